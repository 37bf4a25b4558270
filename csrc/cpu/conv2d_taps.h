// A weight as one matrix a tap.
#pragma once

#include <algorithm>

#include "../view.h"

namespace bigops {

// One group's weight by the channels of source and result, tap after tap.
template <class T>
struct Taps {
    static constexpr int64_t kResults = 16;
    T* data;
    int64_t source, result, row, column, rows, columns;  // strides, sizes

    Taps(const View& weight, int64_t first_filter, bool transposed)
        : data(weight.ptr<T>() + first_filter * weight.strides[0]),
          source(weight.strides[transposed ? 0 : 1]), result(weight.strides[transposed ? 1 : 0]),
          row(weight.strides[2]), column(weight.strides[3]), rows(weight.shape[2]),
          columns(weight.shape[3]) {}
    int64_t count() const { return rows * columns; }
    Taps from(int64_t first_source) const {
        Taps rest = *this;
        rest.data += first_source * source;
        return rest;
    }

    // run(from, strides of a matrix's rows and columns, the same of matrix, its rows and columns):
    // copies between the weight and matrix[tap][source][result], whose tap and source are
    // `tap_step` and `source_step` apart, of sources [0, sources) and results [begin, begin + count).
    template <class Run>
    void for_matrices(int64_t sources, int64_t begin, int64_t results, int64_t tap_step,
                      int64_t source_step, Run&& run) const {
        T* first = data + begin * result;
        // Taps side by side.
        if (count() > 1 && (columns == 1 || column == 1) && (rows == 1 || row == columns)) {
            // So few results that their lines stay in the first cache from one source to the next.
            for (int64_t r = 0; r < results; r += kResults)
                for (int64_t s = 0; s < sources; ++s)
                    run(first + r * result + s * source, result, int64_t{1}, s * source_step + r,
                        int64_t{1}, tap_step, std::min(kResults, results - r), count());
            return;
        }
        for (int64_t tap = 0; tap < count(); ++tap)
            run(first + tap / columns * row + tap % columns * column, source, result,
                tap * tap_step, source_step, int64_t{1}, sources, results);
    }
};

}  // namespace bigops
