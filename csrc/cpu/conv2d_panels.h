// Products of a block that stays in L1 with a matrix packed in panels as wide as the microkernel.
#pragma once

#include <algorithm>
#include <vector>

#include "conv2d_copy.h"
#include "kept_memory.h"
#include "microkernel.h"

namespace bigops {

constexpr int64_t kPointwiseChain = 128;  // of additions; long runs suit memory
constexpr int64_t kRowBlock = 48;         // broadcast against a panel while it is in L1

// run(i, lanes...) for vectors of `count` numbers; lanes only of a last one that is not whole.
template <class A, class Run>
void for_lanes(int64_t count, Run&& run) {
    int64_t i = 0;
    for (; i + kLanes<A> <= count; i += kLanes<A>) run(i);
    if (i < count) run(i, static_cast<int>(count - i));
}

template <class T>
void put(const compute_t<T>* from, int64_t count, T* to) {
    for_lanes<compute_t<T>>(count, [&](int64_t i, auto... some) {
        store(to + i, load(from + i, some...), some...);
    });
}

// Rows of an odd number of cache lines: a column of theirs does not fall into few of L1's sets.
template <class A>
constexpr int64_t odd_lines(int64_t numbers) {
    constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(A));
    return round_up(round_up(numbers, line) | line, kLanes<A>);
}

// A matrix in panels of kTileLanes columns, one after the other.
template <class A>
struct Panels {
    static constexpr int64_t kWidth = kTileLanes<A>;
    int64_t rows, columns;
    Aligned<A> memory;

    Panels(int64_t most_rows, int64_t most_columns)
        : rows(most_rows), columns(most_columns),
          memory(allocate<A>(most_rows * round_up(std::max<int64_t>(most_columns, 1), kWidth))) {}
    int64_t count() const { return divide_up(columns, kWidth); }
    A* at(int64_t panel) const { return memory.get() + panel * kWidth * rows; }
    int64_t width(int64_t panel) const { return std::min(kWidth, columns - panel * kWidth); }
    int64_t vectors(int64_t panel) const { return divide_up(width(panel), kLanes<A>); }
};

// panels[i][j] = source[i][j], or with `turned` source[j][i], where source has a row's start at
// from(row) and its numbers `step` apart.
template <class T, class A = compute_t<T>, class From>
void pack(const Panels<A>& panels, bool turned, int64_t step, From&& from, int threads = 1) {
    std::vector<int64_t> offsets(static_cast<size_t>(turned ? panels.columns : panels.rows));
    const T* base = from(0);
    for (size_t i = 0; i < offsets.size(); ++i) offsets[i] = from(static_cast<int64_t>(i)) - base;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < panels.count(); ++p) {
        const int64_t first = p * panels.kWidth;
        if (turned)
            pack_transposed<T>({base, offsets.data() + first, step}, panels.width(p), panels.rows,
                               A{1}, panels.at(p), panels.kWidth);
        else
            pack_rows<T>({base + first * step, offsets.data(), step}, panels.rows, panels.width(p),
                         panels.at(p), panels.kWidth);
    }
}

// done(row, rows, column, columns): `block` is a * panels, added to what begin put there if it did.
// ahead(step, steps) has time to fetch what comes next.
template <class A, class Ahead, class Begin, class Done>
void multiply(int64_t rows, const A* a, int64_t a_row, int64_t a_step, const Panels<A>& panels,
              int64_t panel, int64_t last_panel, A* block, Ahead&& ahead, Begin&& begin,
              Done&& done) {
    constexpr int64_t W = Panels<A>::kWidth;
    // Sums of nothing are zero, too.
    const int64_t chains = std::max<int64_t>(1, divide_up(panels.rows, kPointwiseChain));
    const int64_t blocks = divide_up(rows, kRowBlock);
    const int64_t steps = (last_panel - panel) * blocks * chains;
    for (int64_t step = 0; panel < last_panel; ++panel)
        for (int64_t b = 0; b < blocks; ++b) {
            const int64_t r = rows * b / blocks, count = rows * (b + 1) / blocks - r;
            const bool begun = begin(r, count, panel * W);
            for (int64_t chain = 0; chain < chains; ++chain, ++step) {
                ahead(step, steps);
                const int64_t k = chain * kPointwiseChain;
                tile_matmul<A>(count, panels.vectors(panel),
                               std::min(kPointwiseChain, panels.rows - k),
                               a + r * a_row + k * a_step, a_row, a_step, panels.at(panel) + k * W,
                               W, block, W, begun || k > 0, kPointwiseChain);
            }
            done(r, count, panel * W, panels.width(panel));
        }
}

}  // namespace bigops
