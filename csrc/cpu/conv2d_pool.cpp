// The ReLU and the max-pooling around somebody else's convolution. Forward: its output is read
// once, one value and one byte per window are written. Backward: the gradient of its output is
// written once, with the ReLU's mask and the pooling's scatter (both from the saved bytes) in it,
// and the bias gradient is summed on the way. Memory traffic is all there is, so the work goes row
// by row through tiles that stay in L1.
//
// Backward, one task owns the rows of the convolution from its window row's top to the next one's,
// and gathers what every window row that covers them adds: no two tasks write one element, and
// each element's sum has a fixed order.
#include "conv2d_pool.h"
#include "huge_pages.h"
#include "threads.h"

#include <vector>

namespace bigops {
namespace {

constexpr double kPerElement = 16;  // a number moved takes as long as so many operations

void check_sizes(const View& conv_out, const View& out, const Pool2dParams& pool) {
    require(conv_out.ndim == 4 && out.ndim == 4, "pooling takes 4-d tensors");
    require(conv_out.dtype == out.dtype, "pooling dtypes differ");
    require(pool.kernel[0] * pool.kernel[1] <= kBlocked, "a window's place must fit a byte");
    for (int i = 0; i < 2; ++i) {
        require(conv_out.shape[i] == out.shape[i], "out does not fit the convolution's output");
        require(out.shape[2 + i] == conv_size(conv_out.shape[2 + i], pool.kernel[i], pool.stride[i],
                                              pool.padding[i], 1),
                "out does not fit the windows");
    }
}

template <class T>
void pool_forward(const View& conv_view, const View& out, const OptionalView& index,
                  const Pool2dParams& pool) {
    const int64_t batch = conv_view.shape[0], filters = conv_view.shape[1];
    const int64_t conv_h = conv_view.shape[2], conv_w = conv_view.shape[3];
    const int64_t pool_h = out.shape[2], pool_w = out.shape[3];
    const Image<const T> conv(conv_view);
    const RowWriter<T> writer(out, index);
    const bool pixels_first = conv.stride_c != 1;  // not channels_last: bring rows into that order
#pragma omp parallel num_threads(threads_for(kPerElement * static_cast<double>(conv_view.numel())))
    {
        RowTile<compute_t<T>> tile(pool_w, filters, index.has_value());
        Scratch<T> turned(pixels_first ? pool.kernel[0] * conv_w * filters : 0);
        std::vector<const T*> window(static_cast<size_t>(pool.kernel[0]));
#pragma omp for schedule(dynamic, 4)
        for (int64_t task = 0; task < batch * pool_h; ++task) {
            const int64_t n = task / pool_h, pr = task % pool_h;
            for (int64_t kh = 0; kh < pool.kernel[0]; ++kh) {
                const int64_t r = pr * pool.stride[0] - pool.padding[0] + kh;
                const T*& row = window[static_cast<size_t>(kh)];
                row = r < 0 || r >= conv_h ? nullptr : conv.at(n, 0, r, 0);
                if (!row || !pixels_first) continue;
                T* copy = turned + kh * conv_w * filters;
                copy_2d(row, conv.stride_w, conv.stride_c, copy, filters, int64_t{1}, conv_w,
                        filters);
                row = copy;
            }
            pool_row(window.data(), pixels_first ? filters : conv.stride_w, conv_w, filters, pool,
                     pool_w, tile);
            writer.write(tile, n, 0, pr, pool_w, filters);
        }
    }
}

// grad_out of one window row where the ReLU let the value pass, and the winners' places.
template <class T>
struct GradientRows {
    using A = compute_t<T>;
    const Image<const T> grad_out;
    const Image<const uint8_t> index;

