// Depthwise convolution: one channel a group. There is no sum over channels to make a matrix product
// of, so memory is the limit, and each plane is read into the cache once and everything done there:
// convolution, bias, residual and activation, or all the gradients.
//
// Lanes are neighbouring pixels. A padded plane is stored phase by phase: pixel (i, j) lies in
// subplane (i % stride_h, j % stride_w) at (i / stride_h) * pitch + j / stride_w. Output pixels lie
// at oh * pitch + ow, and then every tap is one distance in memory, whatever the stride:
//     out[i]  = sum over taps  weight[t] * x[offset[t] + i]       for all i of the plane at once,
//     grad_x[i] = sum over taps of a subplane  weight[t] * grad[i - shift[t]],
//     grad_weight[t] = sum over i  grad[i] * x[offset[t] + i].
// Places between rows compute what nobody reads; in grad they are zeros.
#include <algorithm>
#include <vector>

#include "conv2d_depthwise.h"
#include "huge_pages.h"
#include "threads.h"

namespace bigops {
namespace {

constexpr double kPerElement = 16;  // a number moved takes as long as so many operations
constexpr int64_t kMostTaps = 9;            // of whose gradients the sums stay in registers
constexpr int64_t kChannels = 8;            // of a task: their planes follow each other in memory
constexpr int64_t kSplits = 8;              // of the batch, in grad_weight: the same on any machine

struct Geometry {
    int64_t pitch, rows, subplane;  // of one phase
    int64_t plane;                  // all phases
    int64_t out, front, gradient;   // an output plane; the zeros before it; with those around it
    std::vector<int32_t> offset, shift;                 // of each tap

    Geometry(const Conv2dShape& s, const Conv2dParams& conv, int64_t lanes) {
        const auto reach = [&](int i, int64_t size, int64_t outputs, int64_t kernel) {
            const int64_t stride = conv.stride[static_cast<size_t>(i)];
            const int64_t padded = size + 2 * conv.padding[static_cast<size_t>(i)];
            const int64_t last = (kernel - 1) * conv.dilation[static_cast<size_t>(i)] / stride;
            return std::max((padded + stride - 1) / stride, outputs + last);
        };
        rows = reach(0, s.height, s.conv_h, s.kernel_h);
        pitch = reach(1, s.width, s.conv_w, s.kernel_w);
        subplane = rows * pitch;
        plane = subplane * conv.stride[0] * conv.stride[1] + kSlack * lanes;
        out = s.conv_h * pitch + kSlack * lanes;
        for (int64_t kh = 0; kh < s.kernel_h; ++kh)
            for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
                const int64_t h = kh * conv.dilation[0], w = kw * conv.dilation[1];
                const int64_t phase = h % conv.stride[0] * conv.stride[1] + w % conv.stride[1];
                shift.push_back(
                    static_cast<int32_t>(h / conv.stride[0] * pitch + w / conv.stride[1]));
                offset.push_back(static_cast<int32_t>(phase * subplane) + shift.back());
            }
        front = (*std::max_element(shift.begin(), shift.end()) + lanes - 1) / lanes * lanes;
        gradient = front + subplane + kSlack * lanes;
        require(plane < (int64_t{1} << 31) && gradient < (int64_t{1} << 31),
                "input too large for this kernel");
    }

