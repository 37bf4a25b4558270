// Gradients of filters of one pixel. The gradient before the activation is made tile by tile, in
// cache: it serves the three others and never reaches memory. Each thread adds up the weight's over
// its own tiles.
#include "conv2d_pointwise.h"
#include "huge_pages.h"

namespace bigops {
namespace {

// Of a tensor without gaps.
template <class T>
void fill_zero(const View& view, int threads) {
    const int64_t images = view.shape[0], numbers = view.numel() / std::max<int64_t>(1, images);
#pragma omp parallel for num_threads(threads)
    for (int64_t n = 0; n < images; ++n)
        std::fill_n(view.ptr<T>() + n * view.strides[0], numbers, T{});
}

// Rows of `count` numbers of the gradient before the activation.
template <class T>
using Gradient = void (*)(int64_t rows, int64_t count, const T* grad, const T* saved, T* residual,
                          int64_t pitch, compute_t<T>* to, int64_t to_pitch);
template <class T, Activation kActivation>
void gradient(int64_t rows, int64_t count, const T* grad, const T* saved, T* residual,
              int64_t pitch, compute_t<T>* to, int64_t to_pitch) {
    using A = compute_t<T>;
    for (int64_t r = 0; r < rows; ++r)
        for_lanes<A>(count, [&](int64_t i, auto... some) {
            const int64_t at = r * pitch + i;
            const Vec<A> g = activation_gradient<kActivation, A>(load(grad + at, some...),
                                                                 load(saved + at, some...));
            if (residual) store(residual + at, g, some...);
            store(to + r * to_pitch + i, g, some...);
        });
}

// What a thread adds up over its tiles.
template <class A>
struct Part {
    int64_t pitch;
    Aligned<A> weight;  // [filter][channel]
    std::vector<double> bias;

