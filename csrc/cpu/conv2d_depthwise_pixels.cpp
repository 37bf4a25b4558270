// Depthwise convolution, one filter a channel, in channels_last: lanes are channels.
//
// Everything is one sum over taps along a row of pixels j,
//     dst[j] = sum over taps  weight[t] * src[t][j],
// where a tap's source row starts where the tap reads for pixel 0: in the input, `stride` pixels
// apart, for the output; in the gradient, side by side, for those pixels of the input's gradient
// that meet the same taps (each residue by the stride). A tap counts for the pixels [begin, end)
// that it finds inside its row: between the rows' borders all do, and there eight pixels share each
// load of a weight. The weight's gradient runs over the same rows with sums that stay in registers.
#if defined(__SANITIZE_ADDRESS__)
#pragma GCC optimize("O1")  // in one minute instead of four
#endif

#include <algorithm>
#include <vector>

#include "conv2d_depthwise.h"
#include "huge_pages.h"
#include "threads.h"

namespace bigops {
namespace {

constexpr double kPerElement = 16;  // a number moved takes as long as so many operations
constexpr int kTogether = 8;        // pixels
constexpr int64_t kMostTaps = 9;    // of whose gradients the sums stay in registers
constexpr int64_t kSplits = 64;     // of all bands, in grad_weight: the same on any machine
constexpr int64_t kBandBytes = 256 << 10;
constexpr int64_t kRowsTogether = 8;  // of the output: what a sum takes up before it goes on in double

template <class T>
struct Tap {
    const T* src;
    int64_t number;      // within the kernel
    int64_t begin, end;  // the pixels it counts for
};

// Of a row, the pixels that all taps count for.
template <class T>
std::pair<int64_t, int64_t> inside(const std::vector<Tap<T>>& taps, int64_t pixels) {
    int64_t begin = 0, end = pixels;
    for (const Tap<T>& tap : taps) begin = std::max(begin, tap.begin), end = std::min(end, tap.end);
    return {std::min(begin, pixels), std::max(begin, end)};
}

// ceil(a / b) for b > 0.
int64_t over(int64_t a, int64_t b) { return a >= 0 ? (a + b - 1) / b : -(-a / b); }

// The taps of row `oh` of the output in image n.
template <class T>
void taps_of_output(const Image<const T>& input, int64_t n, int64_t oh, const Conv2dShape& s,
                    const Conv2dParams& conv, std::vector<Tap<T>>& taps) {
    taps.clear();
    for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
        const int64_t h = oh * conv.stride[0] - conv.padding[0] + kh * conv.dilation[0];
        if (h < 0 || h >= s.height) continue;
        for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
            const int64_t left = kw * conv.dilation[1] - conv.padding[1];
            const int64_t begin = std::max<int64_t>(0, over(-left, conv.stride[1]));
            const int64_t end = std::min(s.conv_w, over(s.width - left, conv.stride[1]));
            if (begin < end)
                taps.push_back({input.at(n, 0, h, 0) + left * input.stride_w,
                                kh * s.kernel_w + kw, begin, end});
        }
    }
}

// The taps of those pixels of the input's row h that are `residue` beyond a multiple of the stride,
// in rows of the gradient without gaps.
template <class A>
void taps_of_input(const A* rows, int64_t h, int64_t residue, const Conv2dShape& s,
                   const Conv2dParams& conv, int64_t pixels, std::vector<Tap<A>>& taps) {
    taps.clear();
    for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
        const int64_t below = h + conv.padding[0] - kh * conv.dilation[0];
        if (below < 0 || below % conv.stride[0] || below / conv.stride[0] >= s.conv_h) continue;
        for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
            const int64_t right = residue + conv.padding[1] - kw * conv.dilation[1];
            const int64_t first = over(right, conv.stride[1]);
            if (first * conv.stride[1] != right) continue;
            const int64_t begin = std::max<int64_t>(0, -first);
            const int64_t end = std::min(pixels, s.conv_w - first);
            if (begin < end)
                taps.push_back({rows + (below / conv.stride[0] * s.conv_w + first) * s.channels,
                                kh * s.kernel_w + kw, begin, end});
        }
    }
}

