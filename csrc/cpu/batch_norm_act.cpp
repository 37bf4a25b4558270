// Batch normalisation, residual and ReLU in as few passes over memory as there can be: forward one
// reading for mean and variance and one that normalises, adds, cuts off and writes; backward one
// reading for the two sums of a channel, which leaves the masked gradient where the residual's goes,
// and one that writes the input's.
//
// Where a channel's numbers lie in planes, a thread takes a channel through both passes, so that the
// second one finds it in L2. Where channels are neighbours (channels_last, and planes so small that
// they are better taken as rows of C * H * W numbers), threads take blocks of rows, and each goes
// back over its own from the last to the first. Sums come from blocks whose bounds depend on sizes
// alone, added in their order: the same bits for any number of threads.
//
// Ioffe and Szegedy 2015, "Batch normalization"; Chan, Golub and LeVeque 1983, "Algorithms for
// computing the sample variance", on why an estimate of the mean is taken off first.
#include "batch_norm_act_parts.h"

#include <omp.h>

#include <cmath>

#include "huge_pages.h"
#include "threads.h"

namespace bigops {
namespace {

constexpr double kPerElement = 8;    // a number moved takes as long as so many operations
constexpr int64_t kNarrow = 64;      // planes below it are taken as rows
constexpr int64_t kMostBlocks = 32;  // of rows
constexpr int64_t kSampled = 4;      // numbers that the estimate of a mean is made of

// How tensors lie: `planes` of `size` neighbours of one channel, or `rows` across the channels, of
// each of which `fold` neighbours are one channel's.
struct Arrangement {
    int64_t batch, channels, size, rows, fold;
    bool across;

    Arrangement(const View& input, const BatchNormParams& p)
        : batch(input.shape[0]), channels(input.shape[1]), size(1) {
        for (int i = 2; i < input.ndim; ++i) size *= input.shape[i];
        across = p.channels_last || size < kNarrow;
        rows = p.channels_last ? batch * size : batch;
        fold = across && !p.channels_last ? size : 1;
    }
    int64_t lanes() const { return channels * fold; }
    int64_t count() const { return batch * size; }  // of a channel's numbers
    double elements() const { return static_cast<double>(batch * size * channels); }

