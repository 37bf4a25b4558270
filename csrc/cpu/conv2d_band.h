// Bands of an image: some of its rows, padded, with a pixel's channels side by side.
#pragma once

#include <algorithm>

#include "conv2d_copy.h"
#include "conv2d_tile.h"
#include "microkernel.h"

namespace bigops {

// Channels as they lie in a band: whole vectors.
template <class A>
inline int64_t channel_pitch(int64_t channels) {
    return round_up(channels, kLanes<A>);
}

// Rows [top, top + rows) and columns [left, left + columns) of an image, zero where it has none.
// Pixels are `pitch` apart in the band; channels up to a whole vector are zero, if there is room.
template <class A, class T>
void copy_band(const Image<const T>& image, int64_t n, int64_t height, int64_t width,
               int64_t channels, int64_t top, int64_t rows, int64_t left, int64_t columns, A* band,
               int64_t pitch) {
    const int64_t first = std::clamp<int64_t>(-left, 0, columns);
    const int64_t last = std::clamp<int64_t>(width - left, first, columns);
    const int64_t end = std::min(pitch, channel_pitch<A>(channels));
    for (int64_t row = 0; row < rows; ++row, band += columns * pitch) {
        const int64_t y = top + row;
        if (y < 0 || y >= height) {
            std::fill(band, band + columns * pitch, A{});
            continue;
        }
        std::fill(band, band + first * pitch, A{});
        std::fill(band + last * pitch, band + columns * pitch, A{});
        if (first == last) continue;
        copy_2d(image.at(n, 0, y, left + first), image.stride_w, image.stride_c,
                band + first * pitch, pitch, int64_t{1}, last - first, channels);
        for (int64_t x = first; end > channels && x < last; ++x)
            std::fill(band + x * pitch + channels, band + x * pitch + end, A{});
    }
}

}  // namespace bigops
