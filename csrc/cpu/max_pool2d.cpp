// Max-pooling. Memory traffic is all there is, so every number is read once and written once, and
// between that lives in L1, row by row.
//
// Lanes are whatever lies side by side in memory. In channels_last these are the channels, and a
// tap of a window is a run of memory. In contiguous images they are the columns, where a window's
// taps are `stride` apart from the next window's: a row is dealt out by column modulo stride as it
// is read (`Deal`), and a tap of all windows is a run then, whatever the stride and the dilation.
// Gradients take the same way back.
//
// Backward, a row of the image gathers from every row of windows that covers it, so no two tasks
// write one element, and each sum has the order of the windows, as torch's has.
#include "max_pool2d.h"

#include "conv2d_pool.h"
#include "huge_pages.h"
#include "max_pool2d_rows.h"
#include "max_pool2d_square.h"
#include "threads.h"

namespace bigops {
namespace {

constexpr double kPerElement = 16;  // a number moved takes as long as so many operations

// Rows one after the other in each thread, so that those that windows share are still at hand.
template <class F>
void for_rows(int64_t rows, double elements, F&& work) {
#pragma omp parallel num_threads(threads_for(kPerElement * elements))
    {
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        work(rows * me / threads, rows * (me + 1) / threads);
    }
}

template <class T>
const T* end_of(const View& view) {
    int64_t last = 0;
    for (int i = 0; i < view.ndim; ++i) last += (view.shape[i] - 1) * view.strides[i];
    return view.ptr<T>() + last + 1;
}

template <class A>
Best<A> nothing_yet(Mask<A> place) {
    return {splat(-std::numeric_limits<A>::infinity()), place};
}

template <class T>
void forward_planes(const MaxPool2dShape& s, const View& input, const View& out, const View& index,
                    const MaxPool2dParams& p) {
    using A = compute_t<T>;
    constexpr int L = kLanes<A>;
    constexpr A kLeast = -std::numeric_limits<A>::infinity();
    const Image<const T> image(input);
    const T* const end = end_of<T>(input);
    if (is_square(s, p) && image.stride_w == 1)
        return for_rows(s.batch * s.channels * s.out_h, static_cast<double>(input.numel()),
                        [&](int64_t task, int64_t last) {
                            forward_square(s, image, end, out.ptr<T>(), index.ptr<uint8_t>(),
                                           task, last);
                        });
    const Deal deal(s, p, L);
    const auto slots = (p.kernel[0] - 1) * p.dilation[0] + 1;
    // The first place inside the image of each window's row: a window that has nothing above -inf
    // has its winner there.
    std::vector<uint8_t> first(static_cast<size_t>((s.out_w + L - 1) / L * L));
    for (int64_t w = 0; w < s.out_w; ++w) {
        const auto [from, to] = taps_inside(w, s.width, 1, p);
        first[static_cast<size_t>(w)] = static_cast<uint8_t>(from < to ? from : kNowhere);
    }
    for_rows(s.batch * s.channels * s.out_h, static_cast<double>(input.numel()), [&](int64_t task,
                                                                                   int64_t last) {
        Scratch<A> lines(slots * deal.size());
        std::fill(lines.get(), lines + slots * deal.size(), kLeast);
        Ring ring(slots);
        std::vector<const A*> window(static_cast<size_t>(p.kernel[0]));
        const T* const out_end = out.ptr<T>() + last * s.out_w;
        const uint8_t* const index_end = index.ptr<uint8_t>() + last * s.out_w;
        for (; task < last; ++task) {
            const int64_t plane = task / s.out_h, oh = task % s.out_h;
            const auto [from, to] = taps_inside(oh, s.height, 0, p);
            for (int64_t kh = from; kh < to; ++kh) {
                const int64_t r = oh * p.stride[0] - p.padding[0] + kh * p.dilation[0];
                const auto [slot, empty] = ring.find(plane, r, s.height);
                A* line = lines + slot * deal.size();
                if (empty)
                    deal_out(image.at(plane / s.channels, plane % s.channels, r, 0),
                             image.stride_w, end, s.width, kLeast, deal, line);
                window[static_cast<size_t>(kh)] = line;
            }
            for (int64_t w = 0; w < s.out_w; w += L) {
                const Mask<A> column = load_bytes<A>(first.data() + w);
                const Mask<A> nowhere = Best<A>::lanes(kNowhere);
                auto best = nothing_yet<A>(
                    from == to ? nowhere
                               : select(column == nowhere, nowhere,
                                        column + Best<A>::lanes(from * p.kernel[1])));
                for (int64_t kh = from; kh < to; ++kh)
                    for (int64_t kw = 0; kw < p.kernel[1]; ++kw)
                        best.meet(load(window[static_cast<size_t>(kh)] +
                                       deal.taps[static_cast<size_t>(kw)] + w),
                                  kh * p.kernel[1] + kw);
                const int64_t at = task * s.out_w + w;
                store_over(out.ptr<T>() + at, out_end, best.value, s.out_w - w);
                store_bytes_over<A>(index.ptr<uint8_t>() + at, index_end, best.place, s.out_w - w);
            }
        }
    });
}

template <class T>
void forward_pixels(const MaxPool2dShape& s, const View& input, const View& out, const View& index,
                    const MaxPool2dParams& p) {
    using A = compute_t<T>;
    constexpr int L = kLanes<A>;
    const Image<const T> image(input);
    const int64_t c = s.channels;
    const bool turned = image.stride_c != 1 && c > 1;  // pixels are put together first
    const auto slots = turned ? (p.kernel[0] - 1) * p.dilation[0] + 1 : 0;
    const int64_t pixel = turned ? c : image.stride_w, row_size = s.width * c;
    for_rows(s.batch * s.out_h, static_cast<double>(input.numel()), [&](int64_t task,
                                                                      int64_t last) {
        Scratch<T> rows(slots * row_size);
        Ring ring(std::max<int64_t>(slots, 1));
        const T* const end = turned ? rows + slots * row_size : end_of<T>(input);
        std::vector<const T*> window(static_cast<size_t>(p.kernel[0]));
        struct Tap {
            const T* pixel;
            int64_t place;
        };
        std::vector<Tap> taps;
        const T* const out_end = out.ptr<T>() + last * s.out_w * c;
        const uint8_t* const index_end = index.ptr<uint8_t>() + last * s.out_w * c;
        for (; task < last; ++task) {
            const int64_t n = task / s.out_h, oh = task % s.out_h;
            const auto [from, to] = taps_inside(oh, s.height, 0, p);
            for (int64_t kh = from; kh < to; ++kh) {
                const int64_t r = oh * p.stride[0] - p.padding[0] + kh * p.dilation[0];
                const T*& row = window[static_cast<size_t>(kh)];
                row = image.at(n, 0, r, 0);
                if (!turned) continue;
                const auto [slot, empty] = ring.find(n, r, s.height);
                T* copy = rows + slot * row_size;
                if (empty)
                    copy_2d(row, image.stride_w, image.stride_c, copy, c, int64_t{1}, s.width, c);
                row = copy;
            }
            for (int64_t w = 0; w < s.out_w; ++w) {
                const auto [left, right] = taps_inside(w, s.width, 1, p);
                const int64_t at = (task * s.out_w + w) * c;
                const int64_t column = w * p.stride[1] - p.padding[1];
                taps.clear();
                for (int64_t kh = from; kh < to; ++kh)
                    for (int64_t kw = left; kw < right; ++kw)
                        taps.push_back({window[static_cast<size_t>(kh)] +
                                            (column + kw * p.dilation[1]) * pixel,
                                        kh * p.kernel[1] + kw});
                const int64_t first = taps.empty() ? kNowhere : taps[0].place;
                T* const to_out = out.ptr<T>() + at;
                uint8_t* const to_index = index.ptr<uint8_t>() + at;
                int64_t k = 0;
                for (; k + L <= c; k += L) {
                    auto best = nothing_yet<A>(Best<A>::lanes(first));
                    for (const auto& [tap, place] : taps) best.meet(load(tap + k), place);
                    store(to_out + k, best.value);
                    store_bytes<A>(to_index + k, best.place);
                }
                if (k == c) continue;
                auto best = nothing_yet<A>(Best<A>::lanes(first));
                for (const auto& [tap, place] : taps)
                    best.meet(load_over(tap + k, end, c - k), place);
                store_over(to_out + k, out_end, best.value, c - k);
                store_bytes_over<A>(to_index + k, index_end, best.place, c - k);
            }
        }
    });
}

template <class T>
void backward_planes(const MaxPool2dShape& s, const View& grad_out, const View& index,
                     const View& grad_input, const MaxPool2dParams& p) {
    using A = compute_t<T>;
    const Image<const T> from(grad_out);
    if (is_square(s, p) && from.stride_w == 1)
        return for_rows(s.batch * s.channels * s.out_h, static_cast<double>(grad_input.numel()),
                        [&](int64_t task, int64_t last) {
                            backward_square(s, from, end_of<T>(grad_out), index.ptr<uint8_t>(),
                                            end_of<uint8_t>(index), grad_input.ptr<T>(), task, last);
                        });
    // Winners are few beside the image's rows, of which as many as a window spans are kept as sums.
    const int64_t span = (p.kernel[0] - 1) * p.dilation[0] + 1, size = span * s.width;
    for_rows(s.batch * s.channels * s.height, static_cast<double>(grad_input.numel()),
             [&](int64_t task, int64_t last) {
        Scratch<A> sums(size + s.out_w * p.stride[1]), values(s.out_w);
        std::fill(sums.get(), sums + size, A{});
        int64_t targets[kNowhere + 1];  // of the places; what is not wanted goes behind the sums
        T* to = grad_input.ptr<T>() + task * s.width;
        while (task < last) {  // the rows [begin, end) of a plane
            const int64_t plane = task / s.height, begin = task % s.height;
            const int64_t end = std::min(s.height, begin + last - task);
            task += end - begin;
            const int64_t reach = begin + p.padding[0] - span + 1, step = p.stride[0];
            int64_t oh = reach > 0 ? (reach + step - 1) / step : 0, done = begin;
            const auto finish = [&](int64_t row) {  // rows before `row` are whole
                for (; done < std::min(row, end); ++done, to += s.width) {
                    A* sum = sums + done % span * s.width;
                    copy_2d(sum, int64_t{0}, int64_t{1}, to, int64_t{0}, int64_t{1}, int64_t{1},
                            s.width);
                    std::fill(sum, sum + s.width, A{});
                }
            };
            for (; oh < s.out_h; ++oh) {
                const int64_t top = oh * step - p.padding[0];
                if (top >= end) break;
                finish(top);
                std::fill(targets, targets + kNowhere + 1, size);
                for (int64_t kh = 0; kh < p.kernel[0]; ++kh) {
                    const int64_t row = top + kh * p.dilation[0];
                    if (row < begin || row >= end) continue;
                    for (int64_t kw = 0; kw < p.kernel[1]; ++kw)
                        targets[kh * p.kernel[1] + kw] =
                            row % span * s.width + kw * p.dilation[1] - p.padding[1];
                }
                const T* g = from.at(plane / s.channels, plane % s.channels, oh, 0);
                const A* value = values;
                if (std::is_same_v<T, A> && from.stride_w == 1) value = reinterpret_cast<const A*>(g);
                else copy_2d(g, int64_t{0}, from.stride_w, values.get(), int64_t{0}, int64_t{1},
                             int64_t{1}, s.out_w);
                const uint8_t* place = index.ptr<uint8_t>() + (plane * s.out_h + oh) * s.out_w;
                A* sum = sums;
                for (int64_t w = 0; w < s.out_w; ++w, sum += p.stride[1])
                    sum[targets[place[w]]] += value[w];
            }
            finish(end);
        }
    });
}

template <class T>
void backward_pixels(const MaxPool2dShape& s, const View& grad_out, const View& index,
                     const View& grad_input, const MaxPool2dParams& p) {
    using A = compute_t<T>;
    constexpr int L = kLanes<A>;
    const Image<const T> from(grad_out);
    const int64_t c = s.channels, row_size = s.out_w * c;
    const bool turned = (from.stride_c != 1 && c > 1) || from.stride_w != c;
    const auto slots = turned ? (p.kernel[0] - 1) * p.dilation[0] / p.stride[0] + 1 : 0;
    std::vector<std::vector<Cover>> columns(static_cast<size_t>(s.width));
    for (int64_t w = 0; w < s.width; ++w)
        find_cover(w, s.out_w, 1, p, columns[static_cast<size_t>(w)]);
    const uint8_t* const index_end = end_of<uint8_t>(index);
    for_rows(s.batch * s.height, static_cast<double>(grad_input.numel()), [&](int64_t task,
                                                                            int64_t last) {
        Scratch<T> copies(slots * row_size);
        Ring ring(std::max<int64_t>(slots, 1));
        const T* const end = turned ? copies + slots * row_size : end_of<T>(grad_out);
        std::vector<Cover> rows;
        std::vector<const T*> values;
        struct Window {
            const T* value;
            const uint8_t* place;
            Mask<A> here;
        };
        std::vector<Window> windows;
        T* to = grad_input.ptr<T>() + task * s.width * c;
        const T* const to_end = grad_input.ptr<T>() + last * s.width * c;
        for (; task < last; ++task) {
            const int64_t n = task / s.height;
            rows.clear();
            values.clear();
            find_cover(task % s.height, s.out_h, 0, p, rows);
            for (const Cover& row : rows) {
                values.push_back(from.at(n, 0, row.window, 0));
                if (!turned) continue;
                const auto [slot, empty] = ring.find(n, row.window, s.out_h);
                T* copy = copies + slot * row_size;
                if (empty)
                    copy_2d(values.back(), from.stride_w, from.stride_c, copy, c, int64_t{1},
                            s.out_w, c);
                values.back() = copy;
            }
            for (const auto& covers : columns) {
                windows.clear();
                for (size_t i = 0; i < rows.size(); ++i)
                    for (const auto& [ow, kw] : covers)
                        windows.push_back(
                            {values[i] + ow * c,
                             index.ptr<uint8_t>() + ((n * s.out_h + rows[i].window) * s.out_w + ow) * c,
                             Best<A>::lanes(rows[i].tap * p.kernel[1] + kw)});
                int64_t k = 0;
                for (; k + L <= c; k += L) {
                    Vec<A> sum = {};
                    for (const auto& [value, place, here] : windows)
                        sum += select(load_bytes<A>(place + k) == here, load(value + k), Vec<A>{});
                    store(to + k, sum);
                }
                if (k < c) {
                    Vec<A> sum = {};
                    for (const auto& [value, place, here] : windows)
                        sum += select(load_bytes_over<A>(place + k, index_end, c - k) == here,
                                      load_over(value + k, end, c - k), Vec<A>{});
                    store_over(to + k, to_end, sum, c - k);
                }
                to += c;
            }
        }
    });
}

bool channels_last(const View& view) {
    return view.shape[1] > 1 && view.strides[1] == 1;
}

MaxPool2dShape checked(const View& image, const View& pooled, const View& index,
                       const MaxPool2dParams& p) {
    require(image.ndim == 4 && pooled.ndim == 4, "max_pool2d takes 4-d tensors");
    require(image.dtype == pooled.dtype && index.dtype == DType::u8, "max_pool2d dtypes differ");
    require(same_shape(index, pooled), "index does not fit the windows");
    require(image.shape[0] == pooled.shape[0] && image.shape[1] == pooled.shape[1],
            "the images do not fit each other");
    for (int axis : {0, 1})
        require(p.kernel[axis] > 0 && p.stride[axis] > 0 && p.padding[axis] >= 0 &&
                    p.dilation[axis] > 0,
                "a window's sizes must be positive");
    require(p.kernel[0] * p.kernel[1] <= kNowhere, "a window's place must fit a byte");
    return {image.shape[0], image.shape[1], image.shape[2], image.shape[3], pooled.shape[2],
            pooled.shape[3]};
}

}  // namespace

void max_pool2d_forward(const View& input, const View& out, const View& index,
                        const MaxPool2dParams& p) {
    const MaxPool2dShape s = checked(input, out, index, p);
    if (out.numel() == 0) return;
    expect_writes(out);
    with_float_type(input.dtype, [&](auto zero) {
        if (channels_last(out)) forward_pixels<decltype(zero)>(s, input, out, index, p);
        else forward_planes<decltype(zero)>(s, input, out, index, p);
    });
}

void max_pool2d_backward(const View& grad_out, const View& index, const View& grad_input,
                         const MaxPool2dParams& p) {
    const MaxPool2dShape s = checked(grad_input, grad_out, index, p);
    if (grad_input.numel() == 0) return;
    expect_writes(grad_input);
    with_float_type(grad_input.dtype, [&](auto zero) {
        if (channels_last(grad_input))
            backward_pixels<decltype(zero)>(s, grad_out, index, grad_input, p);
        else
            backward_planes<decltype(zero)>(s, grad_out, index, grad_input, p);
    });
}

}  // namespace bigops
