// Before attention's backward kernels: FlashAttention-2's delta (Dao 2023, algorithm 2, line 4), from which
// grad_lse is taken off since lse's derivative by a score is that score's weight. One pass over out and
// grad_out, as fast as memory.
#include "attention_backward_prepare.h"

namespace bigops::cuda {
namespace {

constexpr int kThreads = 256;

struct PrepareArguments {
    BackwardWorkspace workspace;
    AttentionSizes sizes;
    const void *out, *grad_out;
    const float *lse, *grad_lse;  // grad_lse: null if lse was not used
    int64_t out_strides[3], grad_out_strides[3], lse_strides[3], grad_lse_strides[3];
    int row_blocks;
};

BIGOPS_DEVICE int64_t place(const int64_t (&strides)[3], int64_t batch, int64_t head, int64_t row) {
    return batch * strides[0] + head * strides[1] + row * strides[2];
}

template <class T>
BIGOPS_DEVICE float dot8(const uint4& a, const uint4& b) {
    T x[8], y[8];
    memcpy(x, &a, sizeof(a));
    memcpy(y, &b, sizeof(b));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum = fmaf(float(x[i]), float(y[i]), sum);
    return sum;
}

// A group of lanes does one row, 8 columns each.
template <class T, int kHeadSize>
__global__ void __launch_bounds__(kThreads)
    attention_backward_prepare_kernel(const __grid_constant__ PrepareArguments arguments) {
    constexpr int kLanes = kHeadSize == 96 ? 16 : kHeadSize / 8, kRows = kThreads / kLanes;
    const AttentionSizes& sizes = arguments.sizes;
    const int number = static_cast<int>(blockIdx.x), plane = number / arguments.row_blocks;
    const int head = plane % sizes.heads, batch = plane / sizes.heads;
    const Sequence sequence(sizes, batch);
    if (number == 0 && threadIdx.x == 0) *arguments.workspace.drawn = 0;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
    const int row = number % arguments.row_blocks * kRows + static_cast<int>(threadIdx.x) / kLanes;

    const bool packed = sizes.cu_seqlens_q != nullptr;
    const int which = packed ? 0 : batch, from = sequence.query_start + row;
    const bool there = row < sequence.query_len;
    float delta = 0.0f;
    if (there && lane < kHeadSize / 8) {
        const T* out = static_cast<const T*>(arguments.out) +
                       place(arguments.out_strides, which, head, from) + 8 * lane;
        const T* grad_out = static_cast<const T*>(arguments.grad_out) +
                            place(arguments.grad_out_strides, which, head, from) + 8 * lane;
        delta = dot8<T>(__ldg(reinterpret_cast<const uint4*>(out)),
                        __ldg(reinterpret_cast<const uint4*>(grad_out)));
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) delta += device::shuffle_xor(delta, mask);

    if (row >= arguments.workspace.rows.padded(sequence.query_len)) return;
    const int64_t to = static_cast<int64_t>(head) * arguments.workspace.rows.total +
                       arguments.workspace.rows.start(sizes, batch) + row;
    float4* sums = reinterpret_cast<float4*>(arguments.workspace.grad_query + to * kHeadSize);
    for (int i = lane; i < kHeadSize / 4; i += kLanes) sums[i] = make_float4(0, 0, 0, 0);
    if (lane != 0) return;
    const float lse =
        there ? arguments.lse[place(arguments.lse_strides, which, head, from)] : -kInfinity;
    const bool none = lse == -kInfinity;
    if (!none && arguments.grad_lse != nullptr)
        delta -= arguments.grad_lse[place(arguments.grad_lse_strides, which, head, from)];
    arguments.workspace.lse[to] = none ? kInfinity : lse * kLog2E;
    arguments.workspace.delta[to] = none ? 0.0f : delta;
    if (row % arguments.workspace.rows.tile_rows == 0)
        arguments.workspace.turns[to / arguments.workspace.rows.tile_rows] = 0;
}

template <class T, int kHeadSize>
void launch_prepare(PrepareArguments& arguments, void* stream) {
    constexpr int kLanes = kHeadSize == 96 ? 16 : kHeadSize / 8, kRows = kThreads / kLanes;
    const AttentionSizes& sizes = arguments.sizes;
    arguments.row_blocks = (arguments.workspace.rows.padded(sizes.query_len) + kRows - 1) / kRows;
    const int64_t blocks = static_cast<int64_t>(arguments.row_blocks) * sizes.heads * sizes.batch;
    if (blocks == 0) return;
    require(blocks <= std::numeric_limits<int32_t>::max(), "more rows than a kernel can count");
    launch("attention_backward_prepare_kernel", attention_backward_prepare_kernel<T, kHeadSize>,
           {dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream}, arguments);
}

template <class T>
void launch_type(int64_t head_size, PrepareArguments& arguments, void* stream) {
    switch (head_size) {
        case 64: return launch_prepare<T, 64>(arguments, stream);
        case 96: return launch_prepare<T, 96>(arguments, stream);
        case 128: return launch_prepare<T, 128>(arguments, stream);
        case 256: return launch_prepare<T, 256>(arguments, stream);
        default: require(false, "attention's backward takes head sizes 64, 96, 128 and 256");
    }
}

PaddedRows padded_rows(const View& query, const AttentionSizes& sizes, int tile_rows) {
    PaddedRows rows = {tile_rows, 0};
    const int64_t padding = static_cast<int64_t>(sizes.batch) * tile_rows;
    const int64_t total = sizes.cu_seqlens_q != nullptr
                              ? (query.shape[2] + padding) / tile_rows * tile_rows
                              : static_cast<int64_t>(sizes.batch) * rows.padded(sizes.query_len);
    require(total <= std::numeric_limits<int32_t>::max(), "more rows than a kernel can count");
    rows.total = static_cast<int>(total);
    return rows;
}

}  // namespace

BackwardWorkspace::BackwardWorkspace(const View& query, const AttentionSizes& sizes, int tile_rows,
                                     void* data)
    : rows(padded_rows(query, sizes, tile_rows)) {
    const int64_t numbers = static_cast<int64_t>(rows.total) * sizes.heads;
    grad_query = static_cast<float*>(data);
    lse = grad_query + numbers * query.shape[3];
    delta = lse + numbers;
    turns = reinterpret_cast<int*>(delta + numbers);
    drawn = turns + numbers / tile_rows;
}

int64_t BackwardWorkspace::bytes(const View& query, const AttentionSizes& sizes, int tile_rows) {
    const int64_t numbers =
        static_cast<int64_t>(padded_rows(query, sizes, tile_rows).total) * sizes.heads;
    static_assert(sizeof(float) == 4 && sizeof(int) == 4);
    return 4 * (numbers * (query.shape[3] + 2) + numbers / tile_rows + 1);
}

void attention_backward_prepare(const View& out, const View& lse, const View& grad_out,
                                const View* grad_lse, const AttentionSizes& sizes,
                                const BackwardWorkspace& workspace, void* stream) {
    PrepareArguments arguments = {workspace, sizes};
    const auto strides = [](const View& view, int64_t (&to)[3]) {
        std::copy(view.strides, view.strides + 3, to);
    };
    arguments.out = out.data;
    arguments.grad_out = grad_out.data;
    arguments.lse = lse.ptr<const float>();
    strides(out, arguments.out_strides);
    strides(grad_out, arguments.grad_out_strides);
    strides(lse, arguments.lse_strides);
    if (grad_lse) {
        arguments.grad_lse = grad_lse->ptr<const float>();
        strides(*grad_lse, arguments.grad_lse_strides);
    }
    if (out.dtype == DType::bf16)
        launch_type<device::bf16>(out.shape[3], arguments, stream);
    else
        launch_type<device::f16>(out.shape[3], arguments, stream);
}

}  // namespace bigops::cuda
