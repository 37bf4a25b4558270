// The launchers as Python can call them, with the tiles for either kind of multiprocessor.
#include "../../csrc/cuda/attention_backward_prepare.cu"
#include "../../csrc/cuda/attention_backward_sm80.cu"

using bigops::View;

namespace {

void with_packed(const View* starts_q, const View* starts_k, int64_t max_q, int64_t max_k, auto call) {
    if (!starts_q) return call(nullptr);
    const bigops::cuda::Packed packed = {*starts_q, *starts_k, max_q, max_k};
    call(&packed);
}

}  // namespace

void workspace_bytes(const View& query, const View& key, const View* starts_q, const View* starts_k,
                     int64_t max_q, int64_t max_k, int64_t large, const View& bytes) {
    with_packed(starts_q, starts_k, max_q, max_k, [&](const bigops::cuda::Packed* packed) {
        *bytes.ptr<int64_t>() =
            bigops::cuda::backward_workspace(query, key, packed, large != 0);
    });
}

void backward(const View& grad_out, const View& query, const View& key, const View& value,
              const View& out, const View& lse, const View* grad_lse, const View& grad_query,
              const View& grad_key, const View& grad_value, double scale, int64_t offset, int64_t left,
              int64_t right, double softcap, const View* starts_q, const View* starts_k, int64_t max_q,
              int64_t max_k, int64_t deterministic, const View& workspace, int64_t large) {
    const bigops::cuda::AttentionOptions options = {scale, offset,  left,
                                                    right, softcap, deterministic != 0};
    with_packed(starts_q, starts_k, max_q, max_k, [&](const bigops::cuda::Packed* packed) {
        bigops::cuda::backward(grad_out, query, key, value, out, lse, grad_lse, grad_query, grad_key,
                               grad_value, options, packed, workspace, large != 0, nullptr);
    });
}
