// The sums of products over windows: a convolution, or its input's gradient.
#pragma once

#include <vector>

#include "conv2d_windows.h"

namespace bigops {

constexpr int64_t kWindowPixels = 96;       // of a tile, about: each reads all of the weight
constexpr int64_t kBandBytes = 512 << 10;   // of a tile's sources, within L2
constexpr int64_t kWindowTasks = 4;         // of a thread, at least

// result[pixel][r] = the sum over taps and s of source[its pixel at the tap][s] tap[s][r].
struct Windows {
    Axis rows, columns;
    int64_t batch, height, width;  // of the result
    int64_t sources, results;      // channels
    int64_t taps() const { return rows.kernel * columns.kernel; }
};

// The taps' matrices, one after the other, in panels of result channels.
template <class T, class A = compute_t<T>>
void pack_taps(const Taps<const T>& taps, const Windows& w, const Panels<A>& to, int threads) {
    constexpr int64_t W = Panels<A>::kWidth;
#pragma omp parallel for num_threads(threads)
    for (int64_t p = 0; p < to.count(); ++p) {
        const int64_t width = to.width(p), pad = to.vectors(p) * kLanes<A> - width;
        for (int64_t row = 0; pad && row < to.rows; ++row)
            std::fill_n(to.at(p) + row * W + width, pad, A{});
        taps.for_matrices(w.sources, p * W, width, w.sources * W, W,
                          [&](const T* from, int64_t from_i, int64_t from_j, int64_t at,
                              int64_t i, int64_t j, int64_t rows, int64_t columns) {
                              copy_2d(from, from_i, from_j, to.at(p) + at, i, j, rows, columns);
                          });
    }
}

// band(n, top, rows, left, columns, to, pitch) copies source pixels, padded; begin(panel, pixels,
// block) puts what is added to; done(n, panel, y, pixels, block) takes the sums of `pixels` pixels
// from row y on. Channels of a block are as panel_pitch says.
template <class A, class Band, class Begin, class Done>
void sum_windows(const Windows& w, const Panels<A>& taps, int threads, Band&& band, Begin&& begin,
                 Done&& done) {
    constexpr int64_t W = Panels<A>::kWidth;
    const Axis &rows = w.rows, &columns = w.columns;
    const int64_t pitch = band_pitch<A>(w.sources), block_pitch = panel_pitch<A>(w.results);
    const int64_t left = columns.least(0), across = columns.most(w.width);
    const int64_t row_bytes = across * pitch * static_cast<int64_t>(sizeof(A));
    int64_t high = std::clamp<int64_t>(divide_up(kWindowPixels, w.width), 1, w.height);
    while (high > 1 && rows.most(high) * row_bytes > kBandBytes) --high;
    const int64_t tiles = divide_up(w.height, high), panels = taps.count();
    high = divide_up(w.height, tiles);
    const int64_t tasks = std::max<int64_t>(1, w.batch * tiles);
    const int64_t splits = std::clamp<int64_t>(divide_up(kWindowTasks * threads, tasks), 1, panels);
    // Without steps between the sources every tap reaches every pixel, and all taps are one sum. So
    // are rows without a gap one row.
    const bool all = rows.div == 1 && columns.div == 1;
    const bool gapless = all && rows.mul * across == columns.mul * w.width;
    const int64_t together = all ? w.taps() : 1, depth = together * w.sources;
    std::vector<int64_t> offsets(static_cast<size_t>(depth));
    for (int64_t k = 0; k < depth; ++k) {
        const int64_t tap = k / w.sources;
        offsets[static_cast<size_t>(k)] =
            (tap / columns.kernel * rows.tap * across + tap % columns.kernel * columns.tap) * pitch +
            k % w.sources;
    }
#pragma omp parallel num_threads(threads)
    {
        const Aligned<A> from = allocate<A>(rows.most(high) * across * pitch + kLanes<A>);
        const Aligned<A> block = allocate<A>(high * w.width * block_pitch);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < w.batch * tiles * splits; ++task) {
            const int64_t n = task / (tiles * splits), split = task % splits;
            const int64_t y0 = task / splits % tiles * high, y1 = std::min(w.height, y0 + high);
            const int64_t top = rows.least(y0);
            if (y0 >= y1) continue;
            band(n, top, rows.most(y1 - y0), left, across, from.get(), pitch);
            for (int64_t p = panels * split / splits; p < panels * (split + 1) / splits; ++p) {
                begin(p, (y1 - y0) * w.width, block.get());
                for (int64_t tap = 0; tap < w.taps(); tap += together) {
                    const int64_t ty = tap / columns.kernel, tx = tap % columns.kernel;
                    const int64_t x = columns.first(0, tx);
                    const int64_t count = divide_up(w.width - x, columns.div);
                    if (count <= 0) continue;
                    const A* source = from.get() + (columns.source(x, tx) - left) * pitch;
                    const int64_t row = across * pitch;
                    for_chains(depth, kPointwiseChain, [&](int64_t k, int64_t terms) {
                        const int64_t* of_terms = offsets.data() + k;
                        const A* matrix = taps.at(p) + (tap * w.sources + k) * W;
                        for (int64_t y = rows.first(y0, ty); y < y1; y += gapless ? y1 : rows.div)
                            tile_matmul<A>(gapless ? (y1 - y0) * count : count, taps.vectors(p),
                                           terms, source + (rows.source(y, ty) - top) * row,
                                           columns.mul * pitch, of_terms, matrix, W,
                                           block.get() + ((y - y0) * w.width + x) * block_pitch,
                                           columns.div * block_pitch, true, terms);
                    });
                }
                done(n, p, y0, (y1 - y0) * w.width, block.get());
            }
        }
    }
}

}  // namespace bigops
