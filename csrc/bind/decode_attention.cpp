// Decoding and combining as Python sees them: tensors in, preallocated tensors out.
#include <optional>

#include "../cpu/combine_attention.h"
#include "../cpu/decode_attention.h"
#include "module.h"
#include "tensor.h"

namespace py = pybind11;

namespace bigops {
namespace {

using Optional = std::optional<View>;

void decode(const View& query, const View& k_cache, const View& v_cache, const View& cache_seqlens,
            const Optional& k_new, const Optional& v_new, const Optional& block_table,
            const Optional& rotary_cos, const Optional& rotary_sin, const Optional& alibi_slopes,
            const Optional& sinks, bool rotary_interleaved, int64_t left, int64_t right,
            double scale, double softcap, int64_t num_splits, const View& out, const View& lse) {
    decode_attention({query, k_cache, v_cache, cache_seqlens, pointer(k_new), pointer(v_new),
                      pointer(block_table), pointer(rotary_cos), pointer(rotary_sin),
                      pointer(alibi_slopes), pointer(sinks), rotary_interleaved, left, right, scale,
                      softcap, num_splits, out, lse});
}

void combine_backward(const View& grad_out, const View& grad_lse, const View& outs,
                      const View& lses, const Optional& grad_outs, const Optional& grad_lses) {
    combine_attention_backward(grad_out, grad_lse, outs, lses, pointer(grad_outs),
                               pointer(grad_lses));
}

}  // namespace

void bind_decode_attention(py::module_& m) {
    m.def("decode_attention", &decode, py::arg("query"), py::arg("k_cache"), py::arg("v_cache"),
          py::arg("cache_seqlens"), py::arg("k_new"), py::arg("v_new"), py::arg("block_table"),
          py::arg("rotary_cos"), py::arg("rotary_sin"), py::arg("alibi_slopes"), py::arg("sinks"),
          py::arg("rotary_interleaved"), py::arg("left"), py::arg("right"), py::arg("scale"),
          py::arg("softcap"), py::arg("num_splits"), py::arg("out"), py::arg("lse"),
          py::call_guard<Unlocked>());
    m.def("combine_attention", &combine_attention, py::arg("outs"), py::arg("lses"),
          py::arg("out"), py::arg("lse"), py::call_guard<Unlocked>());
    m.def("combine_attention_backward", &combine_backward, py::arg("grad_out"),
          py::arg("grad_lse"), py::arg("outs"), py::arg("lses"), py::arg("grad_outs"),
          py::arg("grad_lses"), py::call_guard<Unlocked>());
}

}  // namespace bigops
