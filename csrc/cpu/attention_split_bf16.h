// Which sequences of float32 are multiplied as bf16, three parts an element (parts_bf16.h).
#pragma once

#if defined(__AVX512BF16__)

#include <atomic>
#include <vector>

#include "attention_tiles_bf16.h"

namespace bigops {

// The largest magnitudes in each sequence of the tensors that are split; none for bf16.
class SplitRanges {
   public:
    enum Tensor { query, key, value, grad_out, kTensors };

    explicit SplitRanges(int64_t batch) : largest_(static_cast<size_t>(batch * kTensors)) {}

    // By any number of threads at once.
    template <class T>
    void take(int64_t b, Tensor tensor, const Rows<T>& rows) {
        if constexpr (kParts<T> > 1) {
            uint32_t seen = 0;
            for (int64_t i = 0; i < rows.count; ++i)
                seen = std::max(seen, largest_magnitude(rows.data + i * rows.stride, rows.step,
                                                        rows.size));
            const std::atomic_ref largest(largest_[static_cast<size_t>(b * kTensors + tensor)]);
            uint32_t before = largest.load(std::memory_order_relaxed);
            while (before < seen && !largest.compare_exchange_weak(before, seen)) {}
        }
    }

    bool fit(int64_t b) const {
        const auto first = largest_.begin() + b * kTensors;
        return std::all_of(first, first + kTensors, may_be_split);
    }

   private:
    std::vector<uint32_t> largest_;
};

// Whether three parts an element are worth their packing and being padded to multiples of 32, which
// the query and the key in the middle tell: at half of these numbers FMA was 4 to 20% faster, at
// twice of them 10 to 20% slower. Nothing outside of the sequence has a say, so that it gets the
// same bits whatever is beside it.
inline bool split_pays(const AttentionProblem& p, const Sequence& s) {
    const int64_t size = std::min(p.head_size, p.value_size);
    if (size < 32 || s.query_len == 0 || s.key_len == 0) return false;
    const int64_t i = s.query_len / 2, j = s.key_len / 2;
    const int64_t seen = std::min(s.end_key(i) - s.first_key(i),
                                  (s.end_query(j) - s.first_query(j)) * p.group);
    return seen >= 400 && seen * size >= 512 * 64;
}

// Runs `kernel`, given a problem of the sequences that pay and the ranges to fill, and says which
// are done.
template <class Kernel>
std::vector<bool> run_split(AttentionProblem p, const Kernel& kernel) {
    std::vector<bool> done, left;
    for (int64_t b = 0; b < p.batch; ++b) done.push_back(split_pays(p, p.sequence(b)));
    if (std::find(done.begin(), done.end(), true) == done.end()) return {};
    left = done;
    left.flip();
    p.elsewhere = &left;
    SplitRanges ranges(p.batch);
    kernel(p, ranges);
    for (int64_t b = 0; b < p.batch; ++b) done[b] = done[b] && ranges.fit(b);
    return done;
}

}  // namespace bigops

#endif
