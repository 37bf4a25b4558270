// Forward convolution + bias + ReLU + max-pooling in one pass: the un-pooled output exists only as
// a few rows in L1, and memory sees the input once and the pooled output once.
//
// Lanes are filters. One block of the microkernel holds kPixels neighbouring output pixels times
// kVectors vectors of filters in registers and walks the taps t = (channel, kh, kw):
//     acc[pixel][v] += x[offset[t] + pixel] * w[t][v]
// Each weight vector loaded serves kPixels products and each broadcast pixel kVectors, so the
// multipliers are the limit. The input band is copied into planes padded with zeros first, with
// the columns of each stride phase side by side (column i lies at (i % s) * phase + i / s): then
// neighbouring outputs read neighbouring memory whatever the stride, dilation, layout or dtype of
// the input, and no border is ever tested in the inner loop.
#include <utility>
#include <vector>

#include "conv2d_pool.h"
#include "huge_pages.h"
#include "threads.h"

namespace bigops {
namespace {

// 14 x 2 accumulators + 2 weights + 1 pixel fill AVX-512's 32 registers, 6 x 2 AVX2's 16.
constexpr int kMaxPixels = kVectorBytes == 64 ? 14 : 6;
constexpr int kMaxVectors = 2;

// Pooled pixels of a tile: with their places they stay in L1.
constexpr int64_t kTilePixels = 256;

// One running sum over thousands of taps would lose digits that eager keeps, so sums are carried
// in registers over a chunk of taps and added up in L1. (float64 is held against itself: shorter.)
template <class A>
constexpr int64_t kTapChunk = sizeof(A) == 8 ? 32 : 128;

// dst[pixel][filter] = init[pixel][filter] + the taps' sum; init_stride 0 starts from the bias.
template <class A, int kPixels, int kVectors>
void multiply_block(const A* x, const int32_t* offset, int64_t taps, const A* weight, const A* init,
                    int64_t init_stride, A* dst) {
    constexpr int L = kLanes<A>, kFilters = L * kVectors;
    Vec<A> acc[kPixels][kVectors] = {};
    for (int64_t t = 0; t < taps; ++t, weight += kFilters) {
        const A* pixel = x + offset[t];
        Vec<A> w[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) w[v] = load(weight + v * L);
#pragma GCC unroll 16
        for (int p = 0; p < kPixels; ++p) {
            const Vec<A> value = splat(pixel[p]);
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) acc[p][v] = fma(value, w[v], acc[p][v]);
        }
    }
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
            store(dst + p * kFilters + v * L, load(init + p * init_stride + v * L) + acc[p][v]);
}

template <class A>
using BlockFn = void (*)(const A*, const int32_t*, int64_t, const A*, const A*, int64_t, A*);

template <class A, int kVectors, int... kPixels>
constexpr std::array<BlockFn<A>, sizeof...(kPixels)> block_table(
    std::integer_sequence<int, kPixels...>) {
    return {&multiply_block<A, kPixels + 1, kVectors>...};
}

// The planes of one group's channels for a band of input rows, and where each tap reads in them.
struct Planes {
    int64_t rows, phase, row, plane;
    std::vector<int32_t> offset;

    Planes(const Conv2dShape& s, const Conv2dParams& conv, int64_t conv_rows) {
        rows = (conv_rows - 1) * conv.stride[0] + (s.kernel_h - 1) * conv.dilation[0] + 1;
        phase = (s.width + 2 * conv.padding[1] + conv.stride[1] - 1) / conv.stride[1];
        row = phase * conv.stride[1];
        plane = rows * row;
        require(plane * s.group_channels < (int64_t{1} << 31), "input too large for this kernel");
        offset.reserve(static_cast<size_t>(s.taps));
        for (int64_t c = 0; c < s.group_channels; ++c)
            for (int64_t kh = 0; kh < s.kernel_h; ++kh)
                for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
                    const int64_t column = kw * conv.dilation[1];
                    offset.push_back(static_cast<int32_t>(
                        c * plane + kh * conv.dilation[0] * row +
                        column % conv.stride[1] * phase + column / conv.stride[1]));
                }
    }

