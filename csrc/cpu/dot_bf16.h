// Products of bf16 matrices with fp32 sums, for kernels that compute other things meanwhile.
//
// The right operand is packed once into panels of 16 columns whose rows hold one pair of depth:
//   panel[r][c] = (B[2r][c], B[2r+1][c]),
// 64 bytes a row: the layout that both VDPBF16PS and AMX's TDPBF16PS multiply without a shuffle
// (Intel, "Intrinsics Guide"; oneDNN calls it VNNI). A Product advances by step(), so that its
// caller can place steps between vector code: the tile unit then works in the shadow of it.
// Both engines take denormal inputs as zero and flush denormal sums.
#pragma once

#if defined(__AVX512BF16__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "vec.h"

namespace bigops {

constexpr int kPanel = 16;      // columns of a panel: lanes of fp32, columns of a tile
constexpr int kTileDepth = 32;  // operands are padded with zeros to this depth: one tile's
constexpr int kTileRows = 16;   // the left operand's and the result's memory ends on a whole tile

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// result[rows x 16 panels] (+)= left[rows x depth] * right. Strides count elements.
struct Product {
    const bf16* left = nullptr;
    int64_t left_stride = 0;
    const bf16* right = nullptr;
    int64_t panel_stride = 0;
    float* result = nullptr;
    int64_t result_stride = 0;
    int rows = 0, panels = 0, depth = 0;
    bool accumulate = false;
    // Where the next step begins.
    int row = 0, panel = 0, from = 0;

    int steps() const;
    bool step();  // false once the result is complete
    void finish() {
        while (step()) {
        }
    }

    template <int M, int N>
    void block();
};

// At most `count` bf16 from memory, zero beyond; 0 <= count <= 32.
inline __m512i load_bf16(const bf16* p, int64_t stride, int64_t count) {
    if (stride == 1)
        return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1, p);
    alignas(64) bf16 lanes[32] = {};
    for (int64_t i = 0; i < std::min<int64_t>(count, 32); ++i) lanes[i] = p[i * stride];
    return _mm512_load_si512(lanes);
}

// One panel from 16 columns that are rows in memory (keys): a transpose of pairs, by halves.
inline void pack_columns(__m512i (&rows)[kPanel], bf16* panel) {
    const __m512i lane =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#pragma GCC unroll 4
    for (int distance = 1; distance < kPanel; distance *= 2) {
        const __m512i far = _mm512_set1_epi32(distance);
        const __mmask16 odd = _mm512_test_epi32_mask(lane, far);
        const __m512i other = _mm512_xor_si512(lane, far);
        const __m512i second = _mm512_set1_epi32(kPanel);
        const __m512i low = _mm512_mask_or_epi32(lane, odd, other, second);
        const __m512i high = _mm512_mask_or_epi32(other, odd, lane, second);
#pragma GCC unroll 16
        for (int i = 0; i < kPanel; ++i) {
            if (i & distance) continue;
            const __m512i a = rows[i], b = rows[i | distance];
            rows[i] = _mm512_permutex2var_epi32(a, low, b);
            rows[i | distance] = _mm512_permutex2var_epi32(a, high, b);
        }
    }
    for (int i = 0; i < kPanel; ++i) _mm512_store_si512(panel + i * 2 * kPanel, rows[i]);
}

// One row of two neighbouring panels from two rows in memory (values of a pair of keys).
inline void pack_rows(__m512i even, __m512i odd, bf16* panel, bf16* next_panel) {
    alignas(64) static constexpr auto interleave = [] {
        struct {
            int16_t lanes[2][32];
        } index = {};
        for (int half = 0; half < 2; ++half)
            for (int i = 0; i < 32; ++i)
                index.lanes[half][i] = static_cast<int16_t>(half * 16 + i / 2 + i % 2 * 32);
        return index;
    }();
    _mm512_store_si512(panel, _mm512_permutex2var_epi16(
                                  even, _mm512_load_si512(interleave.lanes[0]), odd));
    if (next_panel)
        _mm512_store_si512(next_panel, _mm512_permutex2var_epi16(
                                           even, _mm512_load_si512(interleave.lanes[1]), odd));
}

#if defined(__AMX_BF16__)

// Tiles 0-3 hold a 2x2 block of results, 4-5 its left rows, 6-7 its panels: four products for four
// loads, which is what the loads' throughput (8 cycles each, a product takes 16) needs.
class ProductThread {
public:
    ProductThread() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        std::fill_n(config.row_bytes, 8, 64);
        std::fill_n(config.rows, 8, 16);
        _tile_loadconfig(&config);
    }
    ~ProductThread() { _tile_release(); }
    ProductThread(const ProductThread&) = delete;
    ProductThread& operator=(const ProductThread&) = delete;
};

