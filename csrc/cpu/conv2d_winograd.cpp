#include "conv2d_winograd.h"

#include "conv2d_winograd_tiles.h"
#include "huge_pages.h"
#include "kept_memory.h"
#include "threads.h"

namespace bigops {
namespace {

constexpr int64_t kTaskNumbers = 1 << 17;  // of transformed tiles and products: a second cache's
constexpr int64_t kTaskTiles = 32;         // at least: all filters are read for each task
constexpr int64_t kBatchNumbers = 3 << 19;  // of transformed tiles that both threads share
constexpr int64_t kChannels = 16;
constexpr int64_t kTerms = 32;     // of a sum over channels that are added up at once

// Whether a sum of 0 * x, over everything that a call computed, tells that all x were finite.
template <class A>
bool finite(Vec<A> zeros) {
    bool all = true;
    for (int i = 0; i < kLanes<A>; ++i) all &= zeros[i] == 0;
    return all;
}

// A 3x3 weight by channel and filter: of an input's gradient these are the other way around.
template <class T>
struct Weight {
    T* data;
    int64_t channel, filter, row, column;  // strides

    Weight(const View& weight, bool transposed)
        : data(weight.ptr<T>()), channel(weight.strides[transposed ? 0 : 1]),
          filter(weight.strides[transposed ? 1 : 0]), row(weight.strides[2]),
          column(weight.strides[3]) {}

    // run(first number, stride of filters and of the other, first number in taps[tap][channel]
    // [filter], its stride of the other, count of the other): in whichever order copies best.
    template <class Run>
    void for_matrices(int64_t begin, int64_t count, int64_t pitch, Run&& run) const {
        const int64_t step = count * pitch;
        if (column == 1 && row == 3)  // the taps lie side by side
            for (int64_t c = 0; c < count; ++c)
                run(data + (begin + c) * channel, int64_t{1}, c * pitch, step, int64_t{9});
        else
            for (int64_t tap = 0; tap < 9; ++tap)
                run(data + begin * channel + tap / 3 * row + tap % 3 * column, channel, tap * step,
                    pitch, count);
    }
};

template <class T, class A>
void take_filters(const View& weight, bool transposed, int threads, const Filters<A>& to) {
    const Weight<const T> from(weight, transposed);
    const int64_t pitch = to.panels() * kTileLanes<A>, size = 9 * kChannels * pitch;
#pragma omp parallel num_threads(threads)
    {
        const Aligned<A> taps = allocate<A>(size);
        std::fill_n(taps.get(), size, A{});
#pragma omp for schedule(static)
        for (int64_t begin = 0; begin < to.channels; begin += kChannels) {
            const int64_t count = std::min(kChannels, to.channels - begin);
            from.for_matrices(begin, count, pitch, [&](const T* first, int64_t other, int64_t at,
                                                       int64_t at_other, int64_t columns) {
                copy_2d(first, from.filter, other, taps.get() + at, int64_t{1}, at_other,
                        to.filters, columns);
            });
            transform_filters(taps.get(), begin, begin + count, transposed, to);
        }
    }
}

// How many terms of a sum are added up at once: the rounding error of a sum of such sums grows with
// their length and with their number, so both are about equal.
int64_t chain_of(int64_t terms) {
    int64_t chain = 16;
    while (chain < kChain && chain * chain < terms) chain *= 2;
    return chain;
}

// products = points * filters at each of the 16 points.
template <class A>
void multiply(const Points<A>& points, const Filters<A>& filters, int64_t tiles,
              const Points<A>& products) {
    for (int64_t point = 0; point < kPoints; ++point)
        for (int64_t panel = 0; panel < filters.panels(); ++panel) {
            const int64_t first = panel * kTileLanes<A>;
            const int64_t lanes = std::min<int64_t>(kTileLanes<A>, channel_pitch<A>(filters.filters) - first);
            for (int64_t c = 0; c < filters.channels; c += kTerms)
                tile_matmul(tiles, lanes / kLanes<A>, std::min(kTerms, filters.channels - c),
                            points.at(point, 0) + c, points.pitch, 1, filters.at(point, panel, c),
                            kTileLanes<A>, products.at(point, 0) + first, products.pitch, c > 0);
        }
}

// What becomes of a tile's outputs, and where it goes: pixel by pixel where channels lie side by
// side in whole vectors, through memory of a few rows elsewhere.
template <class T>
class Outputs {
    using A = compute_t<T>;

