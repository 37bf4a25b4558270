// A warp's products of tiles by mma.sync: operands are read from swizzled shared memory by ldmatrix, 16 x 16
// elements at a time. Which of the four 8 x 8 matrices comes second, the one below or the one beside, and
// whether they are transposed, is all that differs between operands ("Matrix Fragments for mma.m16n8k16"):
//     A, its rows a tile's rows (m, k)     below first    as stored
//     A, its rows a tile's columns (k, m)  beside first   transposed
//     B, its rows a tile's columns (n, k)  beside first   as stored
//     B, its rows a tile's rows (k, n)     below first    transposed
#pragma once

#include "async_copy.h"
#include "mma.h"
#include "tile.h"

namespace bigops::device {

enum class Second { below, beside };

// Where a lane reads its row of each 16 x 16 piece. Pieces begin at multiples of 16, where the swizzle is a
// XOR that a step to the right adds to and a step down leaves alone: one look-up serves all of them.
template <class Tile, Second kSecond>
struct Pieces {
    const char* data;
    uint32_t lane;

    BIGOPS_DEVICE explicit Pieces(const Tile& tile) : data(tile.data) {
        const int first = lane_id() % 8, low = lane_id() / 8 % 2 * 8, high = lane_id() / 16 * 8;
        lane = kSecond == Second::below ? Tile::offset(first + low, high)
                                        : Tile::offset(first + high, low);
    }
    BIGOPS_DEVICE const char* at(int row, int column) const {
        const auto across = static_cast<uint32_t>(column % Tile::kBlockColumns * 2);
        return data + (lane ^ across) + column / Tile::kBlockColumns * Tile::kBlockBytes +
               row * Tile::kRowBytes;
    }
};

// d += a * b for 16 columns of d, `b` being the two operands of 8 columns each.
template <class T, int N>
BIGOPS_DEVICE void multiply(Fragment<N>& d, int column, const uint32_t (&a)[4],
                            const uint32_t (&b)[4]) {
    mma_m16n8k16<T>(d.columns(column), a, b[0], b[1]);
    mma_m16n8k16<T>(d.columns(column + 8), a, b[2], b[3]);
}

// d += rows * columns^T: rows [row, row + 16 kRowTiles) of the one tile with all rows of the other.
template <class A, class B, int kRowTiles, int N>
BIGOPS_DEVICE void multiply_rows(Fragment<N> (&d)[kRowTiles], const A& rows, int row,
                                 const B& columns) {
    static_assert(A::kColumns == B::kColumns && B::kRows == N);
    using T = typename A::Element;
    const Pieces<A, Second::below> left(rows);
    const Pieces<B, Second::beside> right(columns);
#pragma unroll
    for (int k = 0; k < A::kColumns; k += 16) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) ldmatrix_x4(a[m], left.at(row + 16 * m, k));
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t b[4];
            ldmatrix_x4(b, right.at(n, k));
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) multiply<T>(d[m], n, a[m], b);
        }
    }
}

// 16-bit copies of a fragment, as operands A of its columns by 16.
template <int K>
struct Weights {
    uint32_t a[K / 16][4];
};

template <class T, int K>
BIGOPS_DEVICE void round(const Fragment<K>& from, Weights<K>& to) {
#pragma unroll
    for (int step = 0; step < K / 16; ++step) as_operand<T>(from, step, to.a[step]);
}

// d += weights * tile
template <class B, int kRowTiles, int K, int N>
BIGOPS_DEVICE void multiply_weights(Fragment<N> (&d)[kRowTiles], const Weights<K> (&weights)[kRowTiles],
                                    const B& tile) {
    static_assert(B::kRows == K && B::kColumns == N);
    using T = typename B::Element;
    const Pieces<B, Second::below> right(tile);
#pragma unroll
    for (int k = 0; k < K; k += 16) {
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, right.at(k, n));
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) multiply<T>(d[m], n, weights[m].a[k / 16], b);
        }
    }
}

// Global memory's rows become tiles by cp.async, kThreads threads taking part.
template <class Tile, int kThreads>
struct RowLoader {
    static constexpr int kChunks = Tile::kRowBytes / 16, kRowsAtOnce = kThreads / kChunks;
    static_assert(kRowsAtOnce % 8 == 0 && Tile::kRows % kRowsAtOnce == 0);

    const typename Tile::Element* from;  // the thread's own first 16 bytes

    BIGOPS_DEVICE RowLoader(const typename Tile::Element* first_row, int64_t stride)
        : from(first_row + row() * stride + column()) {}
    BIGOPS_DEVICE static int row() { return static_cast<int>(threadIdx.x % kThreads / kChunks); }
    BIGOPS_DEVICE static int column() { return static_cast<int>(threadIdx.x % kChunks * 8); }

    // Zeros behind the first `rows` of the tile's rows.
    BIGOPS_DEVICE void load(const Tile& tile, int64_t stride, int rows) const {
        char* to = tile.at(row(), column());  // the swizzle's period is 8 rows
#pragma unroll
        for (int down = 0; down < Tile::kRows; down += kRowsAtOnce)
#pragma unroll
            for (int block = 0; block < Tile::kBlocks; ++block)
                cp_async_16(to + down * Tile::kRowBytes + block * Tile::kBlockBytes,
                            from + down * stride + block * Tile::kBlockColumns,
                            row() < rows - down);
    }
    BIGOPS_DEVICE void move(int64_t elements) { from += elements; }
};

// A warp's rows [row, row + 16) of a tile become 16-bit copies of a fragment.
template <class Tile>
BIGOPS_DEVICE void store_rows(const Tile& tile, int row, const Fragment<Tile::kColumns>& from) {
    const int lane = lane_id();
#pragma unroll
    for (int i = 0; i < from.kCount; i += 2)
        *reinterpret_cast<uint32_t*>(tile.at(row + from.row(from.half(i)), i / 4 * 8) +
                                     lane % 4 * 4) =
            pack<typename Tile::Element>(from.d[i], from.d[i + 1]);
}

}  // namespace bigops::device
