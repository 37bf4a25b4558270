// Backward of convolution + ReLU + max-pooling, through the winners only. A window passes its
// gradient g to one place, the pixel p that won it, so per window and filter k
//     grad_weight[k] += g * patch(input, p),      grad_input patch(p) += g * weight[k],
// where patch(p) is the kernel-sized piece of the image under p. With 2x2 windows that is a quarter
// of the multiplications of the dense convolutions that a framework runs over the scattered
// gradient, and that gradient is never written. Windows of 1x1 make it the dense backward.
//
// Both sums are one loop (conv2d_winners.h) over runs of contiguous memory: in a padded image
// stored pixel by pixel, a kernel row under p is kernel_w * channels numbers in a row, and so it is
// in a filter stored likewise. For grad_weight the sum over a band's windows of one filter stays in
// registers; for grad_input the filters that won at the same pixel are brought together first
// (a counting sort by place) and their sum stays in registers. Images with few channels have runs
// too short for vectors: they are unfolded to one pixel of `taps` numbers per output first.
//
// Threads own whole images, and add their parts of grad_weight in a fixed order.
#include "conv2d_winners.h"
#include "threads.h"

namespace bigops {
namespace {

// One group's image as the passes see it: padded, pixel by pixel, or unfolded.
struct Layout {
    bool unfold;
    int64_t height, width;             // of the padded image
    int64_t padded, size;              // numbers in it; numbers in what the passes read
    int64_t pixel_row, pixel;          // from one output row, column to the next
    int64_t filter;                    // from one filter to the next
    int32_t place, place_row, place_reciprocal;  // place p: p * place + p / pool_w * place_row
    std::vector<Pass> weight_passes, input_passes;
    int64_t run;                                      // contiguous numbers of a patch in the image
    std::vector<std::pair<int64_t, int64_t>> runs;    // where each lies in the patch, in the image
};

void add_passes(std::vector<Pass>& passes, int lanes, int max_rows, int64_t runs, int64_t length,
                int64_t image, int64_t image_run, int64_t weight, int64_t weight_run) {
    const int64_t vectors = (length + lanes - 1) / lanes;
    const int64_t pieces = (vectors + kMaxWidth - 1) / kMaxWidth;
    for (int64_t i = 0; i < pieces; ++i) {
        const int64_t from = i * vectors / pieces, to = (i + 1) * vectors / pieces;
        const int64_t valid = std::min(length, to * lanes) - (to - 1) * lanes;
        for (int64_t r = 0; r < runs; r += max_rows)
            passes.push_back({static_cast<int>(std::min<int64_t>(max_rows, runs - r)),
                              static_cast<int>(to - from), static_cast<int>(valid),
                              image + r * image_run + from * lanes, image_run,
                              weight + r * weight_run + from * lanes, weight_run});
    }
}

Layout make_layout(const Conv2dShape& s, const Conv2dParams& conv, const Pool2dParams& pool,
                   int lanes) {
    Layout l;
    const auto vectors = [&](int64_t n) { return (n + lanes - 1) / lanes; };
    const int64_t c = s.group_channels;
    const auto reach = [&](int i, int64_t outputs, int64_t kernel, int64_t size) {
        return std::max((outputs - 1) * conv.stride[i] + (kernel - 1) * conv.dilation[i] + 1,
                        size + conv.padding[i]);
    };
    l.height = reach(0, s.conv_h, s.kernel_h, s.height);
    l.width = reach(1, s.conv_w, s.kernel_w, s.width);
    l.padded = l.height * l.width * c;
    l.filter = vectors(s.taps) * lanes;
    const bool dense = conv.dilation[1] == 1 || s.kernel_w == 1;  // a kernel row is one run
    const int64_t run = l.run = dense ? s.kernel_w * c : c;
    for (int64_t kh = 0; kh < s.kernel_h; ++kh)
        for (int64_t kw = 0; kw < s.kernel_w * c; kw += run)
            l.runs.emplace_back(kh * s.kernel_w * c + kw, kh * conv.dilation[0] * l.width * c +
                                                              kw * conv.dilation[1]);
    l.unfold = s.taps / run > 1 && 4 * vectors(s.taps) < 3 * (s.taps / run) * vectors(run);
    // Three kernel rows at once for grad_weight, whose image stays in L1; one for grad_input, whose
    // filters would not.
    if (l.unfold) {
        l.pixel = l.filter;
        l.pixel_row = l.pixel * s.conv_w;
        l.size = l.pixel_row * s.conv_h;
        add_passes(l.weight_passes, lanes, 1, 1, s.taps, 0, 0, 0, 0);
        add_passes(l.input_passes, lanes, 1, 1, s.taps, 0, 0, 0, 0);
    } else {
        l.pixel = conv.stride[1] * c;
        l.pixel_row = conv.stride[0] * l.width * c;
        l.size = l.padded;
        const int64_t image_row = conv.dilation[0] * l.width * c;
        if (dense) {
            add_passes(l.weight_passes, lanes, kMaxRows, s.kernel_h, run, 0, image_row, 0, run);
            add_passes(l.input_passes, lanes, 1, s.kernel_h, run, 0, image_row, 0, run);
        } else {
            for (int64_t kh = 0; kh < s.kernel_h; ++kh)
                for (auto* passes : {&l.weight_passes, &l.input_passes})
                    add_passes(*passes, lanes, passes == &l.weight_passes ? kMaxRows : 1,
                               s.kernel_w, c, kh * image_row, conv.dilation[1] * c,
                               kh * s.kernel_w * c, c);
        }
    }
    require(l.size + l.filter < (int64_t{1} << 31) && l.filter * s.group_filters < int64_t{1} << 31,
            "input too large for this kernel");
    l.place = static_cast<int32_t>(l.pixel);
    l.place_row = static_cast<int32_t>(l.pixel_row - pool.kernel[1] * l.pixel);
    l.place_reciprocal = static_cast<int32_t>(65535 / pool.kernel[1] + 1);  // exact below 256
    return l;
}

// Every output pixel's patch of the padded image, side by side. Copied are whole vectors, short ones
// for short runs, as stores across cache lines are slow: what is too much, the next run overwrites.
template <class A, int kLength>
void unfold(const Conv2dShape& s, const Conv2dParams& conv, const Layout& l, const A* image, A* to) {
    const int64_t step = conv.stride[1] * s.group_channels;
    for (int64_t oh = 0; oh < s.conv_h; ++oh) {
        const A* from = image + oh * conv.stride[0] * l.width * s.group_channels;
        for (int64_t ow = 0; ow < s.conv_w; ++ow, from += step, to += l.pixel)
            for (const auto& [patch_at, image_at] : l.runs)
                for (int64_t i = 0; i < l.run; i += kLength)
                    std::memcpy(to + patch_at + i, from + image_at + i, kLength * sizeof(A));
    }
}

template <class A>
void unfold(const Conv2dShape& s, const Conv2dParams& conv, const Layout& l, const A* image, A* to) {
    constexpr int kShort = 16 / sizeof(A);
    if (l.run <= kShort) unfold<A, kShort>(s, conv, l, image, to);
    else unfold<A, kLanes<A>>(s, conv, l, image, to);
}

template <class A>
void fold(const Conv2dShape& s, const Conv2dParams& conv, const Layout& l, const A* from, A* image) {
    const int64_t step = conv.stride[1] * s.group_channels;
    for (int64_t oh = 0; oh < s.conv_h; ++oh) {
        A* to = image + oh * conv.stride[0] * l.width * s.group_channels;
        for (int64_t ow = 0; ow < s.conv_w; ++ow, to += step, from += l.pixel)
            for (const auto& [patch_at, image_at] : l.runs)
                for (int64_t i = 0; i < l.run; ++i) to[image_at + i] += from[patch_at + i];
    }
}

// Whole vectors of 32-bit numbers, as lanes of A's width.
template <class A>
inline Mask<A> load_places(const int32_t* p) {
    typedef int32_t Places __attribute__((vector_size(4 * kLanes<A>)));
    Places places;
    std::memcpy(&places, p, sizeof places);
    return __builtin_convertvector(places, Mask<A>);
}

template <class A>
inline void store_places(int32_t* p, Mask<A> lanes) {
    typedef int32_t Places __attribute__((vector_size(4 * kLanes<A>)));
    const Places places = __builtin_convertvector(lanes, Places);
    std::memcpy(p, &places, sizeof places);
}

// The windows of a band for a block of filters: the gradient where the ReLU let the value pass, the
// winner's place in its window, and where that lies in the image. Window by window, as the gradient
// of the input wants them, or filter by filter, where that is not wanted and nothing need be turned.
template <class T>
struct Winners {
    using A = compute_t<T>;
    const Image<const T> grad_out, out;  // out without pooling, else index
    const Image<const uint8_t> index;
    const bool has_index, by_filter;
    const int64_t window_step, filter_step, size;
    Scratch<A> value, passed;
    Scratch<uint8_t> bytes;
    Scratch<int32_t> place, offset;