    // Blocks of rows, and of lanes where the rows are few.
    int64_t block_rows() const {
        return std::max<int64_t>(4 * kChain, (rows + kMostBlocks - 1) / kMostBlocks);
    }
    int64_t blocks() const { return (rows + block_rows() - 1) / block_rows(); }
    int64_t block_lanes() const {
        const int64_t pieces = std::max<int64_t>(1, kMostBlocks / 2 / blocks());
        return std::max<int64_t>(kNarrow, (lanes() + pieces - 1) / pieces / kNarrow * kNarrow);
    }
    int64_t pieces() const { return (lanes() + block_lanes() - 1) / block_lanes(); }
};

// sum(way, first, second, at, lane, ...) adds a vector of numbers from `at` on, whose coefficients
// are `way`'s of `lane`; finish(channel, sums) makes coefficients of the sums; apply(way, at, size,
// lane) goes over the numbers once more.
template <class A, class Sum, class Finish, class Apply>
void over_planes(const Arrangement& a, bool summed, Sum&& sum, Finish&& finish, Apply&& apply) {
    const int threads = threads_for(kPerElement * a.elements());
    const auto plane = [&](int64_t n, int64_t c) { return (n * a.channels + c) * a.size; };
    const auto sums_of = [&](int64_t n, int64_t c) {
        return summed ? sums_along<A>(a.size, [&, at = plane(n, c)](auto& first, auto& second, int64_t i,
                                                                   auto... some) {
            sum(Along{}, first, second, at + i, c, some...);
        })
                      : Sums{};
    };
    std::vector<Sums> parts(a.channels < threads ? static_cast<size_t>(a.batch * a.channels) : 0);
#pragma omp parallel num_threads(threads)
    if (a.channels >= threads) {
#pragma omp for schedule(dynamic)
        for (int64_t c = 0; c < a.channels; ++c) {
            Sums total;
            for (int64_t n = 0; n < a.batch; ++n) total += sums_of(n, c);
            finish(c, total);
            for (int64_t n = a.batch - 1; n >= 0; --n) apply(Along{}, plane(n, c), a.size, c);
        }
    } else {
#pragma omp for
        for (int64_t i = 0; i < a.batch * a.channels; ++i)
            parts[static_cast<size_t>(i)] = sums_of(i / a.channels, i % a.channels);
#pragma omp for
        for (int64_t c = 0; c < a.channels; ++c) {
            Sums total;
            for (int64_t n = 0; n < a.batch; ++n) total += parts[static_cast<size_t>(n * a.channels + c)];
            finish(c, total);
        }
#pragma omp for
        for (int64_t i = 0; i < a.batch * a.channels; ++i) 
            apply(Along{}, i * a.size, a.size, i % a.channels);
    }
}

template <class A, class Sum, class Finish, class Apply>
void over_rows(const Arrangement& a, bool summed, Sum&& sum, Finish&& finish, Apply&& apply) {
    const int64_t lanes = a.lanes(), blocks = a.blocks(), pieces = a.pieces();
    const int64_t row_of_sums = lanes + kLanes<A>;
    std::vector<double> parts(summed ? static_cast<size_t>(2 * blocks * row_of_sums) : 0);
    const auto task = [&](int64_t t, auto&& f) {
        const int64_t begin = t / pieces * a.block_rows(), lane = t % pieces * a.block_lanes();
        f(begin, std::min(a.rows, begin + a.block_rows()), lane,
          std::min(lanes - lane, a.block_lanes()));
    };
#pragma omp parallel num_threads(threads_for(kPerElement * a.elements()))
    {
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t first = blocks * pieces * me / threads;
        const int64_t last = blocks * pieces * (me + 1) / threads;
        if (summed)
            for (int64_t t = first; t < last; ++t)
                task(t, [&](int64_t begin, int64_t end, int64_t lane, int64_t count) {
                    sums_across<A>(
                        begin, end, lane, lane + count,
                        [&](auto& one, auto& two, int64_t row, int64_t i, auto... some) {
                            sum(Across{}, one, two, row * lanes + i, i, some...);
                        },
                        parts.data() + 2 * (t / pieces) * row_of_sums,
                        parts.data() + (2 * (t / pieces) + 1) * row_of_sums);
                });
#pragma omp barrier
#pragma omp for
        for (int64_t c = 0; c < a.channels; ++c) {
            Sums total;
            for (int64_t b = 0; summed && b < blocks; ++b) {
                const double* sums = parts.data() + 2 * b * row_of_sums;
                for (int64_t i = c * a.fold; i < (c + 1) * a.fold; ++i)
                    total += {sums[i], sums[row_of_sums + i]};
            }
            finish(c, total);
        }
        for (int64_t t = last - 1; t >= first; --t)
            task(t, [&](int64_t begin, int64_t end, int64_t lane, int64_t count) {
                for (int64_t row = end - 1; row >= begin; --row) 
                    apply(Across{}, row * lanes + lane, count, lane);
            });
    }
}

template <class A, class... Parts>
void over(const Arrangement& a, Parts&&... parts) {
    if (a.across) over_rows<A>(a, parts...);
    else over_planes<A>(a, parts...);
}

template <class T>
std::vector<double> numbers_of(const View& view) {
    std::vector<double> found(static_cast<size_t>(view.shape[0]));
    for (size_t i = 0; i < found.size(); ++i)
        found[i] = to_float(view.ptr<T>()[static_cast<int64_t>(i) * view.strides[0]]);
    return found;
}
std::vector<double> numbers(const View& view) {
    std::vector<double> found;
    with_float_type(view.dtype, [&](auto zero) { found = numbers_of<decltype(zero)>(view); });
    return found;
}
std::vector<double> numbers(const OptionalView& view, const Arrangement& a, double otherwise) {
    return view ? numbers(*view) : std::vector<double>(static_cast<size_t>(a.channels), otherwise);
}

void put(const OptionalView& view, const std::vector<double>& values) {
    if (!view) return;
    with_float_type(view->dtype, [&](auto zero) {
        using T = decltype(zero);
        for (size_t i = 0; i < values.size(); ++i)
            view->ptr<T>()[static_cast<int64_t>(i) * view->strides[0]] =
                from_float<T>(static_cast<compute_t<T>>(values[i]));
    });
}

// One coefficient of every channel, once for each of its lanes and with a vector's room behind.
template <class A>
struct Coefficients : std::vector<A> {
    int64_t fold;
    explicit Coefficients(const Arrangement& a)
        : std::vector<A>(static_cast<size_t>(a.lanes() + kLanes<A>)), fold(a.fold) {}
    void set(int64_t channel, double value) {
        std::fill_n(this->begin() + channel * fold, fold, static_cast<A>(value));
    }
};

template <class T>
T* data(const OptionalView& view) {
    return view ? view->ptr<T>() : nullptr;
}

// Of every channel, of a few numbers that lie evenly apart.
template <class T, class A>
void estimate_means(const T* x, const Arrangement& a, bool channels_last, Coefficients<A>& center) {
    const int64_t count = std::min(kSampled, a.count());
    int64_t at[kSampled];
    for (int64_t k = 0; k < count; ++k) {
        const int64_t i = k * a.count() / count;
        at[k] = channels_last ? i * a.channels : i / a.size * a.channels * a.size + i % a.size;
    }
    const int64_t step = channels_last ? 1 : a.size;
    for (int64_t c = 0; c < a.channels; ++c) {
        double total = 0;
        for (int64_t k = 0; k < count; ++k) total += to_float(x[at[k] + c * step]);
        total /= static_cast<double>(count);
        center.set(c, std::isfinite(total) ? total : 0);
    }
}

template <class T>
void forward(const View& input, const OptionalView& residual, const OptionalView& weight,
             const OptionalView& bias, const View& mean, const View& var, const View& out,
             const BatchNormParams& p) {
    using A = compute_t<T>;
    const Arrangement a(input, p);
    const T* const x = input.ptr<T>();
    const T* const added = data<T>(residual);
    Coefficients<A> center(a), scale(a), shift(a);
    if (p.training) estimate_means(x, a, p.channels_last, center);
    const std::vector<double> weights = numbers(weight, a, 1), biases = numbers(bias, a, 0);
    std::vector<double> means = p.training ? weights : numbers(mean);
    std::vector<double> vars = p.training ? weights : numbers(var);
    const auto count = static_cast<double>(a.count());
    const double share = 1 / count, unbiased = count / (count - 1);
    const auto sum = [&](auto way, auto& first, auto& second, int64_t at, int64_t lane, auto... some) {
        auto off = load(x + at, some...) - way.of(center, lane).at(0);
        if constexpr (sizeof...(some)) off = first_lanes(off, some..., A{});
        first += off;
        second = fma(off, off, second);
    };
    const auto finish = [&](int64_t c, Sums sums) {
        const auto channel = static_cast<size_t>(c);
        double its_mean = means[channel], its_var = vars[channel];
        if (p.training) {
            const double off = sums.first * share;
            its_mean = off + static_cast<double>(center[channel * static_cast<size_t>(a.fold)]);
            its_var = sums.second * share - off * off;
            if (its_var < 0) its_var = 0;  // rounded; a NaN stays
            means[channel] = its_mean;
            vars[channel] = its_var * unbiased;
        }
        const double slope = weights[channel] / std::sqrt(its_var + p.eps);
        center.set(c, its_mean);
        scale.set(c, slope);
        // With what is lost where the mean is rounded.
        const double lost = static_cast<double>(static_cast<A>(its_mean)) - its_mean;
        shift.set(c, biases[channel] + (std::isfinite(lost) ? lost * slope : 0));
    };
    const auto run = [&](auto relu) {
        over<A>(a, p.training, sum, finish,
                [&](auto way, int64_t at, int64_t size, int64_t lane) {
                    normalise<decltype(relu)::value>(
                        x + at, added ? added + at : nullptr, size, way.of(center, lane),
                        way.of(scale, lane), way.of(shift, lane), out.ptr<T>() + at);
                });
    };
    if (p.relu) run(std::true_type{});
    else run(std::false_type{});
    if (!p.training) return;
    put(mean, means);
    put(var, vars);
}

template <class T>
void backward(const View& grad_out, const View& input, const View& out, const OptionalView& weight,
              const View& mean, const View& var, const OptionalView& grad_input,
              const OptionalView& grad_weight, const OptionalView& grad_bias,
              const OptionalView& grad_residual, const BatchNormParams& p) {
    using A = compute_t<T>;
    const Arrangement a(input, p);
    const T *g = grad_out.ptr<T>(), *mask = p.relu ? out.ptr<T>() : nullptr;
    const T* const x = input.ptr<T>();
    T *const to_input = data<T>(grad_input), *const to_residual = data<T>(grad_residual);
    const bool summed = grad_weight || grad_bias || (p.training && grad_input);
    Coefficients<A> center(a), lift(a), slope(a), scale(a);
    const std::vector<double> weights = numbers(weight, a, 1), means = numbers(mean);
    const std::vector<double> vars = numbers(var);
    for (int64_t c = 0; c < a.channels; ++c) center.set(c, means[static_cast<size_t>(c)]);
    std::vector<double> grads_weight(weights.size()), grads_bias(weights.size());
    const auto count = static_cast<double>(a.count());
    const double share = 1 / count, biased = p.training ? (count - 1) / count : 1;
    const auto sum = [&](auto way, auto& first, auto& second, int64_t at, int64_t lane, auto... some) {
        const auto passing = passed(g, mask, at, some...);
        if (to_residual) store(to_residual + at, passing, some...);
        first += passing;
        second = fma(passing, load(x + at, some...) - way.of(center, lane).at(0), second);
    };
    const auto finish = [&](int64_t c, Sums sums) {
        const double inv_std = 1 / std::sqrt(vars[static_cast<size_t>(c)] * biased + p.eps);
        grads_bias[static_cast<size_t>(c)] = sums.first;
        grads_weight[static_cast<size_t>(c)] = sums.second * inv_std;
        lift.set(c, sums.first * share);
        slope.set(c, sums.second * inv_std * inv_std * share);
        scale.set(c, weights[static_cast<size_t>(c)] * inv_std);
    };
    // What the first pass has left for the residual is what the second one needs.
    const T* const from = summed && to_residual ? to_residual : g;
    const T* const from_mask = summed && to_residual ? nullptr : mask;
    T* const masked = summed ? nullptr : to_residual;
    over<A>(a, summed, sum, finish, [&](auto way, int64_t at, int64_t size, int64_t lane) {
        if (!to_input && !masked) return;
        spread(from + at, from_mask ? from_mask + at : nullptr, p.training ? x + at : nullptr, size,
               way.of(center, lane), way.of(lift, lane), way.of(slope, lane), way.of(scale, lane),
               to_input ? to_input + at : nullptr, masked ? masked + at : nullptr);
    });
    put(grad_weight, grads_weight);
    put(grad_bias, grads_bias);
}

void check(const View& input, const View& mean, const View& var, const View& like) {
    require(input.ndim >= 2 && mean.ndim == 1 && var.ndim == 1, "batch_norm_act takes (N, C, *)");
    require(mean.shape[0] == input.shape[1] && var.shape[0] == input.shape[1],
            "mean and var do not fit the channels");
    require(same_shape(input, like) && input.dtype == like.dtype, "tensors differ from the input");
}

}  // namespace

void batch_norm_act_forward(const View& input, const OptionalView& residual,
                            const OptionalView& weight, const OptionalView& bias, const View& mean,
                            const View& var, const View& out, const BatchNormParams& params) {
    check(input, mean, var, out);
    if (residual) check(input, mean, var, *residual);
    if (input.numel() == 0) return;
    expect_writes(out);
    with_float_type(input.dtype, [&](auto zero) {
        forward<decltype(zero)>(input, residual, weight, bias, mean, var, out, params);
    });
}

void batch_norm_act_backward(const View& grad_out, const View& input, const View& out,
                             const OptionalView& weight, const View& mean, const View& var,
                             const OptionalView& grad_input, const OptionalView& grad_weight,
                             const OptionalView& grad_bias, const OptionalView& grad_residual,
                             const BatchNormParams& params) {
    check(input, mean, var, grad_out);
    check(input, mean, var, out);
    for (const auto& grad : {grad_input, grad_residual})
        if (grad) {
            check(input, mean, var, *grad);
            expect_writes(*grad);
        }
    if (input.numel() == 0) {
        const std::vector<double> nothing(static_cast<size_t>(input.shape[1]));
        put(grad_weight, nothing);
        put(grad_bias, nothing);
        return;
    }
    with_float_type(input.dtype, [&](auto zero) {
        backward<decltype(zero)>(grad_out, input, out, weight, mean, var, grad_input, grad_weight,
                                 grad_bias, grad_residual, params);
    });
}

}  // namespace bigops
