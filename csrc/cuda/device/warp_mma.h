// A warp's products of tiles by mma.sync: operands are read from swizzled shared memory by
// ldmatrix, 16 x 16 elements at a time. Which of the four 8 x 8 matrices comes second, the one
// below or the one beside, and whether they are transposed, is all that differs between operands
// ("Matrix Fragments for mma.m16n8k16"):
//     left, its rows a tile's rows (m, k)          below first    as stored
//     left, its rows a tile's columns (k, m)       beside first   transposed
//     right, its columns a tile's rows (n, k)      beside first   as stored
//     right, its columns a tile's columns (k, n)   below first    transposed
#pragma once

#include "async_copy.h"
#include "mma.h"
#include "tile.h"

namespace bigops::device {

// The same number, of which the compiler knows nothing: what follows from it is computed where it
// is needed, in each turn of a loop, rather than kept in registers throughout.
BIGOPS_DEVICE uint32_t anew(uint32_t x) {
#ifndef BIGOPS_SIMT
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// The part of a tile that begins at a row and a column and has kSpan columns: a lane's place in it,
// and the same place some rows further down and columns to the right. These are known when
// compiling and steps of 8 rows and of 8 columns: the swizzle is a XOR, which a step right adds to
// and a step down leaves alone.
template <class Tile, int kSpan>
struct Part {
    static constexpr int kBlock = Tile::kBlockColumns;
    // Else a step right may cross into the next block at any place.
    static constexpr bool kAligned = kSpan % kBlock == 0 || (kBlock % kSpan == 0 && kSpan % 16 == 0);

    char* data;
    uint32_t offset;
    int first;

    BIGOPS_DEVICE Part(const Tile& tile, int row, int column, int lane_row, int lane_column)
        : data(tile.data), offset(Tile::offset(lane_row, lane_column)), first(0) {
        offset += row * Tile::kRowBytes;
        if constexpr (kAligned)
            offset = (offset ^ static_cast<uint32_t>(column % kBlock * 2)) +
                     column / kBlock * Tile::kBlockBytes;
        else
            first = column;
    }
    BIGOPS_DEVICE char* at(int down, int right) const {
        const int column = first + right;
        return data + (offset ^ static_cast<uint32_t>(column % kBlock * 2)) +
               column / kBlock * Tile::kBlockBytes + down * Tile::kRowBytes;
    }
};

// Where a lane reads its row of each piece of 16 x 16.
template <class Tile, int kSpan>
BIGOPS_DEVICE Part<Tile, kSpan> below_first(const Tile& tile, int row, int column) {
    return {tile, row, column, lane_id() % 16, lane_id() / 16 * 8};
}
template <class Tile, int kSpan>
BIGOPS_DEVICE Part<Tile, kSpan> beside_first(const Tile& tile, int row, int column) {
    return {tile, row, column, lane_id() / 16 * 8 + lane_id() % 8, lane_id() / 8 % 2 * 8};
}

// An operand of a product with sizes m, n, k: `kDepth` is k, `load` takes the 16 rows (or columns)
// and the 16 of k that it is wanted of. kSpan: how many rows or columns the warp takes from the
// first on.
template <class Tile>
struct LeftRows {
    using T = typename Tile::Element;
    static constexpr int kDepth = Tile::kColumns;
    Part<Tile, kDepth> part;

    BIGOPS_DEVICE LeftRows(const Tile& tile, int row)
        : part(below_first<Tile, kDepth>(tile, row, 0)) {}
    BIGOPS_DEVICE void load(uint32_t (&a)[4], int m, int k) const { ldmatrix_x4(a, part.at(m, k)); }
};
template <int kSpan, class Tile>
struct LeftColumns {
    using T = typename Tile::Element;
    static constexpr int kDepth = Tile::kRows;
    Part<Tile, kSpan> part;

    BIGOPS_DEVICE LeftColumns(const Tile& tile, int column)
        : part(beside_first<Tile, kSpan>(tile, 0, column)) {}
    BIGOPS_DEVICE void load(uint32_t (&a)[4], int m, int k) const {
        ldmatrix_x4_trans(a, part.at(k, m));
    }
};
template <class Tile>
struct RightRows {
    static constexpr int kDepth = Tile::kColumns;
    Part<Tile, kDepth> part;

    BIGOPS_DEVICE RightRows(const Tile& tile, int row)
        : part(beside_first<Tile, kDepth>(tile, row, 0)) {}
    BIGOPS_DEVICE void load(uint32_t (&b)[4], int n, int k) const { ldmatrix_x4(b, part.at(n, k)); }
};
template <int kSpan, class Tile>
struct RightColumns {
    static constexpr int kDepth = Tile::kRows;
    Part<Tile, kSpan> part;

    BIGOPS_DEVICE RightColumns(const Tile& tile, int column)
        : part(below_first<Tile, kSpan>(tile, 0, column)) {}
    BIGOPS_DEVICE void load(uint32_t (&b)[4], int n, int k) const {
        ldmatrix_x4_trans(b, part.at(k, n));
    }
};

template <class Tile>
BIGOPS_DEVICE LeftRows<Tile> left_rows(const Tile& tile, int row) { return {tile, row}; }
template <int kSpan, class Tile>
BIGOPS_DEVICE LeftColumns<kSpan, Tile> left_columns(const Tile& tile, int column) {
    return {tile, column};
}
template <class Tile>
BIGOPS_DEVICE RightRows<Tile> right_rows(const Tile& tile, int row) { return {tile, row}; }
template <int kSpan, class Tile>
BIGOPS_DEVICE RightColumns<kSpan, Tile> right_columns(const Tile& tile, int column) {
    return {tile, column};
}

// Fragments rounded to 16 bits, as the left operand that they lie ready for.
template <class T_, int kRowTiles, int K>
struct Weights {
    using T = T_;
    static constexpr int kDepth = K;
    uint32_t a[kRowTiles][K / 16][4];

    BIGOPS_DEVICE void round(int m, const Fragment<K>& from) {
#pragma unroll
        for (int step = 0; step < K / 16; ++step) as_operand<T>(from, step, a[m][step]);
    }
    BIGOPS_DEVICE void load(uint32_t (&to)[4], int m, int k) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = a[m / 16][k / 16][i];
    }
};

// d += left * right, d[m] being 16 rows.
template <class Left, class Right, int kRowTiles, int N>
BIGOPS_DEVICE void multiply(Fragment<N> (&d)[kRowTiles], const Left& left, const Right& right) {
    using T = typename Left::T;
    static_assert(Left::kDepth == Right::kDepth && N % 16 == 0);
#pragma unroll
    for (int k = 0; k < Left::kDepth; k += 16) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) left.load(a[m], 16 * m, k);
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            uint32_t b[4];
            right.load(b, n, k);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
                mma_m16n8k16<T>(d[m].columns(n), a[m], b[0], b[1]);
                mma_m16n8k16<T>(d[m].columns(n + 8), a[m], b[2], b[3]);
            }
        }
    }
}

