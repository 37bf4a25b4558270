// The gradient of the weight: tiles of inputs and of gradients, whose products are summed over all
// tiles before they go back to 3x3. All threads transform a batch of tiles that stays in their caches,
// then each sums for channels and points of its own: in the same order with any number of threads.
#include "conv2d_winograd.h"
#include "conv2d_winograd_shape.h"
#include "conv2d_winograd_tiles.h"
#include "huge_pages.h"
#include "kept_memory.h"
#include "threads.h"

namespace bigops {
namespace {

constexpr int64_t kBatchNumbers = 1 << 18;  // of a batch's tiles
constexpr int64_t kSlice = 16;  // channels that are worth transforming all gradients for

// How many terms of a sum are added up at once: the rounding error of a sum of such sums grows with
// their length and with their number, so both are about equal.
int64_t chain_of(int64_t terms) {
    int64_t chain = 16;
    while (chain < kChain && chain * chain < terms) chain *= 2;
    return chain;
}

template <class T>
bool weight_gradient(const View& grad_out, const View& input, const View& grad_weight,
                     Size2 padding, int threads) {
    using A = compute_t<T>;
    const Image<const T> from(input), grads(grad_out);
    const int64_t channels = input.shape[1], filters = grad_out.shape[1];
    const int64_t height = input.shape[2], width = input.shape[3];
    const int64_t out_height = grad_out.shape[2], out_width = grad_out.shape[3];
    const Tiles tiles(out_height, out_width);
    const int64_t c_pitch = channel_pitch<A>(channels), f_pitch = channel_pitch<A>(filters);
    const int64_t rows = input.shape[0] * tiles.rows, columns = tiles.columns;
    // Of the filters alone: a sum's order is the same for any slice of the channels.
    const int64_t wanted = kBatchNumbers / (2 * kPoints * f_pitch) / columns;
    const int64_t batches = divide_up(rows, std::max<int64_t>(1, wanted));
    const int64_t most = divide_up(rows, batches), together = std::min(most, tiles.rows);
    const int64_t points_size = Points<A>::size(most * columns, channels);
    const Aligned<A> memory =
        allocate<A>(points_size + Points<A>::size(most * columns, filters));
    const Points<A> points(memory.get(), most * columns, channels);
    const Points<A> slopes(memory.get() + points_size, most * columns, filters);
    const Aligned<A> sums_memory = allocate<A>(Points<A>::size(channels, filters));
    const Points<A> sums(sums_memory.get(), channels, filters);
    const Taps<T> to(grad_weight, 0, false);
    const int64_t chain = chain_of(rows * columns);
    const int64_t blocks = divide_up(channels, kChain), vectors = f_pitch / kLanes<A>;
    bool all = true;
#pragma omp parallel num_threads(threads) reduction(&& : all)
    {
        const Aligned<A> band =
            allocate<A>((2 * together + 2) * (2 * columns + 2) * std::max(c_pitch, f_pitch));
        for (int64_t batch = 0; batch < batches; ++batch) {
            const int64_t begin = rows * batch / batches, end = rows * (batch + 1) / batches;
            const int64_t pieces = std::min<int64_t>(end - begin, 4 * threads);
#pragma omp for schedule(static)
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const int64_t first = begin + (end - begin) * piece / pieces;
                const int64_t last = begin + (end - begin) * (piece + 1) / pieces;
                tiles.for_images(first, last, [&](int64_t n, int64_t row, int64_t high, int64_t at) {
                    at += (first - begin) * columns;
                    copy_band(from, n, height, width, channels, 2 * row - padding[0], 2 * high + 2,
                              -padding[1], 2 * columns + 2, band.get(), c_pitch);
                    transform_input(band.get(), high, columns, channels, points, at);
                    copy_band(grads, n, out_height, out_width, filters, 2 * row, 2 * high,
                              int64_t{0}, 2 * columns, band.get(), f_pitch);
                    transform_gradient(band.get(), high, columns, filters, slopes, at);
                });
            }
            const int64_t count = (end - begin) * columns;
#pragma omp for schedule(static)
            for (int64_t block = 0; block < kPoints * blocks; ++block) {
                const int64_t point = block / blocks, c = block % blocks * kChain;
                for (int64_t t = 0; t < count; t += chain)
                    tile_matmul(std::min(kChain, channels - c), vectors, std::min(chain, count - t),
                                points.at(point, t) + c, 1, points.pitch, slopes.at(point, t),
                                slopes.pitch, sums.at(point, c), sums.pitch, batch > 0 || t > 0);
            }
        }
        const Aligned<A> taps = allocate<A>(9 * kWeightChannels * f_pitch);
        Vec<A> zeros = {};
#pragma omp for schedule(static)
        for (int64_t first = 0; first < channels; first += kWeightChannels) {
            const int64_t count = std::min(kWeightChannels, channels - first);
            zeros += tap_sums(sums, first, first + count, filters, taps.get());
            to.from(first).for_matrices(
                count, 0, filters, count * f_pitch, f_pitch,
                [&](T* at, int64_t i, int64_t j, int64_t from, int64_t from_i, int64_t from_j,
                    int64_t rows, int64_t columns) {
                    copy_2d(static_cast<const A*>(taps.get()) + from, from_i, from_j, at, i, j,
                            rows, columns);
                });
        }
        all = finite<A>(zeros);
    }
    return all;
}

}  // namespace

bool conv2d_winograd_weight(const View& grad_out, const View& input, const View& grad_weight,
                            Size2 padding) {
    const Size2 size = winograd_out_size(input, grad_weight, padding);
    require(input.shape[1] == grad_weight.shape[1], "channels do not fit the weight");
    require_image(grad_out, input.shape[0], grad_weight.shape[0], size, input.dtype);
    expect_writes(grad_weight);
    const int64_t channels = input.shape[1];
    const int threads = threads_for(8.0 * static_cast<double>(grad_out.numel() * channels));
    return with_float(input.dtype, [&](auto zero) {
        using T = decltype(zero);
        if (threads == 1 || channels < threads * kSlice)
            return weight_gradient<T>(grad_out, input, grad_weight, padding, threads);
        return apart(threads, channels, kSlice, [&](int64_t begin, int64_t end) {
            return weight_gradient<T>(grad_out, slice<T>(input, 1, begin, end),
                                      slice<T>(grad_weight, 1, begin, end), padding, 1);
        });
    });
}

}  // namespace bigops
