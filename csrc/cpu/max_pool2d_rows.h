// How max-pooling's rows are read and written: whole vectors wherever memory allows it, and columns
// dealt out so that each tap of all windows is a run.
#pragma once

#include <vector>

#include "conv2d_tile.h"
#include "max_pool2d.h"

namespace bigops {

struct MaxPool2dShape {
    int64_t batch, channels, height, width, out_h, out_w;
};

// Places along the columns by their distance t from the padding's edge: runs of equal remainders
// modulo the stride, with a vector's room after each.
struct Deal {
    int64_t stride, padding, length;
    std::vector<int64_t> taps;  // where the first window's lie

    Deal(const MaxPool2dShape& s, const MaxPool2dParams& p, int lanes)
        : stride(p.stride[1]), padding(p.padding[1]) {
        const int64_t whole = (s.out_w + lanes - 1) / lanes * lanes;
        const int64_t windows = whole + (p.kernel[1] - 1) * p.dilation[1] / stride;
        const int64_t columns = (s.width + padding + stride - 1) / stride;
        length = (std::max(windows, columns) + 2 * lanes - 1) / lanes * lanes;
        for (int64_t kw = 0; kw < p.kernel[1]; ++kw) taps.push_back(at(kw * p.dilation[1]));
    }
    int64_t at(int64_t t) const { return t % stride * length + t / stride; }
    int64_t size() const { return stride * length; }
};

// Even and odd lanes of two vectors, and back.
template <class A>
inline std::pair<Vec<A>, Vec<A>> split(Vec<A> low, Vec<A> high) {
    return [&]<int... i>(std::integer_sequence<int, i...>) {
        return std::pair{Vec<A>(__builtin_shufflevector(low, high, 2 * i...)),
                         Vec<A>(__builtin_shufflevector(low, high, (2 * i + 1)...))};
    }(std::make_integer_sequence<int, kLanes<A>>{});
}
template <class A>
inline std::pair<Vec<A>, Vec<A>> zip(Vec<A> even, Vec<A> odd) {
    constexpr int L = kLanes<A>;
    return [&]<int... i>(std::integer_sequence<int, i...>) {
        return std::pair{Vec<A>(__builtin_shufflevector(even, odd, (i / 2 + i % 2 * L)...)),
                         Vec<A>(__builtin_shufflevector(even, odd, ((i + L) / 2 + i % 2 * L)...))};
    }(std::make_integer_sequence<int, L>{});
}

// Vectors of which `count` lanes matter. Memory up to `end` may be read or overwritten: a whole
// vector is loaded or stored if it fits; what a store writes too much, the next one overwrites.
template <class T>
inline Vec<compute_t<T>> load_over(const T* p, const T* end, int64_t count) {
    constexpr int L = kLanes<compute_t<T>>;
    return end - p >= L ? load(p) : load(p, static_cast<int>(std::clamp<int64_t>(count, 0, L)));
}
template <class A>
inline Mask<A> load_bytes_over(const uint8_t* p, const uint8_t* end, int64_t count) {
    constexpr int L = kLanes<A>;
    if (end - p >= L) return load_bytes<A>(p);
    uint8_t bytes[L] = {};
    std::memcpy(bytes, p, static_cast<size_t>(std::clamp<int64_t>(count, 0, L)));
    return load_bytes<A>(bytes);
}
template <class T>
inline void store_over(T* p, const T* end, Vec<compute_t<T>> v, int64_t count) {
    constexpr int L = kLanes<compute_t<T>>;
    if (end - p >= L) store(p, v);
    else store(p, v, static_cast<int>(std::clamp<int64_t>(count, 0, L)));
}
template <class A>
inline void store_bytes_over(uint8_t* p, const uint8_t* end, Mask<A> v, int64_t count) {
    constexpr int L = kLanes<A>;
    if (end - p >= L) return store_bytes<A>(p, v);
    uint8_t bytes[L];
    store_bytes<A>(bytes, v);
    std::memcpy(p, bytes, static_cast<size_t>(std::clamp<int64_t>(count, 0, L)));
}

// row[w] -> line[at(w + padding)]; at most `rest` comes after a run.
template <class T, class A>
void deal_out(const T* row, int64_t step, const T* end, int64_t width, A rest, const Deal& deal,
              A* line) {
    constexpr int L = kLanes<A>;
    const int64_t padding = deal.padding;
    const auto part = [&](int64_t w) {
        const Vec<A> v = load_over(row + w, end, width - w);
        return width - w >= L ? v : first_lanes(v, width - w, rest);
    };
    if (step == 1 && deal.stride == 1) {
        for (int64_t w = 0; w < width; w += L) store(line + padding + w, part(w));
    } else if (step == 1 && deal.stride == 2) {
        int64_t w = padding % 2;
        if (w) line[deal.at(padding)] = to_float(row[0]);
        A *even = line + (padding + w) / 2, *odd = even + deal.length;
        for (; w < width; w += 2 * L, even += L, odd += L) {
            const auto [first, second] =
                split<A>(part(w), w + L < width ? part(w + L) : splat(rest));
            store(even, first);
            store(odd, second);
        }
    } else {
        int64_t phase = padding % deal.stride, place = padding / deal.stride;
        for (int64_t w = 0; w < width; ++w) {
            line[phase * deal.length + place] = to_float(row[w * step]);
            if (++phase == deal.stride) phase = 0, ++place;
        }
    }
}

// Which row lies in which of as many slots as may be wanted at once.
class Ring {
public:
    explicit Ring(int64_t slots) : held_(static_cast<size_t>(slots), -1) {}

    // The slot of an image's row, and whether it has to be filled. 32 bits, as their division takes
    // half of the time.
    std::pair<int64_t, bool> find(int64_t image, int64_t row, int64_t rows) {
        const size_t slot = static_cast<uint32_t>(row) % static_cast<uint32_t>(held_.size());
        return {static_cast<int64_t>(slot),
                std::exchange(held_[slot], image * rows + row) != image * rows + row};
    }

private:
    std::vector<int64_t> held_;
};

// [begin, end) of the taps of a window, along one axis, that are inside an image of `size` places.
inline std::pair<int64_t, int64_t> taps_inside(int64_t window, int64_t size, int axis,
                                               const MaxPool2dParams& p) {
    const int64_t start = window * p.stride[axis] - p.padding[axis], d = p.dilation[axis];
    const int64_t begin = start < 0 ? (-start + d - 1) / d : 0;
    const int64_t end = start < size ? std::min(p.kernel[axis], (size - start + d - 1) / d) : 0;
    return {std::min(begin, end), end};
}

// The windows along one axis that cover a place, each with its tap there, the first windows first.
struct Cover {
    int64_t window, tap;
};
inline void find_cover(int64_t place, int64_t windows, int axis, const MaxPool2dParams& p,
                       std::vector<Cover>& found) {
    for (int64_t k = p.kernel[axis] - 1; k >= 0; --k) {
        const int64_t start = place + p.padding[axis] - k * p.dilation[axis];
        if (start >= 0 && start % p.stride[axis] == 0 && start / p.stride[axis] < windows)
            found.push_back({start / p.stride[axis], k});
    }
}

}  // namespace bigops
