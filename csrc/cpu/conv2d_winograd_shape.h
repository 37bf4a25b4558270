// What Winograd's convolution and its weight's gradient ask of their tensors.
#pragma once

#include "conv2d_taps.h"
#include "conv2d_tile.h"

namespace bigops {

constexpr int64_t kWeightChannels = 16;  // that are transformed together

// Whether a sum of 0 * x, over everything that a call computed, tells that all x were finite.
template <class A>
bool finite(Vec<A> zeros) {
    bool all = true;
    for (int i = 0; i < kLanes<A>; ++i) all &= zeros[i] == 0;
    return all;
}

// The size of a 3x3 convolution's output.
inline Size2 winograd_out_size(const View& input, const View& weight, Size2 padding) {
    require(input.ndim == 4 && weight.ndim == 4, "conv2d takes 4-d tensors");
    require(input.dtype == weight.dtype, "conv2d dtypes differ");
    require(weight.shape[2] == 3 && weight.shape[3] == 3, "the kernel must be 3x3");
    Size2 out;
    for (size_t i = 0; i < 2; ++i) {
        require(padding[i] >= 0 && padding[i] <= 2, "the padding must be 0, 1 or 2");
        out[i] = input.shape[2 + i] + 2 * padding[i] - 2;
        require(out[i] > 0, "kernel exceeds input");
    }
    require(input.numel() > 0 && weight.numel() > 0, "conv2d takes no empty tensors here");
    return out;
}

inline void require_image(const View& t, int64_t batch, int64_t channels, Size2 size, DType dtype) {
    require(t.ndim == 4 && t.dtype == dtype && t.shape[0] == batch &&
                t.shape[1] == channels && t.shape[2] == size[0] && t.shape[3] == size[1],
            "out or index has the wrong shape or dtype");
}

// Entries [begin, end) of a dimension.
template <class T>
View slice(View view, int dim, int64_t begin, int64_t end) {
    view.data = view.ptr<T>() + begin * view.strides[dim];
    view.shape[dim] = end - begin;
    return view;
}

// Each thread runs a convolution of its own on [begin, end) of `count` channels or filters, whole runs
// of `least` but the last: what one thread has transformed, no other has to fetch from its cache.
// Returns whether all is finite.
template <class Run>
bool apart(int threads, int64_t count, int64_t least, Run&& run) {
    const int64_t runs = (count + least - 1) / least;
    const int64_t slices = std::min<int64_t>(threads, runs);
    bool all = true;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(&& : all)
    for (int64_t i = 0; i < slices; ++i)
        all = all && run(runs * i / slices * least, std::min(count, runs * (i + 1) / slices * least));
    return all;
}

template <class F>
bool with_float(DType dtype, F&& f) {
    bool found = false;
    with_float_type(dtype, [&](auto zero) { found = f(zero); });
    return found;
}

}  // namespace bigops
