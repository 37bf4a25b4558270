// What becomes of a tile's outputs, and where they go.
#pragma once

#include "conv2d_winograd_tiles.h"

namespace bigops {

// The outputs of tiles, with bias, ReLU and pooling: pixel by pixel where channels lie side by side in
// whole vectors, through memory of a few rows elsewhere.
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

}  // namespace bigops
