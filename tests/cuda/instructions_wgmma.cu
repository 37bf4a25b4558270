// wgmma: every place of its operands, swizzle and major-ness, through the device header's tiles and
// descriptors. Two warpgroups have 64 rows each.
#include "instructions.h"

#include "../../csrc/cuda/device/tile.h"
#include "../../csrc/cuda/device/wgmma.h"

namespace test {

constexpr int kRows = 128;

enum class Left { k_major, m_major, registers };

// a: kRows x kDepth, or its transpose where it is M-major; b: N x kDepth, or its transpose where it is
// N-major. out = c + a * b; without c the first step overwrites.
template <class T, int N, int kDepth, Left kLeft, bool kNMajor>
__global__ void __launch_bounds__(256) wgmma(const T* a, const T* b, const float* c, float* out) {
    constexpr int kTileColumns = N < 16 ? 16 : N;  // no swizzle is narrower
    using KTile = device::SharedTile<T, kRows, kDepth>;
    using MTile = device::SharedTile<T, kDepth, kRows>;
    using NTile = device::SharedTile<T, kDepth, kTileColumns>;
    using BTile = device::SharedTile<T, N, kDepth>;
    const KTile rows = {device::dynamic_shared()};
    const MTile columns = {device::dynamic_shared()};
    const NTile right_rows = {device::dynamic_shared() + kRows * kDepth * 2};
    const BTile right = {device::dynamic_shared() + kRows * kDepth * 2};
    if constexpr (kLeft == Left::k_major) fill(rows, a);
    if constexpr (kLeft == Left::m_major) fill(columns, a);
    if constexpr (kNMajor) fill(right_rows, b);
    else fill(right, b);
    publish();

    const int group = static_cast<int>(threadIdx.x) / 128, row0 = 64 * group;
    const int warp_row = row0 + static_cast<int>(threadIdx.x) % 128 / 32 * 16;
    device::Fragment<N> d;
    for (int i = 0; i < d.kCount; ++i)
        d.d[i] = c ? c[(warp_row + d.row(d.half(i))) * N + d.column(i)] : 7.0f;
    // "Register Fragments": of 16 columns of A, as accumulators of 16 columns lie.
    uint32_t registers[kDepth / 16][4];
    if constexpr (kLeft == Left::registers)
        for (int step = 0; step < kDepth / 16; ++step)
            for (int i = 0; i < 4; ++i)
                registers[step][i] = *reinterpret_cast<const uint32_t*>(
                    a + (warp_row + device::lane_id() / 4 + i % 2 * 8) * kDepth + 16 * step +
                    i / 2 * 8 + device::lane_id() % 4 * 2);

    device::wgmma_pin(d.d);
    device::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDepth / 16; ++step) {
        const int add = step > 0 || c != nullptr;
        uint64_t b_at;
        if constexpr (kNMajor) b_at = device::along_rows(right_rows, 0, step);
        else b_at = device::along_columns(right, 0, step);
        using Instruction = device::Wgmma<N, T>;
        if constexpr (kLeft == Left::k_major)
            Instruction::template shared<0, kNMajor>(d.d, device::along_columns(rows, row0, step), b_at,
                                                     add);
        if constexpr (kLeft == Left::m_major)
            Instruction::template shared<1, kNMajor>(
                d.d, device::along_rows(columns, row0 / MTile::kBlockColumns, step), b_at, add);
        if constexpr (kLeft == Left::registers)
            Instruction::template registers<kNMajor>(d.d, registers[step], b_at, add);
    }
    device::wgmma_commit();
    device::wgmma_wait<0>();
    device::wgmma_pin(d.d);
    for (int i = 0; i < d.kCount; ++i)
        out[(warp_row + d.row(d.half(i))) * N + d.column(i)] = d.d[i];
}

