// Adam, AdamW and AMSGrad (the rule is csrc/adam_rule.h, the walk step_walk.h) over a list of tensors,
// and the norm that clips them. A step reads four streams and writes three.
//
// The norm adds squares in double: each block writes its chunk's sum, and the last block to finish
// adds these up in a fixed order.
#include "adam.h"

#include "step_walk.h"

namespace bigops::cuda {
namespace {

// Of one stream only, and so more.
constexpr int kNormPieces = 8;

// ---- The tables

template <class C>
struct Row : StepRow<C, kAdamRoles> {
    AdamPace<float> pace;
};

struct Counter {
    double step;
    DeviceNumber count;
};

struct NormRow {
    const void* grad;
    int64_t numel;
    int first_chunk;
    DType dtype;
};

template <class T>
constexpr int kNormChunk = kThreads * kNormPieces * kWide<T>;

// ---- The step

template <bool kAmsgrad>
struct AdamLanes {
    static constexpr int kRoles = kAmsgrad ? kAdamRoles : kMaxExpAvgSq;
    AdamNumbers<float> numbers;

    __device__ void operator()(float (&lanes)[kRoles]) const {
        float none = 0;
        float& most = kAmsgrad ? lanes[kRoles - 1] : none;
        adam_rule<kAmsgrad, Math>(numbers, lanes[kGrad], lanes[kParam], lanes[kExpAvg],
                                  lanes[kExpAvgSq], most);
    }
};

// For a step whose count or learning rate is on the device: advances the count and writes what the
// update wants of both.
template <int kRows>
__global__ void __launch_bounds__(kThreads)
    adam_pace_kernel(const __grid_constant__ Table<Counter, kRows> table, AdamOptions options,
                     StepScalars scalars, AdamPace<float>* paces) {
    const int i = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
    if (i >= table.count || (scalars.found_inf && *scalars.found_inf != 0.0f)) return;
    const auto [step, count] = table.rows[i];
    double now = step;
    if (count.at && count.wide) now = *static_cast<double*>(count.at) += 1;
    else if (count.at) now = *static_cast<float*>(count.at) += 1;
    paces[i] = AdamPace<float>(options, rate_of(scalars, options.lr), now);
}

template <class T, class C, bool kAmsgrad, int kRows>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const __grid_constant__ Table<Row<C>, kRows> table, AdamNumbers<float> numbers,
                float max_grad_norm, bool maximize, StepScalars scalars,
                const AdamPace<float>* paces) {
    const int number = row_of(table, static_cast<int>(blockIdx.x));
    const Row<C>& row = table.rows[number];
    using Rule = AdamLanes<kAmsgrad>;
    update_chunk<T, Rule>(static_cast<const StepRow<C, kAdamRoles>&>(row), Rule::kRoles,
                          scalars.found_inf, [&] {
                              Rule rule = {numbers};
                              rule.numbers.factor = factor_of(scalars, max_grad_norm, maximize);
                              rule.numbers.set(paces ? paces[number] : row.pace);
                              return rule;
                          });
}

// ---- The norm

template <class T>
__device__ double squares(const void* grads, int64_t start, int64_t numel) {
    const T* grad = static_cast<const T*>(grads) + start;
    constexpr int kCount = kWide<T>;
    const int rest = static_cast<int>(min(int64_t{kNormChunk<T>}, numel - start));
    const int wide = reinterpret_cast<uintptr_t>(grad) % 16 == 0 ? rest / kCount * kCount : 0;
    const int first = static_cast<int>(threadIdx.x) * kCount;
    Pack<T, kCount> packs[kNormPieces] = {};
    for (int p = 0; p < kNormPieces; ++p)
        if (const int i = first + p * kThreads * kCount; i < wide) packs[p].load(grad + i);
    // A thread adds up at most 72 squares, so float serves; across threads it is double.
    float sum = 0.0f;
    for (int p = 0; p < kNormPieces; ++p)
        for (int k = 0; k < kCount; ++k) {
            const float x = widen(packs[p].lanes[k]);
            sum = fmaf(x, x, sum);
        }
    for (int i = wide + static_cast<int>(threadIdx.x); i < rest; i += kThreads) {
        const float x = widen(grad[i]);
        sum = fmaf(x, x, sum);
    }
    return sum;
}

// The sum over the block, in thread 0. Between two calls there has to be a barrier.
__device__ double block_sum(double x) {
    __shared__ double warps[kThreads / 32];
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_down_sync(0xffffffffu, x, lane);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < kThreads / 32; ++warp) x += warps[warp];
    return x;
}

