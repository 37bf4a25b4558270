// The attention kernels as Python sees them: tensors in, preallocated tensors out.
#include <optional>

#include "../cpu/attention.h"
#include "module.h"
#include "tensor.h"

namespace py = pybind11;

namespace bigops {
namespace {

const View* pointer(const std::optional<View>& view) { return view ? &*view : nullptr; }

void forward(const View& query, const View& key, const View& value, const std::optional<View>& mask,
             const View& out, const View& lse, std::optional<int64_t> diagonal, double scale) {
    attention_forward(query, key, value, pointer(mask), out, lse, diagonal, scale);
}

void backward(const View& grad_out, const std::optional<View>& grad_lse, const View& query,
              const View& key, const View& value, const std::optional<View>& mask, const View& out,
              const View& lse, std::optional<int64_t> diagonal, double scale,
              const std::optional<View>& grad_query, const std::optional<View>& grad_key,
              const std::optional<View>& grad_value) {
    attention_backward(grad_out, pointer(grad_lse), query, key, value, pointer(mask), out, lse,
                       diagonal, scale, pointer(grad_query), pointer(grad_key),
                       pointer(grad_value));
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention_forward", &forward, py::arg("query"), py::arg("key"), py::arg("value"),
          py::arg("mask"), py::arg("out"), py::arg("lse"), py::arg("diagonal"), py::arg("scale"),
          py::call_guard<Unlocked>());
    m.def("attention_backward", &backward, py::arg("grad_out"), py::arg("grad_lse"),
          py::arg("query"), py::arg("key"), py::arg("value"), py::arg("mask"), py::arg("out"),
          py::arg("lse"), py::arg("diagonal"), py::arg("scale"), py::arg("grad_query"),
          py::arg("grad_key"), py::arg("grad_value"), py::call_guard<Unlocked>());
}

}  // namespace bigops
