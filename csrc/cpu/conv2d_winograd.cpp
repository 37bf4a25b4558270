#include "conv2d_winograd.h"

#include "conv2d_winograd_outputs.h"
#include "conv2d_winograd_shape.h"
#include "huge_pages.h"
#include "kept_memory.h"
#include "threads.h"

namespace bigops {
namespace {

constexpr int64_t kTaskNumbers = 1 << 17;  // of a task's tiles and products: the second cache's
constexpr int64_t kTaskTiles = 32;         // of a task at least, as each reads all filters
constexpr int64_t kTerms = 32;             // of a sum over channels that are added up at once

template <class T, class A>
void take_filters(const View& weight, bool transposed, int threads, const Filters<A>& to) {
    const Taps<const T> from(weight, 0, transposed);
    const int64_t pitch = to.panels() * kTileLanes<A>, size = 9 * kWeightChannels * pitch;
#pragma omp parallel num_threads(threads)
    {
        const Aligned<A> taps = allocate<A>(size);
        std::fill_n(taps.get(), size, A{});
#pragma omp for schedule(static)
        for (int64_t begin = 0; begin < to.channels; begin += kWeightChannels) {
            const int64_t count = std::min(kWeightChannels, to.channels - begin);
            from.from(begin).for_matrices(
                count, 0, to.filters, count * pitch, pitch,
                [&](const T* first, int64_t i, int64_t j, int64_t at, int64_t at_i, int64_t at_j,
                    int64_t rows, int64_t columns) {
                    copy_2d(first, i, j, taps.get() + at, at_i, at_j, rows, columns);
                });
            transform_filters(taps.get(), begin, begin + count, transposed, to);
        }
    }
}

// products = points * filters at each of the 16 points.
template <class A>
void multiply(const Points<A>& points, const Filters<A>& filters, int64_t tiles,
              const Points<A>& products) {
    for (int64_t point = 0; point < kPoints; ++point)
        for (int64_t panel = 0; panel < filters.panels(); ++panel) {
            const int64_t first = panel * kTileLanes<A>;
            const int64_t lanes =
                std::min<int64_t>(kTileLanes<A>, channel_pitch<A>(filters.filters) - first);
            for (int64_t c = 0; c < filters.channels; c += kTerms)
                tile_matmul(tiles, lanes / kLanes<A>, std::min(kTerms, filters.channels - c),
                            points.at(point, 0) + c, points.pitch, 1, filters.at(point, panel, c),
                            kTileLanes<A>, products.at(point, 0) + first, products.pitch, c > 0);
        }
}

template <class T>
bool convolve(const View& input, const View& weight, const OptionalView& bias,
              const Outputs<T>& outputs, Size2 size, Size2 padding, bool transposed, int threads) {
    using A = compute_t<T>;
    const int64_t batch = input.shape[0], channels = input.shape[1];
    const int64_t height = input.shape[2], width = input.shape[3];
    Filters<A> filters{nullptr, channels, weight.shape[transposed ? 1 : 0]};
    const Aligned<A> filters_memory = allocate<A>(filters.size());
    filters.data = filters_memory.get();
    take_filters<T>(weight, transposed, threads, filters);
    const int64_t c_pitch = channel_pitch<A>(channels), f_pitch = channel_pitch<A>(filters.filters);
    const Aligned<A> biases = allocate<A>(f_pitch);
    std::fill_n(biases.get(), f_pitch, A{});
    for (int64_t f = 0; bias && f < filters.filters; ++f)
        biases[f] = to_float(bias->ptr<T>()[f * bias->strides[0]]);

    const Image<const T> from(input);
    const Tiles tiles(size[0], size[1]);
    const int64_t rows = batch * tiles.rows, columns = 2 * tiles.columns + 2;
    const int64_t wanted = std::max(kTaskTiles, kTaskNumbers / (kPoints * (c_pitch + f_pitch)));
    const int64_t tasks =
        std::min(rows, round_up(divide_up(rows * tiles.columns, wanted), threads));
    const int64_t most = divide_up(rows, tasks), together = std::min(most, tiles.rows);
    const int64_t most_tiles = most * tiles.columns;
    const int64_t points_size = Points<A>::size(most_tiles, channels);
    const int64_t products_size = Points<A>::size(most_tiles, filters.filters);
    bool all = true;
#pragma omp parallel num_threads(threads) reduction(&& : all)
    {
        const Aligned<A> memory = allocate<A>(points_size + products_size);
        const Aligned<A> band = allocate<A>(std::max((2 * together + 2) * columns * c_pitch,
                                                     outputs.band_numbers(together)));
        const Points<A> points(memory.get(), most_tiles, channels);
        const Points<A> products(memory.get() + points_size, most_tiles, filters.filters);
        Vec<A> zeros = {};
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tasks; ++task) {
            const int64_t begin = rows * task / tasks, end = rows * (task + 1) / tasks;
            tiles.for_images(begin, end, [&](int64_t n, int64_t row, int64_t high, int64_t at) {
                copy_band(from, n, height, width, channels, 2 * row - padding[0], 2 * high + 2,
                          -padding[1], columns, band.get(), c_pitch);
                transform_input(band.get(), high, tiles.columns, channels, points, at);
            });
            multiply(points, filters, (end - begin) * tiles.columns, products);
            tiles.for_images(begin, end, [&](int64_t n, int64_t row, int64_t high, int64_t at) {
                outputs.put(products, biases.get(), at, n, row, high, band.get(), zeros);
            });
        }
        all = finite<A>(zeros);
    }
    return all;
}

}  // namespace