    void read(int64_t n, int64_t pr, int64_t pool_w, int64_t filters, RowTile<A>& tile) {
        copy_2d(grad_out.at(n, 0, pr, 0), grad_out.stride_w, grad_out.stride_c, tile.value.get(),
                tile.stride, int64_t{1}, pool_w, filters);
        copy_2d(index.at(n, 0, pr, 0), index.stride_w, index.stride_c, tile.place.get(),
                tile.stride, int64_t{1}, pool_w, filters);
        for (int64_t i = 0; i < pool_w * tile.stride; ++i)
            tile.value[i] = tile.place[i] == kBlocked ? A{} : tile.value[i];
    }
};

// row[column] += the gradients of the windows of one tile that won at their kernel row kh; with
// windows apart it is an assignment.
template <class A>
void scatter_row(RowTile<A>& tile, int64_t kh, int64_t pool_w, int64_t conv_w, int64_t filters,
                 const Pool2dParams& pool, bool add, A* row) {
    for (int64_t pw = 0; pw < pool_w; ++pw) {
        const A* value = tile.value + pw * tile.stride;
        const uint8_t* place = tile.place + pw * tile.stride;
        for (int64_t kw = 0; kw < pool.kernel[1]; ++kw) {
            const int64_t column = pw * pool.stride[1] - pool.padding[1] + kw;
            if (column < 0 || column >= conv_w) continue;
            const auto here = static_cast<uint8_t>(kh * pool.kernel[1] + kw);
            A* dst = row + column * filters;
            if (add)
                for (int64_t k = 0; k < filters; ++k) dst[k] += place[k] == here ? value[k] : A{};
            else
                for (int64_t k = 0; k < filters; ++k) dst[k] = place[k] == here ? value[k] : A{};
        }
    }
}

template <class T>
void pool_backward(const View& grad_out, const View& index, const View& grad_conv_view,
                   const OptionalView& grad_bias, const Pool2dParams& pool) {
    using A = compute_t<T>;
    const int64_t batch = grad_out.shape[0], filters = grad_out.shape[1];
    const int64_t conv_h = grad_conv_view.shape[2], conv_w = grad_conv_view.shape[3];
    const int64_t pool_h = grad_out.shape[2], pool_w = grad_out.shape[3];
    const int64_t stride_h = pool.stride[0], pad_h = pool.padding[0];
    const int64_t above = (pool.kernel[0] - 1) / stride_h;  // earlier window rows that reach down
    const bool overlap =
        pool.kernel[0] > pool.stride[0] || pool.kernel[1] > pool.stride[1];
    const bool gaps = overlap || pool.kernel[1] < pool.stride[1] ||
                      (pool_w - 1) * pool.stride[1] - pool.padding[1] + pool.kernel[1] < conv_w;
    const Image<T> grad_conv(grad_conv_view);
    const int threads = threads_for(kPerElement * static_cast<double>(grad_conv_view.numel()));
    std::vector<std::vector<double>> bias_parts(static_cast<size_t>(threads));
#pragma omp parallel num_threads(threads)
    {
        auto& bias = bias_parts[static_cast<size_t>(omp_get_thread_num())];
        bias.assign(static_cast<size_t>(filters), 0.0);
        GradientRows<T> gradients{Image<const T>(grad_out), Image<const uint8_t>(index)};
        std::vector<RowTile<A>> tiles;
        for (int64_t i = 0; i <= above; ++i) tiles.emplace_back(pool_w, filters, true);
        Scratch<A> row(conv_w * filters);
        Scratch<A> bias_row(filters);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < batch * pool_h; ++task) {
            const int64_t n = task / pool_h, pr = task % pool_h;
            for (int64_t up = 0; up <= std::min(above, pr); ++up)
                gradients.read(n, pr - up, pool_w, filters, tiles[static_cast<size_t>(up)]);
            if (grad_bias) {
                std::fill(bias_row.get(), bias_row + filters, A{});
                for (int64_t w = 0; w < pool_w; ++w)
                    for (int64_t k = 0; k < filters; ++k)
                        bias_row[k] += tiles[0].value[w * tiles[0].stride + k];
                for (int64_t k = 0; k < filters; ++k) bias[static_cast<size_t>(k)] += bias_row[k];
            }
            const int64_t begin =
                pr == 0 ? 0 : std::clamp<int64_t>(pr * stride_h - pad_h, 0, conv_h);
            const int64_t end =
                pr == pool_h - 1 ? conv_h
                                 : std::clamp<int64_t>((pr + 1) * stride_h - pad_h, 0, conv_h);
            for (int64_t r = begin; r < end; ++r) {
                bool first = true;
                if (gaps) std::fill(row.get(), row + conv_w * filters, A{});
                for (int64_t up = std::min(above, pr); up >= 0; --up) {
                    const int64_t kh = r - (pr - up) * stride_h + pad_h;
                    if (kh < 0 || kh >= pool.kernel[0]) continue;
                    scatter_row(tiles[static_cast<size_t>(up)], kh, pool_w, conv_w, filters, pool,
                                overlap, row.get());
                    first = false;
                }
                if (first) std::fill(row.get(), row + conv_w * filters, A{});
                copy_2d(static_cast<const A*>(row.get()), filters, int64_t{1}, grad_conv.at(n, 0, r, 0),
                        grad_conv.stride_w, grad_conv.stride_c, conv_w, filters);
            }
        }
    }
    if (!grad_bias) return;
    for (int64_t k = 0; k < filters; ++k) {
        double total = 0;
        for (const auto& part : bias_parts)
            if (!part.empty()) total += part[static_cast<size_t>(k)];
        grad_bias->ptr<T>()[k * grad_bias->strides[0]] = from_float<T>(static_cast<A>(total));
    }
}

}  // namespace

void relu_pool_forward(const View& conv_out, const View& out, const OptionalView& index,
                       const Pool2dParams& pool) {
    check_sizes(conv_out, out, pool);
    require(!index || (index->dtype == DType::u8 && same_shape(*index, out)),
            "index does not fit out");
    if (out.numel() == 0) return;
    expect_writes(out);
    expect_writes(index);
    with_float_type(out.dtype, [&](auto zero) {
        pool_forward<decltype(zero)>(conv_out, out, index, pool);
    });
}

void relu_pool_backward(const View& grad_out, const View& index, const View& grad_conv,
                        const OptionalView& grad_bias, const Pool2dParams& pool) {
    check_sizes(grad_conv, grad_out, pool);
    require(index.dtype == DType::u8 && same_shape(index, grad_out), "index does not fit grad_out");
    expect_writes(grad_conv);
    with_float_type(grad_out.dtype, [&](auto zero) {
        pool_backward<decltype(zero)>(grad_out, index, grad_conv, grad_bias, pool);
    });
}

}  // namespace bigops
