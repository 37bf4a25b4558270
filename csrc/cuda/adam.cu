// Adam, AdamW and AMSGrad (the rule is csrc/adam_rule.h) over a list of tensors in one launch, and
// the norm that clips them. A step reads four streams and writes three and is as fast as memory, so
// accesses are 16 bytes wide and what remains is to start once: the addresses lie in a table on the
// device, copied there on the same stream, where torch passes them as kernel arguments and launches
// anew for every few dozen tensors. A block owns a chunk of one tensor; rows hold the number of
// their first chunk, so a binary search over the rows (in cache) tells which.
//
// The norm adds squares in double: each block writes its chunk's sum, and the last block to finish
// adds these up in a fixed order.
#include "adam.h"

#include <algorithm>
#include <cstring>

#include "device/launch.h"

namespace bigops::cuda {
namespace {

constexpr int kThreads = 256;
// A block's look-up (about ten dependent reads) is small beside its 28 * 8192 bytes of traffic.
constexpr int64_t kChunk = 8192;

struct Row {
    void* data[kAdamRoles];
    int64_t numel;
    int64_t first_chunk;
    float step_size, correction;
    DType dtype;
    bool wide;  // all addresses are multiples of 16
};

struct Math {
    using Scalar = float;
    using Lanes = float;
    static __device__ float fma(float a, float b, float c) { return fmaf(a, b, c); }
    static __device__ float sqrt(float x) { return sqrtf(x); }
};

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
template <class T>
__device__ inline T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) { return x; }
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ inline __half narrow<__half>(float x) { return __float2half_rn(x); }

// 16 bytes of elements, moved as one access: the intrinsics tell the compiler that addresses from a
// table are global memory's, and that nothing is read again, so L1 is passed by.
template <class T>
struct alignas(16) Pack {
    static constexpr int kCount = 16 / sizeof(T);
    T lanes[kCount];

    __device__ static Pack load(const T* at) {
        const uint4 raw = __ldcg(reinterpret_cast<const uint4*>(at));
        Pack pack;
        memcpy(&pack, &raw, sizeof pack);
        return pack;
    }
    __device__ void store(T* at) const {
        uint4 raw;
        memcpy(&raw, this, sizeof raw);
        __stcg(reinterpret_cast<uint4*>(at), raw);
    }
};

__device__ inline const Row& row_of(const Row* rows, int count, int64_t chunk) {
    int low = 0, high = count;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (rows[middle].first_chunk <= chunk) low = middle;
        else high = middle;
    }
    return rows[low];
}

template <class T, bool kAmsgrad>
__global__ void __launch_bounds__(kThreads)
    adam_kernel(const Row* rows, int count, AdamNumbers<float> numbers, float max_grad_norm,
                bool maximize, const float* total_norm, const float* grad_scale,
                const float* found_inf) {
    if (found_inf && *found_inf != 0.0f) return;
    const Row& row = row_of(rows, count, blockIdx.x);
    const int64_t start = (blockIdx.x - row.first_chunk) * kChunk;
    const int rest = static_cast<int>(min(kChunk, row.numel - start));
    numbers.factor = grad_factor(total_norm ? max_grad_norm : INFINITY, maximize,
                                 total_norm ? *total_norm : 0.0f, grad_scale ? *grad_scale : 1.0f);
    numbers.step_size = row.step_size;
    numbers.correction = row.correction;
    T* at[kAdamRoles];
    for (int role = 0; role < kAdamRoles; ++role) at[role] = static_cast<T*>(row.data[role]) + start;

    using P = Pack<T>;
    int done = 0;
    if (row.wide) {
        done = rest / P::kCount * P::kCount;
        for (int i = threadIdx.x * P::kCount; i < done; i += kThreads * P::kCount) {
            P packs[kAdamRoles];
            for (int role = 0; role < (kAmsgrad ? kAdamRoles : kMaxExpAvgSq); ++role)
                packs[role] = P::load(at[role] + i);
            for (int k = 0; k < P::kCount; ++k) {
                float lanes[kAdamRoles] = {};
                for (int role = 0; role < (kAmsgrad ? kAdamRoles : kMaxExpAvgSq); ++role)
                    lanes[role] = widen(packs[role].lanes[k]);
                adam_rule<kAmsgrad, Math>(numbers, lanes[kGrad], lanes[kParam], lanes[kExpAvg],
                                          lanes[kExpAvgSq], lanes[kMaxExpAvgSq]);
                for (int role = 0; role < (kAmsgrad ? kAdamRoles : kMaxExpAvgSq); ++role)
                    if (role != kGrad) packs[role].lanes[k] = narrow<T>(lanes[role]);
            }
            for (int role = 0; role < (kAmsgrad ? kAdamRoles : kMaxExpAvgSq); ++role)
                if (role != kGrad) packs[role].store(at[role] + i);
        }
    }
    for (int i = done + threadIdx.x; i < rest; i += kThreads) {
        float lanes[kAdamRoles] = {};
        for (int role = 0; role < (kAmsgrad ? kAdamRoles : kMaxExpAvgSq); ++role)
            lanes[role] = widen(at[role][i]);
        adam_rule<kAmsgrad, Math>(numbers, lanes[kGrad], lanes[kParam], lanes[kExpAvg],
                                  lanes[kExpAvgSq], lanes[kMaxExpAvgSq]);
        for (int role = 0; role < (kAmsgrad ? kAdamRoles : kMaxExpAvgSq); ++role)
            if (role != kGrad) at[role][i] = narrow<T>(lanes[role]);
    }
}

