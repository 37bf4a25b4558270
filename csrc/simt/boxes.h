// What the copy engine moves: rows in global memory, and where they lie in shared memory. "Tensors: tiled
// mode, im2col mode, swizzling modes".
#pragma once

#include <vector>

#include "core.h"
#include "tensor_map.h"

namespace bigops::simt {

// A row of what is copied: its elements from `first` to `last` exist, the first of them at `data`.
struct Row {
    char* data = nullptr;
    int first = 0, last = 0;
};

// Rows of equal length, in the order in which they lie in shared memory.
struct Rows {
    std::vector<Row> rows;
    size_t row_bytes = 0;
    int element_bytes = 1, swizzle = 0;

    size_t bytes() const { return rows.size() * row_bytes; }
    // Of what exists of the i-th row: the bytes, and where they are within all.
    size_t existing(size_t i) const {
        return static_cast<size_t>(rows[i].last - rows[i].first) * static_cast<size_t>(element_bytes);
    }
    size_t offset(size_t i) const {
        return i * row_bytes + static_cast<size_t>(rows[i].first) * static_cast<size_t>(element_bytes);
    }
};

// `at` from the innermost dimension.
Rows tiled_rows(const TensorMap& map, const int64_t* at);
Rows im2col_rows(const TensorMap& map, const int64_t* at, const int* offset);

// Global to shared memory, zeros for what does not exist; and shared memory's bytes in their order.
void copy_in(const Rows& rows, char* shared, Agent agent);
std::vector<char> taken_out(const Rows& rows, char* shared, Agent agent);

}  // namespace bigops::simt
