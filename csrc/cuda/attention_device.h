// What the attention kernels share on the device: which sequence a tile is of, which keys its rows see,
// the order of tiles, and the online softmax (Milakov and Gimelshein 2018, "Online normalizer calculation
// for softmax"; Dao 2023, "FlashAttention-2").
#pragma once

#include "device/tile.h"

namespace bigops::cuda {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;
constexpr float kInfinity = __builtin_huge_valf();

// Sizes and options of a call; of packed sequences the lengths are the longest.
struct AttentionSizes {
    int batch, heads, kv_heads, query_len, key_len;
    int offset, left, right;  // see AttentionOptions
    float scale, softcap;
    const int* cu_seqlens_q;  // null unless packed
    const int* cu_seqlens_k;
    int head_group;           // heads whose tiles are done together, so that their keys stay in L2

    BIGOPS_DEVICE int group() const { return heads / kv_heads; }
    // Scores times this are exponents of 2; a capped score has been scaled already.
    BIGOPS_DEVICE float log2_unit() const { return softcap > 0.0f ? kLog2E : scale * kLog2E; }
};

// One sequence: where its rows begin, how many there are, and which keys row i sees.
struct Sequence {
    int query_start, key_start, query_len, key_len;
    int offset, left, right;

    BIGOPS_DEVICE Sequence(const AttentionSizes& sizes, int batch)
        : query_start(0), key_start(0), query_len(sizes.query_len), key_len(sizes.key_len),
          offset(sizes.offset), left(sizes.left), right(sizes.right) {
        if (sizes.cu_seqlens_q == nullptr) return;
        query_start = sizes.cu_seqlens_q[batch];
        key_start = sizes.cu_seqlens_k[batch];
        query_len = sizes.cu_seqlens_q[batch + 1] - query_start;
        key_len = sizes.cu_seqlens_k[batch + 1] - key_start;
        offset = key_len - query_len;
    }
    BIGOPS_DEVICE int first_key(int row) const { return left < 0 ? 0 : max(0, row + offset - left); }
    BIGOPS_DEVICE int last_key(int row) const {
        return right < 0 ? key_len - 1 : min(key_len - 1, row + offset + right);
    }
    // The rows that see a key.
    BIGOPS_DEVICE int first_query(int key) const {
        return right < 0 ? 0 : max(0, key - offset - right);
    }
    BIGOPS_DEVICE int last_query(int key) const {
        return left < 0 ? query_len - 1 : min(query_len - 1, key - offset + left);
    }
};

// The blocks of kBlock keys that rows [low, high] see (of no rows: none), and those of them that all of
// these rows see whole.
template <int kBlock>
struct KeyBlocks {
    int first, last;
    int whole_first, whole_last;

    BIGOPS_DEVICE KeyBlocks(const Sequence& sequence, int low, int high) {
        first = sequence.first_key(low) / kBlock;
        const int last_key = sequence.last_key(high);
        const bool none = high < low || last_key < sequence.first_key(low);
        last = none ? first - 1 : last_key / kBlock;
        whole_first = (sequence.first_key(high) + kBlock - 1) / kBlock;
        whole_last = (sequence.last_key(low) + 1) / kBlock - 1;  // -1 / kBlock is 0: none
    }
    BIGOPS_DEVICE bool none() const { return last < first; }
    BIGOPS_DEVICE bool whole(int block) const { return block >= whole_first && block <= whole_last; }
};

// The blocks of kBlock rows that see any of the keys [low, low + keys), and those that see all of them; of
// keys past the sequence's end: none.
template <int kBlock>
struct QueryBlocks {
    int first, last;
    int whole_first, whole_last;

    BIGOPS_DEVICE QueryBlocks(const Sequence& sequence, int low, int keys) {
        const int high = min(low + keys, sequence.key_len) - 1;
        const int from = sequence.first_query(low), to = sequence.last_query(high);
        first = from / kBlock;
        last = low > high || to < from ? first - 1 : to / kBlock;
        whole_first = (sequence.first_query(high) + kBlock - 1) / kBlock;
        const bool cut = low + keys > sequence.key_len;
        whole_last = cut ? -1 : (sequence.last_query(low) + 1) / kBlock - 1;
    }
    BIGOPS_DEVICE bool whole(int block) const { return block >= whole_first && block <= whole_last; }
};

// The tile of this number: heaviest (latest rows) first, since under a causal mask the longest tiles should
// not come last; heads by groups whose keys and values fit in L2 together.
struct TileOrder {
    int row_block, head, batch;

