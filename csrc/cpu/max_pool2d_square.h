// Max-pooling's usual windows in contiguous images: 2x2, apart, without padding. Straight code, rows
// read and written in place: a third of the time of dealing them out.
#pragma once

#include "conv2d_pool.h"
#include "max_pool2d_rows.h"

namespace bigops {

inline bool is_square(const MaxPool2dShape& s, const MaxPool2dParams& p) {
    return p.kernel == Size2{2, 2} && p.stride == Size2{2, 2} && p.padding == Size2{0, 0} &&
           p.dilation == Size2{1, 1} && 2 * s.out_h <= s.height && 2 * s.out_w <= s.width;
}

// Rows `task` to `last` of windows, counted through all planes.
template <class T>
void forward_square(const MaxPool2dShape& s, const Image<const T>& image, const T* end, T* out,
                    uint8_t* index, int64_t task, int64_t last) {
    using A = compute_t<T>;
    constexpr int L = kLanes<A>;
    const T* const out_end = out + last * s.out_w;
    const uint8_t* const index_end = index + last * s.out_w;
    int64_t plane = task / s.out_h, oh = task % s.out_h;
    for (; task < last; ++task) {
        const T* rows[2];
        rows[0] = image.at(plane / s.channels, plane % s.channels, 2 * oh, 0);
        rows[1] = rows[0] + image.stride_h;
        for (int64_t w = 0; w < s.out_w; w += L) {
            Vec<A> taps[2][2];
            for (int kh = 0; kh < 2; ++kh) {
                const T* p = rows[kh] + 2 * w;
                const int64_t count = 2 * (s.out_w - w);
                const Vec<A> low = load_over(p, end, count);
                const auto [even, odd] =
                    split<A>(low, count > L ? load_over(p + L, end, count - L) : low);
                taps[kh][0] = even, taps[kh][1] = odd;
            }
            Best<A> best{taps[0][0], Mask<A>{}};
            best.meet(taps[0][1], 1);
            best.meet(taps[1][0], 2);
            best.meet(taps[1][1], 3);
            const int64_t at = task * s.out_w + w;
            store_over(out + at, out_end, best.value, s.out_w - w);
            store_bytes_over<A>(index + at, index_end, best.place, s.out_w - w);
        }
        if (++oh == s.out_h) oh = 0, ++plane;
    }
}

// The rows of the image that these windows cover, and those below the last ones.
template <class T>
void backward_square(const MaxPool2dShape& s, const Image<const T>& from, const T* end,
                     const uint8_t* index, const uint8_t* index_end, T* to, int64_t task,
                     int64_t last) {
    using A = compute_t<T>;
    constexpr int L = kLanes<A>;
    const auto row_of = [&](int64_t t) {
        return to + (t / s.out_h * s.height + t % s.out_h * 2) * s.width;
    };
    const T* const to_end = row_of(last);
    T* row = row_of(task);
    int64_t plane = task / s.out_h, oh = task % s.out_h;
    for (; task < last; ++task) {
        const T* g = from.at(plane / s.channels, plane % s.channels, oh, 0);
        for (int kh = 0; kh < 2; ++kh, row += s.width) {
            for (int64_t w = 0; w < s.out_w; w += L) {
                const int64_t count = s.out_w - w;
                const Vec<A> value = load_over(g + w, end, count);
                const Mask<A> place =
                    load_bytes_over<A>(index + task * s.out_w + w, index_end, count);
                const auto here = [&](int64_t tap) {
                    return select(place == Best<A>::lanes(tap), value, Vec<A>{});
                };
                const auto [low, high] = zip<A>(here(2 * kh), here(2 * kh + 1));
                store_over(row + 2 * w, to_end, low, 2 * count);
                if (2 * count > L) store_over(row + 2 * w + L, to_end, high, 2 * count - L);
            }
            if (s.width % 2) row[s.width - 1] = T{};
        }
        if (++oh < s.out_h) continue;
        oh = 0, ++plane;
        if (s.height % 2) row = std::fill_n(row, s.width, T{});
    }
}

}  // namespace bigops