    // Fills the planes for input rows first_row ... of image n; outside the image lie zeros.
    template <class T, class A>
    void fill(A* dst, const Image<const T>& input, int64_t n, int64_t first_channel,
              int64_t first_row, const Conv2dShape& s, const Conv2dParams& conv) const {
        const int64_t stride = conv.stride[1], pad = conv.padding[1];
        if (pad > 0 || row != s.width || first_row < 0 || first_row + rows > s.height)
            std::fill(dst, dst + plane * s.group_channels, A{});
        for (int64_t r = 0; r < rows; ++r) {
            const int64_t h = first_row + r;
            if (h < 0 || h >= s.height) continue;
            for (int64_t ph = 0; ph < stride; ++ph) {
                const int64_t w = ((ph - pad) % stride + stride) % stride;  // first column of phase
                if (w >= s.width) continue;
                copy_2d(input.at(n, first_channel, h, w), input.stride_c, input.stride_w * stride,
                        dst + r * row + ph * phase + (w + pad) / stride, plane, int64_t{1},
                        s.group_channels, (s.width - w + stride - 1) / stride);
            }
        }
    }
};

// Weights as [group][block of filters][tap][filter] and the bias likewise, zero beyond the last.
template <class T, class A>
void pack_weights(const View& weight, const OptionalView& bias, const Conv2dShape& s,
                  int64_t groups, int64_t block, A* packed, A* packed_bias) {
    const Image<const T> w(weight);
    const int64_t blocks = (s.group_filters + block - 1) / block;
#pragma omp parallel for if (s.filters * s.taps > 65536)
    for (int64_t b = 0; b < groups * blocks; ++b) {
        const int64_t first = b % blocks * block, filter = b / blocks * s.group_filters + first;
        const int64_t valid = std::min(block, s.group_filters - first);
        A* dst = packed + b * s.taps * block;
        if (valid < block) std::fill(dst, dst + s.taps * block, A{});
        for (int64_t c = 0; c < s.group_channels; ++c)
            for (int64_t kh = 0; kh < s.kernel_h; ++kh)
                copy_2d(w.at(filter, c, kh, 0), w.stride_n, w.stride_w,
                        dst + (c * s.kernel_h + kh) * s.kernel_w * block, int64_t{1}, block, valid,
                        s.kernel_w);
        for (int64_t k = 0; k < block; ++k)
            packed_bias[b * block + k] =
                bias && k < valid
                    ? to_float(bias->ptr<T>()[(filter + k) * bias->strides[0]])
                    : A{};
    }
}

// Pooled rows per task: enough tasks to balance the threads, planes within half of L2.
inline int64_t band_rows(const Conv2dShape& s, const Conv2dParams& conv, const Pool2dParams& pool) {
    const int64_t row_bytes =
        s.group_channels * (s.width + 2 * conv.padding[1]) * conv.stride[0] * pool.stride[0] * 4;
    const int64_t images = s.batch * conv.groups;
    int64_t rows = std::max<int64_t>(1, 262144 / row_bytes);
    if (images < 16) rows = std::min(rows, (s.pool_h * images + 15) / 16);
    return std::clamp<int64_t>(rows, 1, s.pool_h);
}

