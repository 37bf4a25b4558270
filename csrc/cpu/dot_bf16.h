// Products of bf16 matrices with fp32 sums, by AMX tiles or by VDPBF16PS, behind one interface;
// with AMX also of fp32 matrices, whose elements are split into three bf16 each.
//
// The right operand is packed once into panels of 16 columns whose rows hold one pair of depth:
//   panel[r][c] = (B[2r][c], B[2r+1][c]),
// 64 bytes a row: the layout that both VDPBF16PS and TDPBF16PS multiply without a shuffle (Intel,
// "Intrinsics Guide"; oneDNN calls it VNNI). Both take denormal inputs as zero and flush denormal
// sums.
#pragma once

#if defined(__AVX512BF16__)

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "parts_bf16.h"

namespace bigops {

constexpr int kPanel = 16;      // columns of a panel: lanes of fp32, columns of a tile
constexpr int kTileDepth = 32;  // operands are padded with zeros to this depth: one tile's
constexpr int kTileRows = 16;   // the left operand's and the result's memory ends on a whole tile

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// result[rows x 16 panels] (+)= left[rows x depth] * right. Strides count elements; depth is a
// multiple of 32 and at least that. An operand's parts lie left_part and right_part apart.
template <int kParts = 1>
struct Product {
    const bf16* left;
    int64_t left_stride, left_part = 0;
    const bf16* right;
    int64_t panel_stride, right_part = 0;
    float* result;
    int64_t result_stride;
    int rows, panels, depth;
    bool accumulate;

    void run() const;

private:
#if defined(__AMX_BF16__)
    struct Pending;
    template <int M, int N>
    void block(int row, int panel, Pending& pending) const;
    template <int M, int N, int kStep>
    void step(const bf16* a, const bf16* b, float* c, bool first, Pending& pending) const;
#else
    template <int M, int N>
    void block(int row, int panel) const;
#endif
};

// 16 rows of 16 pairs become 16 columns: a transpose by halves.
inline void transpose(__m512i (&rows)[kPanel]) {
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
}

// One panel from 16 columns that are rows in memory (keys).
inline void pack_columns(__m512i (&rows)[kPanel], bf16* panel) {
    transpose(rows);
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
        // The intrinsic says that it reads 8 bytes.
        asm volatile("" : : "m"(config));
        _tile_loadconfig(&config);
    }
    ~ProductThread() { _tile_release(); }
    ProductThread(const ProductThread&) = delete;
    ProductThread& operator=(const ProductThread&) = delete;
};

// The intrinsics want a tile's number as a literal.
template <int kTile>
inline void store_tile(float* p, int64_t bytes) {
    if constexpr (kTile == 0) _tile_stored(0, p, bytes);
    if constexpr (kTile == 1) _tile_stored(1, p, bytes);
    if constexpr (kTile == 2) _tile_stored(2, p, bytes);
    if constexpr (kTile == 3) _tile_stored(3, p, bytes);
}
template <int kTile>
inline void load_tile(const float* p, int64_t bytes) {
    if constexpr (kTile == 0) _tile_loadd(0, p, bytes);
    if constexpr (kTile == 1) _tile_loadd(1, p, bytes);
    if constexpr (kTile == 2) _tile_loadd(2, p, bytes);
    if constexpr (kTile == 3) _tile_loadd(3, p, bytes);
}
template <int kTile>
inline void zero_tile() {
    if constexpr (kTile == 0) _tile_zero(0);
    if constexpr (kTile == 1) _tile_zero(1);
    if constexpr (kTile == 2) _tile_zero(2);
    if constexpr (kTile == 3) _tile_zero(3);
}

// Where the results still in tiles belong. A block's go to memory between the first products of the
// next block, since a store waits for the last product's 52 cycles.
template <int kParts>
struct Product<kParts>::Pending {
    float* at[4] = {};
    int64_t stride;
    bool accumulate;

    // Sums of parts begin at zero and are added to what is there in the end: each of the six
    // products a step would round off the whole sum, and the error grow with its length.
    static constexpr bool kAddsLast = kParts > 1;

    template <int kTile>
    void store() {
        float* to = std::exchange(at[kTile], nullptr);
        if (!to) return;
        if (!kAddsLast || !accumulate) return store_tile<kTile>(to, stride * 4);
        alignas(64) float sums[kTileRows][kPanel];
        store_tile<kTile>(sums[0], sizeof sums[0]);
        for (int row = 0; row < kTileRows; ++row, to += stride)
            bigops::store(to, load(to) + load(sums[row]));
    }
    template <int kTile>
    void start(float* p) {
        store<kTile>();
        if (accumulate && !kAddsLast) load_tile<kTile>(p, stride * 4);
        else zero_tile<kTile>();
        at[kTile] = p;
    }
};

