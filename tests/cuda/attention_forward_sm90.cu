// The launcher as Python can call it.
#include "../../csrc/cuda/attention_sm90.cu"

void forward(const bigops::View& query, const bigops::View& key, const bigops::View& value,
             const bigops::View& out, const bigops::View& lse, double scale, int64_t offset, int64_t left,
             int64_t right, double softcap, const bigops::View* starts_q, const bigops::View* starts_k,
             int64_t max_q, int64_t max_k, const bigops::View& workspace) {
    const bigops::cuda::AttentionOptions options = {scale, offset, left, right, softcap};
    if (starts_q) {
        const bigops::cuda::Packed packed = {*starts_q, *starts_k, max_q, max_k};
        bigops::cuda::attention_forward_sm90(query, key, value, out, lse, options, &packed, workspace,
                                             nullptr);
    } else {
        bigops::cuda::attention_forward_sm90(query, key, value, out, lse, options, nullptr, workspace,
                                             nullptr);
    }
}
