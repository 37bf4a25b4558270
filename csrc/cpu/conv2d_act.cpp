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

// Checks that all lie as `first` does; true for planes.
bool alike(const View& first, std::initializer_list<const View*> others) {
    require(first.ndim == 4, "activations take 4-d tensors");
    bool planes = in_planes(first), pixels = channels_last(first);
    for (const View* other : others) {
        if (!other) continue;
        require(same_shape(*other, first) && other->dtype == first.dtype,
                "tensors differ in shape or dtype");
        planes &= in_planes(*other), pixels &= channels_last(*other);
    }
    require(planes || pixels, "tensors do not lie alike");
    return planes;
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

}  // namespace

void activation_forward(const View& conv_out, const OptionalView& residual, const View& out,
                        const OptionalView& pre, Activation activation) {
    alike(out, {&conv_out, given(residual), given(pre)});
    expect_writes(pre);
    with_float_type(out.dtype, [&](auto zero) {
        with_activation(activation, [&](auto which) {
            forward<decltype(zero), decltype(which)::value>(conv_out, residual, out, pre);
        });
    });
}

void activation_backward(const View& grad_out, const OptionalView& saved, const View& grad_conv,
                         const OptionalView& grad_bias, Activation activation) {
    const bool planes = alike(grad_conv, {&grad_out, given(saved)});
    require(saved || activation == Activation::none, "the activation's gradient needs what was saved");
    require(!grad_bias || (grad_bias->ndim == 1 && grad_bias->shape[0] == grad_conv.shape[1] &&
                           grad_bias->dtype == grad_conv.dtype),
            "grad_bias does not fit");
    expect_writes(grad_conv);
    with_float_type(grad_conv.dtype, [&](auto zero) {
        with_activation(activation, [&](auto which) {
            backward<decltype(zero), decltype(which)::value>(grad_out, saved, grad_conv, grad_bias,
                                                             planes);
        });
    });
}

}  // namespace bigops