// Two groups under way: the first is used while the second runs.
template <class T>
__global__ void __launch_bounds__(128) wgmma_groups(const T* a, const T* b, float* out) {
    using Tile = device::SharedTile<T, 64, 64>;
    const Tile left = {device::dynamic_shared()}, right = {device::dynamic_shared() + Tile::kBytes};
    fill(left, a);
    fill(right, b);
    publish();
    device::Fragment<64> first, second;
    device::wgmma_fence();
    for (int step = 0; step < 4; ++step)
        device::Wgmma<64, T>::template shared<0, 0>(first.d, device::along_columns(left, 0, step),
                                                    device::along_columns(right, 0, step), step > 0);
    device::wgmma_commit();
    for (int step = 0; step < 4; ++step)
        device::Wgmma<64, T>::template shared<0, 0>(second.d, device::along_columns(right, 0, step),
                                                    device::along_columns(left, 0, step), step > 0);
    device::wgmma_commit();
    const int row = static_cast<int>(threadIdx.x) / 32 * 16;
    device::wgmma_wait<1>();
    device::wgmma_pin(first.d);
    for (int i = 0; i < first.kCount; ++i)
        out[(row + first.row(first.half(i))) * 64 + first.column(i)] = first.d[i];
    device::wgmma_wait<0>();
    device::wgmma_pin(second.d);
    for (int i = 0; i < second.kCount; ++i)
        out[64 * 64 + (row + second.row(second.half(i))) * 64 + second.column(i)] = second.d[i];
}

template <class T, int N, int kDepth>
void run(const void* a, const void* b, const float* c, float* out, int64_t left, bool n_major) {
    const auto with = [&]<Left kLeft>() {
        const auto kernel = n_major ? wgmma<T, N, kDepth, kLeft, true> : wgmma<T, N, kDepth, kLeft, false>;
        const size_t shared = (kRows + (N < 16 ? 16 : N)) * kDepth * 2;
        cuda::launch("wgmma", kernel, {dim3(1), dim3(256), shared}, static_cast<const T*>(a),
                     static_cast<const T*>(b), c, out);
    };
    switch (static_cast<Left>(left)) {
        case Left::k_major: return with.template operator()<Left::k_major>();
        case Left::m_major: return with.template operator()<Left::m_major>();
        case Left::registers: return with.template operator()<Left::registers>();
    }
}

template <class T>
void run_type(const void* a, const void* b, const float* c, float* out, int64_t n, int64_t depth,
              int64_t left, bool n_major) {
    const auto is = [&](int64_t columns, int64_t k) { return n == columns && depth == k; };
    if (is(8, 64)) return run<T, 8, 64>(a, b, c, out, left, n_major);
    if (is(64, 16)) return run<T, 64, 16>(a, b, c, out, left, n_major);
    if (is(64, 32)) return run<T, 64, 32>(a, b, c, out, left, n_major);
    if (is(64, 64)) return run<T, 64, 64>(a, b, c, out, left, n_major);
    if (is(96, 128)) return run<T, 96, 128>(a, b, c, out, left, n_major);
    if constexpr (std::is_same_v<T, bf16>) {
        if (is(80, 64)) return run<T, 80, 64>(a, b, c, out, left, n_major);
        if (is(128, 96)) return run<T, 128, 96>(a, b, c, out, left, n_major);
        if (is(176, 64)) return run<T, 176, 64>(a, b, c, out, left, n_major);
        if (is(192, 64)) return run<T, 192, 64>(a, b, c, out, left, n_major);
        if (is(256, 64)) return run<T, 256, 64>(a, b, c, out, left, n_major);
    }
    throw std::runtime_error("wgmma: this shape is not instantiated");
}

}  // namespace test

extern "C" void wgmma(const void* a, const void* b, const float* c, float* out, int64_t n,
                      int64_t depth, int64_t left, int64_t n_major, int64_t is_bf16) {
    if (is_bf16) test::run_type<test::bf16>(a, b, c, out, n, depth, left, n_major != 0);
    else test::run_type<test::f16>(a, b, c, out, n, depth, left, n_major != 0);
}
extern "C" void wgmma_groups(const void* a, const void* b, float* out) {
    bigops::cuda::launch("wgmma_groups", test::wgmma_groups<test::bf16>,
                         {dim3(1), dim3(128), 2 * 64 * 64 * 2}, static_cast<const test::bf16*>(a),
                         static_cast<const test::bf16*>(b), out);
}
