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
constexpr int64_t kChannels = 16;  // of filters that are transformed together
constexpr double kPerNumber = 16;  // operations that a transformed number stands for

// Whether a sum of 0 * x, over everything that a call computed, tells that all x were finite.
template <class A>
bool finite(Vec<A> zeros) {
    bool all = true;
    for (int i = 0; i < kLanes<A>; ++i) all &= zeros[i] == 0;
    return all;
}

// A 3x3 weight by channel and filter: of an input's gradient these are the other way around.
template <class A>
struct Weight {
    A* data;
    int64_t channel, filter, row, column;  // strides

    Weight(const View& weight, bool transposed)
        : data(weight.ptr<A>()), channel(weight.strides[transposed ? 0 : 1]),
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

template <class A>
void take_filters(const View& weight, bool transposed, int threads, const Filters<A>& to) {
    const Weight<const A> from(weight, transposed);
    const int64_t pitch = to.panels() * kTileLanes<A>, size = 9 * kChannels * pitch;
#pragma omp parallel num_threads(threads)
    {
        const Aligned<A> taps = allocate<A>(size);
        std::fill_n(taps.get(), size, A{});
#pragma omp for schedule(static)
        for (int64_t begin = 0; begin < to.channels; begin += kChannels) {
            const int64_t count = std::min(kChannels, to.channels - begin);
            from.for_matrices(begin, count, pitch, [&](const A* first, int64_t other, int64_t at,
                                                       int64_t at_other, int64_t columns) {
                copy_2d(first, from.filter, other, taps.get() + at, int64_t{1}, at_other,
                        to.filters, columns);
            });
            transform_filters(taps.get(), begin, begin + count, transposed, to);
        }
    }
}

template <class A>
class Convolution {
   public:
    Convolution(const View& input, const OptionalView& bias, const View& out, Size2 padding,
                bool relu, const Filters<A>& filters)
        : from_(input), to_(out), height_(input.shape[2]), width_(input.shape[3]),
          out_height_(out.shape[2]), out_width_(out.shape[3]), batch_(out.shape[0]),
          padding_(padding), relu_(relu), filters_(filters), tiles_(out_height_, out_width_),
          bias_(allocate<A>(filters.panels() * kTileLanes<A>)) {
        std::fill_n(bias_.get(), filters.panels() * kTileLanes<A>, A{});
        for (int64_t f = 0; bias && f < filters.filters; ++f)
            bias_[f] = bias->ptr<A>()[f * bias->strides[0]];
    }

    bool run(int threads) const {
        const int64_t rows = batch_ * tiles_.rows;
        const int64_t numbers = kPoints * (channels_pitch() + products_pitch());
        const int64_t wanted = std::max(kTaskTiles, kTaskNumbers / numbers);
        int64_t tasks = divide_up(rows * tiles_.columns, wanted);
        tasks = std::min(rows, round_up(tasks, threads));
        const int64_t most = divide_up(rows, tasks);
        bool all = true;
#pragma omp parallel num_threads(threads) reduction(&& : all)
        {
            const int64_t count = most * tiles_.columns, band_rows = std::min(most, tiles_.rows);
            const int64_t in_step = Points<A>::step_of(count, channels_pitch());
            const int64_t out_step = Points<A>::step_of(count, products_pitch());
            const Aligned<A> memory = allocate<A>(kPoints * (in_step + out_step));
            const Aligned<A> band =
                allocate<A>(std::max((2 * band_rows + 2) * band_columns() * channels_pitch(),
                                     4 * band_rows * tiles_.columns * products_pitch()));
            const Points<A> points{memory.get(), channels_pitch(), in_step};
            const Points<A> products{memory.get() + kPoints * in_step, products_pitch(), out_step};
            Vec<A> zeros = {};
#pragma omp for schedule(static)
            for (int64_t task = 0; task < tasks; ++task) {
                const int64_t begin = rows * task / tasks, end = rows * (task + 1) / tasks;
                tiles_.for_images(begin, end, [&](int64_t n, int64_t row, int64_t high, int64_t at) {
                    copy_band(from_, n, height_, width_, filters_.channels, 2 * row - padding_[0],
                              2 * high + 2, -padding_[1], band_columns(), band.get());
                    transform_input(band.get(), high, tiles_.columns, filters_.channels, points, at);
                });
                multiply(points, products, (end - begin) * tiles_.columns);
                tiles_.for_images(begin, end, [&](int64_t n, int64_t row, int64_t high, int64_t at) {
                    put(products, at, n, row, high, band.get(), zeros);
                });
            }
            all = finite<A>(zeros);
        }
        return all;
    }