   public:
    Outputs(const View& out, const OptionalView& index, int64_t rows, int64_t columns, bool relu)
        : to_(out), index_(index.value_or(out)), pooled_(index), relu_(relu), rows_(rows),
          columns_(columns), filters_(out.shape[1]), pitch_(channel_pitch<A>(filters_)),
          direct_(to_.stride_c == 1 && filters_ == pitch_ && (!pooled_ || index_.stride_c == 1)) {}

    // What `put` needs of `band`, for so many rows of tiles.
    int64_t band_numbers(int64_t high) const {
        return direct_ ? 0 : (pooled_ ? 2 : 4) * high * divide_up(columns_, 2) * pitch_;
    }

    // The outputs of image n's `high` rows of tiles from `row`, whose products begin at tile `at`.
    void put(const Points<A>& products, const A* bias, int64_t at, int64_t n, int64_t row,
             int64_t high, A* band, Vec<A>& zeros) const {
        if (pooled_) put_windows(products, bias, at, n, row, high, band, zeros);
        else if (direct_) put_pixels(products, bias, at, row, high, to_.at(n, 0, 2 * row, 0),
                                     to_.stride_h, to_.stride_w, zeros);
        else {
            const int64_t rows = std::min(2 * high, rows_ - 2 * row), pitch = columns_ * pitch_;
            put_pixels(products, bias, at, row, high, band, pitch, pitch_, zeros);
            for (int64_t y = 0; y < rows; ++y)
                copy_2d(static_cast<const A*>(band) + y * pitch, pitch_, int64_t{1},
                        to_.at(n, 0, 2 * row + y, 0), to_.stride_w, to_.stride_c, columns_, filters_);
        }
    }

   private:
    template <class To>
    void put_pixels(const Points<A>& products, const A* bias, int64_t at, int64_t row, int64_t high,
                    To* to, int64_t down, int64_t right, Vec<A>& zeros) const {
        const int64_t rows = std::min(2 * high, rows_ - 2 * row);
        for (int64_t y = 0; y < rows; y += 2)
            for (int64_t x = 0; x < columns_; x += 2, ++at)
                for (int64_t f = 0; f < pitch_; f += kLanes<A>) {
                    std::array<Vec<A>, 4> out = output_tile(products, at, f);
#pragma GCC unroll 4
                    for (Vec<A>& x : out) {
                        zeros = fma(Vec<A>{}, x, zeros);
                        x += load(bias + f);
                        if (relu_) x = select(x < 0, Vec<A>{}, x);
                    }
                    To* pixel = to + y * down + x * right + f;
                    const bool below = y + 1 < rows, beside = x + 1 < columns_;
                    store(pixel, out[0]);
                    if (beside) store(pixel + right, out[1]);
                    if (below) store(pixel + down, out[2]);
                    if (below && beside) store(pixel + down + right, out[3]);
                }
    }

    // A tile is a window of the pooling; windows lack those that an odd size leaves incomplete.
    void put_windows(const Points<A>& products, const A* bias, int64_t at, int64_t n, int64_t row,
                     int64_t high, A* band, Vec<A>& zeros) const {
        const int64_t rows = std::min(high, rows_ / 2 - row), columns = columns_ / 2;
        const int64_t tiles = divide_up(columns_, 2);
        auto* places = reinterpret_cast<uint8_t*>(band + columns * pitch_);
        for (int64_t y = 0; y < rows; ++y) {
            T* to = to_.at(n, 0, row + y, 0);
            uint8_t* index = index_.at(n, 0, row + y, 0);
            for (int64_t x = 0; x < columns; ++x)
                for (int64_t f = 0; f < pitch_; f += kLanes<A>) {
                    const auto out = output_tile(products, at + y * tiles + x, f);
                    Vec<A> most = {};
                    Mask<A> place = Mask<A>{} + kBlocked;
#pragma GCC unroll 4
                    for (int i = 0; i < 4; ++i) {
                        zeros = fma(Vec<A>{}, out[static_cast<size_t>(i)], zeros);
                        const Vec<A> value = round_to(out[static_cast<size_t>(i)] + load(bias + f));
                        place = value > most ? Mask<A>{} + i : place;
                        most = vmax(value, most);
                    }
                    if (direct_) {
                        store(to + x * to_.stride_w + f, most);
                        store_bytes<A>(index + x * index_.stride_w + f, place);
                    } else {
                        store(band + x * pitch_ + f, most);
                        store_bytes<A>(places + x * pitch_ + f, place);
                    }
                }
            if (direct_) continue;
            copy_2d(static_cast<const A*>(band), pitch_, int64_t{1}, to, to_.stride_w, to_.stride_c,
                    columns, filters_);
            copy_2d(static_cast<const uint8_t*>(places), pitch_, int64_t{1}, index, index_.stride_w,
                    index_.stride_c, columns, filters_);
        }
    }