// What the output's row `oh` is the first to read of the input. Read a vector here and one there, it
// would be waited for: a forward pass with stride 2 took 2.4 times as long.
template <class T>
struct NewPixels {
    const T* first;  // of the rows
    int64_t rows, row, columns, column, width;

    NewPixels(const Image<const T>& input, int64_t n, int64_t oh, const Conv2dShape& s,
              const Conv2dParams& conv)
        : row(input.stride_h), columns(conv.stride[1]), column(input.stride_w), width(s.width) {
        const int64_t h =
            oh * conv.stride[0] - conv.padding[0] + (s.kernel_h - 1) * conv.dilation[0];
        const int64_t begin = std::max<int64_t>(0, h + 1 - conv.stride[0]);
        const int64_t end = std::min(s.height, h + 1);
        rows = end - begin;
        first = input.at(n, 0, std::min(begin, s.height - 1), 0);
    }
    // Those of an output pixel.
    void fetch(int64_t j, int64_t c) const {
        const int64_t end = std::min((j + 1) * columns, width);
        for (int64_t h = 0; h < rows; ++h)
            for (int64_t w = j * columns; w < end; ++w)
                bigops::fetch(first + h * row + w * column + c, 1);
    }
};

// Out of line where there is much of it: in the two dozen places that it would be inlined into, it took
// half a minute to compile, and four with sanitizers.
template <Activation kActivation, class A>
[[gnu::noinline]] Vec<A> activate_apart(Vec<A> x) {
    return activate<kActivation, A>(x);
}

// Numbers by tap and channel, whole vectors of channels.
template <class A>
struct Weights {
    int64_t step;
    Scratch<A> memory;