   private:
    int64_t channels_pitch() const { return channel_pitch<A>(filters_.channels); }
    int64_t products_pitch() const { return channel_pitch<A>(filters_.filters); }
    int64_t band_columns() const { return 2 * tiles_.columns + 2; }

    void multiply(const Points<A>& points, const Points<A>& products, int64_t tiles) const {
        for (int64_t point = 0; point < kPoints; ++point)
            for (int64_t panel = 0; panel < filters_.panels(); ++panel) {
                const int64_t first = panel * kTileLanes<A>;
                const int64_t lanes = std::min<int64_t>(kTileLanes<A>, products.pitch - first);
                for (int64_t c = 0; c < filters_.channels; c += kChain)
                    tile_matmul(tiles, lanes / kLanes<A>, std::min(kChain, filters_.channels - c),
                                points.at(point, 0) + c, points.pitch, 1,
                                filters_.at(point, panel, c), kTileLanes<A>,
                                products.at(point, 0) + first, products.pitch, c > 0);
            }
    }

    // The outputs of an image's rows of tiles, whose products begin at tile `at`.
    void put(const Points<A>& products, int64_t at, int64_t n, int64_t row, int64_t high, A* band,
             Vec<A>& zeros) const {
        const int64_t top = 2 * row, filters = filters_.filters, pitch = products.pitch;
        const int64_t rows = std::min(2 * high, out_height_ - top);
        const bool direct = to_.stride_c == 1;
        A* to = direct ? to_.at(n, 0, top, 0) : band;
        const int64_t down = direct ? to_.stride_h : out_width_ * pitch;
        const int64_t right = direct ? to_.stride_w : pitch;
        const int64_t writes = direct ? filters : pitch;
        for (int64_t y = 0; y < rows; y += 2)
            for (int64_t x = 0; x < out_width_; x += 2, ++at) {
                A* pixel = to + y * down + x * right;
                const bool below = y + 1 < rows, beside = x + 1 < out_width_;
                int64_t f = 0;
                for (; f + kLanes<A> <= writes; f += kLanes<A>)
                    put_tile(products, at, f, pixel + f, down, right, below, beside, zeros);
                if (f < writes)
                    put_tile(products, at, f, pixel + f, down, right, below, beside, zeros,
                             static_cast<int>(writes - f));
            }
        for (int64_t y = 0; !direct && y < rows; ++y)
            copy_2d(static_cast<const A*>(band) + y * down, pitch, int64_t{1},
                    to_.at(n, 0, top + y, 0), to_.stride_w, to_.stride_c, out_width_, filters);
    }

    template <class... Some>
    void put_tile(const Points<A>& products, int64_t tile, int64_t filter, A* pixel, int64_t down,
                  int64_t right, bool below, bool beside, Vec<A>& zeros, Some... some) const {
        std::array<Vec<A>, 4> out = output_tile(products, tile, filter);
        const Vec<A> bias = load(bias_.get() + filter);
#pragma GCC unroll 4
        for (Vec<A>& x : out) {
            zeros = fma(Vec<A>{}, x, zeros);
            x += bias;
            if (relu_) x = select(x < 0, Vec<A>{}, x);
        }
        store(pixel, out[0], some...);
        if (beside) store(pixel + right, out[1], some...);
        if (below) store(pixel + down, out[2], some...);
        if (below && beside) store(pixel + down + right, out[3], some...);
    }