template <class T>
__device__ double squares(const Row& row, int64_t start, int rest) {
    const T* grad = static_cast<const T*>(row.data[kGrad]) + start;
    using P = Pack<T>;
    // A thread adds up at most 32 squares, so float serves; across threads it is double.
    float sum = 0.0f;
    int done = 0;
    if (row.wide) {
        done = rest / P::kCount * P::kCount;
        for (int i = threadIdx.x * P::kCount; i < done; i += kThreads * P::kCount) {
            const P pack = P::load(grad + i);
            for (int k = 0; k < P::kCount; ++k) {
                const float x = widen(pack.lanes[k]);
                sum = fmaf(x, x, sum);
            }
        }
    }
    for (int i = done + threadIdx.x; i < rest; i += kThreads) {
        const float x = widen(grad[i]);
        sum = fmaf(x, x, sum);
    }
    return sum;
}

// The sum over the block, in thread 0.
__device__ double block_sum(double x) {
    __shared__ double warps[kThreads / 32];
    for (int lane = 16; lane > 0; lane /= 2) x += __shfl_down_sync(0xffffffffu, x, lane);
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < kThreads / 32; ++warp) x += warps[warp];
    __syncthreads();
    return x;
}

__global__ void __launch_bounds__(kThreads)
    grad_norm_kernel(const Row* rows, int count, double* sums, unsigned* finished, float* out) {
    const Row& row = row_of(rows, count, blockIdx.x);
    const int64_t start = (blockIdx.x - row.first_chunk) * kChunk;
    const int rest = static_cast<int>(min(kChunk, row.numel - start));
    double sum = 0.0;
    if (row.dtype == DType::bf16) sum = squares<__nv_bfloat16>(row, start, rest);
    else if (row.dtype == DType::f16) sum = squares<__half>(row, start, rest);
    else sum = squares<float>(row, start, rest);
    sum = block_sum(sum);

    __shared__ bool last;
    if (threadIdx.x == 0) {
        sums[blockIdx.x] = sum;
        __threadfence();
        last = atomicAdd(finished, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    double total = 0.0;
    for (unsigned i = threadIdx.x; i < gridDim.x; i += kThreads)
        total += *static_cast<volatile double*>(sums + i);
    total = block_sum(total);
    if (threadIdx.x == 0) *out = static_cast<float>(::sqrt(total));
}

class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        check(cudaSetDevice(device), "cudaSetDevice");
    }
    ~DeviceGuard() { cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int previous_ = 0;
};

int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// The table without empty tensors, and the number of chunks.
std::pair<std::vector<Row>, int64_t> table(const std::vector<AdamTensor>& tensors) {
    std::vector<Row> rows;
    int64_t chunks = 0;
    for (const AdamTensor& tensor : tensors) {
        if (tensor.numel == 0) continue;
        Row row = {};
        uintptr_t addresses = 0;
        for (int role = 0; role < kAdamRoles; ++role) {
            row.data[role] = tensor.data[role];
            addresses |= reinterpret_cast<uintptr_t>(tensor.data[role]);
        }
        row.numel = tensor.numel;
        row.first_chunk = chunks;
        row.wide = addresses % 16 == 0;
        rows.push_back(row);
        chunks += chunks_of(tensor.numel);
    }
    require(chunks <= std::numeric_limits<int32_t>::max(), "more chunks than a grid has blocks");
    return {rows, chunks};
}

const Row* to_device(const std::vector<Row>& rows, const View& workspace, void* stream) {
    check(cudaMemcpyAsync(workspace.data, rows.data(), rows.size() * sizeof(Row),
                          cudaMemcpyHostToDevice, static_cast<cudaStream_t>(stream)),
          "adam: copying the table");
    return static_cast<const Row*>(workspace.data);
}

LaunchConfig per_chunk(int64_t chunks, void* stream) {
    return {dim3(static_cast<unsigned>(chunks)), dim3(kThreads), 0, stream};
}

template <class T>
void step(const AdamOptions& options, const Row* rows, int count, int64_t chunks,
          const float* total_norm, const float* grad_scale, const float* found_inf, void* stream) {
    auto* kernel = options.amsgrad ? adam_kernel<T, true> : adam_kernel<T, false>;
    launch("adam_kernel", kernel, per_chunk(chunks, stream), rows, count,
           AdamNumbers<float>(options, 1), static_cast<float>(options.max_grad_norm),
           options.maximize, total_norm, grad_scale, found_inf);
}

}  // namespace

