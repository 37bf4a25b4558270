// The launcher as Python can call it, with the tiles for either kind of multiprocessor.
#include "../../csrc/cuda/attention_sm80.cu"

using bigops::View;

void forward(const View& query, const View& key, const View& value, const View& out, const View& lse,
             double scale, int64_t offset, int64_t left, int64_t right, double softcap,
             const View* starts_q, const View* starts_k, int64_t max_q, int64_t max_k, int64_t large) {
    const bigops::cuda::AttentionOptions options = {scale, offset, left, right, softcap};
    const auto run = [&](const bigops::cuda::Packed* packed) {
        bigops::cuda::forward(query, key, value, out, lse, options, packed, large != 0, nullptr);
    };
    if (!starts_q) return run(nullptr);
    const bigops::cuda::Packed packed = {*starts_q, *starts_k, max_q, max_k};
    run(&packed);
}
