// The passes before and after somebody else's convolution: memory traffic is all there is, so each
// number is read and written once, and the bias gradient is summed as the gradient goes by.
#include "conv2d_act.h"

#include <algorithm>
#include <vector>

#include "conv2d_tile.h"
#include "huge_pages.h"
#include "threads.h"

namespace bigops {
namespace {

constexpr double kPerElement = 16;   // a number moved takes as long as so many operations
constexpr int64_t kChunk = 16384;    // elements of a task
constexpr int64_t kRowsTogether = 64;  // whose bias gradient is summed in the compute type

// Whether 4-d tensors of these strides have no gaps, pixel by pixel; a size of 1 has any stride.
bool lies(const View& view, const std::array<int, 4>& order) {
    int64_t expected = 1;
    for (int d : order) {
        if (view.shape[d] != 1 && view.strides[d] != expected) return false;
        expected *= view.shape[d];
    }
    return true;
}
bool in_planes(const View& view) { return lies(view, {3, 2, 1, 0}); }
bool channels_last(const View& view) { return lies(view, {1, 3, 2, 0}); }

enum class Lie { planes, pixels, differently };

// How they all lie, which have one shape and dtype.
Lie alike(const View& first, std::initializer_list<const View*> others) {
    require(first.ndim == 4, "activations take 4-d tensors");
    bool planes = in_planes(first), pixels = channels_last(first);
    for (const View* other : others) {
        if (!other) continue;
        require(same_shape(*other, first) && other->dtype == first.dtype,
                "tensors differ in shape or dtype");
        planes &= in_planes(*other), pixels &= channels_last(*other);
    }
    return planes ? Lie::planes : pixels ? Lie::pixels : Lie::differently;
}

const View* given(const OptionalView& view) { return view ? &*view : nullptr; }

// run(i, lanes...) for vectors in [begin, end): no lanes for whole ones, their number for the last.
template <class A, class Run>
void for_vectors(int64_t begin, int64_t end, Run&& run) {
    int64_t i = begin;
    for (; i + kLanes<A> <= end; i += kLanes<A>) run(i);
    if (i < end) run(i, static_cast<int>(end - i));
}

template <class T, Activation kActivation>
void forward(const View& conv_out, const OptionalView& residual, const View& out,
             const OptionalView& pre) {
    using A = compute_t<T>;
    const T* from = conv_out.ptr<T>();
    const T* added = residual ? residual->ptr<T>() : nullptr;
    T *to = out.ptr<T>(), *kept = pre ? pre->ptr<T>() : nullptr;
    const int64_t count = out.numel();
#pragma omp parallel for num_threads(threads_for(kPerElement * static_cast<double>(count)))
    for (int64_t begin = 0; begin < count; begin += kChunk)
        for_vectors<A>(begin, std::min(count, begin + kChunk), [&](int64_t i, auto... some) {
            Vec<A> x = load(from + i, some...);
            if (added) x += load(added + i, some...);
            if (kept) store(kept + i, x, some...);
            store(to + i, activate<kActivation, A>(x), some...);
        });
}

// Tensors that lie differently, as a convolution's in channels_last and a result in planes: row by
// row of an image, through tiles in cache with a pixel's channels side by side.
template <class A>
struct Tile {
    Scratch<A> memory;
    int64_t count;

