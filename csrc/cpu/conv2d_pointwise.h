// What forward and backward of filters of one pixel share: their operands in either layout, tile by
// tile.
//
// Tiles of pixels are packed once for all products they take part in. The microkernel's lanes are
// pixels of planes and channels of pixels, so that no result is turned around.
#pragma once

#include "conv2d_depthwise.h"
#include "conv2d_panels.h"
#include "threads.h"

namespace bigops {

constexpr int64_t kTileBytes = 256 << 10;    // of packed operands, within L2
constexpr int64_t kMostPixels = 4 * 64;      // of a tile

inline bool in_planes(const View& input, const View& out) {
    return input.strides[1] != 1 || out.strides[1] != 1;
}

// Images as the products see them: numbers of a run side by side (pixels of a plane, or a pixel's
// channels), the pixels those of the output.
template <class T>
struct Pixels {
    T* data;
    int64_t image, channel, row, column, width;
    bool joined;  // the pixels follow each other

    Pixels(const View& view, const Size2& stride, int64_t conv_w)
        : data(view.ptr<T>()), image(view.strides[0]), channel(view.strides[1]),
          row(view.strides[2] * stride[0]), column(view.strides[3] * stride[1]), width(conv_w),
          joined(stride == Size2{1, 1} && (row == width * column || view.shape[2] == 1)) {}
    int64_t offset(int64_t pixel) const { return pixel / width * row + pixel % width * column; }
    T* at(int64_t n, int64_t c, int64_t pixel) const {
        return data + n * image + c * channel + offset(pixel);
    }
};

// Pixels of an image, which may be none.
struct Tile {
    int64_t n, first, count;
};

// Fetches the numbers of a tile's channels, of `steps` equal parts the given one.
template <class T>
void fetch_part(const Pixels<T>& of, const Tile& tile, int64_t channels, bool planes, int64_t step,
                int64_t steps) {
    const int64_t runs = planes ? channels : tile.count;
    const int64_t last = tile.first + tile.count - 1;
    const int64_t length = planes ? of.offset(last) - of.offset(tile.first) + 1 : channels;
    for (int64_t i = runs * step / steps; tile.count && i < runs * (step + 1) / steps; ++i)
        fetch(planes ? of.at(tile.n, i, tile.first) : of.at(tile.n, 0, tile.first + i), length);
}

// Of planes whose pixels are not side by side: panels[channel][pixel], or turned [pixel][channel].
template <class T, class A = compute_t<T>>
void pack_apart(const Panels<A>& panels, bool turned, const Pixels<const T>& from, int64_t n,
                int64_t first) {
    constexpr int64_t W = Panels<A>::kWidth;
    const int64_t channels = turned ? panels.columns : panels.rows;
    std::vector<int64_t> offsets(static_cast<size_t>(turned ? panels.rows : panels.columns));
    for (size_t i = 0; i < offsets.size(); ++i)
        offsets[i] = from.offset(first + static_cast<int64_t>(i));
    for (int64_t c = 0; c < channels; ++c) {
        const T* plane = from.at(n, c, 0);
        A* to = turned ? panels.at(c / W) + c % W : panels.at(0) + c * W;
        for (size_t i = 0; i < offsets.size(); ++i) {
            const auto pixel = static_cast<int64_t>(i);
            to[turned ? pixel * W : pixel / W * W * panels.rows + pixel % W] =
                to_float(plane[offsets[i]]);
        }
    }
}

template <class T>
struct Operands {
    using A = compute_t<T>;
    Conv2dShape s;
    bool planes;
    int64_t pixels;  // of an output
    Pixels<const T> input;
    const T* weight;
    int64_t weight_row, weight_step;

    Operands(const View& input_view, const View& weight_view, const View& out,
             const Conv2dParams& conv, const Conv2dShape& shape)
        : s(shape), planes(in_planes(input_view, out)), pixels(s.conv_h * s.conv_w),
          input(input_view, conv.stride, s.conv_w), weight(weight_view.ptr<T>()),
          weight_row(weight_view.strides[0]), weight_step(weight_view.strides[1]) {}

    const T* filter(int64_t k) const { return weight + k * weight_row; }
    // The tiles of an image, of whole `step`s of pixels, with so many numbers to pack for a pixel.
    int64_t tile(int64_t numbers, int64_t step, int threads) const {
        const int64_t bytes = static_cast<int64_t>(sizeof(A)) * std::max<int64_t>(1, numbers);
        const int64_t fit = kTileBytes / bytes / step * step;
        const int64_t most = std::min(kMostPixels, divide_up(s.batch * pixels, threads));
        const int64_t tiles = divide_up(pixels, std::max(step, std::min(fit, most)));
        return round_up(divide_up(pixels, tiles), step);
    }
    // The tile behind one.
    Tile next(const Tile& now, int64_t step) const {
        const bool same = now.first + step < pixels;
        const Tile then = {same ? now.n : now.n + 1, same ? now.first + step : 0, 0};
        return {then.n, then.first, then.n < s.batch ? std::min(step, pixels - then.first) : 0};
    }
    // Channels of the input at a tile's pixels: [channel][pixel], or turned.
    void pack_planes(const Panels<A>& panels, bool turned, int64_t n, int64_t first) const {
        if (input.joined)
            pack<T>(panels, turned, input.column, [&](int64_t c) { return input.at(n, c, first); });
        else pack_apart<T>(panels, turned, input, n, first);
    }
};

// Of either layout the numbers of a run lie side by side, and the runs of output-like tensors
// follow each other.
inline Conv2dShape pointwise_shape(const View& input, const View& weight, const View& out,
                            const Conv2dParams& conv) {
    const Conv2dShape s = conv2d_shape(input, weight, out, conv, kNoPool);
    require(s.kernel_h == 1 && s.kernel_w == 1 && conv.groups == 1 && conv.padding == Size2{0, 0},
            "pointwise filters have one pixel in one group, without padding");
    const int dim = in_planes(input, out) ? 3 : 1;
    depthwise_fits(input, dim, {input});
    depthwise_fits(out, dim, {out});
    require(Pixels<const char>(out, {1, 1}, s.conv_w).joined,
            "pixels of the output must follow each other");
    return s;
}
inline void like_output(const View& out, std::initializer_list<OptionalView> views) {
    for (const OptionalView& view : views)
        require(!view || (same_shape(*view, out) && view->dtype == out.dtype &&
                          std::equal(out.strides, out.strides + 4, view->strides)),
                "tensors of the output's shape differ in dtype or strides");
}

}  // namespace bigops