int64_t adam_workspace(size_t tensors) { return static_cast<int64_t>(tensors * sizeof(Row)); }

int64_t grad_norm_workspace(size_t tensors, int64_t numel) {
    const int64_t sums = chunks_of(numel) + static_cast<int64_t>(tensors);
    return adam_workspace(tensors) + sums * static_cast<int64_t>(sizeof(double)) + 16;
}

void adam(const std::vector<AdamTensor>& tensors, DType dtype, const AdamOptions& options,
          const float* total_norm, const float* grad_scale, const float* found_inf,
          const View& workspace, void* stream) {
    auto [rows, chunks] = table(tensors);
    if (rows.empty()) return;
    size_t i = 0;
    for (const AdamTensor& tensor : tensors) {
        if (tensor.numel == 0) continue;
        const AdamNumbers<float> numbers(options, tensor.step);
        rows[i].step_size = numbers.step_size;
        rows[i++].correction = numbers.correction;
    }
    const DeviceGuard guard(workspace.device_id);
    const Row* at = to_device(rows, workspace, stream);
    const int count = static_cast<int>(rows.size());
    switch (dtype) {
        case DType::f32:
            step<float>(options, at, count, chunks, total_norm, grad_scale, found_inf, stream);
            break;
        case DType::bf16:
            step<__nv_bfloat16>(options, at, count, chunks, total_norm, grad_scale, found_inf,
                                stream);
            break;
        case DType::f16:
            step<__half>(options, at, count, chunks, total_norm, grad_scale, found_inf, stream);
            break;
        default: require(false, "adam takes float32, bfloat16 and float16 on a GPU");
    }
}

void grad_norm(const std::vector<AdamTensor>& tensors, const std::vector<DType>& dtypes, float* out,
               const View& workspace, void* stream) {
    const DeviceGuard guard(workspace.device_id);
    auto* queue = static_cast<cudaStream_t>(stream);
    auto [rows, chunks] = table(tensors);
    if (rows.empty()) {
        check(cudaMemsetAsync(out, 0, sizeof(float), queue), "grad_norm: clearing the result");
        return;
    }
    size_t i = 0;
    for (size_t k = 0; k < tensors.size(); ++k)
        if (tensors[k].numel != 0) rows[i++].dtype = dtypes[k];
    const Row* at = to_device(rows, workspace, stream);
    auto* finished = reinterpret_cast<unsigned*>(const_cast<Row*>(at) + rows.size());
    auto* sums = reinterpret_cast<double*>(finished + 2);
    check(cudaMemsetAsync(finished, 0, sizeof(unsigned), queue), "grad_norm: clearing the counter");
    launch("grad_norm_kernel", grad_norm_kernel, per_chunk(chunks, stream), at,
           static_cast<int>(rows.size()), sums, finished, out);
}

}  // namespace bigops::cuda