bool conv2d_winograd(const View& input, const View& weight, const OptionalView& bias,
                     const View& out, const OptionalView& index, Size2 padding, bool relu,
                     bool transposed) {
    if (transposed) padding = {2 - padding[0], 2 - padding[1]};
    const Size2 size = winograd_out_size(input, weight, padding);
    require(input.shape[1] == weight.shape[transposed ? 0 : 1], "channels do not fit the weight");
    const int64_t filters = weight.shape[transposed ? 1 : 0];
    const Size2 kept = index ? Size2{size[0] / 2, size[1] / 2} : size;
    require_image(out, input.shape[0], filters, kept, input.dtype);
    if (index) require_image(*index, input.shape[0], filters, kept, DType::u8);
    require(!bias || (bias->ndim == 1 && bias->shape[0] == filters && bias->dtype == input.dtype),
            "bias does not fit");
    expect_writes(out);
    const Tiles tiles(size[0], size[1]);
    const int64_t count = input.shape[0] * tiles.rows * tiles.columns;
    const int threads = threads_for(32.0 * static_cast<double>(count * input.shape[1] * filters));
    return with_float(out.dtype, [&](auto zero) {
        using T = decltype(zero);
        const auto run = [&](const View& weight, const OptionalView& bias, const View& out,
                             const OptionalView& index, int threads) {
            const Outputs<T> outputs(out, index, size[0], size[1], relu);
            return convolve<T>(input, weight, bias, outputs, size, padding, transposed, threads);
        };
        // Of the filters and the tiles, transformed, the larger stay with one thread.
        if (threads == 1 || count >= filters) return run(weight, bias, out, index, threads);
        constexpr int64_t kPanel = kTileLanes<compute_t<T>>;
        return apart(threads, filters, kPanel, [&](int64_t begin, int64_t end) {
            const auto part = [&](const OptionalView& of, int dim) {
                return of ? OptionalView(slice<T>(*of, dim, begin, end)) : of;
            };
            return run(slice<T>(weight, transposed ? 1 : 0, begin, end), part(bias, 0),
                       slice<T>(out, 1, begin, end),
                       index ? OptionalView(slice<uint8_t>(*index, 1, begin, end)) : index, 1);
        });
    });
}

}  // namespace bigops
