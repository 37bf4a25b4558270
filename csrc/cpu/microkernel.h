// Products of small tiles held in cache, and the packing that feeds them: what is left of a matrix
// product when the caller does the blocking (Goto and van de Geijn, "Anatomy of High-Performance
// Matrix Multiplication", 2008). One operand is read as vectors, the other one number at a time and
// broadcast, so only the vector operand ever needs its rows contiguous; the other takes any strides
// and a transposed product costs nothing.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "vec.h"

namespace bigops {

// A block of kTileRows x kTileVectors accumulators, the vectors of one row of b and one broadcast
// number have to fit into the registers: 6*4 + 4 + 1 of AVX-512's 32, 6*2 + 2 + 1 of AVX2's 16.
// Both keep more sums in flight than two FMA units with a latency of 4 can start (8), and need
// fewer loads than FMAs.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;
// Fewer vectors leave registers for more rows, so that there are as many sums and fewer loads.
constexpr int most_rows(int64_t vectors) {
    return vectors == 1 ? 2 * kTileVectors + 8 : kTileRows * kTileVectors / static_cast<int>(vectors);
}
template <class C>
constexpr int kTileLanes = kTileVectors* kLanes<C>;

// The longest chain of additions in one register. Rounding errors of long sums grow with its length
// (eager's products break theirs up too); shorter ones cost time: of the peak 95% are left at 128,
// 88% at 64, 80% at 32.
constexpr int64_t kChain = 64;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

namespace detail {

// Where row 0 of `a` has its number k: so many steps on, or at an offset of its own.
template <class C>
inline const C* at_depth(const C* a, int64_t step, int64_t k) { return a + k * step; }
template <class C>
inline const C* at_depth(const C* a, const int64_t* offsets, int64_t k) { return a + offsets[k]; }

// Unrolled by request wherever `acc` is touched: one loop left rolled puts it on the stack.
template <class C, class Step, int R, int V>
void tile_product(int64_t first, int64_t depth, const C* a, int64_t a_row, Step a_step, const C* b,
                  int64_t b_pitch, C* c, int64_t c_pitch, bool accumulate) {
    constexpr int L = kLanes<C>;
    Vec<C> acc[R * V] = {};
    for (int64_t k = first; k < first + depth; ++k) {
        const C* numbers = at_depth(a, a_step, k);
        Vec<C> row[V];
#pragma GCC unroll 32
        for (int v = 0; v < V; ++v) row[v] = load(b + v * L);
#pragma GCC unroll 32
        for (int i = 0; i < R * V; ++i)
            acc[i] = fma(splat(numbers[i / V * a_row]), row[i % V], acc[i]);
        b += b_pitch;
    }
    // Added to what is there only now: a sum of sums of `depth` terms rounds off less than one chain.
    if (accumulate) {
#pragma GCC unroll 32
        for (int i = 0; i < R * V; ++i) acc[i] += load(c + i / V * c_pitch + i % V * L);
    }
#pragma GCC unroll 32
    for (int i = 0; i < R * V; ++i) store(c + i / V * c_pitch + i % V * L, acc[i]);
}

template <class C, class Step>
using TileProduct = void (*)(int64_t, int64_t, const C*, int64_t, Step, const C*, int64_t, C*,
                             int64_t, bool);

template <class C, class Step, int V, int... R>
constexpr TileProduct<C, Step> tile_product_of(int64_t rows, std::integer_sequence<int, R...>) {
    constexpr TileProduct<C, Step> of_rows[] = {&tile_product<C, Step, R + 1, V>...};
    return of_rows[rows - 1];
}
template <class C, class Step, int V = kTileVectors>
TileProduct<C, Step> tile_product_of(int64_t rows, int64_t vectors) {
    if constexpr (V > 1)
        if (vectors < V) return tile_product_of<C, Step, V - 1>(rows, vectors);
    return tile_product_of<C, Step, V>(rows, std::make_integer_sequence<int, most_rows(V)>{});
}

template <class V, int... I>
inline V interleave_low(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    return __builtin_shufflevector(a, b, (I % 2 ? n + I / 2 : I / 2)...);
}
template <class V, int... I>
inline V interleave_high(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int n = sizeof...(I);
    return __builtin_shufflevector(a, b, (n / 2 + (I % 2 ? n + I / 2 : I / 2))...);
}

// A perfect shuffle of the rows, once per bit of their number, transposes.
template <class C>
inline void transpose_square(Vec<C> (&rows)[kLanes<C>]) {
    constexpr int L = kLanes<C>;
    constexpr auto lanes = std::make_integer_sequence<int, L>{};
    for (int bit = 1; bit < L; bit *= 2) {
        Vec<C> shuffled[L];
        for (int i = 0; i < L / 2; ++i) {
            shuffled[2 * i] = interleave_low(rows[i], rows[i + L / 2], lanes);
            shuffled[2 * i + 1] = interleave_high(rows[i], rows[i + L / 2], lanes);
        }
        for (int i = 0; i < L; ++i) rows[i] = shuffled[i];
    }
}

template <class T>
inline Vec<compute_t<T>> load_strided(const T* p, int64_t stride, int count) {
    constexpr int L = kLanes<compute_t<T>>;
    if (stride == 1) return count >= L ? load(p) : load(p, count);
    T lanes[L] = {};
    for (int i = 0; i < L && i < count; ++i) lanes[i] = p[i * stride];
    return load(lanes);
}

template <class T>
inline void store_strided(T* p, int64_t stride, Vec<compute_t<T>> v, int count) {
    constexpr int L = kLanes<compute_t<T>>;
    if (stride == 1) return count >= L ? store(p, v) : store(p, v, count);
    T lanes[L];
    store(lanes, v);
    for (int i = 0; i < L && i < count; ++i) p[i * stride] = lanes[i];
}

}  // namespace detail

// c[r][n] (+)= sum over k < depth of a[r * a_row + k * a_step] * b[k * b_pitch + n], for r < rows
// and n < vectors * kLanes; a_step may be a table of offsets, a_step[k], instead. Rows are dealt out
// in nearly equal blocks: 64 rows are 9 blocks of 6 and 2 of 5, not 10 of 6 and a slow one of 4.
template <class C, class Step = int64_t>
inline void tile_matmul(int64_t rows, int64_t vectors, int64_t depth, const C* a, int64_t a_row,
                        Step a_step, const C* b, int64_t b_pitch, C* c, int64_t c_pitch,
                        bool accumulate, int64_t chain = kChain) {
    const int64_t vector_blocks = divide_up(vectors, kTileVectors);
    for (int64_t vb = 0; vb < vector_blocks; ++vb) {
        const int64_t v = vectors * vb / vector_blocks;
        const int64_t wide = vectors * (vb + 1) / vector_blocks - v;
        const int64_t row_blocks = divide_up(rows, int64_t{most_rows(wide)});
        for (int64_t rb = 0; rb < row_blocks; ++rb) {
            const int64_t r = rows * rb / row_blocks;
            const int64_t high = rows * (rb + 1) / row_blocks - r;
            const auto product = detail::tile_product_of<C, Step>(high, wide);
            // Sums of nothing are zero, too.
            for (int64_t k = 0; k < depth || (k == 0 && !accumulate); k += chain)
                product(k, std::min(chain, depth - k), a + r * a_row, a_row, a_step,
                        b + k * b_pitch + v * kLanes<C>, b_pitch,
                        c + r * c_pitch + v * kLanes<C>, c_pitch, accumulate || k > 0);
        }
    }
}

// Rows of a tensor: row r begins at data + offset(r), its elements are `step` apart.
template <class T>
struct Rows {
    T* data;
    const int64_t* offsets;
    int64_t step;
};

// packed[r][c] = rows[r][c], converted; columns up to the next whole vector become zero.
template <class T>
[[gnu::noinline]] void pack_rows(const Rows<const T>& rows, int64_t count, int64_t columns,
                      compute_t<T>* packed, int64_t pitch) {
    constexpr int L = kLanes<compute_t<T>>;
    for (int64_t r = 0; r < count; ++r) {
        const T* row = rows.data + rows.offsets[r];
        for (int64_t c = 0; c < columns; c += L)
            store(packed + r * pitch + c,
                  detail::load_strided(row + c * rows.step, rows.step,
                                       static_cast<int>(columns - c)));
    }
}

// packed[c][r] = rows[r][c] * factor; rows up to the next whole vector become zero.
template <class T>
[[gnu::noinline]] void pack_transposed(const Rows<const T>& rows, int64_t count, int64_t columns,
                            compute_t<T> factor, compute_t<T>* packed, int64_t pitch) {
    using C = compute_t<T>;
    constexpr int L = kLanes<C>;
    for (int64_t r = 0; r < count; r += L)
        for (int64_t c = 0; c < columns; c += L) {
            Vec<C> square[L];
            for (int i = 0; i < L; ++i)
                square[i] = r + i < count
                                ? detail::load_strided(
                                      rows.data + rows.offsets[r + i] + c * rows.step, rows.step,
                                      static_cast<int>(columns - c)) *
                                      factor
                                : Vec<C>{};
            detail::transpose_square<C>(square);
            for (int i = 0; i < L && c + i < columns; ++i)
                store(packed + (c + i) * pitch + r, square[i]);
        }
}

// rows[r][c] = packed[c][r].
template <class T>
[[gnu::noinline]] void unpack_transposed(const compute_t<T>* packed, int64_t pitch, int64_t count,
                              int64_t columns, const Rows<T>& rows) {
    using C = compute_t<T>;
    constexpr int L = kLanes<C>;
    for (int64_t r = 0; r < count; r += L)
        for (int64_t c = 0; c < columns; c += L) {
            Vec<C> square[L];
            for (int i = 0; i < L; ++i)
                square[i] = c + i < columns ? load(packed + (c + i) * pitch + r) : Vec<C>{};
            detail::transpose_square<C>(square);
            for (int i = 0; i < L && r + i < count; ++i)
                detail::store_strided(rows.data + rows.offsets[r + i] + c * rows.step, rows.step,
                                      square[i], static_cast<int>(columns - c));
        }
}

}  // namespace bigops
