// How the rows of sequences are dealt out and read: shared by the passes that walk over tiles.
#pragma once

#include <type_traits>
#include <vector>

#include "attention.h"
#include "microkernel.h"

namespace bigops {

struct RowBlock {
    int64_t sequence, first;
};

// Blocks of `rows` rows over all sequences of which there are rows_of(sequence) each.
template <class Count>
std::vector<RowBlock> blocks_of(const AttentionProblem& p, int64_t rows, const Count& rows_of) {
    std::vector<RowBlock> blocks;
    for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t count = rows_of(p.sequence(b));
        for (int64_t first = 0; first < count; first += rows) blocks.push_back({b, first});
    }
    return blocks;
}

// Rows of packed tensors before the first sequence and after the last.
template <class Row>
void for_rows_of_no_sequence(const AttentionProblem& p, const View* cu_seqlens, int64_t rows,
                             const Row& visit) {
    if (!p.packed()) return;
    const int32_t* offsets = cu_seqlens->ptr<int32_t>();
    for (int64_t row = 0; row < offsets[0]; ++row) visit(row);
    for (int64_t row = offsets[p.batch]; row < rows; ++row) visit(row);
}

// Zeros for every head of a packed tensor's row.
template <class T>
void clear_row(const View& view, int64_t row) {
    for (int64_t h = 0; h < view.shape[1]; ++h)
        for (int64_t d = 0; d < view.shape[3]; ++d)
            view.ptr<T>()[h * view.strides[1] + row * view.strides[2] + d * view.strides[3]] =
                from_float<T>(0);
}

// Rows of a tile in the type they are computed in, their elements side by side.
template <class C>
struct TileRows {
    const C* data;
    int64_t pitch;
};

// Of packed rows: a vector more than they need keeps a column of them off one set of the cache.
template <class C>
int64_t packed_pitch(int64_t columns) {
    return round_up(columns, kLanes<C>) + kLanes<C>;
}

// `count` rows of `view` from `first` on: where they lie if they can be used there and `copies` is
// false, else in `packed`.
template <class T>
TileRows<compute_t<T>> tile_of(const View& view, const T* first, int64_t count,
                               compute_t<T>* packed, int64_t* offsets, bool copies = false) {
    using C = compute_t<T>;
    if constexpr (std::is_same_v<T, C>) {
        if (view.strides[3] == 1 && !copies) return {first, view.strides[2]};
    }
    const int64_t pitch = packed_pitch<C>(view.shape[3]);
    for (int64_t r = 0; r < count; ++r) offsets[r] = r * view.strides[2];
    pack_rows<T>({first, offsets, view.strides[3]}, count, view.shape[3], packed, pitch);
    return {packed, pitch};
}

}  // namespace bigops