    Weights(int64_t taps, int64_t channels)
        : step((channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>), memory(taps * step) {
        std::fill(memory.get(), memory.get() + taps * step, A{});
    }
    A* tap(int64_t t) { return memory.get() + t * step; }
};

// run(pixel, channel, sum, lanes...) for every pixel of a row and every vector of channels.
template <class A, class T, class Run>
void combine(const std::vector<Tap<T>>& taps, int64_t pixels, int64_t src_step, int64_t channels,
             Weights<A>& weights, const A* init, Run run) {
    constexpr int L = kLanes<A>;
    const auto block = [&]<int kPixels>(std::integral_constant<int, kPixels>, int64_t j, int64_t c,
                                        auto... some) {
        Vec<A> acc[kPixels];
#pragma GCC unroll 8
        for (int p = 0; p < kPixels; ++p) acc[p] = load(init + c);
        for (const Tap<T>& tap : taps) {
            if (kPixels == 1 && (j < tap.begin || j >= tap.end)) continue;
            const Vec<A> weight = load(weights.tap(tap.number) + c);
            const T* from = tap.src + j * src_step + c;
#pragma GCC unroll 8
            for (int p = 0; p < kPixels; ++p)
                acc[p] = fma(load(from + p * src_step, some...), weight, acc[p]);
        }
#pragma GCC unroll 8
        for (int p = 0; p < kPixels; ++p) run(j + p, c, acc[p], some...);
    };
    const auto all_channels = [&](auto count, int64_t j) {
        int64_t c = 0;
        for (; c + L <= channels; c += L) block(count, j, c);
        if (c < channels) block(count, j, c, static_cast<int>(channels - c));
    };
    const auto [begin, end] = inside(taps, pixels);
    int64_t j = 0;
    for (; j < begin; ++j) all_channels(std::integral_constant<int, 1>{}, j);
    for (; j + kTogether <= end; j += kTogether)
        all_channels(std::integral_constant<int, kTogether>{}, j);
    for (; j + kTogether / 2 <= end; j += kTogether / 2)
        all_channels(std::integral_constant<int, kTogether / 2>{}, j);
    for (; j < pixels; ++j) all_channels(std::integral_constant<int, 1>{}, j);
}

// sums[tap][channel] += sum over j of grad[j] * src[tap][j], for kTaps taps.
template <class T, int kTaps, class A = compute_t<T>>
void dot_taps(const Tap<T>* taps, const A* grad, int64_t grad_step, int64_t src_step,
              int64_t channels, Weights<A>& sums) {
    constexpr int L = kLanes<A>;
    int64_t begin = taps[0].begin, end = taps[0].end;
    int64_t first = begin, last = end;
    for (int t = 1; t < kTaps; ++t) {
        begin = std::max(begin, taps[t].begin), end = std::min(end, taps[t].end);
        first = std::min(first, taps[t].begin), last = std::max(last, taps[t].end);
    }
    end = std::max(begin, end);
    const auto vector = [&](int64_t c, auto... some) {
        Vec<A> acc[kTaps] = {};
        const auto border = [&](int64_t j) {
            const Vec<A> g = load(grad + j * grad_step + c, some...);
            for (int t = 0; t < kTaps; ++t)
                if (j >= taps[t].begin && j < taps[t].end)
                    acc[t] = fma(g, load(taps[t].src + j * src_step + c, some...), acc[t]);
        };
        for (int64_t j = first; j < std::min(begin, last); ++j) border(j);
        int64_t j = begin;
        for (; j + 2 <= end; j += 2) {  // each address serves two pixels
            const Vec<A> g = load(grad + j * grad_step + c, some...);
            const Vec<A> next = load(grad + (j + 1) * grad_step + c, some...);
#pragma GCC unroll 9
            for (int t = 0; t < kTaps; ++t) {
                const T* from = taps[t].src + j * src_step + c;
                acc[t] = fma(g, load(from, some...), acc[t]);
                acc[t] = fma(next, load(from + src_step, some...), acc[t]);
            }
        }
        if (j < end) border(j);
        for (j = end; j < last; ++j) border(j);
        for (int t = 0; t < kTaps; ++t) {
            A* sum = sums.tap(taps[t].number) + c;
            store(sum, load(sum) + acc[t]);
        }
    };
    int64_t c = 0;
    for (; c + L <= channels; c += L) vector(c);
    if (c < channels) vector(c, static_cast<int>(channels - c));
}

template <class T>
using DotFn = void (*)(const Tap<T>*, const compute_t<T>*, int64_t, int64_t, int64_t,
                       Weights<compute_t<T>>&);

template <class T>
void fill_weights(const View& weight, const Conv2dShape& s, Weights<compute_t<T>>& to) {
    const Image<const T> w(weight);
    for (int64_t k = 0; k < s.filters; ++k)
        for (int64_t t = 0; t < s.taps; ++t)
            to.tap(t)[k] = to_float(*w.at(k, 0, t / s.kernel_w, t % s.kernel_w));
}

template <class T, Activation kActivation>
void forward(const View& input_view, const View& weight, const OptionalView& bias,
             const OptionalView& residual, const View& out_view, const OptionalView& pre,
             const Conv2dParams& conv, const Conv2dShape& s) {
    using A = compute_t<T>;
    const Image<const T> input(input_view), added(residual ? *residual : out_view);
    const Image<T> out(out_view), kept(pre ? *pre : out_view);
    Weights<A> weights(s.taps, s.channels), init(1, s.channels);
    fill_weights<T>(weight, s, weights);
    for (int64_t k = 0; bias && k < s.filters; ++k)
        init.tap(0)[k] = to_float(bias->ptr<T>()[k * bias->strides[0]]);
    const double moved = kPerElement * static_cast<double>(input_view.numel() + out_view.numel());
#pragma omp parallel num_threads(threads_for(s.operations() + moved))
    {
        std::vector<Tap<T>> taps;
#pragma omp for schedule(dynamic, 4)
        for (int64_t row = 0; row < s.batch * s.conv_h; ++row) {
            const int64_t n = row / s.conv_h, oh = row % s.conv_h;
            taps_of_output(input, n, oh, s, conv, taps);
            const NewPixels next(input, n, oh + 1, s, conv);
            const auto write = [&](int64_t j, int64_t c, Vec<A> x, auto... some) {
                next.fetch(j, c);
                if (residual) x += load(added.at(n, c, oh, j), some...);
                if (pre) store(kept.at(n, c, oh, j), x, some...);
                constexpr bool kShort =
                    kActivation == Activation::none || kActivation == Activation::relu;
                if constexpr (kShort) x = activate<kActivation, A>(x);
                else x = activate_apart<kActivation, A>(x);
                store(out.at(n, c, oh, j), x, some...);
            };
            combine<A>(taps, s.conv_w, input.stride_w * conv.stride[1], s.channels, weights,
                       init.tap(0), write);
        }
    }
}

// A band of the output's rows at a time, in cache: the gradient before the activation, of these rows
// and of those above that reach into the same rows of the input; from it the input's gradient, whose
// rows [begin, end) * stride are the band's, and what it adds to the weight's and the bias'.
template <class T, Activation kActivation>
void backward(const View& grad_view, const View& input_view, const View& weight,
              const OptionalView& saved_view, const OptionalView& grad_input,
              const OptionalView& grad_weight, const OptionalView& grad_bias,
              const OptionalView& grad_residual, const Conv2dParams& conv, const Conv2dShape& s) {
    using A = compute_t<T>;
    static constexpr auto kTable = []<int... i>(std::integer_sequence<int, i...>) {
        return std::array<DotFn<T>, sizeof...(i)>{&dot_taps<T, i + 1>...};
    }(std::make_integer_sequence<int, kMostTaps>{});
    const Image<const T> grad(grad_view), saved(saved_view ? *saved_view : grad_view), input(input_view);
    const Image<T> passed_on(grad_residual ? *grad_residual : grad_view);
    const Image<T> to(grad_input ? *grad_input : input_view);
    Weights<A> weights(s.taps, s.channels), zero(1, s.channels);
    fill_weights<T>(weight, s, weights);
    const int64_t row = s.conv_w * s.channels, stride = conv.stride[1];
    const int64_t above = (s.kernel_h - 1) * conv.dilation[0] / conv.stride[0];
    const int64_t fitting = kBandBytes / (static_cast<int64_t>(sizeof(A)) * row);
    const int64_t band = std::clamp<int64_t>(fitting - above, std::min(4 * above + 1, s.conv_h), s.conv_h);
    const int64_t bands = (s.conv_h + band - 1) / band;
    const int64_t splits = std::min(s.batch * bands, kSplits);
    const int64_t numbers = s.taps + 1;  // of a channel: its taps' gradients, then its bias'
    std::vector<double> parts(static_cast<size_t>(splits * numbers * s.channels));
    const double moved = kPerElement * static_cast<double>(input_view.numel() + grad_view.numel());
#pragma omp parallel num_threads(threads_for(2 * (s.operations() + moved)))
    {
        std::vector<Tap<T>> taps;
        std::vector<Tap<A>> back;
        Scratch<A> buffer((band + above) * row + kLanes<A>);
        Weights<A> sums(numbers, s.channels);
        const auto flush = [&](double* totals) {  // longer sums go on in double
            for (int64_t t = 0; t < numbers; ++t)
                for (int64_t k = 0; k < s.channels; ++k) {
                    totals[t * s.channels + k] += sums.tap(t)[k];
                    sums.tap(t)[k] = A{};
                }
        };
#pragma omp for schedule(dynamic)
        for (int64_t split = 0; split < splits; ++split) {
            double* totals = parts.data() + split * numbers * s.channels;
            const int64_t last_task = s.batch * bands * (split + 1) / splits;
            for (int64_t task = s.batch * bands * split / splits; task < last_task; ++task) {
                const int64_t n = task / bands, begin = task % bands * band;
                const int64_t end = std::min(s.conv_h, begin + band);
                const int64_t top = grad_input ? std::max<int64_t>(0, begin - above) : begin;
                A* const rows = buffer.get() - top * row;  // of the output's first row, were it there
                for (int64_t oh = top; oh < end; ++oh) {
                    A* total = sums.tap(s.taps);
                    const bool own = oh >= begin;
                    const auto pixel = [&](int64_t j, int64_t c, auto... some) {
                        const Vec<A> g = activation_gradient<kActivation, A>(
                            load(grad.at(n, c, oh, j), some...), load(saved.at(n, c, oh, j), some...));
                        store(rows + oh * row + j * s.channels + c, g, some...);
                        if (!own) return;
                        if (grad_residual) store(passed_on.at(n, c, oh, j), g, some...);
                        store(total + c, load(total + c) + g);
                    };
                    for (int64_t j = 0; j < s.conv_w; ++j) {
                        int64_t c = 0;
                        for (; c + kLanes<A> <= s.channels; c += kLanes<A>) pixel(j, c);
                        if (c < s.channels) pixel(j, c, static_cast<int>(s.channels - c));
                    }
                }
                for (int64_t oh = begin; grad_weight && oh < end; ++oh) {
                    taps_of_output(input, n, oh, s, conv, taps);
                    const auto count = static_cast<int64_t>(taps.size());
                    for (int64_t t = 0; t < count; t += kMostTaps)
                        kTable[static_cast<size_t>(std::min(kMostTaps, count - t) - 1)](
                            taps.data() + t, rows + oh * row, s.channels, input.stride_w * stride,
                            s.channels, sums);
                    if (oh % kRowsTogether == kRowsTogether - 1) flush(totals);
                }
                flush(totals);
                if (!grad_input) continue;
                const int64_t first = begin == 0 ? 0 : begin * conv.stride[0] - conv.padding[0];
                const int64_t behind = end == s.conv_h ? s.height : end * conv.stride[0] - conv.padding[0];
                for (int64_t h = std::max<int64_t>(0, first); h < std::min(s.height, behind); ++h)
                    for (int64_t residue = 0; residue < std::min(stride, s.width); ++residue) {
                        const int64_t pixels = (s.width - residue + stride - 1) / stride;
                        taps_of_input(rows, h, residue, s, conv, pixels, back);
                        combine<A>(back, pixels, s.channels, s.channels, weights, zero.tap(0),
                                   [&](int64_t j, int64_t c, Vec<A> x, auto... some) {
                                       store(to.at(n, c, h, residue + j * stride), x, some...);
                                   });
                    }
            }
        }
    }
    const auto total = [&](int64_t t, int64_t k) {
        double sum = 0;
        for (int64_t split = 0; split < splits; ++split)
            sum += parts[static_cast<size_t>((split * numbers + t) * s.channels + k)];
        return from_float<T>(static_cast<A>(sum));
    };
    for (int64_t k = 0; k < s.channels; ++k) {
        for (int64_t t = 0; grad_weight && t < s.taps; ++t)
            *Image<T>(*grad_weight).at(k, 0, t / s.kernel_w, t % s.kernel_w) = total(t, k);
        if (grad_bias) grad_bias->ptr<T>()[k * grad_bias->strides[0]] = total(s.taps, k);
    }
}

}  // namespace