    Winners(const View& g, const View& saved, int64_t windows, int64_t filters, bool input_needed)
        : grad_out(g), out(saved), index(saved), has_index(saved.dtype == DType::u8),
          by_filter(!input_needed && g.strides[3] == 1),
          window_step(by_filter ? 1 : whole(filters)), filter_step(by_filter ? whole(windows) : 1),
          size(by_filter ? filters * filter_step : windows * window_step), value(size),
          passed(has_index ? 0 : size), bytes(size), place(size), offset(size) {
        std::fill(bytes.get(), bytes + size, uint8_t{});
        std::fill(place.get(), place + size, 0);
    }

    static int64_t whole(int64_t count) { return (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }

    // window_offset is read in whole vectors.
    void read(int64_t n, int64_t filter, int64_t count, int64_t row, int64_t rows, int64_t pool_w,
              const Layout& l, const int32_t* window_offset) {
        const int64_t windows = rows * pool_w;
        const auto copy = [&](const auto& from, auto* to) {
            // Window rows that follow each other in memory are copied as one.
            const bool joined = from.stride_h == from.stride_w * pool_w;
            const int64_t length = joined ? windows : pool_w;
            for (int64_t r = 0; r < windows; r += length)
                copy_2d(from.at(n, filter, row + r / pool_w, 0), from.stride_w, from.stride_c,
                        to + r * window_step, window_step, filter_step, length, count);
        };
        // Lanes beyond the last filter or window count as zeros.
        const int64_t lines = by_filter ? count : windows, line = by_filter ? windows : count;
        const int64_t step = by_filter ? filter_step : window_step, lanes = whole(line);
        if (line < lanes)
            for (int64_t i = 0; i < lines; ++i)
                store(value + i * step + lanes - kLanes<A>, Vec<A>{});
        copy(grad_out, value.get());
        if (has_index) copy(index, bytes.get());
        else copy(out, passed.get());
        for (int64_t i = 0; i < lines; ++i)
            for (int64_t at = i * step, k = 0; k < lanes; at += kLanes<A>, k += kLanes<A>) {
                const Mask<A> p = load_bytes<A>(bytes + at), kh = p * l.place_reciprocal >> 16;
                const Mask<A> blocked =
                    has_index ? p == kBlocked : Mask<A>(load(passed + at) <= 0);
                const Mask<A> origin = by_filter ? load_places<A>(window_offset + k)
                                                 : Mask<A>(window_offset[i] - Mask<A>{});
                // A blocked window adds 0 times something: the image's first patch always exists.
                store_places<A>(offset + at, ~blocked & (origin + kh * l.place_row + p * l.place));
                store_places<A>(place + at, p);
                store(value + at, select(blocked, Vec<A>{}, load(value + at)));
            }
    }

    // totals[k] += the gradients of filter k.
    void add_up(int64_t count, int64_t windows, double* totals) {
        for (int64_t k = 0; k < count; k += by_filter ? 1 : kLanes<A>) {
            Vec<A> total{};
            if (by_filter) {
                for (int64_t w = 0; w < windows; w += kLanes<A>)
                    total += load(value + k * filter_step + w);
                totals[k] += sum(total);
                continue;
            }
            for (int64_t w = 0; w < windows; ++w) total += load(value + w * window_step + k);
            for (int64_t i = k; i < std::min<int64_t>(count, k + kLanes<A>); ++i)
                totals[i] += total[i - k];
        }
    }
};

// Appends the lanes under the mask to two lists and returns how many they are. Whole vectors are
// written: the lists need room for one more.
template <class A>
inline int append(Mask<A> mask, Vec<A> value, Mask<A> filter, A* values, int32_t* filters) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<A, float>) {
        const __mmask16 chosen = _mm512_movepi32_mask((__m512i)mask);
        store(values, _mm512_maskz_compress_ps(chosen, value));
        _mm512_storeu_si512(filters, _mm512_maskz_compress_epi32(chosen, (__m512i)filter));
        return __builtin_popcount(chosen);
    }
#endif
    int count = 0;
    for (int i = 0; i < kLanes<A>; ++i) {
        values[count] = value[i];
        filters[count] = static_cast<int32_t>(filter[i]);
        count += mask[i] != 0;
    }
    return count;
}

// The same windows by pixel: segments of filters that won at one place of one window.
template <class A>
struct Segments {
    struct Segment {
        int32_t pixel;
        int32_t begin;
    };
    Scratch<A> value;
    Scratch<int32_t> filter;
    Scratch<Segment> segment;
    int64_t count = 0;