// Rows [row, row + 16) of a tile from a column on become 16-bit copies of a fragment.
template <class Tile, int N>
BIGOPS_DEVICE void store(const Tile& tile, int row, int column, const Fragment<N>& from) {
    using T = typename Tile::Element;
    const Part<Tile, N> part(tile, row, column, from.row(0), 0);
#pragma unroll
    for (int i = 0; i < from.kCount; i += 2)
        *reinterpret_cast<uint32_t*>(part.at(8 * from.half(i), i / 4 * 8) + lane_id() % 4 * 4) =
            pack<T>(from.d[i], from.d[i + 1]);
}

// Global memory's rows become tiles by cp.async, kThreads threads taking part.
template <class Tile, int kThreads>
struct RowLoader {
    static constexpr int kChunks = Tile::kRowBytes / 16, kRowsAtOnce = kThreads / kChunks;
    static_assert(kRowsAtOnce % 8 == 0 && Tile::kRows % kRowsAtOnce == 0);

    const typename Tile::Element* from;  // the thread's own first 16 bytes

    BIGOPS_DEVICE RowLoader(const typename Tile::Element* first_row, int64_t stride)
        : from(first_row + row() * stride + column()) {}
    BIGOPS_DEVICE static int row() {
        return static_cast<int>(anew(threadIdx.x) % kThreads / kChunks);
    }
    BIGOPS_DEVICE static int column() { return static_cast<int>(anew(threadIdx.x) % kChunks * 8); }

    // Zeros behind the first `rows` of the tile's rows.
    BIGOPS_DEVICE void load(const Tile& tile, int64_t stride, int rows) const {
        char* to = tile.at(row(), column());  // the swizzle's period is 8 rows
#pragma unroll
        for (int down = 0; down < Tile::kRows; down += kRowsAtOnce)
#pragma unroll
            for (int block = 0; block < Tile::kBlocks; ++block)
                // In full, since the model has one of this name beside its element types.
                device::cp_async_16(to + down * Tile::kRowBytes + block * Tile::kBlockBytes,
                                    from + down * stride + block * Tile::kBlockColumns,
                                    row() < rows - down);
    }
    BIGOPS_DEVICE void move(int64_t elements) { from += elements; }
};

}  // namespace bigops::device