    BIGOPS_DEVICE TileOrder(const AttentionSizes& sizes, int row_blocks, int number) {
        const int all = sizes.heads * sizes.batch;
        const int section = number / (sizes.head_group * row_blocks);
        const int begin = section * sizes.head_group;
        const int here = min(sizes.head_group, all - begin);
        const int rest = number - begin * row_blocks;
        row_block = row_blocks - 1 - rest / here;
        const int which = begin + rest % here;
        batch = which / sizes.heads;
        head = which % sizes.heads;
    }
};

// The number-th key tile. Under a causal mask the first keys are seen by the most queries: heaviest first;
// heads by groups whose queries stay in L2 together.
struct KeyTileOrder {
    int key_block, head, batch;

    BIGOPS_DEVICE KeyTileOrder(const AttentionSizes& sizes, int head_group, int key_blocks, int number) {
        const int begin = number / (head_group * key_blocks) * head_group;
        const int here = min(head_group, sizes.kv_heads * sizes.batch - begin);
        const int rest = number - begin * key_blocks;
        key_block = rest / here;
        batch = (begin + rest % here) / sizes.kv_heads;
        head = (begin + rest % here) % sizes.kv_heads;
    }
};

// The keys that a lane's two rows see.
struct SeenKeys {
    int first[2], last[2];

    BIGOPS_DEVICE SeenKeys(const Sequence& sequence, int row) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            first[half] = sequence.first_key(row + 8 * half);
            last[half] = sequence.last_key(row + 8 * half);
        }
    }
};

// Scores of keys from `key` on that are not seen become -infinity.
template <int N>
BIGOPS_DEVICE void hide(device::Fragment<N>& scores, const SeenKeys& seen, int key) {
#pragma unroll
    for (int i = 0; i < scores.kCount; ++i) {
        const int column = key + scores.column(i), half = scores.half(i);
        if (column < seen.first[half] || column > seen.last[half]) scores.d[i] = -kInfinity;
    }
}

// cap * tanh(score * scale / cap). Not tanh.approx, whose error of 2^-11 would be cap / 2048 in a score.
template <int N>
BIGOPS_DEVICE void cap(device::Fragment<N>& scores, float scale, float softcap) {
    const float unit = 2.0f * kLog2E * scale / softcap;
#pragma unroll
    for (int i = 0; i < scores.kCount; ++i) {
        const float e = device::exp2_approx(scores.d[i] * unit);
        scores.d[i] = softcap - 2.0f * softcap * device::reciprocal_approx(e + 1.0f);
    }
}

// What rows were weighed by before is multiplied by this.
struct Rescaling {
    device::PerRow factor;
    bool needed;  // by any row of the warp
};

template <int N>
BIGOPS_DEVICE void rescale(device::Fragment<N>& rows, const Rescaling& rescaling) {
    if (rescaling.needed) device::scale_rows(rows, rescaling.factor);
}

// A row's weights are 2^(score - base), scores in units of log 2; their sum is the lane's own share until
// finish(). The base is a maximum of the scores, not always the last one: weights below 2^kSlack are as
// exact as those below 1, and a row is rescaled less often ("FlashAttention-4", 2026).
struct OnlineSoftmax {
    static constexpr float kSlack = 8.0f;
    device::PerRow base = {{-kInfinity, -kInfinity}};  // nothing seen yet
    device::PerRow sum = {{0.0f, 0.0f}};

    // Scores become weights.
    template <int N>
    BIGOPS_DEVICE Rescaling weigh(device::Fragment<N>& scores, float log2_unit) {
        const device::PerRow greatest = device::row_max(scores, {{-kInfinity, -kInfinity}});
        Rescaling rescaling = {{{1.0f, 1.0f}}, false};
        float shift[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float top = greatest.of[half] * log2_unit, before = base.of[half];
            if (top > before + kSlack) {
                base.of[half] = top;
                rescaling.factor.of[half] = device::exp2_approx(before - top);
                rescaling.needed = true;
            }
            // A row that has seen nothing yet: -inf - -inf would be NaN.
            shift[half] = base.of[half] == -kInfinity ? 0.0f : base.of[half];
            sum.of[half] *= rescaling.factor.of[half];
        }
        rescaling.needed = device::any(rescaling.needed);
#pragma unroll
        for (int i = 0; i < scores.kCount; ++i) {
            const int half = scores.half(i);
            scores.d[i] = device::exp2_approx(fmaf(scores.d[i], log2_unit, -shift[half]));
            sum.of[half] += scores.d[i];
        }
        return rescaling;
    }
    // What a row's output is multiplied by; `lse` becomes the log of the sum of its exponentials.
    BIGOPS_DEVICE device::PerRow finish(device::PerRow& lse) const {
        device::PerRow factor;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = device::row_sum(sum.of[half]);
            const bool none = total == 0.0f;
            factor.of[half] = none ? 0.0f : 1.0f / total;
            lse.of[half] = none ? -kInfinity : base.of[half] * kLn2 + logf(total);
        }
        return factor;
    }
};

}  // namespace bigops::cuda