// One of the launches that write `total` sums; this one's begin with number `first`.
template <int kRows>
__global__ void __launch_bounds__(kThreads)
    grad_norm_kernel(const __grid_constant__ Table<NormRow, kRows> table, unsigned first,
                     unsigned total, double* sums, unsigned* finished, float* out) {
    const NormRow& row = table.rows[row_of(table, static_cast<int>(blockIdx.x))];
    const auto chunk = static_cast<int64_t>(blockIdx.x) - row.first_chunk;
    double sum = 0.0;
    if (row.dtype == DType::bf16)
        sum = squares<__nv_bfloat16>(row.grad, chunk * kNormChunk<__nv_bfloat16>, row.numel);
    else if (row.dtype == DType::f16)
        sum = squares<__half>(row.grad, chunk * kNormChunk<__half>, row.numel);
    else
        sum = squares<float>(row.grad, chunk * kNormChunk<float>, row.numel);
    sum = block_sum(sum);

    __shared__ bool last;
    if (threadIdx.x == 0) {
        sums[first + blockIdx.x] = sum;
        __threadfence();
        last = atomicAdd(finished, 1u) == total - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    double all = 0.0;
#pragma unroll 8
    for (unsigned i = threadIdx.x; i < total; i += kThreads) all += __ldcg(sums + i);
    all = block_sum(all);
    if (threadIdx.x == 0) *out = static_cast<float>(::sqrt(all));
}

// ---- Launchers

template <class T, class C, bool kAmsgrad>
void step(const std::vector<Row<C>>& rows, const AdamOptions& options, const AdamScalars& scalars,
          const AdamPace<float>* paces, void* stream) {
    const AdamNumbers<float> numbers(options, 1);
    const auto max_grad_norm = static_cast<float>(options.max_grad_norm);
    for_tables(rows, [&]<int kRows>(Table<Row<C>, kRows>& table, size_t first) {
        const int chunks = number_chunks(table, [](const Row<C>&) { return kChunk<T>; });
        launch("adam_kernel", adam_kernel<T, C, kAmsgrad, kRows>, blocks(chunks, stream), table,
               numbers, max_grad_norm, options.maximize, scalars, paces ? paces + first : nullptr);
    });
}

// With each tensor's pace, where its step is known here.
template <class C>
std::vector<Row<C>> rows_of(const std::vector<AdamTensor>& tensors, const AdamOptions& options) {
    std::vector<Row<C>> rows;
    rows.reserve(tensors.size());
    AdamPace<float> pace;
    double step_of_pace = -1;
    for (const AdamTensor& tensor : tensors) {
        if (tensor.step != step_of_pace)
            pace = AdamPace<float>(options, options.lr, step_of_pace = tensor.step);
        rows.push_back({StepRow<C, kAdamRoles>(tensor), pace});
    }
    return rows;
}

int norm_chunk(DType dtype) { return dtype == DType::f32 ? kNormChunk<float> : kNormChunk<__half>; }

}  // namespace

int64_t adam_workspace(size_t tensors) {
    return static_cast<int64_t>(tensors * sizeof(AdamPace<float>));
}

int64_t grad_norm_workspace(size_t tensors, int64_t numel) {
    const int64_t sums = ceil_div(numel, kNormChunk<float>) + static_cast<int64_t>(tensors);
    return (sums + 1) * static_cast<int64_t>(sizeof(double));
}

void adam(const std::vector<AdamTensor>& tensors, DType dtype, std::optional<DType> copies,
          const AdamOptions& options, const AdamScalars& scalars, void* workspace, void* stream) {
    AdamPace<float>* paces = nullptr;
    const auto counted = [](const AdamTensor& tensor) { return tensor.count.at != nullptr; };
    if (scalars.lr.at || std::any_of(tensors.begin(), tensors.end(), counted)) {
        std::vector<Counter> counters;
        paces = static_cast<AdamPace<float>*>(workspace);
        for (const AdamTensor& tensor : tensors) counters.push_back({tensor.step, tensor.count});
        for_tables(counters, [&]<int kRows>(Table<Counter, kRows>& table, size_t first) {
            const int count = static_cast<int>(ceil_div(table.count, kThreads));
            launch("adam_pace_kernel", adam_pace_kernel<kRows>, blocks(count, stream), table,
                   options, scalars, paces + first);
        });
    }
    with_types(dtype, copies, [&]<class T, class C>() {
        const auto rows = rows_of<C>(tensors, options);
        if (options.amsgrad) step<T, C, true>(rows, options, scalars, paces, stream);
        else step<T, C, false>(rows, options, scalars, paces, stream);
    });
}

void grad_norm(const std::vector<AdamTensor>& tensors, const std::vector<DType>& dtypes, float* out,
               void* workspace, void* stream) {
    auto* queue = static_cast<cudaStream_t>(stream);
    std::vector<NormRow> rows;
    int64_t total = 0;
    for (size_t i = 0; i < tensors.size(); ++i) {
        if (tensors[i].numel == 0) continue;
        rows.push_back({tensors[i].data[kGrad], tensors[i].numel, 0, dtypes[i]});
        total += ceil_div(tensors[i].numel, norm_chunk(dtypes[i]));
    }
    if (rows.empty()) {
        check(cudaMemsetAsync(out, 0, sizeof(float), queue), "grad_norm: clearing the result");
        return;
    }
    require(total <= kMostBlocks, "more chunks than a grid has blocks");
    auto* finished = static_cast<unsigned*>(workspace);
    auto* sums = static_cast<double*>(workspace) + 1;
    check(cudaMemsetAsync(finished, 0, sizeof(unsigned), queue), "grad_norm: clearing the counter");
    unsigned done = 0;
    for_tables(rows, [&]<int kRows>(Table<NormRow, kRows>& table, size_t) {
        const int chunks =
            number_chunks(table, [](const NormRow& row) { return norm_chunk(row.dtype); });
        launch("grad_norm_kernel", grad_norm_kernel<kRows>, blocks(chunks, stream), table, done,
               static_cast<unsigned>(total), sums, finished, out);
        done += static_cast<unsigned>(chunks);
    });
}

}  // namespace bigops::cuda