void conv2d_depthwise_pixels_forward(const View& input, const View& weight,
                                     const OptionalView& bias, const OptionalView& residual,
                                     const View& out, const OptionalView& pre,
                                     const Conv2dParams& conv, Activation activation) {
    const Conv2dShape s = depthwise_shape(input, weight, out, conv);
    require(s.group_filters == 1, "one filter a channel");
    bias_fits(bias, weight);
    depthwise_fits(out, 1, {out, residual, pre});
    depthwise_fits(input, 1, {input});
    if (out.numel() == 0) return;
    expect_writes(out);
    expect_writes(pre);
    with_float_type(input.dtype, [&](auto zero) {
        with_activation(activation, [&](auto which) {
            forward<decltype(zero), decltype(which)::value>(input, weight, bias, residual, out, pre,
                                                            conv, s);
        });
    });
}

void conv2d_depthwise_pixels_backward(const View& grad_out, const View& input, const View& weight,
                                      const OptionalView& saved, const OptionalView& grad_input,
                                      const OptionalView& grad_weight,
                                      const OptionalView& grad_bias,
                                      const OptionalView& grad_residual, const Conv2dParams& conv,
                                      Activation activation) {
    const Conv2dShape s = depthwise_shape(input, weight, grad_out, conv);
    require(s.group_filters == 1, "one filter a channel");
    depthwise_gradients_fit(1, grad_out, input, weight, saved, grad_input, grad_weight, grad_bias,
                            grad_residual, activation);
    expect_writes(grad_input);
    expect_writes(grad_residual);
    with_float_type(input.dtype, [&](auto zero) {
        with_activation(activation, [&](auto which) {
            backward<decltype(zero), decltype(which)::value>(grad_out, input, weight, saved,
                                                             grad_input, grad_weight, grad_bias,
                                                             grad_residual, conv, s);
        });
    });
}

}  // namespace bigops
