// Tiles of images, and their transforms to the 16 numbers that are multiplied, and back. Images are
// taken in bands of tile rows, padded, with a pixel's channels side by side, so that every transform
// works on whole vectors of channels.
#pragma once

#include <algorithm>
#include <array>

#include "conv2d_band.h"

namespace bigops {

constexpr int64_t kPoints = 16;  // numbers of a transformed tile

// Where the tiles of a batch of (outputs of) convolutions lie: rows of tiles, one image's after
// another's.
struct Tiles {
    int64_t rows, columns;  // of tiles, in an image
    Tiles(int64_t height, int64_t width) : rows(divide_up(height, 2)), columns(divide_up(width, 2)) {}

    // run(image, first row, rows, tiles before) for each image's part of rows [begin, end).
    template <class Run>
    void for_images(int64_t begin, int64_t end, Run&& run) const {
        for (int64_t row = begin; row < end;) {
            const int64_t image = row / rows, first = row % rows;
            const int64_t count = std::min(end - row, rows - first);
            run(image, first, count, (row - begin) * columns);
            row += count;
        }
    }
};

// 16 matrices, (row, channel), of transformed tiles or of products. Neither rows nor matrices are
// multiples of 1024 bytes apart: columns, and what is written to all matrices at once, would fall
// upon few lines of the first cache.
template <class A>
struct Points {
    A* data;
    int64_t pitch, step;  // from one row to the next; from one matrix to the next

    static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A));

    Points(A* data, int64_t rows, int64_t channels)
        : data(data), pitch(apart(channel_pitch<A>(channels))), step(apart(rows * pitch)) {}
    static int64_t size(int64_t rows, int64_t channels) {
        return kPoints * Points(nullptr, rows, channels).step;
    }
    static int64_t apart(int64_t count) {
        return round_up(count, kLine) + (round_up(count, kLine) % (16 * kLine) == 0 ? kLine : 0);
    }
    A* at(int64_t point, int64_t tile) const { return data + point * step + tile * pitch; }
};

// B' d B of each 4x4 pixels: in both directions d0 - d2, d1 + d2, d2 - d1, d1 - d3.
template <class V>
inline void input_points(V& a, V& b, V& c, V& d) {
    const V first = a - c, second = b + c, third = c - b, fourth = b - d;
    a = first, b = second, c = third, d = fourth;
}

template <class A>
void transform_input(const A* band, int64_t rows, int64_t columns, int64_t channels,
                     const Points<A>& points, int64_t tile) {
    const int64_t pitch = channel_pitch<A>(channels), row_pitch = (2 * columns + 2) * pitch;
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column, ++tile) {
            const A* from = band + 2 * row * row_pitch + 2 * column * pitch;
            A* to = points.at(0, tile);
            for (int64_t c = 0; c < channels; c += kLanes<A>) {
                Vec<A> d[4][4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j) d[i][j] = load(from + i * row_pitch + j * pitch + c);
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) input_points(d[0][j], d[1][j], d[2][j], d[3][j]);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    input_points(d[i][0], d[i][1], d[i][2], d[i][3]);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j)
                        store(to + (4 * i + j) * points.step + c, d[i][j]);
                }
            }
        }
}

// Of each 2x2 gradients, for the gradient of 3x3 weights: in both directions g0, (g0 + g1) / 2,
// (g0 - g1) / 2, -g1.
template <class A>
void transform_gradient(const A* band, int64_t rows, int64_t columns, int64_t channels,
                        const Points<A>& points, int64_t tile) {
    const int64_t pitch = channel_pitch<A>(channels), row_pitch = 2 * columns * pitch;
    const A half = static_cast<A>(0.5);
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t column = 0; column < columns; ++column, ++tile) {
            const A* from = band + 2 * row * row_pitch + 2 * column * pitch;
            A* to = points.at(0, tile);
            for (int64_t c = 0; c < channels; c += kLanes<A>) {
                Vec<A> g[4][2];
#pragma GCC unroll 2
                for (int j = 0; j < 2; ++j) {
                    const Vec<A> top = load(from + j * pitch + c);
                    const Vec<A> bottom = load(from + row_pitch + j * pitch + c);
                    g[0][j] = top, g[1][j] = half * (top + bottom);
                    g[2][j] = half * (top - bottom), g[3][j] = -bottom;
                }
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    A* at = to + 4 * i * points.step + c;
                    store(at, g[i][0]);
                    store(at + points.step, half * (g[i][0] + g[i][1]));
                    store(at + 2 * points.step, half * (g[i][0] - g[i][1]));
                    store(at + 3 * points.step, -g[i][1]);
                }
            }
        }
}

