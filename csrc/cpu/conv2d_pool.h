// ReLU + max-pooling of one row of windows, lanes being filters; shared by the direct convolution
// (whose rows lie in L1) and by the pass over somebody else's convolution.
#pragma once

#include "conv2d_tile.h"

namespace bigops {

// Pooled pixels in order: [pixel][stride] values and, if wanted, the bytes of their windows.
template <class A>
struct RowTile {
    int64_t stride;
    bool has_places;
    Scratch<A> value;
    Scratch<uint8_t> place;

    RowTile(int64_t pixels, int64_t filters, bool places)
        : stride((filters + kLanes<A> - 1) / kLanes<A> * kLanes<A>), has_places(places),
          value(pixels * stride), place(places ? pixels * stride : 0) {}
};

// The best of a window so far. As torch does, the first of equal maxima wins and a NaN over all.
template <class A>
struct Best {
    using Lane = decltype(Mask<A>{}[0] + 0);
    Vec<A> value;
    Mask<A> place;

    static Mask<A> lanes(int64_t place) { return static_cast<Lane>(place) - Mask<A>{}; }

    void meet(Vec<A> other, int64_t its_place) {
        const Mask<A> wins = (other > value) | (other != other);
        value = select(wins, other, value);
        place = wins ? lanes(its_place) : place;
    }

    // After ReLU, which keeps NaN.
    void put(RowTile<A>& tile, int64_t at) const {
        store(tile.value + at, select(value < 0, Vec<A>{}, value));
        if (tile.has_places) store_bytes<A>(tile.place + at, value <= 0 ? lanes(kBlocked) : place);
    }
};

// rows: the window's rows (null outside the image), each [conv_w][pixel_stride].
template <class S, class A = compute_t<S>>
inline void pool_row(const S* const* rows, int64_t pixel_stride, int64_t conv_w, int64_t filters,
                     const Pool2dParams& pool, int64_t pool_w, RowTile<A>& tile,
                     int64_t first_pixel = 0) {
    constexpr int L = kLanes<A>;
    const bool pooling = pool.kernel[0] * pool.kernel[1] > 1 || pool.stride[1] > 1;
    const Mask<A> relu = Best<A>::lanes(pool.relu ? -1 : 0);
    if (!pooling && !tile.has_places) {  // ReLU alone, or not even that
        for (int64_t pw = 0; pw < pool_w; ++pw) {
            const S* from = rows[0] + pw * pixel_stride;
            A* to = tile.value + (first_pixel + pw) * tile.stride;
            for (int64_t k = 0; k < filters; k += L) {
                const int count = static_cast<int>(std::min<int64_t>(L, filters - k));
                const Vec<A> value = count == L ? load(from + k) : load(from + k, count);
                store(to + k, select((value < 0) & relu, Vec<A>{}, value));
            }
        }
        return;
    }
    // The usual windows, of 2x2 pixels that are all there, in straight code: 0.37 ms of the
    // first layer's forward pass become 0.32.
    const bool square = pool.kernel == Size2{2, 2} && rows[0] && rows[1] && filters % L == 0;
    for (int64_t pw = 0; pw < pool_w; ++pw) {
        const int64_t left = pw * pool.stride[1] - pool.padding[1];
        const int64_t kw_begin = std::max<int64_t>(0, -left);
        const int64_t kw_end = std::min(pool.kernel[1], conv_w - left);
        const int64_t to = (first_pixel + pw) * tile.stride;
        if (square && kw_begin == 0 && kw_end == 2) {
            const S *top = rows[0] + left * pixel_stride, *bottom = rows[1] + left * pixel_stride;
            for (int64_t k = 0; k < filters; k += L) {
                Best<A> best{load(top + k), Mask<A>{}};
                best.meet(load(top + pixel_stride + k), 1);
                best.meet(load(bottom + k), 2);
                best.meet(load(bottom + pixel_stride + k), 3);
                best.put(tile, to + k);
            }
            continue;
        }
        int64_t first = kw_begin;  // the place of a window without any value above -inf
        while (!rows[first / pool.kernel[1]]) first += pool.kernel[1];
        for (int64_t k = 0; k < filters; k += L) {
            const int count = static_cast<int>(std::min<int64_t>(L, filters - k));
            Best<A> best{splat(-std::numeric_limits<A>::infinity()), Best<A>::lanes(first)};
            for (int64_t kh = 0; kh < pool.kernel[0]; ++kh) {
                if (!rows[kh]) continue;
                for (int64_t kw = kw_begin; kw < kw_end; ++kw) {
                    const S* p = rows[kh] + (left + kw) * pixel_stride + k;
                    best.meet(count == L ? load(p) : load(p, count), kh * pool.kernel[1] + kw);
                }
            }
            best.put(tile, to + k);
        }
    }
}

// Puts a tile into the output and the index, whatever their layouts.
template <class T>
class RowWriter {
public:
    RowWriter(const View& out, const OptionalView& index)
        : out_(out), index_(index ? *index : out), has_index_(index.has_value()) {}

    // Whether rows follow each other in memory as pixels do, so that several are written as one.
    bool joined(int64_t pool_w) const {
        return out_.stride_h == out_.stride_w * pool_w &&
               (!has_index_ || index_.stride_h == index_.stride_w * pool_w);
    }

    // `pixels` from the beginning of `row` on.
    void write(RowTile<compute_t<T>>& tile, int64_t n, int64_t filter, int64_t row, int64_t pixels,
               int64_t filters) const {
        copy_2d(static_cast<const compute_t<T>*>(tile.value.get()), tile.stride, int64_t{1},
                out_.at(n, filter, row, 0), out_.stride_w, out_.stride_c, pixels, filters);
        if (has_index_)
            copy_2d(static_cast<const uint8_t*>(tile.place.get()), tile.stride, int64_t{1},
                    index_.at(n, filter, row, 0), index_.stride_w, index_.stride_c, pixels,
                    filters);
    }

private:
    Image<T> out_;
    Image<uint8_t> index_;
    bool has_index_;
};

}  // namespace bigops