    static constexpr int64_t kSlack = 4;  // vectors that may be touched past the end
};

// dst[i] = (add ? dst[i] : init) + sum over taps of weight[t] * src[offset[t] + i], in whole vectors.
template <class A>
void combine(const A* src, const int32_t* offset, const A* weight, int64_t taps, A init, bool add,
             A* dst, int64_t count) {
    constexpr int L = kLanes<A>, kTogether = 4;
    int64_t i = 0;
    const auto some = [&]<int kVectors>(std::integral_constant<int, kVectors>) {
        Vec<A> acc[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[v] = add ? load(dst + i + v * L) : splat(init);
        for (int64_t t = 0; t < taps; ++t) {
            const Vec<A> w = splat(weight[t]);
            const A* from = src + offset[t] + i;
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) acc[v] = fma(w, load(from + v * L), acc[v]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(dst + i + v * L, acc[v]);
    };
    for (; i + (kTogether - 1) * L < count; i += kTogether * L)
        some(std::integral_constant<int, kTogether>{});
    for (; i < count; i += L) some(std::integral_constant<int, 1>{});
}

// sums[t] += sum over i of grad[i] * x[offset[t] + i].
template <class A, int kTaps>
void dot_taps(const A* grad, const A* x, const int32_t* offset, int64_t count, double* sums) {
    constexpr int64_t kStretch = 256 * kLanes<A>;  // longer sums go on in double
    for (int64_t begin = 0; begin < count; begin += kStretch) {
        Vec<A> acc[kTaps] = {};
        for (int64_t i = begin; i < std::min(count, begin + kStretch); i += kLanes<A>) {
            const Vec<A> g = load(grad + i);
#pragma GCC unroll 9
            for (int t = 0; t < kTaps; ++t) acc[t] = fma(g, load(x + offset[t] + i), acc[t]);
        }
        for (int t = 0; t < kTaps; ++t) sums[t] += sum(acc[t]);
    }
}

template <class A>
void add_weight_gradient(const A* grad, const A* x, const Geometry& geometry, int64_t count,
                         double* sums) {
    static constexpr auto kTable = []<int... i>(std::integer_sequence<int, i...>) {
        return std::array{&dot_taps<A, i + 1>...};
    }(std::make_integer_sequence<int, kMostTaps>{});
    const auto taps = static_cast<int64_t>(geometry.offset.size());
    for (int64_t t = 0; t < taps; t += kMostTaps) {
        const int64_t some = std::min(kMostTaps, taps - t);
        kTable[static_cast<size_t>(some - 1)](grad, x, geometry.offset.data() + t, count, sums + t);
    }
}

// Even and odd places of two vectors in a row, and back.
template <class A, int... i>
void part_vectors(Vec<A> a, Vec<A> b, Vec<A>& even, Vec<A>& odd, std::integer_sequence<int, i...>) {
    even = __builtin_shufflevector(a, b, (2 * i)...);
    odd = __builtin_shufflevector(a, b, (2 * i + 1)...);
}
template <class A, int... i>
void join_vectors(Vec<A> even, Vec<A> odd, Vec<A>& a, Vec<A>& b, std::integer_sequence<int, i...>) {
    constexpr int L = kLanes<A>;
    a = __builtin_shufflevector(even, odd, (i % 2 * L + i / 2)...);
    b = __builtin_shufflevector(even, odd, (i % 2 * L + (i + L) / 2)...);
}

inline int lanes_left(int64_t count, int lanes) {
    return static_cast<int>(std::clamp<int64_t>(count, 0, lanes));
}

// Where the first column of an image's row lies in a padded plane, and the one after it.
struct Place {
    int64_t first, second;
};
Place place_of(int64_t h, const Conv2dParams& conv, const Geometry& geometry) {
    const int64_t i = h + conv.padding[0], stride = conv.stride[1], pad = conv.padding[1];
    const int64_t row = i % conv.stride[0] * stride * geometry.subplane +
                        i / conv.stride[0] * geometry.pitch;
    return {row + pad % stride * geometry.subplane + pad / stride,
            row + (pad + 1) % stride * geometry.subplane + (pad + 1) / stride};
}

// An image into the middle of its padded plane, phase by phase. The image at `next` is fetched: the
// hardware finds no stream in planes of a few pages (1.6 times as fast).
template <class T, class A>
void fill(const T* from, const T* next, int64_t row, const Conv2dShape& s, const Conv2dParams& conv,
          const Geometry& geometry, A* plane) {
    constexpr int L = kLanes<A>;
    const int64_t stride = conv.stride[1], pad = conv.padding[1];
    for (int64_t h = 0; h < s.height; ++h, from += row) {
        const auto [first, second] = place_of(h, conv, geometry);
        fetch(next + h * row, s.width);
        if (stride == 1) {
            int64_t w = 0;
            for (; w + L <= s.width; w += L) store(plane + first + w, load(from + w));
            const int rest = lanes_left(s.width - w, L);
            if (rest) store(plane + first + w, load(from + w, rest), rest);
        } else if (stride == 2) {
            for (int64_t w = 0; w < s.width; w += 2 * L) {
                const int low = lanes_left(s.width - w, L), high = lanes_left(s.width - w - L, L);
                Vec<A> even, odd;
                part_vectors<A>(load(from + w, low), high ? load(from + w + L, high) : Vec<A>{},
                                even, odd, std::make_integer_sequence<int, L>{});
                store(plane + first + w / 2, even, (low + high + 1) / 2);
                store(plane + second + w / 2, odd, (low + high) / 2);
            }
        } else {
            const int64_t start = first - pad % stride * geometry.subplane - pad / stride;
            for (int64_t w = 0; w < s.width; ++w)
                plane[start + (w + pad) % stride * geometry.subplane + (w + pad) / stride] =
                    to_float(from[w]);
        }
    }
}

// The same way back.
template <class T, class A>
void take(const A* plane, const Conv2dShape& s, const Conv2dParams& conv, const Geometry& geometry,
          T* to, int64_t row) {
    constexpr int L = kLanes<A>;
    const int64_t stride = conv.stride[1], pad = conv.padding[1];
    for (int64_t h = 0; h < s.height; ++h, to += row) {
        const auto [first, second] = place_of(h, conv, geometry);
        if (stride == 1) {
            int64_t w = 0;
            for (; w + L <= s.width; w += L) store(to + w, load(plane + first + w));
            const int rest = lanes_left(s.width - w, L);
            if (rest) store(to + w, load(plane + first + w), rest);
        } else if (stride == 2) {
            for (int64_t w = 0; w < s.width; w += 2 * L) {
                const int low = lanes_left(s.width - w, L), high = lanes_left(s.width - w - L, L);
                Vec<A> a, b;
                join_vectors<A>(load(plane + first + w / 2), load(plane + second + w / 2), a, b,
                                std::make_integer_sequence<int, L>{});
                store(to + w, a, low);
                if (high) store(to + w + L, b, high);
            }
        } else {
            const int64_t start = first - pad % stride * geometry.subplane - pad / stride;
            for (int64_t w = 0; w < s.width; ++w)
                to[w] = from_float<T>(
                    plane[start + (w + pad) % stride * geometry.subplane + (w + pad) / stride]);
        }
    }
}

// run(place in the planes, place in the image's rows, lanes...) for all vectors of an output plane.
template <class A, class Run>
void for_outputs(const Conv2dShape& s, const Geometry& geometry, int64_t row, Run run) {
    constexpr int L = kLanes<A>;
    for (int64_t h = 0; h < s.conv_h; ++h) {
        int64_t w = 0;
        for (; w + L <= s.conv_w; w += L) run(h * geometry.pitch + w, h * row + w);
        const int rest = lanes_left(s.conv_w - w, L);
        if (rest) run(h * geometry.pitch + w, h * row + w, rest);
    }
}

template <class A>
struct Zeroed : Scratch<A> {
    explicit Zeroed(int64_t count) : Scratch<A>(count) {
        std::fill(this->get(), this->get() + count, A{});
    }
};

template <class A, class T>
std::vector<A> weights_of(const View& weight, const Conv2dShape& s) {
    std::vector<A> found;
    const Image<const T> w(weight);
    for (int64_t k = 0; k < s.filters; ++k)
        for (int64_t kh = 0; kh < s.kernel_h; ++kh)
            for (int64_t kw = 0; kw < s.kernel_w; ++kw)
                found.push_back(to_float(*w.at(k, 0, kh, kw)));
    return found;
}

template <class T, Activation kActivation>
void forward(const View& input_view, const View& weight, const OptionalView& bias,
             const OptionalView& residual, const View& out_view, const OptionalView& pre,
             const Conv2dParams& conv, const Conv2dShape& s) {
    using A = compute_t<T>;
    const Geometry geometry(s, conv, kLanes<A>);
    const int64_t multiplier = s.group_filters, count = (s.conv_h - 1) * geometry.pitch + s.conv_w;
    const Image<const T> input(input_view), added(residual ? *residual : out_view);
    const Image<T> out(out_view), kept(pre ? *pre : out_view);
    const std::vector<A> weights = weights_of<A, T>(weight, s);
    const double moved = kPerElement * static_cast<double>(input_view.numel() + out_view.numel());
#pragma omp parallel num_threads(threads_for(s.operations() + moved))
    {
        Zeroed<A> x(geometry.plane);
        Zeroed<A> y(geometry.out);
#pragma omp for schedule(dynamic, 8)
        for (int64_t task = 0; task < s.batch * s.channels; ++task) {
            const int64_t n = task / s.channels, channel = task % s.channels;
            const int64_t next = std::min(task + 1, s.batch * s.channels - 1);
            fill(input.at(n, channel, 0, 0), input.at(next / s.channels, next % s.channels, 0, 0),
                 input.stride_h, s, conv, geometry, x.get());
            for (int64_t k = channel * multiplier; k < (channel + 1) * multiplier; ++k) {
                const A init = bias ? to_float(bias->ptr<T>()[k * bias->strides[0]]) : A{};
                combine<A>(x.get(), geometry.offset.data(), weights.data() + k * s.taps, s.taps, init,
                           false, y, count);
                T* to = out.at(n, k, 0, 0);
                T* before = pre ? kept.at(n, k, 0, 0) : nullptr;
                const T* other = residual ? added.at(n, k, 0, 0) : nullptr;
                for_outputs<A>(s, geometry, out.stride_h, [&](int64_t place, int64_t at, auto... some) {
                    Vec<A> value = load(y + place);
                    if (other) value += load(other + at, some...);
                    if (before) store(before + at, value, some...);
                    store(to + at, activate<kActivation, A>(value), some...);
                });
            }
        }
    }
}

template <class T, Activation kActivation>
void backward(const View& grad_out, const View& input_view, const View& weight,
              const OptionalView& saved_view, const OptionalView& grad_input,
              const OptionalView& grad_weight, const OptionalView& grad_bias,
              const OptionalView& grad_residual, const Conv2dParams& conv, const Conv2dShape& s) {
    using A = compute_t<T>;
    const Geometry geometry(s, conv, kLanes<A>);
    const int64_t multiplier = s.group_filters, count = (s.conv_h - 1) * geometry.pitch + s.conv_w;
    const Image<const T> input(input_view), from(grad_out), saved(saved_view ? *saved_view : grad_out);
    const Image<T> passed_on(grad_residual ? *grad_residual : grad_out);
    const Image<T> to(grad_input ? *grad_input : input_view);
    const int64_t splits = std::min(s.batch, kSplits);
    const int64_t blocks = (s.channels + kChannels - 1) / kChannels;
    const std::vector<A> weights = weights_of<A, T>(weight, s);
    const int64_t numbers = s.taps + 1;  // of a filter: its taps' gradients, then its bias'
    std::vector<double> parts(static_cast<size_t>(splits * s.filters * numbers));
    const double moved = kPerElement * static_cast<double>(input_view.numel() + grad_out.numel());

    // Of each subplane the taps that reach it.
    struct Reach {
        std::vector<int32_t> tap, back;
    };
    std::vector<Reach> reaches(static_cast<size_t>(conv.stride[0] * conv.stride[1]));
    for (size_t t = 0; t < geometry.shift.size(); ++t) {
        Reach& reach = reaches[static_cast<size_t>((geometry.offset[t] - geometry.shift[t]) /
                                                   geometry.subplane)];
        reach.tap.push_back(static_cast<int32_t>(t));
        reach.back.push_back(-geometry.shift[t]);
    }

#pragma omp parallel num_threads(threads_for(2 * (s.operations() + moved)))
    {
        Zeroed<A> x(grad_weight ? geometry.plane : 0);
        Zeroed<A> grad_x(grad_input ? geometry.plane : 0);
        Zeroed<A> gradient(geometry.gradient);
        std::vector<A> chosen(static_cast<size_t>(s.taps));
        A* g = gradient + geometry.front;
        const auto one = [&](int64_t split, int64_t n, int64_t channel, int64_t next_n,
                             int64_t next_channel) {
                if (grad_weight)
                    fill(input.at(n, channel, 0, 0), input.at(next_n, next_channel, 0, 0),
                         input.stride_h, s, conv, geometry, x.get());
                for (int64_t k = channel * multiplier; k < (channel + 1) * multiplier; ++k) {
                    const T *grad = from.at(n, k, 0, 0), *value = saved.at(n, k, 0, 0);
                    const bool last = k + 1 == (channel + 1) * multiplier;
                    const int64_t then_n = last ? next_n : n;
                    const int64_t then = last ? next_channel * multiplier : k + 1;
                    const int64_t to_grad = from.at(then_n, then, 0, 0) - grad;
                    const int64_t to_value = saved.at(then_n, then, 0, 0) - value;
                    T* also = grad_residual ? passed_on.at(n, k, 0, 0) : nullptr;
                    Vec<A> total = {};
                    for_outputs<A>(s, geometry, from.stride_h, [&](int64_t place, int64_t at, auto... some) {
                        __builtin_prefetch(grad + at + to_grad);
                        __builtin_prefetch(value + at + to_value);
                        const Vec<A> passed = activation_gradient<kActivation, A>(
                            load(grad + at, some...), load(value + at, some...));
                        store(g + place, passed, some...);
                        if (also) store(also + at, passed, some...);
                        total += passed;
                    });
                    double* sums = parts.data() + (split * s.filters + k) * numbers;
                    sums[s.taps] += sum(total);
                    if (grad_weight) add_weight_gradient<A>(g, x.get(), geometry, count, sums);
                    for (size_t sub = 0; grad_input && sub < reaches.size(); ++sub) {
                        const auto& [tap, back] = reaches[sub];
                        for (size_t t = 0; t < tap.size(); ++t)
                            chosen[t] = weights[static_cast<size_t>(k * s.taps + tap[t])];
                        combine<A>(g, back.data(), chosen.data(), static_cast<int64_t>(tap.size()),
                                   A{}, k % multiplier > 0,
                                   grad_x + static_cast<int64_t>(sub) * geometry.subplane,
                                   geometry.subplane);
                    }
                }
                if (grad_input)
                    take(static_cast<const A*>(grad_x.get()), s, conv, geometry,
                         to.at(n, channel, 0, 0), to.stride_h);
        };
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < splits * blocks; ++task) {
            const int64_t split = task / blocks, begin = task % blocks * kChannels;
            const int64_t end = std::min(begin + kChannels, s.channels);
            const int64_t last = s.batch * (split + 1) / splits - 1;
            for (int64_t n = s.batch * split / splits; n <= last; ++n)
                for (int64_t channel = begin; channel < end; ++channel) {
                    const bool more = channel + 1 < end;
                    one(split, n, channel, more ? n : std::min(n + 1, last),
                        more ? channel + 1 : begin);
                }
        }
    }
    const auto total = [&](int64_t k, int64_t t) {
        double sum = 0;
        for (int64_t split = 0; split < splits; ++split)
            sum += parts[static_cast<size_t>((split * s.filters + k) * numbers + t)];
        return from_float<T>(static_cast<A>(sum));
    };
    for (int64_t k = 0; k < s.filters; ++k) {
        if (grad_weight)
            for (int64_t t = 0; t < s.taps; ++t)
                *Image<T>(*grad_weight).at(k, 0, t / s.kernel_w, t % s.kernel_w) = total(k, t);
        if (grad_bias) grad_bias->ptr<T>()[k * grad_bias->strides[0]] = total(k, s.taps);
    }
}

}  // namespace

void conv2d_depthwise_planes_forward(const View& input, const View& weight, const OptionalView& bias,
                              const OptionalView& residual, const View& out,
                              const OptionalView& pre, const Conv2dParams& conv,
                              Activation activation) {
    const Conv2dShape s = depthwise_shape(input, weight, out, conv);
    bias_fits(bias, weight);
    depthwise_fits(out, 3, {out, residual, pre});
    depthwise_fits(input, 3, {input});
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

void conv2d_depthwise_planes_backward(const View& grad_out, const View& input, const View& weight,
                               const OptionalView& saved, const OptionalView& grad_input,
                               const OptionalView& grad_weight, const OptionalView& grad_bias,
                               const OptionalView& grad_residual, const Conv2dParams& conv,
                               Activation activation) {
    const Conv2dShape s = depthwise_shape(input, weight, grad_out, conv);
    depthwise_gradients_fit(3, grad_out, input, weight, saved, grad_input, grad_weight, grad_bias,
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