constexpr int kStepDepth = 2 * kTileDepth;  // 8 products, 128 cycles: about one row of softmax

inline int Product::steps() const {
    return (rows + 2 * kTileRows - 1) / (2 * kTileRows) * ((panels + 1) / 2) *
           ((depth + kStepDepth - 1) / kStepDepth);
}

template <int M, int N>
inline void Product::block() {
    constexpr int kRowBytes = 64;
    const bf16* a = left + row * left_stride + from;
    const bf16* b = right + panel * panel_stride + from * kPanel;
    float* c = result + row * result_stride + panel * kPanel;
    const int64_t a_bytes = left_stride * 2, c_bytes = result_stride * 4;
    float* c1 = c + kTileRows * result_stride;
    // The tile loads' inline assembly does not say that it reads memory.
    asm volatile("" ::: "memory");
    if (from == 0) {
        if (accumulate) {
            _tile_loadd(0, c, c_bytes);
            if constexpr (N > 1) _tile_loadd(1, c + kPanel, c_bytes);
            if constexpr (M > 1) _tile_loadd(2, c1, c_bytes);
            if constexpr (M > 1 && N > 1) _tile_loadd(3, c1 + kPanel, c_bytes);
        } else {
            _tile_zero(0);
            if constexpr (N > 1) _tile_zero(1);
            if constexpr (M > 1) _tile_zero(2);
            if constexpr (M > 1 && N > 1) _tile_zero(3);
        }
    }
    const int end = std::min(from + kStepDepth, depth);
    for (int k = from; k < end; k += kTileDepth) {
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, b, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (N > 1) {
            _tile_loadd(7, b + panel_stride, kRowBytes);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (M > 1) {
            _tile_loadd(5, a + kTileRows * left_stride, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
        }
        if constexpr (M > 1 && N > 1) _tile_dpbf16ps(3, 5, 7);
        a += kTileDepth;
        b += kTileDepth * kPanel;
    }
    from = end;
    if (end < depth) return;
    _tile_stored(0, c, c_bytes);
    if constexpr (N > 1) _tile_stored(1, c + kPanel, c_bytes);
    if constexpr (M > 1) _tile_stored(2, c1, c_bytes);
    if constexpr (M > 1 && N > 1) _tile_stored(3, c1 + kPanel, c_bytes);
    from = 0;
    if ((row += 2 * kTileRows) >= rows) {
        row = 0;
        panel += 2;
    }
}

inline bool Product::step() {
    if (panel >= panels) return false;
    const bool tall = rows - row > kTileRows, wide = panels - panel > 1;
    if (tall && wide)
        block<2, 2>();
    else if (tall)
        block<2, 1>();
    else if (wide)
        block<1, 2>();
    else
        block<1, 1>();
    return true;
}

#else  // VDPBF16PS

struct ProductThread {
    ProductThread() {}
};

// 4 rows x 4 panels: 16 sums in flight cover the instruction's latency, and half a load feeds each.
constexpr int kBlockRows = 4, kBlockPanels = 4;

inline int Product::steps() const { return (panels + kBlockPanels - 1) / kBlockPanels; }

template <int M, int N>
inline void Product::block() {
    const bf16* a = left + row * left_stride;
    const bf16* b = right + panel * panel_stride;
    float* c = result + row * result_stride + panel * kPanel;
    __m512 sums[M][N];
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
            sums[i][j] = accumulate ? _mm512_loadu_ps(c + i * result_stride + j * kPanel)
                                    : _mm512_setzero_ps();
    for (int k = 0; k < depth; k += 2) {
        __m512bh columns[N];
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
            columns[j] = reinterpret_cast<__m512bh>(
                _mm512_loadu_si512(b + j * panel_stride + k * kPanel));
#pragma GCC unroll 4
        for (int i = 0; i < M; ++i) {
            int32_t pair;
            std::memcpy(&pair, a + i * left_stride + k, sizeof pair);
            const __m512bh both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
            for (int j = 0; j < N; ++j)
                sums[i][j] = _mm512_dpbf16_ps(sums[i][j], both, columns[j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
            _mm512_storeu_ps(c + i * result_stride + j * kPanel, sums[i][j]);
}

inline bool Product::step() {
    if (panel >= panels) return false;
    for (row = 0; row < rows; row += kBlockRows) {
        switch (std::min(panels - panel, kBlockPanels)) {
            case 4: block<kBlockRows, 4>(); break;
            case 3: block<kBlockRows, 3>(); break;
            case 2: block<kBlockRows, 2>(); break;
            default: block<kBlockRows, 1>(); break;
        }
    }
    panel += kBlockPanels;
    return true;
}

#endif

}  // namespace bigops

#endif
