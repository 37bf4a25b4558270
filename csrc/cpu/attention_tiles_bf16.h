// What attention's forward and backward pass share where the processor multiplies bf16: the
// exponential, how rows of a tensor become operands of dot_bf16.h's products, and how work is cut.
#pragma once

#if defined(__AVX512BF16__)

#include <limits>
#include <vector>

#include "attention.h"
#include "dot_bf16.h"
#include "kept_memory.h"

namespace bigops {

constexpr float kInf = std::numeric_limits<float>::infinity();

constexpr int kSkew = 16;   // floats: keeps a column of rows off a single set of the first cache
constexpr int kGroup = 32;  // rows packed at a time

constexpr int64_t divide_up(int64_t n, int64_t step) { return (n + step - 1) / step; }

// A head size as the products want it.
constexpr int64_t padded_size(int64_t size) {
    return round_up(std::max<int64_t>(size, 1), kTileDepth);
}

// 2^y = 2^floor(y) * 2^r. VREDUCEPS gives r = y - floor(y), VSCALEFPS multiplies by 2^floor(y) and
// goes to 0 below the range; -inf gives 0 and NaN stays NaN, both without a test. The polynomial is
// minimax among those exact at both ends: relative error 3.4e-6, its mean over r 3e-8, which is
// nothing beside bf16's 2e-3 and keeps lse within about 1e-6.
inline VecF exp2(VecF y) {
    constexpr int kFloor = 0x9;
    const VecF r = _mm512_reduce_ps(y, kFloor);
    VecF p = fma(splat(0.013555747456848621f), r, splat(0.05203237012028694f));
    p = fma(p, r, splat(0.2413797676563263f));
    p = fma(p, r, splat(0.6930321455001831f));
    p = fma(p, r, splat(1.0f));
    return _mm512_scalef_ps(p, y);
}

// 16 floats to `count` elements, 1 to 16, of any stride.
template <class T>
void store_elements(T* p, int64_t stride, VecF x, int64_t count) {
    const int lanes = static_cast<int>(std::min<int64_t>(count, kPanel));
    if (stride == 1) {
        const auto mask = static_cast<__mmask16>((1u << lanes) - 1);
        if constexpr (std::is_same_v<T, float>) _mm512_mask_storeu_ps(p, mask, x);
        else _mm256_mask_storeu_epi16(p, mask, to_bf16_bits(x));
        return;
    }
    T rounded[kPanel];
    store(rounded, x);
    for (int k = 0; k < lanes; ++k) p[k * stride] = rounded[k];
}

// `count` rows of `size` elements in memory of any strides; what lies beyond either is zero.
template <class T>
struct Rows {
    const T* data;
    int64_t stride, step, count, size;

    // Columns [d, d + 32) of row i.
    Parts<T> load(int64_t i, int64_t d) const {
        if (i >= count) return {};
        return load_parts(data + i * stride + d * step, step, size - d);
    }
};

// Rows [i, i + 16) and columns [d, d + 32) as columns of a panel, the parts of which lie `part`
// apart.
template <class T>
void pack_columns(const Rows<T>& rows, int64_t i, int64_t d, bf16* panel, int64_t part) {
    __m512i lines[kParts<T>][kPanel];
    for (int r = 0; r < kPanel; ++r) {
        const Parts<T> row = rows.load(i + r, d);
        for (int n = 0; n < kParts<T>; ++n) lines[n][r] = row[n];
    }
    for (int n = 0; n < kParts<T>; ++n) pack_columns(lines[n], panel + n * part);
}

// Rows i and i + 1 and columns [d, d + 32) as a row of two panels; the second may be null.
template <class T>
void pack_rows(const Rows<T>& rows, int64_t i, int64_t d, bf16* panel, bf16* next_panel,
               int64_t part) {
    const Parts<T> even = rows.load(i, d), odd = rows.load(i + 1, d);
    for (int n = 0; n < kParts<T>; ++n)
        pack_rows(even[n], odd[n], panel + n * part,
                  next_panel ? next_panel + n * part : nullptr);
}

// count(b) pieces of each head of sequence b, numbered sequence after sequence, head after head.
struct Pieces {
    int64_t heads;
    std::vector<int64_t> start{0};  // of each sequence, in pieces of one head

    template <class Count>
    Pieces(int64_t batch, int64_t heads, const Count& count) : heads(heads) {
        for (int64_t b = 0; b < batch; ++b) start.push_back(start.back() + count(b));
    }
    int64_t total() const { return start.back() * heads; }
    int64_t count(int64_t b) const { return start[b + 1] - start[b]; }
    int64_t first(int64_t b, int64_t h) const { return start[b] * heads + h * count(b); }

    struct Piece {
        int64_t b, h, n;
    };
    Piece find(int64_t index) const {
        const auto after = std::upper_bound(start.begin(), start.end(), index / heads);
        const int64_t b = after - start.begin() - 1;
        const int64_t rest = index - start[b] * heads;
        return {b, rest / count(b), rest % count(b)};
    }
};

// A value for the rows of a packed tensor that belong to no sequence, before the first one and
// after the last; `size` elements in a row of a head.
template <class T>
void fill_outside(const AttentionProblem& p, const View* cu_seqlens, const View& view, int64_t size,
                  T value) {
    if (!p.packed()) return;
    const int32_t* offsets = cu_seqlens->ptr<int32_t>();
    for (int64_t h = 0; h < view.shape[1]; ++h)
        for (int64_t row = 0; row < view.shape[2]; ++row) {
            if (row == offsets[0]) row = offsets[p.batch];
            if (row >= view.shape[2]) break;
            T* at = view.ptr<T>() + h * view.strides[1] + row * view.strides[2];
            for (int64_t d = 0; d < size; ++d) at[d * view.strides[3]] = value;
        }
}

}  // namespace bigops

#endif