    Segments(int64_t windows, int64_t filters, int64_t places)
        : value(windows * filters + kLanes<A>), filter(windows * filters + kLanes<A>),
          segment(windows * std::min(places, filters) + 1) {}

    template <class T>
    void sort(Winners<T>& winners, int64_t windows, int64_t filters, int64_t places,
              const Layout& l, const int32_t* window_offset) {
        constexpr int L = kLanes<A>;
        using Lane = decltype(Mask<A>{}[0] + 0);
        Mask<A> lane;
        for (int i = 0; i < L; ++i) lane[i] = static_cast<Lane>(i * l.filter);
        int32_t end = 0;
        count = 0;
        for (int64_t w = 0; w < windows; ++w)
            for (int32_t p = 0; p < places; ++p) {
                const int32_t begin = end;
                for (int64_t k = 0; k < filters; k += L) {
                    const Vec<A> v = load(winners.value + w * winners.window_step + k);
                    const Mask<A> place = load_places<A>(winners.place + w * winners.window_step + k);
                    end += append<A>((place == p) & (v != 0), v,
                                     lane + static_cast<Lane>(k * l.filter), value + end,
                                     filter + end);
                }
                const int32_t kh = p * l.place_reciprocal >> 16;
                if (end != begin)
                    segment[count++] = {window_offset[w] + kh * l.place_row + p * l.place, begin};
            }
        segment[count] = {0, end};
    }
};

template <class T>
void backward(const View& grad_out, const View& input_view, const View& weight_view,
              const View& saved, const OptionalView& grad_input, const OptionalView& grad_weight,
              const OptionalView& grad_bias, const Conv2dParams& conv, const Pool2dParams& pool, const Conv2dShape& s) {
    using A = compute_t<T>;
    constexpr int L = kLanes<A>;
    constexpr int64_t kSlack = kMaxWidth * L;  // a run's last vector may read past its end
    constexpr int64_t kFilterBlock = 64, kWindows = 128;
    const Layout l = make_layout(s, conv, pool, L);
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
        // in the next image. Their gradient is fetched meanwhile (a fifth of a cold call's time).
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
                               const View& saved, const OptionalView& grad_input,
                               const OptionalView& grad_weight, const OptionalView& grad_bias,
                               const Conv2dParams& conv, const Pool2dParams& pool) {
    const Conv2dShape s = conv2d_shape(input, weight, grad_out, conv, pool);
    require_saved(saved, grad_out, pool);
    require(!grad_input || (same_shape(*grad_input, input) && grad_input->dtype == input.dtype),
            "grad_input does not fit input");
    require(!grad_weight || (same_shape(*grad_weight, weight) && grad_weight->dtype == input.dtype),
            "grad_weight does not fit weight");
    require(!grad_bias || (grad_bias->ndim == 1 && grad_bias->shape[0] == s.filters &&
                           grad_bias->dtype == input.dtype),
            "grad_bias does not fit weight");
    with_float_type(input.dtype, [&](auto zero) {
        backward<decltype(zero)>(grad_out, input, weight, saved, grad_input, grad_weight, grad_bias,
                                 conv, pool, s);
    });
}

}  // namespace bigops
