// Kernels with nothing wrong in them, each for some of CUDA's words; tests/test_simt.py says what
// they compute.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <climits>

#include "../../csrc/cuda/device/launch.h"
#include "../../csrc/view.h"

namespace {

constexpr int kWarp = 32;

// The indices of every thread, and the sizes, in three dimensions.
__global__ void where_am_i(int* out) {
    const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    int* at = out + (block * blockDim.x * blockDim.y * blockDim.z + thread) * 6;
    at[0] = blockIdx.x;
    at[1] = blockIdx.y;
    at[2] = blockIdx.z;
    at[3] = threadIdx.x;
    at[4] = threadIdx.y;
    at[5] = threadIdx.z;
}

template <class T, int kThreads>
__global__ void __launch_bounds__(kThreads) sum_rows(const T* x, float* out, int columns) {
    __shared__ float warps[kThreads / kWarp];
    float sum = 0.0f;
    for (int i = threadIdx.x; i < columns; i += kThreads)
        sum += static_cast<float>(x[static_cast<int64_t>(blockIdx.x) * columns + i]);
    for (int lane = kWarp / 2; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = sum;
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int warp = 1; warp < kThreads / kWarp; ++warp) sum += warps[warp];
    out[blockIdx.x] = sum;
}

// Row i of 16 has what lane threadIdx.x gets from the i-th of these.
__global__ void words_of_a_warp(int* out) {
    const int t = threadIdx.x;
    const int x = 100 + 7 * t;
    const unsigned all = 0xffffffffu;
    int row = 0;
    const auto put = [&](int value) { out[row++ * kWarp + t] = value; };
    put(__shfl_sync(all, x, 5));
    put(__shfl_sync(all, x, 31 - t));
    put(__shfl_sync(all, x, t + 3, 8));
    put(__shfl_up_sync(all, x, 3));
    put(__shfl_up_sync(all, x, 2, 8));
    put(__shfl_down_sync(all, x, 4));
    put(__shfl_down_sync(all, x, 1, 16));
    put(__shfl_xor_sync(all, x, 9));
    put(__shfl_xor_sync(all, x, 12, 8));
    put(static_cast<int>(__ballot_sync(all, t % 3 == 0)));
    put(__any_sync(all, t == 31));
    put(__all_sync(all, t != 31));
    put(__reduce_add_sync(all, x));
    put(__reduce_max_sync(all, x));
    // Half of the warp meets without the other.
    int half = -1;
    if (t < 16) half = __shfl_xor_sync(0xffffu, x, 1);
    put(half);
    put(static_cast<int>(__activemask() >> t & 1));  // of others nothing is promised
}

__global__ void histogram(const int* x, int n, unsigned* out, unsigned* greatest) {
    __shared__ unsigned bins[64];
    if (threadIdx.x < 64) bins[threadIdx.x] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        atomicAdd(&bins[x[i]], 1u);
        atomicMax(greatest, static_cast<unsigned>(i));
    }
    __syncthreads();
    if (threadIdx.x < 64) atomicAdd(&out[threadIdx.x], bins[threadIdx.x]);
}

// The last block to finish adds up what all have written: fences order it, and nothing else does.
__global__ void sum_of_all(const float* x, int n, float* sums, unsigned* finished, float* out) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    float sum = i < n ? x[i] : 0.0f;
    for (int lane = kWarp / 2; lane > 0; lane /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lane);
    if (threadIdx.x != 0) return;
    sums[blockIdx.x] = sum;
    __threadfence();
    if (atomicAdd(finished, 1u) != gridDim.x - 1) return;
    __threadfence();
    float total = 0.0f;
    for (unsigned k = 0; k < gridDim.x; ++k) total += sums[k];
    *out = total;
}

// One warp hands a value to the other by a flag.
__global__ void handed_over(int* out) {
    __shared__ int value;
    __shared__ int flag;
    if (threadIdx.x == 0) flag = 0;
    __syncthreads();
    if (threadIdx.x == 40) {
        value = 17;
        __threadfence_block();
        atomicExch(&flag, 1);
    }
    if (threadIdx.x == 0) {
        while (atomicAdd(&flag, 0) == 0) __nanosleep(20);
        __threadfence_block();
        out[0] = value;
    }
}

// One warp waits for the other without sleeping.
__global__ void polled(int* out) {
    __shared__ volatile int flag;
    if (threadIdx.x == 0) flag = 0;
    __syncthreads();
    if (threadIdx.x == 40) flag = 1;
    if (threadIdx.x == 0) {
        while (flag == 0) {
        }
        out[0] = 17;
    }
}

__global__ void through_dynamic(const float4* x, float4* y, int n) {
    auto* tile = reinterpret_cast<float4*>(bigops::device::dynamic_shared());
    for (int i = threadIdx.x; i < n; i += blockDim.x) tile[i] = __ldcg(&x[i]);
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) __stcg(&y[i], tile[n - 1 - i]);
}

__global__ void widen(const __nv_bfloat16* b, const __half* h, float* from_b, float* from_h, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    from_b[i] = __bfloat162float(b[i]);
    from_h[i] = __half2float(h[i]);
}

__global__ void narrow(const float* x, __nv_bfloat16* b, __half* h, int n) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    b[i] = __float2bfloat16_rn(x[i]);
    h[i] = __float2half_rn(x[i]);
}

// More than registers hold.
__global__ void many_arguments(int a, int64_t b, float c, double d, bool e, unsigned f, int g, int h,
                               int64_t i, float j, int k, double* out) {
    out[threadIdx.x] = static_cast<double>(a) + b + c + d + e + f + g + h + i + j + k;
}

}  // namespace

void rows_of(const bigops::View& x, const bigops::View& out) {
    const auto rows = static_cast<unsigned>(x.shape[0]);
    bigops::require(x.shape[0] == out.shape[0], "out has another number of rows");
    bigops::cuda::launch("sum_rows", sum_rows<float, 64>, {dim3(rows), dim3(64), 0, nullptr},
                         x.ptr<float>(), out.ptr<float>(), static_cast<int>(x.shape[1]));
}

template __global__ void sum_rows<float, 128>(const float*, float*, int);
template __global__ void sum_rows<__half, 96>(const __half*, float*, int);
