// What the launchers of attention share: sizes and options checked and brought into kernels' terms.
#pragma once

#include <algorithm>
#include <limits>

#include "attention.h"
#include "attention_device.h"

namespace bigops::cuda {

// Beyond it a bound changes nothing, and sums of two of them with a row's number do not overflow.
constexpr int64_t kFarthest = 1 << 29;

// Keys and values of this many bytes are read by all of their queries while they are in L2.
constexpr int64_t kCachedBytes = 32 << 20;

inline AttentionSizes attention_sizes(const View& query, const View& key,
                                      const AttentionOptions& options, const Packed* packed) {
    AttentionSizes sizes = {};
    sizes.batch = static_cast<int>(packed ? packed->cu_seqlens_q.shape[0] - 1 : query.shape[0]);
    sizes.heads = static_cast<int>(query.shape[1]);
    sizes.kv_heads = static_cast<int>(key.shape[1]);
    sizes.query_len = static_cast<int>(packed ? packed->max_seqlen_q : query.shape[2]);
    sizes.key_len = static_cast<int>(packed ? packed->max_seqlen_k : key.shape[2]);
    const auto near = [](int64_t x) {
        return static_cast<int>(std::clamp<int64_t>(x, -kFarthest, kFarthest));
    };
    sizes.offset = near(options.offset);
    sizes.left = options.left < 0 ? -1 : near(options.left);
    sizes.right = options.right < 0 ? -1 : near(options.right);
    sizes.scale = static_cast<float>(options.scale);
    sizes.softcap = static_cast<float>(options.softcap);
    if (packed) {
        sizes.cu_seqlens_q = packed->cu_seqlens_q.ptr<int>();
        sizes.cu_seqlens_k = packed->cu_seqlens_k.ptr<int>();
    }
    const int64_t head_bytes = 2 * 2 * query.shape[3] * std::max(sizes.key_len, 1);
    const int64_t cached = std::max<int64_t>(1, kCachedBytes / head_bytes);
    const int64_t all = static_cast<int64_t>(sizes.heads) * sizes.batch;
    sizes.head_group = static_cast<int>(
        std::clamp<int64_t>(cached * (sizes.heads / sizes.kv_heads), 1, std::max<int64_t>(all, 1)));
    return sizes;
}

}  // namespace bigops::cuda