    explicit Tile(int64_t pixels, int64_t channels, bool needed = true)
        : memory(needed ? pixels * channels + kLanes<A> : 0), count(pixels * channels) {}
};
template <class A, class T>
void take_row(const Image<const T>& from, int64_t n, int64_t h, int64_t pixels, int64_t channels,
              Tile<A>& tile) {
    copy_2d(from.at(n, 0, h, 0), from.stride_w, from.stride_c, tile.memory.get(), channels,
            int64_t{1}, pixels, channels);
}
template <class A, class T>
void put_row(Tile<A>& tile, const Image<T>& to, int64_t n, int64_t h, int64_t pixels,
             int64_t channels) {
    copy_2d(static_cast<const A*>(tile.memory.get()), channels, int64_t{1}, to.at(n, 0, h, 0),
            to.stride_w, to.stride_c, pixels, channels);
}

template <class T, Activation kActivation>
void forward_turned(const View& conv_out, const OptionalView& residual, const View& out,
                    const OptionalView& pre) {
    using A = compute_t<T>;
    const int64_t channels = out.shape[1], height = out.shape[2], width = out.shape[3];
    const Image<const T> from(conv_out), added(residual.value_or(out));
    const Image<T> to(out), kept(pre.value_or(out));
#pragma omp parallel num_threads(threads_for(kPerElement * static_cast<double>(out.numel())))
    {
        Tile<A> x(width, channels), r(width, channels, residual.has_value());
#pragma omp for schedule(static)
        for (int64_t row = 0; row < out.shape[0] * height; ++row) {
            const int64_t n = row / height, h = row % height;
            take_row(from, n, h, width, channels, x);
            if (residual) {
                take_row(added, n, h, width, channels, r);
                for_vectors<A>(0, x.count, [&](int64_t i, auto...) {
                    store(x.memory + i, load(x.memory + i) + load(r.memory + i));
                });
            }
            if (pre) put_row(x, kept, n, h, width, channels);
            for_vectors<A>(0, x.count, [&](int64_t i, auto...) {
                store(x.memory + i, activate<kActivation, A>(load(x.memory + i)));
            });
            put_row(x, to, n, h, width, channels);
        }
    }
}

template <class T>
void write_bias(const OptionalView& grad_bias, const std::vector<double>& sums, int64_t channels) {
    const int64_t parts = static_cast<int64_t>(sums.size()) / std::max<int64_t>(1, channels);
    for (int64_t c = 0; c < channels; ++c) {
        double total = 0;
        for (int64_t p = 0; p < parts; ++p)
            total += sums[static_cast<size_t>(p * channels + c)];
        grad_bias->ptr<T>()[c * grad_bias->strides[0]] =
            from_float<T>(static_cast<compute_t<T>>(total));
    }
}

template <class T, Activation kActivation>
void backward(const View& grad_out, const OptionalView& saved, const View& grad_conv,
              const OptionalView& grad_bias, bool planes) {
    using A = compute_t<T>;
    const T *from = grad_out.ptr<T>(), *kept = saved ? saved->ptr<T>() : from;
    T* to = grad_conv.ptr<T>();
    const int64_t batch = grad_conv.shape[0], channels = grad_conv.shape[1];
    const int64_t pixels = grad_conv.shape[2] * grad_conv.shape[3];
    const auto gradient = [&](int64_t i, auto... some) {
        const Vec<A> g = activation_gradient<kActivation, A>(load(from + i, some...),
                                                             load(kept + i, some...));
        store(to + i, g, some...);
        return g;
    };
    const int threads = threads_for(kPerElement * static_cast<double>(grad_conv.numel()));
    if (planes) {
        std::vector<double> sums(static_cast<size_t>(batch * channels));
#pragma omp parallel for num_threads(threads)
        for (int64_t plane = 0; plane < batch * channels; ++plane) {
            const int64_t end = (plane + 1) * pixels, step = kRowsTogether * kLanes<A>;
            double total = 0;
            for (int64_t i = plane * pixels; i < end; i += step) {
                Vec<A> part = {};
                for_vectors<A>(i, std::min(end, i + step),
                               [&](int64_t at, auto... some) { part += gradient(at, some...); });
                total += sum(part);
            }
            sums[static_cast<size_t>(plane)] = total;
        }
        if (grad_bias) write_bias<T>(grad_bias, sums, channels);
        return;
    }
    const int64_t rows = batch * pixels;
    const int64_t together = std::max<int64_t>(kRowsTogether, (rows + 63) / 64);
    const int64_t parts = (rows + together - 1) / together;
    std::vector<double> sums(grad_bias ? static_cast<size_t>(parts * channels) : 0);
#pragma omp parallel for num_threads(threads)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t end = std::min(rows, (part + 1) * together);
        for (int64_t first = part * together; first < end; first += kRowsTogether) {
            const int64_t last = std::min(end, first + kRowsTogether);
            // Sums of a run of channels stay in registers.
            const auto columns = [&]<int kVectors>(std::integral_constant<int, kVectors>, int64_t c,
                                                   auto... some) {
                Vec<A> totals[kVectors] = {};
                for (int64_t row = first; row < last; ++row)
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v)
                        totals[v] += gradient(row * channels + c + v * kLanes<A>, some...);
                for (int64_t k = 0; grad_bias && k < kVectors * kLanes<A> && c + k < channels; ++k)
                    sums[static_cast<size_t>(part * channels + c + k)] +=
                        totals[k / kLanes<A>][k % kLanes<A>];
            };
            int64_t c = 0;
            for (; c + 4 * kLanes<A> <= channels; c += 4 * kLanes<A>)
                columns(std::integral_constant<int, 4>{}, c);
            for_vectors<A>(c, channels, [&](int64_t at, auto... some) {
                columns(std::integral_constant<int, 1>{}, at, some...);
            });
        }
    }
    if (grad_bias) write_bias<T>(grad_bias, sums, channels);
}

