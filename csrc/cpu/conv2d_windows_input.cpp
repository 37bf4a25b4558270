// The gradient of a convolution's input: the same sums, over windows of the output's gradient.
#include "conv2d_windows_sums.h"
#include "huge_pages.h"

namespace bigops {
namespace {

template <class T>
void gradient(const View& grad_out, const OptionalView& saved, const View& weight,
              const View& grad_input, const Conv2dParams& conv, const Conv2dShape& s,
              Slope<compute_t<T>> slope) {
    using A = compute_t<T>;
    constexpr int64_t W = Panels<A>::kWidth;
    const Windows w = {Axis::gradient(conv, 0, s.kernel_h), Axis::gradient(conv, 1, s.kernel_w),
                       s.batch, s.height, s.width, s.group_filters, s.group_channels};
    const int64_t pitch = panel_pitch<A>(w.results);
    const int threads = threads_for(s.operations());
    const Panels<A> taps(w.taps() * w.sources, w.results);
    const Image<T> to(grad_input);
    for (int64_t group = 0; group < conv.groups; ++group) {
        const int64_t c0 = group * w.results, k0 = group * w.sources;
        pack_taps<T>({weight, k0, true}, w, taps, threads);
        sum_windows<A>(
            w, taps, threads,
            [&](int64_t n, int64_t top, int64_t rows, int64_t left, int64_t columns, A* band,
                int64_t band_pitch) {
                const auto copy = [&](const View& view, A* at) {
                    Image<const T> image(view);
                    image.data += k0 * image.stride_c;
                    copy_band(image, n, s.conv_h, s.conv_w, w.sources, top, rows, left, columns,
                              at, band_pitch);
                };
                copy(grad_out, band);
                if (!saved) return;
                // What lies between pixels is nobody's; there may be signalling numbers.
                const int64_t size = rows * columns * band_pitch;
                const Aligned<A> kept = allocate<A>(size);
                copy(*saved, kept.get());
                slope(size, kept.get(), band);
            },
            [&](int64_t, int64_t pixels, A* block) { std::fill_n(block, pixels * pitch, A{}); },
            [&](int64_t n, int64_t p, int64_t y, int64_t pixels, A* block) {
                for_rows(to, n, c0 + p * W, y, w.width, pixels,
                         [&](const Image<T>& image, T* at, int64_t first, int64_t run) {
                             copy_2d(static_cast<const A*>(block) + first * pitch, pitch, int64_t{1},
                                     at, image.stride_w, image.stride_c, run, taps.width(p));
                         });
            });
    }
}

}  // namespace

void windows_grad_input(const View& grad_out, const OptionalView& saved, const View& weight,
                        const View& grad_input, const Conv2dParams& conv, Activation activation) {
    const Conv2dShape s = conv2d_shape(grad_input, weight, grad_out, conv, kNoPool);
    expect_writes(grad_input);
    with_slope(grad_input.dtype, activation, [&](auto zero, auto slope) {
        gradient<decltype(zero)>(grad_out, saved, weight, grad_input, conv, s, slope);
    });
}

}  // namespace bigops
