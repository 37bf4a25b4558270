// Attention of a few new queries over a cache of keys and values, contiguous or in pages.
// bigops/ops/decode_attention.py says what is computed.
#pragma once

#include <cstdint>

#include "../view.h"

namespace bigops {

// Null: not given.
struct DecodeCall {
    View query, k_cache, v_cache, cache_seqlens;
    const View *k_new, *v_new, *block_table, *rotary_cos, *rotary_sin, *alibi_slopes, *sinks;
    bool rotary_interleaved;
    int64_t left, right;  // negative: no bound
    double scale, softcap;
    int64_t num_splits;  // 0: one for each block of keys
    View out, lse;
};

// Writes out and lse, and the new keys and values into the caches. Throws before it writes anything
// if a length exceeds the cache or a page is none of the cache's.
void decode_attention(const DecodeCall& call);

}  // namespace bigops