// A' m A of a tile's 16 products: 2x2 outputs, in both directions m0 + m1 + m2, m1 - m2 - m3.
template <class A>
inline std::array<Vec<A>, 4> output_tile(const Points<A>& points, int64_t tile, int64_t channel) {
    const A* from = points.at(0, tile) + channel;
    Vec<A> top[4], bottom[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const auto m = [&](int i) { return load(from + (4 * i + j) * points.step); };
        const Vec<A> second = m(1), third = m(2);
        top[j] = m(0) + second + third, bottom[j] = second - third - m(3);
    }
    return {top[0] + top[1] + top[2], top[1] - top[2] - top[3],
            bottom[0] + bottom[1] + bottom[2], bottom[1] - bottom[2] - bottom[3]};
}

// Filters as the products read them: U = G g G', point by point in panels of kTileLanes filters,
// (channel, filter) in each; filters up to a panel's end are zero.
template <class A>
struct Filters {
    A* data;
    int64_t channels, filters;

    int64_t panels() const { return divide_up(filters, kTileLanes<A>); }
    int64_t step() const { return Points<A>::apart(panels() * channels * kTileLanes<A>); }
    int64_t size() const { return kPoints * step(); }
    A* at(int64_t point, int64_t panel, int64_t channel) const {
        return data + point * step() + (panel * channels + channel) * kTileLanes<A>;
    }
};

// In both directions g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2.
template <class A>
inline void filter_points(Vec<A> g0, Vec<A> g1, Vec<A> g2, Vec<A> (&to)[4]) {
    const A half = static_cast<A>(0.5);
    const Vec<A> outer = half * (g0 + g2), inner = half * g1;
    to[0] = g0, to[1] = outer + inner, to[2] = outer - inner, to[3] = g2;
}

// Weights of channels [begin, end): taps[tap][channel - begin][filter], whole panels of filters; from
// the last tap to the first if `flipped`.
template <class A>
void transform_filters(const A* taps, int64_t begin, int64_t end, bool flipped,
                       const Filters<A>& to) {
    const int64_t pitch = to.panels() * kTileLanes<A>;
    const int64_t step = (end - begin) * pitch * (flipped ? -1 : 1);
    if (flipped) taps -= 8 * step;
    for (int64_t panel = 0; panel < to.panels(); ++panel)
        for (int64_t c = begin; c < end; ++c) {
            const A* at = taps + (c - begin) * pitch + panel * kTileLanes<A>;
            A* first = to.at(0, panel, c);
            for (int v = 0; v < kTileLanes<A>; v += kLanes<A>) {
                Vec<A> columns[3][4], points[4];
#pragma GCC unroll 3
                for (int j = 0; j < 3; ++j)
                    filter_points<A>(load(at + v + j * step), load(at + v + (3 + j) * step),
                                     load(at + v + (6 + j) * step), columns[j]);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) {
                    filter_points<A>(columns[0][i], columns[1][i], columns[2][i], points);
#pragma GCC unroll 4
                    for (int j = 0; j < 4; ++j)
                        store(first + (4 * i + j) * to.step() + v, points[j]);
                }
            }
        }
}

// Back to 3x3 sums, for the weight's gradient: G' m G, in both directions m0 + m1 + m2, m1 - m2,
// m1 + m2 + m3. taps[tap][channel - begin][filter], whole vectors of filters; returns the sum of 0
// times each.
template <class A>
Vec<A> tap_sums(const Points<A>& sums, int64_t begin, int64_t end, int64_t filters, A* taps) {
    const int64_t pitch = channel_pitch<A>(filters), step = (end - begin) * pitch;
    Vec<A> zeros = {};
    for (int64_t c = begin; c < end; ++c)
        for (int64_t f = 0; f < pitch; f += kLanes<A>) {
            const A* from = sums.at(0, c) + f;
            A* to = taps + (c - begin) * pitch + f;
            Vec<A> rows[3][4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; ++j) {
                const auto m = [&](int i) { return load(from + (4 * i + j) * sums.step); };
                const Vec<A> second = m(1), third = m(2), both = second + third;
                rows[0][j] = m(0) + both, rows[1][j] = second - third, rows[2][j] = both + m(3);
            }
#pragma GCC unroll 3
            for (int i = 0; i < 3; ++i) {
                const Vec<A> both = rows[i][1] + rows[i][2];
                const Vec<A> found[3] = {rows[i][0] + both, rows[i][1] - rows[i][2],
                                         both + rows[i][3]};
#pragma GCC unroll 3
                for (int j = 0; j < 3; ++j) {
                    zeros = fma(Vec<A>{}, found[j], zeros);
                    store(to + (3 * i + j) * step, found[j]);
                }
            }
        }
    return zeros;
}

}  // namespace bigops
