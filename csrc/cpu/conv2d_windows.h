// What the passes of a convolution by products of windows share: along an axis, which source pixel
// meets which tap.
//
// A tile of the result's rows reads a band of the source's, padded, with a pixel's channels side by
// side. Of the pixels of a result's row those that one tap reaches lie evenly in both, so that their
// windows need not be unfolded: a tap's product reads the band as it is.
#pragma once

#include <cstdlib>

#include "activation.h"
#include "conv2d_act.h"
#include "conv2d_band.h"
#include "conv2d_depthwise.h"
#include "conv2d_panels.h"
#include "conv2d_taps.h"
#include "threads.h"

namespace bigops {

// Along height or width: result pixel i and tap t meet source pixel (i mul + t tap + base) / div,
// where that is whole. Of a convolution mul is the stride, of its input's gradient div.
struct Axis {
    int64_t mul, tap, base, div, kernel;

    static Axis forward(const Conv2dParams& conv, size_t axis, int64_t kernel) {
        return {conv.stride[axis], conv.dilation[axis], -conv.padding[axis], 1, kernel};
    }
    static Axis gradient(const Conv2dParams& conv, size_t axis, int64_t kernel) {
        return {1, -conv.dilation[axis], conv.padding[axis], conv.stride[axis], kernel};
    }
    int64_t scaled(int64_t i, int64_t t) const { return i * mul + t * tap + base; }
    bool meet(int64_t i, int64_t t) const { return scaled(i, t) % div == 0; }
    int64_t source(int64_t i, int64_t t) const { return scaled(i, t) / div; }
    // The first result pixel from `i` on that tap t reaches; div further is the next.
    int64_t first(int64_t i, int64_t t) const {
        while (!meet(i, t)) ++i;
        return i;
    }
    // The least source pixel that results from `i` on meet; how many at most `count` results meet.
    int64_t least(int64_t i) const {
        const int64_t at = scaled(i, 0) + std::min<int64_t>(0, (kernel - 1) * tap);
        return at > 0 ? divide_up(at, div) : at / div;
    }
    int64_t most(int64_t count) const {
        return ((count - 1) * mul + (kernel - 1) * std::abs(tap)) / div + 1;
    }
};

// From one pixel to the next: in a band of `channels`; in blocks as wide as panels of `channels`.
template <class A>
int64_t band_pitch(int64_t channels) {
    return channels < 2 * kLanes<A> ? channels : odd_lines<A>(channels);
}
template <class A>
int64_t panel_pitch(int64_t channels) {
    return std::min<int64_t>(kTileLanes<A>, round_up(channels, kLanes<A>));
}

// run(begin, count) for nearly equal parts of `length` terms, none longer than `chain`.
template <class Run>
void for_chains(int64_t length, int64_t chain, Run&& run) {
    const int64_t chains = divide_up(length, chain);
    for (int64_t i = 0; i < chains; ++i) {
        const int64_t begin = length * i / chains;
        run(begin, length * (i + 1) / chains - begin);
    }
}

// copy(image, at, first, run): pixels [first, first + run) of a block that begins with row y lie
// evenly from `at` on; in as few runs as the image's rows allow.
template <class T, class Copy>
void for_rows(const Image<T>& image, int64_t n, int64_t channel, int64_t y, int64_t width,
              int64_t pixels, Copy&& copy) {
    const int64_t run = image.stride_h == width * image.stride_w ? pixels : width;
    for (int64_t first = 0; first < pixels; first += run, ++y)
        copy(image, image.at(n, channel, y, 0), first, run);
}

// grad_input; `saved` only where there is an activation.
void windows_grad_input(const View& grad_out, const OptionalView& saved, const View& weight,
                        const View& grad_input, const Conv2dParams& conv, Activation activation);

// What an activation makes of a gradient, in place; nothing for none.
template <class A>
using Slope = void (*)(int64_t count, const A* saved, A* grad);
template <class A, Activation kActivation>
void slope(int64_t count, const A* saved, A* grad) {
    for_lanes<A>(count, [&](int64_t i, auto... some) {
        const Vec<A> g = load(grad + i, some...);
        store(grad + i, activation_gradient<kActivation, A>(g, load(saved + i, some...)), some...);
    });
}

// Calls f(zero of the storage type, slope of its compute type).
template <class F>
void with_slope(DType dtype, Activation activation, F&& f) {
    with_float_type(dtype, [&](auto zero) {
        using A = compute_t<decltype(zero)>;
        with_activation(activation, [&](auto which) {
            f(zero, &slope<A, decltype(which)::value>);
        });
    });
}

}  // namespace bigops
