// Where a sequence's keys and values lie: in a contiguous cache, or in pages that a table lists.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../view.h"
#include "decode_attention.h"

namespace bigops {

// The sizes of a call, and the lengths, which are read once and checked against the caches before
// anything is written: cache_seqlens and block_table are ordinary tensors that hold anything.
struct DecodeSizes {
    int64_t batch, heads, kv_heads, group, query_len, head_size, value_size, new_len;
    int64_t page_size, pages;  // a contiguous cache is one page for each sequence
    std::vector<int64_t> lengths;  // without the new keys

    int64_t total(int64_t b) const { return lengths[static_cast<size_t>(b)] + new_len; }
    int64_t rows() const { return group * query_len; }  // that read one key head
    // Query i sees the keys from first_key to end_key - 1.
    int64_t first_key(const DecodeCall& call, int64_t b, int64_t i) const {
        return call.left < 0 ? 0 : std::max<int64_t>(0, i + total(b) - query_len - call.left);
    }
    int64_t end_key(const DecodeCall& call, int64_t b, int64_t i) const {
        if (call.right < 0) return total(b);
        return std::clamp<int64_t>(i + total(b) - query_len + call.right + 1, 0, total(b));
    }
    // The position that a query is rotated by.
    int64_t query_position(const DecodeCall& call, int64_t b, int64_t i) const {
        const bool local = call.left >= 0 || call.right >= 0;
        return lengths[static_cast<size_t>(b)] + (local ? i : 0);
    }
};

[[noreturn]] inline void refuse(const std::string& message) {
    throw std::invalid_argument(message);
}

inline DecodeSizes decode_sizes(const DecodeCall& call) {
    const View &query = call.query, &k_cache = call.k_cache, &v_cache = call.v_cache;
    require(query.ndim == 4 && k_cache.ndim == 4 && v_cache.ndim == 4,
            "query, k_cache and v_cache must have 4 dimensions");
    DecodeSizes s;
    s.batch = query.shape[0];
    s.heads = query.shape[1];
    s.query_len = query.shape[2];
    s.head_size = query.shape[3];
    s.kv_heads = k_cache.shape[1];
    s.value_size = v_cache.shape[3];
    s.pages = k_cache.shape[0];
    s.page_size = k_cache.shape[2];
    require(s.heads == 0 || (s.kv_heads > 0 && s.heads % s.kv_heads == 0),
            "k_cache's heads must divide query's heads");
    s.group = s.kv_heads > 0 ? s.heads / s.kv_heads : 0;
    require(k_cache.shape[3] == s.head_size && k_cache.dtype == query.dtype &&
                v_cache.dtype == query.dtype && std::equal(k_cache.shape, k_cache.shape + 3,
                                                           v_cache.shape),
            "query, k_cache and v_cache do not fit together");
    s.new_len = call.k_new ? call.k_new->shape[2] : 0;
    const auto new_fits = [&](const View* view, int64_t size) {
        return view && view->ndim == 4 && view->shape[0] == s.batch &&
               view->shape[1] == s.kv_heads && view->shape[2] == s.new_len &&
               view->shape[3] == size && view->dtype == query.dtype;
    };
    require(!call.k_new || (new_fits(call.k_new, s.head_size) && new_fits(call.v_new, s.value_size)),
            "k_new and v_new do not fit the caches");
    require(call.cache_seqlens.ndim == 1 && call.cache_seqlens.shape[0] == s.batch &&
                call.cache_seqlens.dtype == DType::i32,
            "cache_seqlens must be int32, one for each sequence");
    const View* table = call.block_table;
    require(table ? table->ndim == 2 && table->shape[0] == s.batch && table->dtype == DType::i32
                  : s.pages == s.batch,
            "block_table must be int32, a row for each sequence");
    require(!call.rotary_cos || (call.k_new && call.rotary_sin && call.rotary_cos->ndim == 2 &&
                                 call.rotary_sin->ndim == 2 &&
                                 std::equal(call.rotary_cos->shape, call.rotary_cos->shape + 2,
                                            call.rotary_sin->shape) &&
                                 call.rotary_sin->dtype == call.rotary_cos->dtype &&
                                 (call.rotary_cos->dtype == DType::f32 ||
                                  call.rotary_cos->dtype == query.dtype) &&
                                 2 * call.rotary_cos->shape[1] <= s.head_size),
            "rotary_cos and rotary_sin must be (positions, half of what is rotated), float32 or of "
            "query's dtype");
    const View* slopes = call.alibi_slopes;
    require(!slopes || (slopes->ndim == 1 && slopes->shape[0] == s.heads) ||
                (slopes->ndim == 2 && slopes->shape[0] == s.batch && slopes->shape[1] == s.heads),
            "alibi_slopes must have one for each head, or for each sequence and head");
    require(!call.sinks || (call.sinks->ndim == 1 && call.sinks->shape[0] == s.heads),
            "sinks must have one for each head");
    const int64_t capacity = table ? table->shape[1] * s.page_size : s.page_size;
    s.lengths.reserve(static_cast<size_t>(s.batch));
    for (int64_t b = 0; b < s.batch; ++b) {
        const int64_t length = call.cache_seqlens.ptr<int32_t>()[b * call.cache_seqlens.strides[0]];
        const auto named = [&] { return "cache_seqlens[" + std::to_string(b) + "]"; };
        if (length < 0) refuse(named() + " must not be negative, got " + std::to_string(length));
        if (length + s.new_len > capacity)
            refuse(named() + " must leave room in a cache of " + std::to_string(capacity) +
                   " for " + std::to_string(s.new_len) + " new keys, got " +
                   std::to_string(length));
        s.lengths.push_back(length);
        if (table && s.page_size > 0)
            for (int64_t i = 0; i * s.page_size < s.total(b); ++i) {
                const int64_t page = table->ptr<int32_t>()[b * table->strides[0] +
                                                           i * table->strides[1]];
                if (page < 0 || page >= s.pages)
                    refuse("block_table[" + std::to_string(b) + ", " + std::to_string(i) +
                           "] must be one of " + std::to_string(s.pages) + " pages, got " +
                           std::to_string(page));
            }
        if (!call.rotary_cos || s.query_len + s.new_len == 0) continue;
        const int64_t last = std::max(s.query_position(call, b, s.query_len - 1), s.total(b) - 1);
        if (last >= call.rotary_cos->shape[0])
            refuse("rotary_cos must have a row for position " + std::to_string(last) + ", got " +
                   std::to_string(call.rotary_cos->shape[0]));
    }
    return s;
}

// The rows of a cache that belong to one sequence and head.
template <class T>
class CacheRows {
   public:
    CacheRows(const DecodeSizes& sizes, const View& cache, const View* table, int64_t b, int64_t h)
        : head_(cache.ptr<T>() + h * cache.strides[1]),
          page_stride_(cache.strides[0]),
          row_stride_(cache.strides[2]),
          page_size_(sizes.page_size),
          pages_(table ? table->ptr<int32_t>() + b * table->strides[0] : nullptr),
          table_stride_(table ? table->strides[1] : 0),
          own_page_(b) {}

    T* row(int64_t position) const {
        return page(position / page_size_) + position % page_size_ * row_stride_;
    }

    // rows[i * step] = row(position + i). One division for them all.
    void list(int64_t position, int64_t count, T** rows, int64_t step) const {
        while (count > 0) {
            const int64_t slot = position % page_size_;
            const int64_t here = std::min(count, page_size_ - slot);
            T* at = page(position / page_size_) + slot * row_stride_;
            for (int64_t i = 0; i < here; ++i, at += row_stride_, rows += step) *rows = at;
            position += here;
            count -= here;
        }
    }

   private:
    T* page(int64_t index) const {
        return head_ + page_stride_ * (pages_ ? pages_[index * table_stride_] : own_page_);
    }

    T* head_;
    int64_t page_stride_, row_stride_, page_size_;
    const int32_t* pages_;
    int64_t table_stride_, own_page_;
};

}  // namespace bigops