// One product of parts, of 32 of the depth; the first one begins the sums of the results at `c`.
//
// Panels are loaded with the hint that they are not needed again soon: most come from the
// second-level cache, and results and left rows should keep the first (256 keys at head size 64: a
// product takes 24 cycles instead of 39).
template <int kParts>
template <int M, int N, int kStep>
inline void Product<kParts>::step(const bf16* a, const bf16* b, float* c, bool first,
                                  Pending& pending) const {
    constexpr int kRowBytes = 64;
    constexpr PartProduct now = kPartProducts<kParts>[kStep];
    constexpr PartProduct before =
        kStep > 0 ? kPartProducts<kParts>[kStep > 0 ? kStep - 1 : 0] : PartProduct{-1, -1};
    constexpr bool kNewLeft = now.left != before.left, kNewRight = now.right != before.right;
    const int64_t a_bytes = left_stride * 2;
    if constexpr (kParts > 1) {
        a += now.left * left_part;
        b += now.right * right_part;
    }
    float* c1 = c + kTileRows * result_stride;
    if constexpr (kNewLeft) _tile_loadd(4, a, a_bytes);
    if constexpr (kNewRight) _tile_stream_loadd(6, b, kRowBytes);
    if (first) pending.template start<0>(c);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (N > 1) {
        if constexpr (kNewRight) _tile_stream_loadd(7, b + panel_stride, kRowBytes);
        if (first) pending.template start<1>(c + kPanel);
        _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (M > 1) {
        if constexpr (kNewLeft) _tile_loadd(5, a + kTileRows * left_stride, a_bytes);
        if (first) pending.template start<2>(c1);
        _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (M > 1 && N > 1) {
        if (first) pending.template start<3>(c1 + kPanel);
        _tile_dpbf16ps(3, 5, 7);
    }
}

template <int kParts>
template <int M, int N>
inline void Product<kParts>::block(int row, int panel, Pending& pending) const {
    const bf16* a = left + row * left_stride;
    const bf16* b = right + panel * panel_stride;
    float* c = result + row * result_stride + panel * kPanel;
    for (int k = 0; k < depth; k += kTileDepth)
        [&]<int... kStep>(std::integer_sequence<int, kStep...>) {
            (step<M, N, kStep>(a + k, b + k * kPanel, c, k == 0 && kStep == 0, pending), ...);
        }(std::make_integer_sequence<int, kPartProducts<kParts>.size()>{});
}

template <int kParts>
inline void Product<kParts>::run() const {
    asm volatile("" ::: "memory");  // the tile loads' inline assembly does not say it reads memory
    Pending pending{.stride = result_stride, .accumulate = accumulate};
    for (int row = 0; row < rows; row += 2 * kTileRows) {
        const bool tall = rows - row > kTileRows;
        int panel = 0;
        for (; panel + 2 <= panels; panel += 2)
            tall ? block<2, 2>(row, panel, pending) : block<1, 2>(row, panel, pending);
        if (panel < panels)
            tall ? block<2, 1>(row, panel, pending) : block<1, 1>(row, panel, pending);
    }
    pending.template store<0>();
    pending.template store<1>();
    pending.template store<2>();
    pending.template store<3>();
}

#else  // VDPBF16PS

struct ProductThread {
    ProductThread() {}
};

// 4 rows x 4 panels: 16 sums in flight cover the instruction's latency, and half a load feeds each.
constexpr int kBlockRows = 4, kBlockPanels = 4;

template <int kParts>
template <int M, int N>
inline void Product<kParts>::block(int row, int panel) const {
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

template <int kParts>
inline void Product<kParts>::run() const {
    static_assert(kParts == 1);
    for (int panel = 0; panel < panels; panel += kBlockPanels)
        for (int row = 0; row < rows; row += kBlockRows) {
            switch (std::min(panels - panel, kBlockPanels)) {
                case 4: block<kBlockRows, 4>(row, panel); break;
                case 3: block<kBlockRows, 3>(row, panel); break;
                case 2: block<kBlockRows, 2>(row, panel); break;
                default: block<kBlockRows, 1>(row, panel); break;
            }
        }
}

#endif

}  // namespace bigops

#endif
