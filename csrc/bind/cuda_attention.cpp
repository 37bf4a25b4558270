// Attention's CUDA kernels as Python sees them: tensors in, preallocated tensors out.
#include <optional>

#include "../cuda/attention.h"
#include "cuda_module.h"
#include "tensor.h"

namespace py = pybind11;

namespace bigops {
namespace {

using cuda::AttentionOptions;
using cuda::Packed;

const View* pointer(const std::optional<View>& view) { return view ? &*view : nullptr; }

// (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
using PackedArgument = std::optional<std::tuple<View, View, int64_t, int64_t>>;

std::optional<Packed> packed_of(const PackedArgument& argument) {
    if (!argument) return std::nullopt;
    const auto& [starts_q, starts_k, max_q, max_k] = *argument;
    require(starts_q.dtype == DType::i32 && starts_k.dtype == DType::i32 && starts_q.ndim == 1 &&
                starts_k.ndim == 1 && starts_q.shape[0] == starts_k.shape[0] &&
                starts_q.shape[0] > 0 && starts_q.contiguous() && starts_k.contiguous(),
            "cu_seqlens must be two contiguous int32 tensors of one length");
    return Packed{starts_q, starts_k, max_q, max_k};
}

using Forward = decltype(&cuda::attention_forward_sm90);
using Backward = decltype(&cuda::attention_backward_sm90);

template <Forward kForward>
void forward(const View& query, const View& key, const View& value, const View& out, const View& lse,
             double scale, int64_t offset, int64_t left, int64_t right, double softcap,
             const PackedArgument& packed_argument, const View& workspace) {
    const AttentionOptions options = {scale, offset, left, right, softcap};
    const std::optional<Packed> packed = packed_of(packed_argument);
    const cuda::OnDevice guard(query);
    kForward(query, key, value, out, lse, options, packed ? &*packed : nullptr, workspace,
             query.stream);
}

template <Backward kBackward>
void backward(const View& grad_out, const View& query, const View& key, const View& value,
              const View& out, const View& lse, const std::optional<View>& grad_lse,
              const View& grad_query, const View& grad_key, const View& grad_value, double scale,
              int64_t offset, int64_t left, int64_t right, double softcap, bool deterministic,
              const PackedArgument& packed_argument, const View& workspace) {
    const AttentionOptions options = {scale, offset, left, right, softcap, deterministic};
    const std::optional<Packed> packed = packed_of(packed_argument);
    const cuda::OnDevice guard(query);
    kBackward(grad_out, query, key, value, out, lse, pointer(grad_lse), grad_query, grad_key,
              grad_value, options, packed ? &*packed : nullptr, workspace, query.stream);
}

template <auto kWorkspace>
int64_t workspace(const View& query, const View& key, const PackedArgument& packed_argument) {
    const std::optional<Packed> packed = packed_of(packed_argument);
    return kWorkspace(query, key, packed ? &*packed : nullptr);
}

template <Forward kForward>
void def_forward(py::module_& m, const char* name) {
    m.def(name, &forward<kForward>, py::arg("query"), py::arg("key"), py::arg("value"),
          py::arg("out"), py::arg("lse"), py::arg("scale"), py::arg("offset"), py::arg("left"),
          py::arg("right"), py::arg("softcap"), py::arg("packed"), py::arg("workspace"));
}

template <Backward kBackward, auto kWorkspace>
void def_backward(py::module_& m, const std::string& name) {
    m.def((name + "_workspace").c_str(), &workspace<kWorkspace>, py::arg("query"), py::arg("key"),
          py::arg("packed"));
    m.def(name.c_str(), &backward<kBackward>, py::arg("grad_out"), py::arg("query"),
          py::arg("key"), py::arg("value"), py::arg("out"), py::arg("lse"), py::arg("grad_lse"),
          py::arg("grad_query"), py::arg("grad_key"), py::arg("grad_value"), py::arg("scale"),
          py::arg("offset"), py::arg("left"), py::arg("right"), py::arg("softcap"),
          py::arg("deterministic"), py::arg("packed"), py::arg("workspace"));
}

}  // namespace

void bind_cuda_attention(py::module_& m) {
    m.attr("FORWARD_WORKSPACE") = cuda::kAttentionForwardWorkspace;
    def_forward<&cuda::attention_forward_sm90>(m, "attention_forward_sm90");
    def_forward<&cuda::attention_forward_sm80>(m, "attention_forward_sm80");
    def_backward<&cuda::attention_backward_sm90, &cuda::attention_backward_sm90_workspace>(
        m, "attention_backward_sm90");
    def_backward<&cuda::attention_backward_sm80, &cuda::attention_backward_sm80_workspace>(
        m, "attention_backward_sm80");
}

}  // namespace bigops
