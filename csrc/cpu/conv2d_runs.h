// The one inner loop of the convolution's backward: a sum of scaled runs of memory,
//     dst[r][j] += sum over e of value[e * stride] * src[offset[e * stride] + r * src_row + j],
// for `rows` runs of up to kMaxWidth vectors whose sums stay in registers.
#pragma once

#include <vector>

#include "conv2d_tile.h"

namespace bigops {

// rows * width accumulators, one value and the run's operand must fit the registers.
constexpr int kMaxRows = 3;
constexpr int kMaxWidth = kVectorBytes == 64 ? 8 : 4;

// A rectangle of the kernel: `rows` runs of `width` vectors, of the last only `tail` lanes valid.
// image_* count within the padded image from the pixel's place, weight_* within a filter.
struct Pass {
    int rows, width, tail;
    int64_t image, image_row, weight, weight_row;
};

template <class A>
using SumFn = void (*)(const int32_t* offset, const A* value, int64_t stride, int64_t count,
                       const A* src, int64_t src_row, A* dst, int64_t dst_row, int tail);

template <class A, int kRows, int kWidth>
void sum_runs(const int32_t* offset, const A* value, int64_t stride, int64_t count, const A* src,
              int64_t src_row, A* dst, int64_t dst_row, int tail) {
    constexpr int L = kLanes<A>;
    // A single short run would wait for its own last sum; several at once keep the units busy.
    constexpr int kChains = kRows * kWidth >= 6 ? 1 : kRows * kWidth >= 3 ? 2 : 4;
    Vec<A> acc[kChains][kRows][kWidth] = {};
    int64_t e = 0;
    for (; e + kChains <= count; e += kChains, value += kChains * stride, offset += kChains * stride)
#pragma GCC unroll 4
        for (int u = 0; u < kChains; ++u) {
            const Vec<A> v = splat(value[u * stride]);
            const A* run = src + offset[u * stride];
#pragma GCC unroll 3
            for (int r = 0; r < kRows; ++r, run += src_row)
#pragma GCC unroll 8
                for (int m = 0; m < kWidth; ++m)
                    acc[u][r][m] = fma(v, load(run + m * L), acc[u][r][m]);
        }
    if constexpr (kChains > 1)
        for (; e < count; ++e, value += stride, offset += stride) {
            const Vec<A> v = splat(*value);
            const A* run = src + *offset;
#pragma GCC unroll 3
            for (int r = 0; r < kRows; ++r, run += src_row)
#pragma GCC unroll 8
                for (int m = 0; m < kWidth; ++m)
                    acc[0][r][m] = fma(v, load(run + m * L), acc[0][r][m]);
        }
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r, dst += dst_row)
#pragma GCC unroll 8
        for (int m = 0; m < kWidth; ++m) {
            Vec<A> total = acc[0][r][m];
#pragma GCC unroll 4
            for (int u = 1; u < kChains; ++u) total += acc[u][r][m];
            A* to = dst + m * L;
            if (m + 1 < kWidth || tail == L) store(to, load(to) + total);
            else store(to, load(to, tail) + total, tail);
        }
}

template <class A>
inline SumFn<A> sum_function(const Pass& pass) {
    static constexpr auto kTable = []<int... i>(std::integer_sequence<int, i...>) {
        return std::array<SumFn<A>, sizeof...(i)>{
            &sum_runs<A, i / kMaxWidth + 1, i % kMaxWidth + 1>...};
    }(std::make_integer_sequence<int, kMaxRows * kMaxWidth>{});
    return kTable[static_cast<size_t>((pass.rows - 1) * kMaxWidth + pass.width - 1)];
}

}  // namespace bigops
