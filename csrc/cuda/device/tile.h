// Verbs on tiles in registers, so that a kernel's loop reads like the maths. A tile's rows are spread as
// the accumulators of mma.m16n8 and wgmma.m64 have them ("Register Fragments and Shared Memory Matrix
// Layouts"): lane l of a warp holds of rows l / 4 (half 0) and l / 4 + 8 (half 1) of the warp's 16, in
// every 8 columns, columns 2 (l % 4) and the next: d[4 i + 2 half + k] is column 8 i + 2 (l % 4) + k.
#pragma once

#include "layout.h"
#include "warp.h"

namespace bigops::device {

template <int kColumns_>
struct Fragment {
    static constexpr int kColumns = kColumns_, kCount = kColumns / 2;
    float d[kCount];

    // The column of d[i], and which of the lane's two rows it is in.
    BIGOPS_DEVICE static int column(int i) { return i / 4 * 8 + lane_id() % 4 * 2 + i % 2; }
    BIGOPS_DEVICE static int half(int i) { return i / 2 % 2; }
    // The lane's row of this half within the warp's 16.
    BIGOPS_DEVICE static int row(int half) { return lane_id() / 4 + 8 * half; }
    // What one m16n8 instruction accumulates: columns [column, column + 8).
    BIGOPS_DEVICE float (&columns(int column))[4] {
        return *reinterpret_cast<float(*)[4]>(d + column / 2);
    }
};

// One number for each of a lane's two rows, equal in the four lanes that share the rows.
struct PerRow {
    float of[2];
};

template <int N>
BIGOPS_DEVICE void clear(Fragment<N>& tile) {
#pragma unroll
    for (int i = 0; i < tile.kCount; ++i) tile.d[i] = 0.0f;
}

// Over the four lanes that share a row.
template <class Combine>
BIGOPS_DEVICE float across_row(float x, Combine combine) {
    x = combine(x, shuffle_xor(x, 1));
    return combine(x, shuffle_xor(x, 2));
}
BIGOPS_DEVICE float row_sum(float x) {
    return across_row(x, [](float a, float b) { return a + b; });
}

// The greatest of each row and of what it was before.
template <int N>
BIGOPS_DEVICE PerRow row_max(const Fragment<N>& tile, PerRow before) {
#pragma unroll
    for (int i = 0; i < tile.kCount; ++i)
        before.of[tile.half(i)] = fmaxf(before.of[tile.half(i)], tile.d[i]);
#pragma unroll
    for (float& x : before.of) x = across_row(x, [](float a, float b) { return fmaxf(a, b); });
    return before;
}

template <int N>
BIGOPS_DEVICE void scale_rows(Fragment<N>& tile, const PerRow& factor) {
#pragma unroll
    for (int i = 0; i < tile.kCount; ++i) tile.d[i] *= factor.of[tile.half(i)];
}

// 16-bit copies of columns [16 step, 16 step + 16) as the A operand of m16n8k16 and of wgmma:
// accumulators of 16 columns lie in the lanes as that operand wants them.
template <class T, int N>
BIGOPS_DEVICE void as_operand(const Fragment<N>& tile, int step, uint32_t (&a)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = pack<T>(tile.d[8 * step + 2 * i], tile.d[8 * step + 2 * i + 1]);
}

// Adds to global memory, all four at once where the machine can: from sm_90 on.
BIGOPS_DEVICE void add_four(float* to, const float (&x)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    atomicAdd(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) atomicAdd(to + i, x[i]);
#endif
}

}  // namespace bigops::device