    Part(const Conv2dShape& s, bool weight_wanted)
        : pitch(round_up(s.channels, kLanes<A>)),
          weight(allocate<A>(weight_wanted ? s.filters * pitch : 1)),
          bias(static_cast<size_t>(s.filters)) {
        if (weight_wanted) std::fill(weight.get(), weight.get() + s.filters * pitch, A{});
    }
};

template <class T>
void backward(const Operands<T>& of, const View& grad_view, const OptionalView& saved,
              const OptionalView& grad_input, const OptionalView& grad_weight,
              const OptionalView& grad_bias, const OptionalView& grad_residual,
              const Conv2dParams& conv, Gradient<T> gradient) {
    using A = compute_t<T>;
    constexpr int64_t W = Panels<A>::kWidth, L = kLanes<A>;
    const Conv2dShape& s = of.s;
    const Pixels<const T> grad(grad_view, {1, 1}, s.conv_w);
    const Pixels<const T> kept(saved ? *saved : grad_view, {1, 1}, s.conv_w);
    const Pixels<T> to(grad_input ? *grad_input : grad_view, conv.stride, s.conv_w);
    const int threads = threads_for(2 * s.operations());
    const int64_t tile = of.tile(s.channels + s.filters, of.planes ? W : kPointwiseChain, threads);
    const int64_t tiles = divide_up(of.pixels, tile);
    const int64_t tasks = s.batch * tiles;
    const int64_t parts = std::clamp<int64_t>(tasks, 1, threads);
    const int64_t row = odd_lines<A>(s.filters);
    // Filters as the input's gradient takes them: turned and broadcast for planes, else in panels.
    Panels<A> filters(s.filters, grad_input && !of.planes ? s.channels : 0);
    const Aligned<A> turned = allocate<A>(grad_input && of.planes ? s.channels * row : 1);
    if (grad_input && of.planes) {
        std::vector<int64_t> offsets(static_cast<size_t>(s.filters));
        for (size_t k = 0; k < offsets.size(); ++k)
            offsets[k] = static_cast<int64_t>(k) * of.weight_row;
        pack_transposed<T>({of.weight, offsets.data(), of.weight_step}, s.filters, s.channels, A{1},
                           turned.get(), row);
    } else if (grad_input) {
        pack<T>(filters, false, of.weight_step, [&](int64_t k) { return of.filter(k); }, threads);
    }
    if (grad_input && !to.joined) fill_zero<T>(*grad_input, threads);
    std::vector<Part<A>> sums;
    for (int64_t i = 0; i < parts; ++i) sums.emplace_back(s, grad_weight.has_value());

#pragma omp parallel for num_threads(static_cast<int>(parts)) schedule(static, 1)
    for (int64_t part = 0; part < parts; ++part) {
        Part<A>& sum_of = sums[static_cast<size_t>(part)];
        Panels<A> g(of.planes ? s.filters : row, tile);
        Panels<A> x(tile, grad_weight ? s.channels : 0);
        const Aligned<A> block = allocate<A>(kRowBlock * W);
        for (int64_t task = tasks * part / parts; task < tasks * (part + 1) / parts; ++task) {
            const int64_t n = task / tiles, first = task % tiles * tile;
            const int64_t count = std::min(tile, of.pixels - first);
            const auto before = [&](int64_t pixel, int64_t rows, int64_t numbers, A* at,
                                    int64_t pitch) {
                const T* from = grad.at(n, 0, first + pixel);
                const int64_t beside = from - grad.data;
                gradient(rows, numbers, from, kept.data + beside,
                         grad_residual ? grad_residual->ptr<T>() + beside : nullptr,
                         of.planes ? grad.channel : grad.column, at, pitch);
            };
            x.rows = count;
            if (of.planes) {
                g.columns = count;
                for (int64_t p = 0; p < g.count(); ++p) {
                    before(p * W, s.filters, g.width(p), g.at(p), W);
                    for (int64_t k = 0; grad_bias && k < s.filters; ++k) {
                        Vec<A> total = {};
                        for_lanes<A>(g.width(p), [&](int64_t i, auto... some) {
                            total += load(g.at(p) + k * W + i, some...);
                        });
                        sum_of.bias[static_cast<size_t>(k)] += sum(total);
                    }
                }
                if (grad_weight) of.pack_planes(x, true, n, first);
            } else {
                before(0, count, s.filters, g.at(0), row);
                for_lanes<A>(grad_bias ? s.filters : 0, [&](int64_t k, auto... some) {
                    Vec<A> total = {};
                    for (int64_t i = 0; i < count; ++i)
                        total += load(g.at(0) + i * row + k, some...);
                    for (int64_t i = 0; i < std::min<int64_t>(L, s.filters - k); ++i)
                        sum_of.bias[static_cast<size_t>(k + i)] += total[i];
                });
                if (grad_weight)
                    pack<T>(x, false, int64_t{1},
                            [&](int64_t i) { return of.input.at(n, 0, first + i); });
            }
            for (int64_t p = 0; grad_weight && p < x.count(); ++p) {
                A* at = sum_of.weight.get() + p * W;
                // A panel of the gradient is W pixels of each filter; else the whole tile is one.
                const int64_t depth = of.planes ? W : count;
                for (int64_t i = 0; i < count; i += depth)
                    tile_matmul<A>(s.filters, x.vectors(p), std::min(depth, count - i),
                                   of.planes ? g.at(i / W) : g.at(0), of.planes ? W : 1,
                                   of.planes ? 1 : row, x.at(p) + i * W, W, at, sum_of.pitch, true,
                                   kPointwiseChain);
            }
            const auto nothing = [](auto...) { return false; };
            const Tile next = of.next({n, first, count}, tile);
            const auto ahead = [&](int64_t step, int64_t steps) {
                fetch_part(grad, next, s.filters, of.planes, step, steps);
                if (saved) fetch_part(kept, next, s.filters, of.planes, step, steps);
                if (grad_weight) fetch_part(of.input, next, s.channels, of.planes, step, steps);
            };
            if (!grad_input) continue;
            if (of.planes)
                multiply<A>(s.channels, turned.get(), row, 1, g, 0, g.count(), block.get(), ahead,
                            nothing,
                            [&](int64_t c, int64_t channels, int64_t i, int64_t width) {
                                for (int64_t r = 0; r < channels; ++r)
                                    if (to.joined)
                                        put(block.get() + r * W, width, to.at(n, c + r, first + i));
                                    else
                                        for (int64_t j = 0; j < width; ++j)
                                            *to.at(n, c + r, first + i + j) =
                                                from_float<T>(block.get()[r * W + j]);
                            });
            else
                multiply<A>(count, g.at(0), row, 1, filters, 0, filters.count(), block.get(),
                            ahead, nothing,
                            [&](int64_t i, int64_t pixels, int64_t c, int64_t width) {
                                for (int64_t r = 0; r < pixels; ++r)
                                    put(block.get() + r * W, width, to.at(n, c, first + i + r));
                            });
        }
    }
    for (int64_t k = 0; grad_bias && k < s.filters; ++k) {
        double total = 0;
        for (const Part<A>& part : sums) total += part.bias[static_cast<size_t>(k)];
        grad_bias->ptr<T>()[k * grad_bias->strides[0]] = from_float<T>(static_cast<A>(total));
    }
    if (!grad_weight) return;
#pragma omp parallel for num_threads(threads)
    for (int64_t k = 0; k < s.filters; ++k) {
        A* total = sums[0].weight.get() + k * sums[0].pitch;
        for (size_t part = 1; part < sums.size(); ++part)
            for (int64_t c = 0; c < sums[0].pitch; c += L)
                store(total + c,
                      load(total + c) + load(sums[part].weight.get() + k * sums[0].pitch + c));
        copy_2d(static_cast<const A*>(total), sums[0].pitch, int64_t{1},
                grad_weight->ptr<T>() + k * grad_weight->strides[0], grad_weight->strides[0],
                grad_weight->strides[1], int64_t{1}, s.channels);
    }
}

}  // namespace

void conv2d_pointwise_backward(const View& grad_out, const View& input, const View& weight,
                               const OptionalView& saved, const OptionalView& grad_input,
                               const OptionalView& grad_weight, const OptionalView& grad_bias,
                               const OptionalView& grad_residual, const Conv2dParams& conv,
                               Activation activation) {
    const Conv2dShape s = pointwise_shape(input, weight, grad_out, conv);
    require(saved || activation == Activation::none,
            "the activation's gradient needs what was saved");
    bias_fits(grad_bias, weight);
    like_output(grad_out, {saved, grad_residual});
    require(!grad_input || (same_shape(*grad_input, input) && grad_input->dtype == input.dtype &&
                            std::equal(input.strides, input.strides + 4, grad_input->strides)),
            "grad_input does not fit input");
    require(!grad_weight || (same_shape(*grad_weight, weight) && grad_weight->dtype == input.dtype),
            "grad_weight does not fit weight");
    expect_writes(grad_input);
    expect_writes(grad_residual);
    with_float_type(input.dtype, [&](auto zero) {
        using T = decltype(zero);
        with_activation(activation, [&](auto which) {
            backward<T>({input, weight, grad_out, conv, s}, grad_out, saved, grad_input,
                        grad_weight, grad_bias, grad_residual, conv,
                        &gradient<T, decltype(which)::value>);
        });
    });
}

}  // namespace bigops