template <class T, Activation kActivation>
void backward_turned(const View& grad_out, const OptionalView& saved, const View& grad_conv,
                     const OptionalView& grad_bias) {
    using A = compute_t<T>;
    const int64_t channels = grad_conv.shape[1], height = grad_conv.shape[2];
    const int64_t width = grad_conv.shape[3], rows = grad_conv.shape[0] * height;
    const Image<const T> from(grad_out), kept(saved.value_or(grad_out));
    const Image<T> to(grad_conv);
    const int64_t parts = std::min<int64_t>(rows, 64);
    std::vector<double> sums(static_cast<size_t>(parts * channels));
#pragma omp parallel num_threads(threads_for(kPerElement * static_cast<double>(grad_conv.numel())))
    {
        Tile<A> g(width, channels), y(width, channels, saved.has_value());
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
                const int64_t n = row / height, h = row % height;
                take_row(from, n, h, width, channels, g);
                if (saved) take_row(kept, n, h, width, channels, y);
                const A* value = saved ? y.memory.get() : g.memory.get();
                for_vectors<A>(0, g.count, [&](int64_t i, auto...) {
                    store(g.memory + i,
                          activation_gradient<kActivation, A>(load(g.memory + i), load(value + i)));
                });
                put_row(g, to, n, h, width, channels);
                if (!grad_bias) continue;
                double* totals = sums.data() + part * channels;
                for (int64_t c = 0; c < channels; c += kLanes<A>) {
                    Vec<A> total = {};
                    for (int64_t w = 0; w < width; ++w) total += load(g.memory + w * channels + c);
                    for (int64_t k = c; k < std::min<int64_t>(channels, c + kLanes<A>); ++k)
                        totals[k] += total[k - c];
                }
            }
    }
    if (grad_bias) write_bias<T>(grad_bias, sums, channels);
}

}  // namespace

void activation_forward(const View& conv_out, const OptionalView& residual, const View& out,
                        const OptionalView& pre, Activation activation) {
    const Lie lie = alike(out, {&conv_out, given(residual), given(pre)});
    if (out.data != conv_out.data) expect_writes(out);
    else require(lie != Lie::differently, "in place tensors must lie alike");
    expect_writes(pre);
    with_float_type(out.dtype, [&](auto zero) {
        with_activation(activation, [&](auto which) {
            using T = decltype(zero);
            constexpr Activation kActivation = decltype(which)::value;
            if (lie == Lie::differently)
                forward_turned<T, kActivation>(conv_out, residual, out, pre);
            else forward<T, kActivation>(conv_out, residual, out, pre);
        });
    });
}

void activation_backward(const View& grad_out, const OptionalView& saved, const View& grad_conv,
                         const OptionalView& grad_bias, Activation activation) {
    const Lie lie = alike(grad_conv, {&grad_out, given(saved)});
    require(saved || activation == Activation::none, "the activation's gradient needs what was saved");
    require(!grad_bias || (grad_bias->ndim == 1 && grad_bias->shape[0] == grad_conv.shape[1] &&
                           grad_bias->dtype == grad_conv.dtype),
            "grad_bias does not fit");
    expect_writes(grad_conv);
    with_float_type(grad_conv.dtype, [&](auto zero) {
        with_activation(activation, [&](auto which) {
            using T = decltype(zero);
            constexpr Activation kActivation = decltype(which)::value;
            if (lie == Lie::differently)
                backward_turned<T, kActivation>(grad_out, saved, grad_conv, grad_bias);
            else
                backward<T, kActivation>(grad_out, saved, grad_conv, grad_bias, lie == Lie::planes);
        });
    });
}

}  // namespace bigops
