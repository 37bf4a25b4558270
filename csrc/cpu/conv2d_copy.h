// Copies of matrices between any two layouts and dtypes. What matters is the change between
// contiguous and channels_last, where one side's rows run across the other's columns: 8x8 blocks
// are transposed in registers then, so that both sides are touched by whole rows.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "vec.h"

namespace bigops {

template <class To, class From>
inline To convert(From x) {
    if constexpr (std::is_same_v<To, From>) return x;
    else if constexpr (std::is_same_v<To, compute_t<From>>) return to_float(x);
    else return from_float<To>(x);
}

// Eight numbers as floats, whatever they are stored as.
typedef float Row __attribute__((vector_size(32)));
typedef uint32_t RowBits __attribute__((vector_size(32)));
typedef uint16_t HalfRow __attribute__((vector_size(16)));

template <class T>
inline Row load_row(const T* p) {
    if constexpr (std::is_same_v<T, float>) {
        Row row;
        std::memcpy(&row, p, sizeof row);
        return row;
    } else {
        HalfRow halves;
        std::memcpy(&halves, p, sizeof halves);
        if constexpr (std::is_same_v<T, bf16>)
            return std::bit_cast<Row>(__builtin_convertvector(halves, RowBits) << 16);
#if defined(__F16C__)
        return _mm256_cvtph_ps((__m128i)halves);
#endif
        Row row;
        for (int i = 0; i < 8; ++i) row[i] = to_float(T{halves[i]});
        return row;
    }
}

template <class T>
inline void store_row(T* p, Row row) {
    if constexpr (std::is_same_v<T, float>) {
        std::memcpy(p, &row, sizeof row);
    } else {
        HalfRow halves;
        if constexpr (std::is_same_v<T, bf16>) {
            halves = to_bf16_lanes<RowBits, HalfRow>(row);
        } else {
#if defined(__F16C__)
            halves = (HalfRow)_mm256_cvtps_ph(row, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
            for (int i = 0; i < 8; ++i) halves[i] = from_float<T>(row[i]).bits;
#endif
        }
        std::memcpy(p, &halves, sizeof halves);
    }
}

// dst[j][i] = src[i][j] for 8x8 numbers: three rounds of interleaving, each doubling the run.
template <class From, class To>
inline void transpose_8x8(const From* src, int64_t src_row, To* dst, int64_t dst_row) {
    Row in[8], pair[8], quad[8];
    for (int i = 0; i < 8; ++i) in[i] = load_row(src + i * src_row);
    for (int i = 0; i < 8; i += 2) {
        pair[i] = __builtin_shufflevector(in[i], in[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pair[i + 1] = __builtin_shufflevector(in[i], in[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            const Row a = pair[i + j], b = pair[i + j + 2];
            quad[i + 2 * j] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13);
            quad[i + 2 * j + 1] = __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; ++i) {
        const Row low = __builtin_shufflevector(quad[i], quad[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        const Row high = __builtin_shufflevector(quad[i], quad[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
        store_row(dst + i * dst_row, low);
        store_row(dst + (i + 4) * dst_row, high);
    }
}

inline void transpose_8x8(const uint8_t* src, int64_t src_row, uint8_t* dst, int64_t dst_row) {
    typedef uint8_t Bytes __attribute__((vector_size(16)));
    typedef uint16_t Words __attribute__((vector_size(16)));
    typedef uint32_t Longs __attribute__((vector_size(16)));
    typedef uint64_t Halves __attribute__((vector_size(16)));
    Words pair[4];
    Longs quad[4];
    for (int i = 0; i < 4; ++i) {
        uint64_t even, odd;
        std::memcpy(&even, src + 2 * i * src_row, 8);
        std::memcpy(&odd, src + (2 * i + 1) * src_row, 8);
        const Bytes rows = (Bytes)Halves{even, odd};
        pair[i] = (Words)__builtin_shufflevector(rows, rows, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13,
                                                 6, 14, 7, 15);
    }
    for (int i = 0; i < 4; i += 2) {
        quad[i] = (Longs)__builtin_shufflevector(pair[i], pair[i + 1], 0, 8, 1, 9, 2, 10, 3, 11);
        quad[i + 1] =
            (Longs)__builtin_shufflevector(pair[i], pair[i + 1], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 2; ++i) {
        const Halves columns[2] = {
            (Halves)__builtin_shufflevector(quad[i], quad[i + 2], 0, 4, 1, 5),
            (Halves)__builtin_shufflevector(quad[i], quad[i + 2], 2, 6, 3, 7)};
        for (int j = 0; j < 4; ++j) {
            const uint64_t column = columns[j / 2][j % 2];
            std::memcpy(dst + (4 * i + j) * dst_row, &column, 8);
        }
    }
}

// dst[i][j] = src[i][j], converted; strides in elements. Not inlined: it is used in many places,
// and a call is nothing beside a row.
template <class To, class From>
[[gnu::noinline]] void copy_2d(const From* src, int64_t src_i, int64_t src_j, To* dst,
                               int64_t dst_i, int64_t dst_j, int64_t rows, int64_t columns) {
    constexpr bool kSame = std::is_same_v<To, From>, kVectors = !std::is_same_v<To, uint8_t>;
    constexpr int64_t kLong = 256;
    if (src_i == 1 && dst_i == 1) {
        std::swap(src_i, src_j);
        std::swap(dst_i, dst_j);
        std::swap(rows, columns);
    }
    if (src_j == 1 && dst_j == 1) {
        if (src_i == columns && dst_i == columns) columns *= std::exchange(rows, 1);
        for (int64_t i = 0; i < rows; ++i) {
            const From* from = src + i * src_i;
            To* to = dst + i * dst_i;
            // A call of memcpy takes longer than to copy a few vectors.
            if (kSame && (!kVectors || columns > kLong)) {
                std::memcpy(to, from, sizeof(From) * static_cast<size_t>(columns));
            } else if constexpr (kVectors) {
                constexpr int64_t kStep = kLanes<compute_t<To>>;
                int64_t j = 0;
                for (; j + kStep <= columns; j += kStep) store(to + j, load(from + j));
                if (j < columns) store(to + j, load(from + j, static_cast<int>(columns - j)), static_cast<int>(columns - j));
            }
        }
        return;
    }
    constexpr int64_t kBlock = 8;
    constexpr bool kBytes = std::is_same_v<To, uint8_t>, kWide = std::is_same_v<compute_t<To>, double>;
    if constexpr (std::is_same_v<To, From> ? !kWide
                                           : !kBytes && std::is_same_v<compute_t<From>, compute_t<To>>) {
        const bool along_j = src_j == 1 && dst_i == 1, along_i = src_i == 1 && dst_j == 1;
        if (rows >= kBlock && columns >= kBlock && (along_i || along_j)) {
            // The last blocks move back to be whole: what they copy twice is the same.
            for (int64_t j0 = 0; j0 < columns; j0 += kBlock)
                for (int64_t i0 = 0; i0 < rows; i0 += kBlock) {
                    const int64_t i = std::min(i0, rows - kBlock), j = std::min(j0, columns - kBlock);
                    const From* from = src + i * src_i + j * src_j;
                    To* to = dst + i * dst_i + j * dst_j;
                    if (along_j) transpose_8x8(from, src_i, to, dst_j);
                    else transpose_8x8(from, src_j, to, dst_i);
                }
            return;
        }
    }
    if (columns < kBlock) {
        for (int64_t j = 0; j < columns; ++j)
            for (int64_t i = 0; i < rows; ++i)
                dst[i * dst_i + j * dst_j] = convert<To>(src[i * src_i + j * src_j]);
        return;
    }
    for (int64_t i0 = 0; i0 < rows; i0 += kBlock)
        for (int64_t j0 = 0; j0 < columns; j0 += kBlock)
            for (int64_t i = i0; i < std::min(rows, i0 + kBlock); ++i)
                for (int64_t j = j0; j < std::min(columns, j0 + kBlock); ++j)
                    dst[i * dst_i + j * dst_j] = convert<To>(src[i * src_i + j * src_j]);
}

}  // namespace bigops
