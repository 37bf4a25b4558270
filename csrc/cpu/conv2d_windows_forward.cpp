// A convolution by products of windows, with all that follows done while a block of its result is
// in the first caches.
#include "conv2d_windows_sums.h"
#include "huge_pages.h"

namespace bigops {
namespace {

template <class A, Activation kActivation>
void activate_all(int64_t count, A* block) {
    for (int64_t i = 0; i < count; i += kLanes<A>)
        store(block + i, activate<kActivation, A>(load(block + i)));
}

template <class T>
void forward(const View& input, const View& weight, const OptionalView& bias,
             const OptionalView& residual, const View& out, const OptionalView& pre,
             const Conv2dParams& conv, const Conv2dShape& s,
             void (*activate)(int64_t, compute_t<T>*)) {
    using A = compute_t<T>;
    constexpr int64_t W = Panels<A>::kWidth;
    const Windows w = {Axis::forward(conv, 0, s.kernel_h), Axis::forward(conv, 1, s.kernel_w),
                       s.batch, s.conv_h, s.conv_w, s.group_channels, s.group_filters};
    const int threads = threads_for(s.operations());
    const Panels<A> taps(w.taps() * w.sources, w.results);
    const int64_t pitch = panel_pitch<A>(w.results), bias_size = round_up(w.results, W);
    const Aligned<A> biases = allocate<A>(bias_size);
    for (int64_t group = 0; group < conv.groups; ++group) {
        const int64_t c0 = group * w.sources, k0 = group * w.results;
        pack_taps<T>({weight, k0, false}, w, taps, threads);
        std::fill_n(biases.get(), bias_size, A{});
        for (int64_t k = 0; bias && k < w.results; ++k)
            biases[static_cast<size_t>(k)] = to_float(bias->ptr<T>()[(k0 + k) * bias->strides[0]]);
        Image<const T> from(input);
        from.data += c0 * from.stride_c;
        sum_windows<A>(
            w, taps, threads,
            [&](int64_t n, int64_t top, int64_t rows, int64_t left, int64_t columns, A* to,
                int64_t to_pitch) {
                copy_band(from, n, s.height, s.width, w.sources, top, rows, left, columns, to,
                          to_pitch);
            },
            [&](int64_t p, int64_t pixels, A* block) {
                for (int64_t i = 0; i < pixels; ++i)
                    std::copy_n(biases.get() + p * W, pitch, block + i * pitch);
            },
            [&](int64_t n, int64_t p, int64_t y, int64_t pixels, A* block) {
                const int64_t k = k0 + p * W, count = taps.width(p);
                const auto put = [&](const View& view) {
                    for_rows(Image<T>(view), n, k, y, w.width, pixels,
                             [&](const Image<T>& image, T* at, int64_t first, int64_t run) {
                                 copy_2d(static_cast<const A*>(block) + first * pitch, pitch,
                                         int64_t{1}, at, image.stride_w, image.stride_c, run,
                                         count);
                             });
                };
                if (residual) {
                    const Aligned<A> added = allocate<A>(pixels * pitch);
                    for_rows(Image<const T>(*residual), n, k, y, w.width, pixels,
                             [&](const Image<const T>& image, const T* at, int64_t first,
                                 int64_t run) {
                                 copy_2d(at, image.stride_w, image.stride_c,
                                         added.get() + first * pitch, pitch, int64_t{1}, run, count);
                             });
                    for (int64_t i = 0; i < pixels; ++i)
                        for_lanes<A>(count, [&](int64_t j, auto... some) {
                            const int64_t at = i * pitch + j;
                            store(block + at, load(block + at) + load(added.get() + at, some...));
                        });
                }
                if (pre) put(*pre);
                if (activate) activate(pixels * pitch, block);
                put(out);
            });
    }
}

}  // namespace

void conv2d_windows_forward(const View& input, const View& weight, const OptionalView& bias,
                            const OptionalView& residual, const View& out,
                            const OptionalView& pre, const Conv2dParams& conv,
                            Activation activation) {
    const Conv2dShape s = conv2d_shape(input, weight, out, conv, kNoPool);
    bias_fits(bias, weight);
    for (const OptionalView& like : {residual, pre})
        require(!like || (same_shape(*like, out) && like->dtype == out.dtype),
                "tensors of the output's shape differ in shape or dtype");
    if (out.numel() == 0) return;
    expect_writes(out);
    expect_writes(pre);
    with_float_type(input.dtype, [&](auto zero) {
        using T = decltype(zero);
        with_activation(activation, [&](auto which) {
            forward<T>(input, weight, bias, residual, out, pre, conv, s,
                       activation == Activation::none
                           ? nullptr
                           : &activate_all<compute_t<T>, decltype(which)::value>);
        });
    });
}

}  // namespace bigops
