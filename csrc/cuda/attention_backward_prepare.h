// What surrounds attention's backward kernels on every architecture: before them each query row's two
// numbers are made ready and the fp32 sums of grad_query are set to zero, after them these sums are scaled
// and rounded. The rows of all sequences lie one after the other, each sequence's padded to whole tiles, so
// that the kernels between read and add whole tiles without asking.
#pragma once

#include "attention_host.h"
#include "device/launch.h"

namespace bigops::cuda {

struct PaddedRows {
    int tile_rows;
    int total;  // of one head, all sequences

    BIGOPS_DEVICE int start(const AttentionSizes& sizes, int batch) const {
        if (sizes.cu_seqlens_q == nullptr) return batch * padded(sizes.query_len);
        return (sizes.cu_seqlens_q[batch] + batch * tile_rows) / tile_rows * tile_rows;
    }
    __host__ BIGOPS_DEVICE int padded(int rows) const {
        return (rows + tile_rows - 1) / tile_rows * tile_rows;
    }
};

// Of a head come `rows.total` rows, then the next head's.
struct BackwardWorkspace {
    PaddedRows rows;
    float* lse;         // times log2(e); +infinity where every weight is 0: no keys, or no such row
    float* delta;       // sum of out * grad_out, less grad_lse
    float* grad_query;  // a head's size of numbers a row; within a tile in the order its kernel adds in
    int* turns;         // 0 for each tile: for who adds in a fixed order
    int* drawn;         // 0, one number

    BackwardWorkspace(const View& query, const AttentionSizes& sizes, int tile_rows, void* data);
    static int64_t bytes(const View& query, const AttentionSizes& sizes, int tile_rows);
};

void attention_backward_prepare(const View& out, const View& lse, const View& grad_out,
                                const View* grad_lse, const AttentionSizes& sizes,
                                const BackwardWorkspace& workspace, void* stream);

// Where the numbers of a tile of grad_query lie: row after row.
template <int kRows_, int kHeadSize_>
struct RowMajorSums {
    static constexpr int kRows = kRows_, kHeadSize = kHeadSize_;
    BIGOPS_DEVICE static int row(int place) { return place / kHeadSize; }
    BIGOPS_DEVICE static int column(int place) { return place % kHeadSize; }
};

struct ConvertArguments {
    const float* sums;
    void* grad_query;
    int64_t batch_stride, head_stride, row_stride;
    PaddedRows rows;
    float scale;
    AttentionSizes sizes;
};

constexpr int kConvertThreads = 256;

// A block brings one tile from its kernel's order into rows by way of shared memory.
template <class T, class Sums>
__global__ void __launch_bounds__(kConvertThreads)
    attention_backward_convert_kernel(const __grid_constant__ ConvertArguments arguments) {
    constexpr int kHeadSize = Sums::kHeadSize, kCount = Sums::kRows * kHeadSize;
    constexpr int kPitch = kHeadSize + 8;  // rows begin 4 banks apart
    T* tile = reinterpret_cast<T*>(device::dynamic_shared());

    const AttentionSizes& sizes = arguments.sizes;
    const int tiles = (sizes.query_len + Sums::kRows - 1) / Sums::kRows;
    const int number = static_cast<int>(blockIdx.x);
    const int head = number / tiles % sizes.heads, batch = number / tiles / sizes.heads;
    const int first = number % tiles * Sums::kRows;
    const Sequence sequence(sizes, batch);
    if (first >= sequence.query_len) return;

    const int64_t start = arguments.rows.start(sizes, batch) + first;
    const auto* sums = reinterpret_cast<const float4*>(
        arguments.sums + (static_cast<int64_t>(head) * arguments.rows.total + start) * kHeadSize);
    for (int i = static_cast<int>(threadIdx.x); i < kCount / 4; i += kConvertThreads) {
        const float4 four = sums[i];
        const float values[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int k = 0; k < 4; ++k)
            tile[Sums::row(4 * i + k) * kPitch + Sums::column(4 * i + k)] =
                T(values[k] * arguments.scale);
    }
    __syncthreads();

    const int64_t batch_start =
        sizes.cu_seqlens_q != nullptr ? sequence.query_start * arguments.row_stride
                                      : batch * arguments.batch_stride;
    T* out = static_cast<T*>(arguments.grad_query) + batch_start + head * arguments.head_stride +
             first * arguments.row_stride;
    const int rows = min(Sums::kRows, sequence.query_len - first);
    for (int i = static_cast<int>(threadIdx.x); i < rows * (kHeadSize / 8); i += kConvertThreads) {
        const int row = i / (kHeadSize / 8), column = i % (kHeadSize / 8) * 8;
        *reinterpret_cast<uint4*>(out + row * arguments.row_stride + column) =
            *reinterpret_cast<const uint4*>(tile + row * kPitch + column);
    }
}

// grad_query = scale * sums, rounded.
template <class T, class Sums>
void attention_backward_convert(const View& grad_query, const AttentionSizes& sizes,
                                const BackwardWorkspace& workspace, void* stream) {
    const int64_t tiles = (sizes.query_len + Sums::kRows - 1) / Sums::kRows;
    const int64_t blocks = tiles * sizes.heads * sizes.batch;
    if (blocks == 0) return;
    require(blocks <= std::numeric_limits<int32_t>::max(), "more tiles than a kernel can count");
    const ConvertArguments arguments = {workspace.grad_query, grad_query.data,  grad_query.strides[0],
                                        grad_query.strides[1], grad_query.strides[2], workspace.rows,
                                        sizes.scale, sizes};
    constexpr size_t kShared = Sums::kRows * (Sums::kHeadSize + 8) * sizeof(T);
    launch("attention_backward_convert_kernel", attention_backward_convert_kernel<T, Sums>,
           {dim3(static_cast<unsigned>(blocks)), dim3(kConvertThreads), kShared, stream}, arguments);
}

}  // namespace bigops::cuda
