// The windows of max-pooling as its backward wants them: gradients, and where they go to.
#pragma once

#include "conv2d_image.h"

namespace bigops {

// Whole vectors of 32-bit numbers, as lanes of A's width.
template <class A>
inline Mask<A> load_offsets(const int32_t* p) {
    typedef int32_t Offsets __attribute__((vector_size(4 * kLanes<A>)));
    Offsets offsets;
    std::memcpy(&offsets, p, sizeof offsets);
    return __builtin_convertvector(offsets, Mask<A>);
}

template <class A>
inline void store_offsets(int32_t* p, Mask<A> lanes) {
    typedef int32_t Offsets __attribute__((vector_size(4 * kLanes<A>)));
    const Offsets offsets = __builtin_convertvector(lanes, Offsets);
    std::memcpy(p, &offsets, sizeof offsets);
}

// The windows of a band for a block of filters: the gradient where the ReLU let the value pass, the
// window's byte, and where the winner lies in the image. Window by window, as the gradient
// of the input wants them, or filter by filter, where that is not wanted and nothing need be turned.
template <class T>
struct Winners {
    using A = compute_t<T>;
    const Image<const T> grad_out, out;  // out without pooling, else index
    const Image<const uint8_t> index;
    const bool has_index, has_out, by_filter;
    const int64_t window_step, filter_step, size;
    Scratch<A> value, passed;
    Scratch<uint8_t> bytes;
    Scratch<int32_t> offset;

    Winners(const View& g, const OptionalView& saved, int64_t windows, int64_t filters,
            bool input_needed)
        : grad_out(g), out(saved.value_or(g)), index(saved.value_or(g)),
          has_index(saved && saved->dtype == DType::u8), has_out(saved && !has_index),
          by_filter(!input_needed && g.strides[3] == 1),
          window_step(by_filter ? 1 : whole(filters)), filter_step(by_filter ? whole(windows) : 1),
          size(by_filter ? filters * filter_step : windows * window_step), value(size),
          passed(has_out ? size : 0), bytes(size), offset(size) {
        std::fill(bytes.get(), bytes + size, uint8_t{});
    }

    static int64_t whole(int64_t count) { return (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>; }

    // window_offset is read in whole vectors.
    void read(int64_t n, int64_t filter, int64_t count, int64_t row, int64_t rows, int64_t pool_w,
              const PatchLayout& l, const int32_t* window_offset) {
        const int64_t windows = rows * pool_w;
        const auto copy = [&](const auto& from, auto* to) {
            // Window rows that follow each other in memory are copied as one.
            const bool joined = from.stride_h == from.stride_w * pool_w;
            const int64_t length = joined ? windows : pool_w;
            for (int64_t r = 0; r < windows; r += length)
                copy_2d(from.at(n, filter, row + r / pool_w, 0), from.stride_w, from.stride_c,
                        to + r * window_step, window_step, filter_step, length, count);
        };
        // Lanes beyond the last filter or window count as zeros.
        const int64_t lines = by_filter ? count : windows, line = by_filter ? windows : count;
        const int64_t step = by_filter ? filter_step : window_step, lanes = whole(line);
        if (line < lanes)
            for (int64_t i = 0; i < lines; ++i)
                store(value + i * step + lanes - kLanes<A>, Vec<A>{});
        copy(grad_out, value.get());
        if (has_index) copy(index, bytes.get());
        if (has_out) copy(out, passed.get());
        for (int64_t i = 0; i < lines; ++i)
            for (int64_t at = i * step, k = 0; k < lanes; at += kLanes<A>, k += kLanes<A>) {
                const Mask<A> p = load_bytes<A>(bytes + at), kh = p * l.place_reciprocal >> 16;
                const Mask<A> blocked = has_index ? p == kBlocked
                                        : has_out ? Mask<A>(load(passed + at) <= 0)
                                                  : Mask<A>{};
                const Mask<A> origin = by_filter ? load_offsets<A>(window_offset + k)
                                                 : Mask<A>(window_offset[i] - Mask<A>{});
                // A blocked window adds 0 times something: the image's first patch always exists.
                store_offsets<A>(offset + at, ~blocked & (origin + kh * l.place_row + p * l.place));
                store(value + at, select(blocked, Vec<A>{}, load(value + at)));
            }
    }

    // totals[k] += the gradients of filter k.
    void add_up(int64_t count, int64_t windows, double* totals) {
        for (int64_t k = 0; k < count; k += by_filter ? 1 : kLanes<A>) {
            Vec<A> total{};
            if (by_filter) {
                for (int64_t w = 0; w < windows; w += kLanes<A>)
                    total += load(value + k * filter_step + w);
                totals[k] += sum(total);
                continue;
            }
            for (int64_t w = 0; w < windows; ++w) total += load(value + w * window_step + k);
            for (int64_t i = k; i < std::min<int64_t>(count, k + kLanes<A>); ++i)
                totals[i] += total[i - k];
        }
    }
};

// Appends the lanes under the mask to two lists and returns how many they are. Whole vectors are
// written: the lists need room for one more.
template <class A>
inline int append(Mask<A> mask, Vec<A> value, Mask<A> filter, A* values, int32_t* filters) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<A, float>) {
        const __mmask16 chosen = _mm512_movepi32_mask((__m512i)mask);
        store(values, _mm512_maskz_compress_ps(chosen, value));
        _mm512_storeu_si512(filters, _mm512_maskz_compress_epi32(chosen, (__m512i)filter));
        return __builtin_popcount(chosen);
    }
#endif
    int count = 0;
    for (int i = 0; i < kLanes<A>; ++i) {
        values[count] = value[i];
        filters[count] = static_cast<int32_t>(filter[i]);
        count += mask[i] != 0;
    }
    return count;
}

// The same windows by pixel: segments of filters that won at one place of one window.
template <class A>
struct Segments {
    struct Segment {
        int32_t pixel;
        int32_t begin;
    };
    Scratch<A> value;
    Scratch<int32_t> filter;
    Scratch<Segment> segment;
    int64_t count = 0;

    Segments(int64_t windows, int64_t filters, int64_t places)
        : value(windows * filters + kLanes<A>), filter(windows * filters + kLanes<A>),
          segment(windows * std::min(places, filters) + 1) {}

    template <class T>
    void sort(Winners<T>& winners, int64_t windows, int64_t filters, int64_t places,
              const PatchLayout& l, const int32_t* window_offset) {
        constexpr int L = kLanes<A>;
        using Lane = decltype(Mask<A>{}[0] + 0);
        Mask<A> lane;
        for (int i = 0; i < L; ++i) lane[i] = static_cast<Lane>(i * l.filter);
        int32_t end = 0;
        count = 0;
        for (int64_t w = 0; w < windows; ++w)
            for (int32_t p = 0; p < places; ++p) {
                const int32_t begin = end;
                for (int64_t k = 0; k < filters; k += L) {
                    const Vec<A> v = load(winners.value + w * winners.window_step + k);
                    const Mask<A> place = load_bytes<A>(winners.bytes + w * winners.window_step + k);
                    end += append<A>((place == p) & (v != 0), v,
                                     lane + static_cast<Lane>(k * l.filter), value + end,
                                     filter + end);
                }
                const int32_t kh = p * l.place_reciprocal >> 16;
                if (end != begin)
                    segment[count++] = {window_offset[w] + kh * l.place_row + p * l.place, begin};
            }
        segment[count] = {0, end};
    }
};

}  // namespace bigops