    Image<const A> from_;
    Image<A> to_;
    int64_t height_, width_, out_height_, out_width_, batch_;
    Size2 padding_;
    bool relu_;
    Filters<A> filters_;
    Tiles tiles_;
    Aligned<A> bias_;
};

template <class A>
bool convolve(const View& input, const View& weight, const OptionalView& bias, const View& out,
              Size2 padding, bool relu, bool transposed) {
    Filters<A> filters{nullptr, input.shape[1], out.shape[1]};
    const Aligned<A> memory = allocate<A>(filters.size());
    filters.data = memory.get();
    const int threads = threads_for(8.0 * static_cast<double>(out.numel() * filters.channels));
    take_filters(weight, transposed, threads, filters);
    return Convolution<A>(input, bias, out, padding, relu, filters).run(threads);
}

template <class A>
bool weight_gradient(const View& grad_out, const View& input, const View& grad_weight,
                     Size2 padding) {
    const Image<const A> from(input), grads(grad_out);
    const int64_t channels = input.shape[1], filters = grad_out.shape[1];
    const int64_t height = input.shape[2], width = input.shape[3];
    const int64_t out_height = grad_out.shape[2], out_width = grad_out.shape[3];
    const Tiles tiles(out_height, out_width);
    const int64_t c_pitch = channel_pitch<A>(channels), f_pitch = channel_pitch<A>(filters);
    const int64_t rows = input.shape[0] * tiles.rows, columns = tiles.columns;
    const int64_t wanted = kBatchNumbers / (kPoints * (c_pitch + f_pitch)) / columns;
    const int64_t batches = divide_up(rows, std::max<int64_t>(1, wanted));
    const int64_t most = divide_up(rows, batches), together = std::min(most, tiles.rows);
    const int64_t c_step = Points<A>::step_of(most * columns, c_pitch);
    const int64_t f_step = Points<A>::step_of(most * columns, f_pitch);
    const int threads = threads_for(8.0 * static_cast<double>(grad_out.numel() * channels));
    const Aligned<A> memory = allocate<A>(kPoints * (c_step + f_step));
    const Points<A> points{memory.get(), c_pitch, c_step};
    const Points<A> slopes{memory.get() + kPoints * c_step, f_pitch, f_step};
    const int64_t step = Points<A>::step_of(channels, f_pitch);
    const Aligned<A> sums_memory = allocate<A>(kPoints * step);
    const Points<A> sums{sums_memory.get(), f_pitch, step};
    const Weight<A> to(grad_weight, false);
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
                for (int64_t t = 0; t < count; t += kChain)
                    tile_matmul(std::min(kChain, channels - c), vectors, std::min(kChain, count - t),
                                points.at(point, t) + c, 1, c_pitch, slopes.at(point, t), f_pitch,
                                sums.at(point, c), f_pitch, batch > 0 || t > 0);
            }
        }
        const Aligned<A> taps = allocate<A>(9 * kChannels * f_pitch);
        Vec<A> zeros = {};
#pragma omp for schedule(static)
        for (int64_t first = 0; first < channels; first += kChannels) {
            const int64_t count = std::min(kChannels, channels - first);
            zeros += tap_sums(sums, first, first + count, taps.get());
            to.for_matrices(first, count, f_pitch, [&](A* at, int64_t other, int64_t from,
                                                       int64_t from_other, int64_t across) {
                copy_2d(static_cast<const A*>(taps.get()) + from, int64_t{1}, from_other, at,
                        to.filter, other, filters, across);
            });
        }
        all = finite<A>(zeros);
    }
    return all;
}

void check(const View& input, const View& weight, const View& out, Size2 padding) {
    require(input.ndim == 4 && weight.ndim == 4 && out.ndim == 4, "conv2d takes 4-d tensors");
    require(input.dtype == weight.dtype && input.dtype == out.dtype, "conv2d dtypes differ");
    require(weight.shape[2] == 3 && weight.shape[3] == 3, "the kernel must be 3x3");
    require(input.shape[1] == weight.shape[1] && out.shape[1] == weight.shape[0],
            "channels do not fit the weight");
    for (int i = 0; i < 2; ++i) {
        require(padding[i] >= 0 && padding[i] <= 2, "the padding must be 0, 1 or 2");
        require(out.shape[2 + i] == input.shape[2 + i] + 2 * padding[i] - 2 && out.shape[2 + i] > 0,
                "out has the wrong shape");
    }
    require(out.shape[0] == input.shape[0] && input.numel() > 0, "out has the wrong shape");
}

template <class F>
bool with_compute_type(DType dtype, F&& f) {
    require(dtype == DType::f32 || dtype == DType::f64, "dtype must be float32 or float64");
    return dtype == DType::f32 ? f(float{}) : f(double{});
}

}  // namespace

bool conv2d_winograd(const View& input, const View& weight, const OptionalView& bias,
                     const View& out, Size2 padding, bool relu, bool transposed) {
    if (transposed) check(out, weight, input, padding);
    else check(input, weight, out, padding);
    if (transposed) padding = {2 - padding[0], 2 - padding[1]};
    expect_writes(out);
    return with_compute_type(out.dtype, [&](auto zero) {
        return convolve<decltype(zero)>(input, weight, bias, out, padding, relu, transposed);
    });
}

bool conv2d_winograd_weight(const View& grad_out, const View& input, const View& grad_weight,
                            Size2 padding) {
    check(input, grad_weight, grad_out, padding);
    return with_compute_type(input.dtype, [&](auto zero) {
        return weight_gradient<decltype(zero)>(grad_out, input, grad_weight, padding);
    });
}

}  // namespace bigops
