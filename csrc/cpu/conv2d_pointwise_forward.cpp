// Convolution by filters of one pixel in one group: a matrix product for every image, with all that
// follows done while a block of its result is in L1.
#include "conv2d_pointwise.h"
#include "huge_pages.h"

namespace bigops {
namespace {

constexpr int64_t kTasksOfThread = 4;

// What becomes of rows of `count` sums; those in memory are `pitch` apart.
template <class T>
using Finish = void (*)(int64_t rows, int64_t count, const compute_t<T>* sums, const T* residual,
                        T* pre, T* out, int64_t pitch);
template <class T, Activation kActivation>
void finish(int64_t rows, int64_t count, const compute_t<T>* sums, const T* residual, T* pre,
            T* out, int64_t pitch) {
    using A = compute_t<T>;
    for (int64_t r = 0; r < rows; ++r, sums += Panels<A>::kWidth)
        for_lanes<A>(count, [&](int64_t i, auto... some) {
            Vec<A> x = load(sums + i, some...);
            if (residual) x += load(residual + r * pitch + i, some...);
            if (pre) store(pre + r * pitch + i, x, some...);
            store(out + r * pitch + i, activate<kActivation, A>(x), some...);
        });
}

template <class T>
void forward(const Operands<T>& of, const OptionalView& bias, const OptionalView& residual,
             const View& out_view, const OptionalView& pre, Finish<T> finish) {
    using A = compute_t<T>;
    constexpr int64_t W = Panels<A>::kWidth;
    const Conv2dShape& s = of.s;
    const Pixels<T> out(out_view, {1, 1}, s.conv_w);
    const auto beside = [&](const OptionalView& view, T* at) {  // of the same strides as out
        return view ? view->ptr<T>() + (at - out.data) : nullptr;
    };
    const int threads = threads_for(s.operations());
    const Aligned<A> biases = allocate<A>(round_up(s.filters, W));
    std::fill(biases.get(), biases.get() + round_up(s.filters, W), A{});
    for (int64_t k = 0; bias && k < s.filters; ++k)
        biases[static_cast<size_t>(k)] = to_float(bias->ptr<T>()[k * bias->strides[0]]);

    // Broadcast are the filters of planes, else a tile's pixels; the other operand is in panels.
    const int64_t tile = of.tile(s.channels, of.planes ? W : kRowBlock, threads);
    const int64_t tiles = divide_up(of.pixels, tile);
    const Panels<A> all_filters(s.channels, of.planes ? 0 : s.filters);
    const int64_t row = odd_lines<A>(s.channels);
    const Aligned<A> rows = allocate<A>(of.planes ? s.filters * row : 1);
    for (int64_t k = 0; of.planes && k < s.filters; ++k)
        copy_2d(of.filter(k), of.weight_row, of.weight_step, rows.get() + k * row, row,
                int64_t{1}, int64_t{1}, s.channels);
    if (!of.planes)
        pack<T>(
            all_filters, true, of.weight_step, [&](int64_t k) { return of.filter(k); }, threads);
    const int64_t units = of.planes ? divide_up(s.filters, kRowBlock) : all_filters.count();
    const int64_t splits =
        std::clamp<int64_t>(divide_up(kTasksOfThread * threads, s.batch * tiles), 1, units);
#pragma omp parallel num_threads(threads)
    {
        Panels<A> x(s.channels, of.planes ? tile : 0);
        const bool copied = !std::is_same_v<T, A> || !of.input.joined;
        const Aligned<A> own = allocate<A>(!of.planes && copied ? tile * s.channels : 1);
        const Aligned<A> block = allocate<A>(kRowBlock * W);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.batch * tiles * splits; ++task) {
            const int64_t n = task / (tiles * splits), split = task % splits;
            const int64_t first = task / splits % tiles * tile;
            const int64_t count = std::min(tile, of.pixels - first);
            const Tile next = of.next({n, first, count}, tile);
            const auto ahead = [&](int64_t step, int64_t steps) {
                fetch_part(of.input, next, s.channels, of.planes, step, steps);
            };
            const int64_t unit = units * split / splits, last = units * (split + 1) / splits;
            if (of.planes) {
                const int64_t k0 = unit * kRowBlock, k1 = std::min(s.filters, last * kRowBlock);
                x.columns = count;
                of.pack_planes(x, false, n, first);
                multiply<A>(
                    k1 - k0, rows.get() + k0 * row, row, 1, x, 0, x.count(), block.get(),
                    ahead,
                    [&](int64_t r, int64_t filters, int64_t) {
                        for (int64_t k = 0; k < filters; ++k)
                            for (int64_t i = 0; i < W; i += kLanes<A>)
                                store(block.get() + k * W + i,
                                      splat(biases[static_cast<size_t>(k0 + r + k)]));
                        return true;
                    },
                    [&](int64_t r, int64_t filters, int64_t i, int64_t width) {
                        T* at = out.at(n, k0 + r, first + i);
                        finish(filters, width, block.get(), beside(residual, at), beside(pre, at),
                               at, out.channel);
                    });
                continue;
            }
            const A* from = own.get();
            int64_t from_row = s.channels;
            if constexpr (std::is_same_v<T, A>)
                if (!copied) from = of.input.at(n, 0, first), from_row = of.input.column;
            for (int64_t i = 0; copied && i < count; ++i)
                copy_2d(of.input.at(n, 0, first + i), int64_t{1}, int64_t{1},
                        own.get() + i * s.channels, int64_t{1}, int64_t{1}, int64_t{1}, s.channels);
            multiply<A>(
                count, from, from_row, 1, all_filters, unit, last, block.get(),
                ahead,
                [&](int64_t, int64_t pixels, int64_t k) {
                    for (int64_t p = 0; p < pixels; ++p)
                        for (int64_t i = 0; i < W; i += kLanes<A>)
                            store(block.get() + p * W + i, load(biases.get() + k + i));
                    return true;
                },
                [&](int64_t r, int64_t pixels, int64_t k, int64_t width) {
                    T* at = out.at(n, k, first + r);
                    finish(pixels, width, block.get(), beside(residual, at), beside(pre, at), at,
                           out.column);
                });
        }
    }
}

}  // namespace

void conv2d_pointwise_forward(const View& input, const View& weight, const OptionalView& bias,
                              const OptionalView& residual, const View& out,
                              const OptionalView& pre, const Conv2dParams& conv,
                              Activation activation) {
    const Conv2dShape s = pointwise_shape(input, weight, out, conv);
    bias_fits(bias, weight);
    like_output(out, {residual, pre});
    if (out.numel() == 0) return;
    expect_writes(out);
    expect_writes(pre);
    with_float_type(input.dtype, [&](auto zero) {
        using T = decltype(zero);
        with_activation(activation, [&](auto which) {
            forward<T>({input, weight, out, conv, s}, bias, residual, out, pre,
                       &finish<T, decltype(which)::value>);
        });
    });
}

}  // namespace bigops