template <class T>
void forward(const View& input_view, const View& weight, const OptionalView& bias,
             const View& out_view, const OptionalView& index_view, const Conv2dParams& conv,
             const Pool2dParams& pool, const Conv2dShape& s) {
    using A = compute_t<T>;
    static constexpr auto kPixelCounts = std::make_integer_sequence<int, kMaxPixels>{};
    static constexpr std::array<std::array<BlockFn<A>, kMaxPixels>, kMaxVectors> kBlocks = {
        block_table<A, 1>(kPixelCounts), block_table<A, 2>(kPixelCounts)};
    const int64_t vectors = s.group_filters <= kLanes<A> ? 1 : kMaxVectors;
    const int64_t block = vectors * kLanes<A>;
    const int64_t blocks = (s.group_filters + block - 1) / block;
    Scratch<A> packed(conv.groups * blocks * block * s.taps);
    Scratch<A> packed_bias(conv.groups * blocks * block);
    pack_weights<T, A>(weight, bias, s, conv.groups, block, packed, packed_bias);

    const int64_t band = band_rows(s, conv, pool), bands = (s.pool_h + band - 1) / band;
    const int64_t band_conv_rows = (band - 1) * pool.stride[0] + pool.kernel[0];
    const Planes planes(s, conv, std::min(band_conv_rows, s.conv_h));
    const int64_t column_blocks = (s.conv_w + kMaxPixels - 1) / kMaxPixels;
    const int64_t conv_row = s.conv_w * block;
    const Image<const T> input(input_view);
    const RowWriter<T> writer(out_view, index_view);
    // Long tiles have fewer edges where they are turned into the output's layout.
    const int64_t tile_rows =
        writer.joined(s.pool_w) ? std::clamp<int64_t>(kTilePixels / s.pool_w, 1, band) : 1;

#pragma omp parallel num_threads(threads_for(s.operations()))
    {
        Scratch<A> x(planes.plane * s.group_channels);
        Scratch<A> conv_rows(pool.kernel[0] * conv_row);  // row r lies at slot r % kernel
        RowTile<A> tile(tile_rows * s.pool_w, block, index_view.has_value());
        std::vector<const A*> window(static_cast<size_t>(pool.kernel[0]));
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.batch * conv.groups * bands; ++task) {
            const int64_t n = task / (conv.groups * bands), g = task / bands % conv.groups;
            const int64_t pool_begin = task % bands * band;
            const int64_t pool_end = std::min(s.pool_h, pool_begin + band);
            // The planes start where the band's first row of the convolution reads, moved up where
            // they would otherwise reach beyond the last one.
            const int64_t conv_begin =
                std::clamp<int64_t>(pool_begin * pool.stride[0] - pool.padding[0], 0,
                                    s.conv_h - std::min(band_conv_rows, s.conv_h));
            planes.fill<T, A>(x, input, n, g * s.group_channels,
                              conv_begin * conv.stride[0] - conv.padding[0], s, conv);
            for (int64_t b = 0; b < blocks; ++b) {
                const A* w = packed + (g * blocks + b) * block * s.taps;
                const A* w_bias = packed_bias + (g * blocks + b) * block;
                const int64_t filters = std::min(block, s.group_filters - b * block);
                int64_t computed = conv_begin;
                for (int64_t pr = pool_begin; pr < pool_end; ++pr) {
                    const int64_t top = pr * pool.stride[0] - pool.padding[0];
                    for (int64_t kh = 0; kh < pool.kernel[0]; ++kh) {
                        const int64_t r = top + kh;
                        if (r < 0 || r >= s.conv_h) {
                            window[static_cast<size_t>(kh)] = nullptr;
                            continue;
                        }
                        A* row = conv_rows + r % pool.kernel[0] * conv_row;
                        window[static_cast<size_t>(kh)] = row;
                        if (r < computed) continue;
                        computed = r + 1;
                        const A* x_row = x + (r - conv_begin) * conv.stride[0] * planes.row;
                        for (int64_t i = 0; i < column_blocks; ++i) {
                            const int64_t from = i * s.conv_w / column_blocks;
                            const int64_t to = (i + 1) * s.conv_w / column_blocks;
                            const BlockFn<A> multiply =
                                kBlocks[static_cast<size_t>(vectors - 1)]
                                       [static_cast<size_t>(to - from - 1)];
                            A* dst = row + from * block;
                            for (int64_t t = 0; t < s.taps; t += kTapChunk<A>)
                                multiply(x_row + from, planes.offset.data() + t,
                                         std::min(kTapChunk<A>, s.taps - t), w + t * block,
                                         t ? dst : w_bias, t ? block : 0, dst);
                        }
                    }
                    const int64_t row = (pr - pool_begin) % tile_rows;
                    pool_row(window.data(), block, s.conv_w, block, pool, s.pool_w, tile,
                             row * s.pool_w);
                    if (row + 1 == tile_rows || pr + 1 == pool_end)
                        writer.write(tile, n, g * s.group_filters + b * block, pr - row,
                                     (row + 1) * s.pool_w, filters);
                }
            }
        }
    }
}

}  // namespace

void conv2d_relu_pool_forward(const View& input, const View& weight, const OptionalView& bias,
                              const View& out, const OptionalView& index,
                              const Conv2dParams& conv, const Pool2dParams& pool) {
    const Conv2dShape s = conv2d_shape(input, weight, out, conv, pool);
    require(!bias || (bias->ndim == 1 && bias->shape[0] == s.filters && bias->dtype == input.dtype),
            "bias does not fit the weight");
    require(!index || (index->dtype == DType::u8 && same_shape(*index, out)),
            "index does not fit out");
    require(pool.relu || (pool.kernel == Size2{1, 1} && !index), "pooling comes after ReLU");
    if (s.batch == 0 || s.filters == 0) return;
    expect_writes(out);
    expect_writes(index);
    with_float_type(input.dtype, [&](auto zero) {
        forward<decltype(zero)>(input, weight, bias, out, index, conv, pool, s);
    });
}

}  // namespace bigops