    // As the convolution's output would have been stored: what rounds alike is a tie.
    static Vec<A> round_to(Vec<A> x) {
        if constexpr (std::is_same_v<T, A>) return x;
        T halves[kLanes<A>];
        store(halves, x);
        return load(halves);
    }

    Image<T> to_;
    Image<uint8_t> index_;
    bool pooled_, relu_;
    int64_t rows_, columns_, filters_, pitch_;  // of the convolution's output
    bool direct_;
};

template <class T>
bool convolve(const View& input, const View& weight, const OptionalView& bias,
              const Outputs<T>& outputs, int64_t out_height, int64_t out_width, Size2 padding,
              bool transposed) {
    using A = compute_t<T>;
    const int64_t batch = input.shape[0], channels = input.shape[1];
    const int64_t height = input.shape[2], width = input.shape[3];
    Filters<A> filters{nullptr, channels, weight.shape[transposed ? 1 : 0]};
    const Aligned<A> filters_memory = allocate<A>(filters.size());
    filters.data = filters_memory.get();
    const int threads = threads_for(
        8.0 * static_cast<double>(batch * out_height * out_width * channels * filters.filters));
    take_filters<T>(weight, transposed, threads, filters);
    const int64_t c_pitch = channel_pitch<A>(channels), f_pitch = channel_pitch<A>(filters.filters);
    const Aligned<A> biases = allocate<A>(f_pitch);
    std::fill_n(biases.get(), f_pitch, A{});
    for (int64_t f = 0; bias && f < filters.filters; ++f)
        biases[f] = to_float(bias->ptr<T>()[f * bias->strides[0]]);

    const Image<const T> from(input);
    const Tiles tiles(out_height, out_width);
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
                          -padding[1], columns, band.get());
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

template <class T>
bool weight_gradient(const View& grad_out, const View& input, const View& grad_weight,
                     Size2 padding) {
    using A = compute_t<T>;
    const Image<const T> from(input), grads(grad_out);
    const int64_t channels = input.shape[1], filters = grad_out.shape[1];
    const int64_t height = input.shape[2], width = input.shape[3];
    const int64_t out_height = grad_out.shape[2], out_width = grad_out.shape[3];
    const Tiles tiles(out_height, out_width);
    const int64_t c_pitch = channel_pitch<A>(channels), f_pitch = channel_pitch<A>(filters);
    const int64_t rows = input.shape[0] * tiles.rows, columns = tiles.columns;
    const int64_t wanted = kBatchNumbers / (kPoints * (c_pitch + f_pitch)) / columns;
    const int64_t batches = divide_up(rows, std::max<int64_t>(1, wanted));
    const int64_t most = divide_up(rows, batches), together = std::min(most, tiles.rows);
    const int64_t points_size = Points<A>::size(most * columns, channels);
    const int threads = threads_for(8.0 * static_cast<double>(grad_out.numel() * channels));
    const Aligned<A> memory =
        allocate<A>(points_size + Points<A>::size(most * columns, filters));
    const Points<A> points(memory.get(), most * columns, channels);
    const Points<A> slopes(memory.get() + points_size, most * columns, filters);
    const Aligned<A> sums_memory = allocate<A>(Points<A>::size(channels, filters));
    const Points<A> sums(sums_memory.get(), channels, filters);
    const Weight<T> to(grad_weight, false);
    const int64_t chain = chain_of(rows * columns);
    const int64_t blocks = divide_up(channels, kChain), vectors = f_pitch / kLanes<A>;
    bool all = true;
#pragma omp parallel num_threads(threads) reduction(&& : all)
    {
        const Aligned<A> band =
            allocate<A>((2 * together + 2) * (2 * columns + 2) * std::max(c_pitch, f_pitch));
        for (int64_t batch = 0; batch < batches; ++batch) {
            const int64_t begin = rows * batch / batches, end = rows * (batch + 1) / batches;
            // Pieces of about as many rows as an image's bands have elsewhere.
            const int64_t pieces = std::min<int64_t>(end - begin, 4 * threads);
#pragma omp for schedule(static)
            for (int64_t piece = 0; piece < pieces; ++piece) {
                const int64_t first = begin + (end - begin) * piece / pieces;
                const int64_t last = begin + (end - begin) * (piece + 1) / pieces;
                tiles.for_images(first, last, [&](int64_t n, int64_t row, int64_t high, int64_t at) {
                    at += (first - begin) * columns;
                    copy_band(from, n, height, width, channels, 2 * row - padding[0], 2 * high + 2,
                              -padding[1], 2 * columns + 2, band.get());
                    transform_input(band.get(), high, columns, channels, points, at);
                    copy_band(grads, n, out_height, out_width, filters, 2 * row, 2 * high,
                              int64_t{0}, 2 * columns, band.get());
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
        const Aligned<A> taps = allocate<A>(9 * kChannels * f_pitch);
        Vec<A> zeros = {};
#pragma omp for schedule(static)
        for (int64_t first = 0; first < channels; first += kChannels) {
            const int64_t count = std::min(kChannels, channels - first);
            zeros += tap_sums(sums, first, first + count, filters, taps.get());
            to.for_matrices(first, count, f_pitch, [&](T* at, int64_t other, int64_t from,
                                                       int64_t from_other, int64_t across) {
                copy_2d(static_cast<const A*>(taps.get()) + from, int64_t{1}, from_other, at,
                        to.filter, other, filters, across);
            });
        }
        all = finite<A>(zeros);
    }
    return all;
}

// A 3x3 convolution of these has an output of this size.
Size2 out_size(const View& input, const View& weight, Size2 padding) {
    require(input.ndim == 4 && weight.ndim == 4, "conv2d takes 4-d tensors");
    require(input.dtype == weight.dtype, "conv2d dtypes differ");
    require(weight.shape[2] == 3 && weight.shape[3] == 3, "the kernel must be 3x3");
    Size2 out;
    for (size_t i = 0; i < 2; ++i) {
        require(padding[i] >= 0 && padding[i] <= 2, "the padding must be 0, 1 or 2");
        out[i] = input.shape[2 + i] + 2 * padding[i] - 2;
        require(out[i] > 0, "kernel exceeds input");
    }
    require(input.numel() > 0 && weight.numel() > 0, "conv2d takes no empty tensors here");
    return out;
}

void check(const View& t, const View& like, int64_t channels, Size2 size, DType dtype) {
    require(t.ndim == 4 && t.dtype == dtype && t.shape[0] == like.shape[0] &&
                t.shape[1] == channels && t.shape[2] == size[0] && t.shape[3] == size[1],
            "out or index has the wrong shape or dtype");
}

template <class F>
bool with_float(DType dtype, F&& f) {
    bool found = false;
    with_float_type(dtype, [&](auto zero) { found = f(zero); });
    return found;
}

}  // namespace

bool conv2d_winograd(const View& input, const View& weight, const OptionalView& bias,
                     const View& out, const OptionalView& index, Size2 padding, bool relu,
                     bool transposed) {
    if (transposed) padding = {2 - padding[0], 2 - padding[1]};
    const Size2 size = out_size(input, weight, padding);
    require(input.shape[1] == weight.shape[transposed ? 0 : 1], "channels do not fit the weight");
    const int64_t filters = weight.shape[transposed ? 1 : 0];
    const Size2 kept = index ? Size2{size[0] / 2, size[1] / 2} : size;
    check(out, input, filters, kept, input.dtype);
    if (index) check(*index, input, filters, kept, DType::u8);
    require(!bias || (bias->ndim == 1 && bias->shape[0] == filters && bias->dtype == input.dtype),
            "bias does not fit");
    expect_writes(out);
    return with_float(out.dtype, [&](auto zero) {
        using T = decltype(zero);
        const Outputs<T> outputs(out, index, size[0], size[1], relu);
        return convolve<T>(input, weight, bias, outputs, size[0], size[1], padding, transposed);
    });
}

bool conv2d_winograd_weight(const View& grad_out, const View& input, const View& grad_weight,
                            Size2 padding) {
    const Size2 size = out_size(input, grad_weight, padding);
    require(input.shape[1] == grad_weight.shape[1], "channels do not fit the weight");
    check(grad_out, input, grad_weight.shape[0], size, input.dtype);
    return with_float(input.dtype, [&](auto zero) {
        return weight_gradient<decltype(zero)>(grad_out, input, grad_weight, padding);
    });
}

}  // namespace bigops
