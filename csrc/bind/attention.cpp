// The attention kernels as Python sees them: tensors in, preallocated tensors out.
#include <optional>

#include "../cpu/attention.h"
#include "module.h"
#include "tensor.h"

namespace py = pybind11;

namespace bigops {
namespace {

using Maybe = const std::optional<View>&;

AttentionOptions options(Maybe bias, Maybe sinks, Maybe alibi_slopes, Maybe seed,
                         Maybe cu_seqlens_q, Maybe cu_seqlens_k, int64_t left, int64_t right,
                         bool top_left, double scale, double softcap, double dropout_p) {
    return {.bias = pointer(bias),
            .sinks = pointer(sinks),
            .alibi_slopes = pointer(alibi_slopes),
            .seed = pointer(seed),
            .cu_seqlens_q = pointer(cu_seqlens_q),
            .cu_seqlens_k = pointer(cu_seqlens_k),
            .left = left,
            .right = right,
            .top_left = top_left,
            .scale = scale,
            .softcap = softcap,
            .dropout_p = dropout_p};
}

void forward(const View& query, const View& key, const View& value, Maybe bias, Maybe sinks,
             Maybe alibi_slopes, Maybe seed, Maybe cu_seqlens_q, Maybe cu_seqlens_k,
             const View& out, const View& lse, int64_t left, int64_t right, bool top_left,
             double scale, double softcap, double dropout_p) {
    attention_forward(query, key, value,
                      options(bias, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k, left,
                              right, top_left, scale, softcap, dropout_p),
                      out, lse);
}

void backward(const View& grad_out, Maybe grad_lse, const View& query, const View& key,
              const View& value, Maybe bias, Maybe sinks, Maybe alibi_slopes, Maybe seed,
              Maybe cu_seqlens_q, Maybe cu_seqlens_k, const View& out, const View& lse,
              int64_t left, int64_t right, bool top_left, double scale, double softcap,
              double dropout_p, Maybe grad_query, Maybe grad_key, Maybe grad_value, Maybe grad_bias,
              Maybe grad_sinks) {
    attention_backward(grad_out, pointer(grad_lse), query, key, value,
                       options(bias, sinks, alibi_slopes, seed, cu_seqlens_q, cu_seqlens_k, left,
                               right, top_left, scale, softcap, dropout_p),
                       out, lse,
                       {.query = pointer(grad_query),
                        .key = pointer(grad_key),
                        .value = pointer(grad_value),
                        .bias = pointer(grad_bias),
                        .sinks = pointer(grad_sinks)});
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention_forward", &forward, py::arg("query"), py::arg("key"), py::arg("value"),
          py::arg("bias"), py::arg("sinks"), py::arg("alibi_slopes"), py::arg("seed"),
          py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("out"), py::arg("lse"),
          py::arg("left"), py::arg("right"), py::arg("top_left"), py::arg("scale"),
          py::arg("softcap"), py::arg("dropout_p"), py::call_guard<Unlocked>());
    m.def("attention_backward", &backward, py::arg("grad_out"), py::arg("grad_lse"),
          py::arg("query"), py::arg("key"), py::arg("value"), py::arg("bias"), py::arg("sinks"),
          py::arg("alibi_slopes"), py::arg("seed"), py::arg("cu_seqlens_q"),
          py::arg("cu_seqlens_k"), py::arg("out"), py::arg("lse"), py::arg("left"),
          py::arg("right"), py::arg("top_left"), py::arg("scale"), py::arg("softcap"),
          py::arg("dropout_p"), py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"),
          py::arg("grad_bias"), py::arg("grad_sinks"), py::call_guard<Unlocked>());
}

}  // namespace bigops
