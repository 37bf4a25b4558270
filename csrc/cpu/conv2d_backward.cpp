// Backward of convolution + ReLU + max-pooling, through the winners only. A window passes its
// gradient g to one place, the pixel p that won it, so per window and filter k
//     grad_weight[k] += g * patch(input, p),      grad_input patch(p) += g * weight[k],
// where patch(p) is the kernel-sized piece of the image under p. With 2x2 windows that is a quarter
// of the multiplications of the dense convolutions that a framework runs over the scattered
// gradient, and that gradient is never written. Windows of 1x1 make it the dense backward.
//
// Both sums are one loop (conv2d_runs.h) over runs of contiguous memory: in a padded image
// stored pixel by pixel, a kernel row under p is kernel_w * channels numbers in a row, and so it is
// in a filter stored likewise. For grad_weight the sum over a band's windows of one filter stays in
// registers; for grad_input the filters that won at the same pixel are brought together first
// (a counting sort by place) and their sum stays in registers. Images with few channels have runs
// too short for vectors: they are unfolded to one pixel of `taps` numbers per output first.
//
// Threads own whole images, and add their parts of grad_weight in a fixed order.
#include "conv2d_winners.h"
#include "huge_pages.h"
#include "threads.h"

namespace bigops {
namespace {

template <class T>
void backward(const View& grad_out, const View& input_view, const View& weight_view,
              const OptionalView& saved, const OptionalView& grad_input, const OptionalView& grad_weight,
              const OptionalView& grad_bias, const Conv2dParams& conv, const Pool2dParams& pool,
              const Conv2dShape& s) {
    using A = compute_t<T>;
    constexpr int L = kLanes<A>;
    constexpr int64_t kSlack = kMaxWidth * L;  // a run's last vector may read past its end
    constexpr int64_t kFilterBlock = 64, kWindows = 128;
    const PatchLayout l = patch_layout(s, conv, pool, L);
    const int64_t c = s.group_channels, places = pool.kernel[0] * pool.kernel[1];
    const int64_t band = std::clamp<int64_t>(kWindows / s.pool_w, 1, s.pool_h);
    const int64_t filter_block = std::min(kFilterBlock, s.group_filters);
    const int64_t inside = (conv.padding[0] * l.width + conv.padding[1]) * c;  // past the padding
    const bool image_needed = grad_input || grad_weight;

    std::vector<int32_t> window_offset(static_cast<size_t>(s.pool_h * s.pool_w + L));
    for (int64_t h = 0; h < s.pool_h; ++h)
        for (int64_t w = 0; w < s.pool_w; ++w)
            window_offset[static_cast<size_t>(h * s.pool_w + w)] = static_cast<int32_t>(
                (h * pool.stride[0] - pool.padding[0]) * l.pixel_row +
                (w * pool.stride[1] - pool.padding[1]) * l.pixel);

    // Filters in the order (kh, kw, c) of the padded image.
    Scratch<A> filters(grad_input ? s.filters * l.filter + kSlack : 0);
    if (grad_input) {
        const Image<const T> w(weight_view);
        for (int64_t k = 0; k < s.filters; ++k)
            for (int64_t kh = 0; kh < s.kernel_h; ++kh)
                copy_2d(w.at(k, 0, kh, 0), w.stride_w, w.stride_c,
                        filters + k * l.filter + kh * s.kernel_w * c, c, int64_t{1}, s.kernel_w, c);
    }

    const int64_t threads = threads_for(2.0 * s.operations());
    const int parts = static_cast<int>(std::clamp<int64_t>(s.batch, 1, threads));
    const int64_t part_size = s.filters * l.filter;
    Scratch<A> weight_parts(grad_weight ? parts * part_size : 0);
    std::vector<double> bias_parts(static_cast<size_t>(parts * s.filters), 0.0);
    const Image<const T> input(input_view);

#pragma omp parallel for num_threads(parts) schedule(static, 1)
    for (int part = 0; part < parts; ++part) {
        A* weight_part = weight_parts + part * part_size;
        double* bias_part = bias_parts.data() + part * s.filters;
        if (grad_weight) std::fill(weight_part, weight_part + part_size, A{});
        Scratch<A> image(grad_weight ? l.padded + kSlack : 0);
        Scratch<A> grad_image(grad_input ? l.padded + kSlack : 0);
        Scratch<A> unfolded(l.unfold && image_needed ? l.size + kSlack : 0);
        Winners<T> winners(grad_out, saved, band * s.pool_w, filter_block, grad_input.has_value());
        Segments<A> segments(band * s.pool_w, filter_block, places);
        if (grad_weight) std::fill(image.get(), image + l.padded + kSlack, A{});
        if (l.unfold && image_needed) std::fill(unfolded.get(), unfolded + l.size + kSlack, A{});

        const auto fill_image = [&](int64_t n, int64_t g) {
            for (int64_t h = 0; h < s.height; ++h)
                copy_2d(input.at(n, g * c, h, 0), input.stride_w, input.stride_c,
                        image + inside + h * l.width * c, c, int64_t{1}, s.width, c);
        };
        const auto write_grad_input = [&](int64_t n, int64_t g) {
            const Image<T> to(*grad_input);
            for (int64_t h = 0; h < s.height; ++h)
                copy_2d(static_cast<const A*>(grad_image + inside + h * l.width * c), c, int64_t{1},
                        to.at(n, g * c, h, 0), to.stride_w, to.stride_c, s.width, c);
        };
        // The windows that most likely come after those at work: of the same filters, further down or
        // in the next image. Their gradient is fetched meanwhile (a quarter of a cold pass).
        struct {
            int64_t n, row, windows;
        } next = {};
        const auto fetch_next = [&](int64_t filter) {
            if (grad_out.strides[3] != 1) return;  // pixels together, found without help
            fetch(winners.grad_out.at(next.n, filter, next.row, 0), next.windows);
        };
        // Visits all windows of one image and group, band by band and block by block of filters.
        const auto visit = [&](int64_t n, int64_t g, auto&& f) {
            for (int64_t k = 0; k < s.group_filters; k += filter_block)
                for (int64_t row = 0; row < s.pool_h; row += band) {
                    const int64_t rows = std::min(band, s.pool_h - row);
                    const int64_t count = std::min(filter_block, s.group_filters - k);
                    const int64_t first = g * s.group_filters + k;
                    winners.read(n, first, count, row, rows, s.pool_w, l,
                                 window_offset.data() + row * s.pool_w);
                    next.row = row + rows < s.pool_h ? row + rows : 0;
                    next.n = next.row ? n : std::min(n + 1, s.batch - 1);
                    next.windows = std::min(band, s.pool_h - next.row) * s.pool_w;
                    f(first, count, row, rows * s.pool_w);
                }
        };
        const auto add_weight_gradient = [&](const A* from, int64_t first, int64_t count,
                                             int64_t windows) {
            for (const Pass& pass : l.weight_passes) {
                const SumFn<A> sum_runs = sum_function<A>(pass);
                for (int64_t k = 0; k < count; ++k) {
                    if (&pass == &l.weight_passes.front()) fetch_next(first + k);
                    const int64_t at = k * winners.filter_step;
                    sum_runs(winners.offset + at, winners.value + at, winners.window_step, windows,
                             from + pass.image, pass.image_row,
                             weight_part + (first + k) * l.filter + pass.weight, pass.weight_row,
                             pass.tail);
                }
            }
        };
        const auto add_input_gradient = [&](A* to, int64_t first, int64_t count, int64_t row,
                                            int64_t windows) {
            segments.sort(winners, windows, count, places, l,
                          window_offset.data() + row * s.pool_w);
            for (const Pass& pass : l.input_passes) {
                const SumFn<A> sum_runs = sum_function<A>(pass);
                for (int64_t i = 0; i < segments.count; ++i) {
                    const auto [pixel, begin] = segments.segment[i];
                    sum_runs(segments.filter + begin, segments.value + begin, 1,
                             segments.segment[i + 1].begin - begin,
                             filters + first * l.filter + pass.weight, pass.weight_row,
                             to + pixel + pass.image, pass.image_row, pass.tail);
                }
            }
        };

        for (int64_t n = s.batch * part / parts; n < s.batch * (part + 1) / parts; ++n)
            for (int64_t g = 0; g < s.filters / s.group_filters; ++g) {
                A* from = image;
                A* to = l.unfold ? unfolded.get() : grad_image.get();
                if (grad_weight) {
                    fill_image(n, g);
                    if (l.unfold) {
                        unfold<A>(s, conv, l, image, unfolded);
                        from = unfolded;
                    }
                }
                // An unfolded image and its gradient share their memory, one after the other.
                const bool together = grad_weight && grad_input && !l.unfold;
                if (grad_input) std::fill(grad_image.get(), grad_image + l.padded, A{});
                visit(n, g, [&](int64_t first, int64_t count, int64_t row, int64_t windows) {
                    if (grad_bias) winners.add_up(count, windows, bias_part + first);
                    if (grad_weight) add_weight_gradient(from, first, count, windows);
                    if (together) add_input_gradient(to, first, count, row, windows);
                });
                if (!grad_input) continue;
                if (!together) {
                    if (l.unfold) std::fill(unfolded.get(), unfolded + l.size, A{});
                    visit(n, g, [&](int64_t first, int64_t count, int64_t row, int64_t windows) {
                        add_input_gradient(to, first, count, row, windows);
                    });
                }
                if (l.unfold) fold<A>(s, conv, l, unfolded, grad_image);
                write_grad_input(n, g);
            }
    }

    if (grad_weight) {
        const Image<T> to(*grad_weight);
#pragma omp parallel for if (part_size > 16384)
        for (int64_t k = 0; k < s.filters; ++k) {
            A* total = weight_parts + k * l.filter;
            for (int part = 1; part < parts; ++part)
                for (int64_t t = 0; t < s.taps; ++t) total[t] += total[part * part_size + t];
            for (int64_t kh = 0; kh < s.kernel_h; ++kh)
                copy_2d(static_cast<const A*>(total + kh * s.kernel_w * c), c, int64_t{1},
                        to.at(k, 0, kh, 0), to.stride_w, to.stride_c, s.kernel_w, c);
        }
    }
    if (grad_bias)
        for (int64_t k = 0; k < s.filters; ++k) {
            double total = 0;
            for (int part = 0; part < parts; ++part)
                total += bias_parts[static_cast<size_t>(part * s.filters + k)];
            grad_bias->ptr<T>()[k * grad_bias->strides[0]] = from_float<T>(static_cast<A>(total));
        }
}

}  // namespace

void conv2d_relu_pool_backward(const View& grad_out, const View& input, const View& weight,
                               const OptionalView& saved, const OptionalView& grad_input,
                               const OptionalView& grad_weight, const OptionalView& grad_bias,
                               const Conv2dParams& conv, const Pool2dParams& pool) {
    const Conv2dShape s = conv2d_shape(input, weight, grad_out, conv, pool);
    if (saved) require_saved(*saved, grad_out, pool);
    else require(pool.kernel == Size2{1, 1} && !pool.relu, "ReLU and pooling need what was saved");
    require(!grad_input || (same_shape(*grad_input, input) && grad_input->dtype == input.dtype),
            "grad_input does not fit input");
    require(!grad_weight || (same_shape(*grad_weight, weight) && grad_weight->dtype == input.dtype),
            "grad_weight does not fit weight");
    require(!grad_bias || (grad_bias->ndim == 1 && grad_bias->shape[0] == s.filters &&
                           grad_bias->dtype == input.dtype),
            "grad_bias does not fit weight");
    expect_writes(grad_input);
    with_float_type(input.dtype, [&](auto zero) {
        backward<decltype(zero)>(grad_out, input, weight, saved, grad_input, grad_weight, grad_bias,
                                 conv, pool, s);
    });
}

}  // namespace bigops
