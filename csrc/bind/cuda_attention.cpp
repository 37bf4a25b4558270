// Attention's CUDA kernels as Python sees them: tensors in, preallocated tensors out.
#include <algorithm>
#include <optional>

#include "../cuda/attention.h"
#include "cuda_module.h"
#include "tensor.h"

namespace py = pybind11;

namespace bigops {
namespace {

using cuda::AttentionOptions;
using cuda::Packed;

// An access beyond a tensor, or misaligned, costs the process its device: what would lead to one is
// refused here.
void require_on_device_of(const View& query, const View& view) {
    require(view.device_type == query.device_type && view.device_id == query.device_id,
            "attention: tensors are on different devices");
}

// (batch, heads, length, head size) as kernels take it.
View rows(const View& given, const View& query, int64_t heads, int64_t length) {
    require(query.dtype == DType::bf16 || query.dtype == DType::f16,
            "attention: kernels take bfloat16 and float16");
    require(given.dtype == query.dtype, "attention: tensors differ in dtype");
    require_on_device_of(query, given);
    const int64_t wanted[] = {query.shape[0], heads, length, query.shape[3]};
    require(query.ndim == 4 && given.ndim == 4 && std::equal(wanted, wanted + 4, given.shape),
            "attention: tensors differ in shape");
    constexpr int64_t kPiece = 8;  // elements of 16 bytes
    View view = given;
    bool pieces = view.strides[3] == 1 && reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
    for (int dim = 0; dim < 3; ++dim) {
        // One of one has no neighbour: its stride is anything, which the copy engine may refuse.
        if (view.shape[dim] == 1) view.strides[dim] = kPiece;
        pieces = pieces && view.strides[dim] % kPiece == 0;
    }
    require(pieces || view.numel() == 0, "attention: rows must lie in pieces of 16 bytes");
    return view;
}

View like(const View& given, const View& query) {
    return rows(given, query, query.shape[1], query.shape[2]);
}

// Keys, values and their gradients.
View of_keys(const View& given, const View& query, const View& key) {
    require(key.ndim == 4 && key.shape[1] > 0 && query.shape[1] % key.shape[1] == 0,
            "attention: key's heads must divide query's");
    return rows(given, query, key.shape[1], key.shape[2]);
}

// lse and its gradient.
const View& of_rows(const View& given, const View& query) {
    require_on_device_of(query, given);
    require(given.dtype == DType::f32 && given.ndim == 3 && given.contiguous() &&
                std::equal(given.shape, given.shape + 3, query.shape),
            "attention: lse must be a contiguous float32 tensor, a number for each row of query");
    return given;
}

void require_workspace(const View& workspace, const View& query, int64_t bytes) {
    require_on_device_of(query, workspace);
    require(workspace.dtype == DType::u8 && workspace.contiguous() && workspace.numel() >= bytes &&
                reinterpret_cast<uintptr_t>(workspace.data) % 16 == 0,
            "attention: workspace must be that many uint8, aligned to 16 bytes");
}

// (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
using PackedArgument = std::optional<std::tuple<View, View, int64_t, int64_t>>;

std::optional<Packed> packed_of(const PackedArgument& argument, const View& query) {
    if (!argument) return std::nullopt;
    const auto& [starts_q, starts_k, max_q, max_k] = *argument;
    require(starts_q.dtype == DType::i32 && starts_k.dtype == DType::i32 && starts_q.ndim == 1 &&
                starts_k.ndim == 1 && starts_q.shape[0] == starts_k.shape[0] &&
                starts_q.shape[0] > 0 && starts_q.contiguous() && starts_k.contiguous(),
            "attention: cu_seqlens must be two contiguous int32 tensors of one length");
    require(query.shape[0] == 1, "attention: packed sequences have a batch of 1");
    require_on_device_of(query, starts_q);
    require_on_device_of(query, starts_k);
    return Packed{starts_q, starts_k, max_q, max_k};
}

using Forward = decltype(&cuda::attention_forward_sm90);
using Backward = decltype(&cuda::attention_backward_sm90);

template <Forward kForward>
void forward(const View& query, const View& key, const View& value, const View& out, const View& lse,
             double scale, int64_t offset, int64_t left, int64_t right, double softcap,
             const PackedArgument& packed_argument, const View& workspace) {
    const AttentionOptions options = {scale, offset, left, right, softcap};
    const std::optional<Packed> packed = packed_of(packed_argument, query);
    const View q = like(query, query), k = of_keys(key, query, key), v = of_keys(value, query, key);
    const View o = like(out, query), &l = of_rows(lse, query);
    require_workspace(workspace, query, cuda::kAttentionForwardWorkspace);
    const cuda::OnDevice guard(query);
    kForward(q, k, v, o, l, options, packed ? &*packed : nullptr, workspace, query.stream);
}

template <Backward kBackward, auto kWorkspace>
void backward(const View& grad_out, const View& query, const View& key, const View& value,
              const View& out, const View& lse, const std::optional<View>& grad_lse,
              const View& grad_query, const View& grad_key, const View& grad_value, double scale,
              int64_t offset, int64_t left, int64_t right, double softcap, bool deterministic,
              const PackedArgument& packed_argument, const View& workspace) {
    const AttentionOptions options = {scale, offset, left, right, softcap, deterministic};
    const std::optional<Packed> packed = packed_of(packed_argument, query);
    const Packed* const sequences = packed ? &*packed : nullptr;
    const View q = like(query, query), k = of_keys(key, query, key), v = of_keys(value, query, key);
    const View o = like(out, query), grad_o = like(grad_out, query), grad_q = like(grad_query, query);
    const View grad_k = of_keys(grad_key, query, key), grad_v = of_keys(grad_value, query, key);
    require_workspace(workspace, query, kWorkspace(q, k, sequences));
    const View &l = of_rows(lse, query), *grad_l = grad_lse ? &of_rows(*grad_lse, query) : nullptr;
    const cuda::OnDevice guard(query);
    kBackward(grad_o, q, k, v, o, l, grad_l, grad_q, grad_k, grad_v, options, sequences, workspace,
              query.stream);
}

template <auto kWorkspace>
int64_t workspace(const View& query, const View& key, const PackedArgument& packed_argument) {
    const std::optional<Packed> packed = packed_of(packed_argument, query);
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
    m.def(name.c_str(), &backward<kBackward, kWorkspace>, py::arg("grad_out"), py::arg("query"),
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
