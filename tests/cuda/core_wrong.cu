// One mistake per kernel, which the model has to find; the lines that a finding names end in a
// comment with the name of the kernel's first or second place.
#include "../../csrc/cuda/device/launch.h"
#include "../../csrc/simt/core.h"
#include "../../csrc/view.h"

namespace simt = bigops::simt;

__global__ void race_shared(int* out) {
    __shared__ int tile[64];
    tile[threadIdx.x] = threadIdx.x;  // race_shared 1
    out[threadIdx.x] = tile[63 - threadIdx.x];  // race_shared 2
}

// Lanes of one warp do not run in step either.
__global__ void race_within_a_warp(int* out) {
    __shared__ int tile[32];
    tile[threadIdx.x] = threadIdx.x;  // race_within_a_warp 1
    out[threadIdx.x] = tile[threadIdx.x ^ 1];  // race_within_a_warp 2
}

__global__ void race_overwrites(int* out) {
    __shared__ int tile[64];
    tile[threadIdx.x] = threadIdx.x;
    __syncthreads();
    const int x = tile[63 - threadIdx.x];  // race_overwrites 1
    tile[threadIdx.x] = x + 1;  // race_overwrites 2
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void race_global(int* out) {
    out[threadIdx.x] = threadIdx.x;  // race_global 1
    if (threadIdx.x == 40) out[0] += 1;  // race_global 2
}

__global__ void race_of_bytes(unsigned char* out) {
    out[threadIdx.x / 2] = 1;  // race_of_bytes 1
}

// The barrier is another warp's.
__global__ void race_beside_syncwarp(int* out) {
    __shared__ int tile[64];
    tile[threadIdx.x] = threadIdx.x;  // race_beside_syncwarp 1
    __syncwarp();
    out[threadIdx.x] = tile[63 - threadIdx.x];  // race_beside_syncwarp 2
}

// As in core_right.cu, without the first fence.
__global__ void race_without_fence(int* out) {
    __shared__ int value;
    __shared__ int flag;
    if (threadIdx.x == 0) flag = 0;
    __syncthreads();
    if (threadIdx.x == 40) {
        value = 17;  // race_without_fence 1
        atomicExch(&flag, 1);
    }
    if (threadIdx.x == 0) {
        while (atomicAdd(&flag, 0) == 0) __nanosleep(20);
        __threadfence_block();
        out[0] = value;  // race_without_fence 2
    }
}

// And without the second.
__global__ void race_without_second_fence(int* out) {
    __shared__ int value;
    __shared__ int flag;
    if (threadIdx.x == 0) flag = 0;
    __syncthreads();
    if (threadIdx.x == 40) {
        value = 17;  // race_without_second_fence 1
        __threadfence_block();
        atomicExch(&flag, 1);
    }
    if (threadIdx.x == 0) {
        while (atomicAdd(&flag, 0) == 0) __nanosleep(20);
        out[0] = value;  // race_without_second_fence 2
    }
}

__global__ void race_plain_beside_atomic(int* out) {
    if (threadIdx.x == 0) out[0] = 0;  // race_plain_beside_atomic 1
    atomicAdd(out, 1);  // race_plain_beside_atomic 2
}

// Every block writes the same element.
__global__ void race_of_blocks(int* out) {
    if (threadIdx.x == 0) out[blockIdx.x / 2] = blockIdx.x;  // race_of_blocks 1
}

__global__ void race_of_blocks_without_fence(int* sums, unsigned* finished, int* out) {
    if (threadIdx.x != 0) return;
    sums[blockIdx.x] = blockIdx.x;  // race_of_blocks_without_fence 1
    if (atomicAdd(finished, 1u) != gridDim.x - 1) return;
    __threadfence();
    int total = 0;
    for (unsigned i = 0; i < gridDim.x; ++i) total += sums[i];  // race_of_blocks_without_fence 2
    *out = total;
}

// Blocks add to the same sums, in turn unless one of the steps of that is left out.
__global__ void sums_of_blocks(const float* x, float* sums, int* turn, int left_out) {
    if (threadIdx.x == 0 && left_out != 1)
        while (atomicAdd(turn, 0) != static_cast<int>(blockIdx.x)) __nanosleep(20);
    if (threadIdx.x == 0 && left_out != 2) __threadfence();
    if (left_out != 3) __syncthreads();
    atomicAdd(sums + threadIdx.x, x[threadIdx.x]);  // sums_of_blocks 1
    if (left_out != 4) __syncthreads();
    if (threadIdx.x == 0 && left_out != 5) __threadfence();
    if (threadIdx.x == 0) atomicAdd(turn, 1);
}

__global__ void race_of_a_copy(int* out) {
    __shared__ int tile[32];
    if (threadIdx.x == 0) {
        const simt::Agent copy = simt::fork_agent();  // race_of_a_copy 1
        simt::write(tile, sizeof tile, copy, simt::Proxy::async);
        memset(tile, 0, sizeof tile);
    }
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];  // race_of_a_copy 2
}

__global__ void never_written(int* out) {
    __shared__ int tile[64];
    if (threadIdx.x < 63) tile[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x];  // never_written 1
}

__global__ void never_written_dynamic(int* out) {
    const auto* tile = reinterpret_cast<int*>(bigops::device::dynamic_shared());
    out[threadIdx.x] = tile[threadIdx.x];  // never_written_dynamic 1
}

__global__ void reads_past_the_end(const float* x, float* out) {
    out[threadIdx.x] = x[threadIdx.x + 1];  // reads_past_the_end 1
}

__global__ void writes_before_the_start(float* out) {
    out[static_cast<int>(threadIdx.x) - 1] = 0.0f;  // writes_before_the_start 1
}

__global__ void reads_past_shared(int* out) {
    auto* tile = reinterpret_cast<int*>(bigops::device::dynamic_shared());
    tile[threadIdx.x] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = tile[threadIdx.x + 1];  // reads_past_shared 1
}

__global__ void copies_past_the_end(const float* x, float* out) {
    if (threadIdx.x == 0) memcpy(out, x, 64 * sizeof(float) + blockDim.x);  // copies_past_the_end 1
}

__global__ void reads_the_host(const float* x, float* out) {
    out[threadIdx.x] = x[threadIdx.x];  // reads_the_host 1
}

void gives_what_is_the_hosts(const bigops::View& out) {
    const std::vector<float> x(32, 1.0f);
    bigops::cuda::launch("reads_the_host", reads_the_host, {dim3(1), dim3(32), 0, nullptr}, x.data(),
                         out.ptr<float>());
}

__global__ void misaligned(const float* x, float4* out) {
    out[threadIdx.x] = *reinterpret_cast<const float4*>(x + threadIdx.x);  // misaligned 1
}

__global__ void barrier_after_exit(int* out) {
    if (threadIdx.x == 5) return;
    __syncthreads();  // barrier_after_exit 1
    out[threadIdx.x] = 1;
}

__global__ void barriers_of_one_warp_differ(int* out) {
    if (threadIdx.x % 2 == 0) __syncthreads();  // barriers_of_one_warp_differ 1
    else __syncthreads();  // barriers_of_one_warp_differ 2
    out[threadIdx.x] = 1;
}

__global__ void barrier_for_some(int* out) {
    if (threadIdx.x < 32) __syncthreads();  // barrier_for_some 1
    else out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, threadIdx.x == 40 ? 0 : 1);
    if (threadIdx.x == 40) __syncwarp();  // barrier_for_some 2
}

__global__ void collectives_differ(int* out) {
    int x = threadIdx.x;
    if (x < 16) x = __shfl_xor_sync(0xffffffffu, x, 1);  // collectives_differ 1
    else x = __shfl_down_sync(0xffffffffu, x, 1);  // collectives_differ 2
    out[threadIdx.x] = x;
}

__global__ void shuffle_of_an_exited_lane(int* out) {
    if (threadIdx.x == 3) return;
    out[threadIdx.x] = __shfl_sync(0xffffffffu, 1, 0);  // shuffle_of_an_exited_lane 1
}

__global__ void shuffle_reads_outside(int* out) {
    if (threadIdx.x < 16)
        out[threadIdx.x] = __shfl_sync(0xffffu, 1, threadIdx.x + 1);  // shuffle_reads_outside 1
}

__global__ void not_in_its_mask(int* out) {
    out[threadIdx.x] = __shfl_sync(0xffffu, 1, 0);  // not_in_its_mask 1
}

__global__ void waits_forever(int* out) {
    if (threadIdx.x < 32)
        simt::wait_until([] { return false; }, "a flag that nobody sets");  // waits_forever 1
    __syncthreads();  // waits_forever 2
    out[threadIdx.x] = 1;
}

__global__ void polls_forever(int* flag) {
    while (atomicAdd(flag, 0) == 0) __nanosleep(20);  // polls_forever 1
}

__global__ void wrong_forever(int* out) {
    __shared__ volatile int done;
    while (done != 1) __syncwarp();  // wrong_forever 1
    out[threadIdx.x] = done;
}

__global__ void polls_forever_without_sleep(int* flag) {
    while (atomicAdd(flag, 0) == 0) {  // polls_forever_without_sleep 1
    }
}

__global__ void missing_fence(int* out) {
    __shared__ int tile[32];
    tile[threadIdx.x] = threadIdx.x;  // missing_fence 1
    __syncthreads();
    if (threadIdx.x != 0) return;
    const simt::Agent copy = simt::fork_agent();  // missing_fence 2
    simt::read(tile, sizeof tile, copy, simt::Proxy::async);
    simt::join_agent(copy);
    out[0] = tile[0];
}

// Before the writes it orders nothing.
__global__ void fence_too_early(int* out) {
    __shared__ int tile[32];
    simt::proxy_fence();
    tile[threadIdx.x] = threadIdx.x;  // fence_too_early 1
    __syncthreads();
    if (threadIdx.x != 0) return;
    const simt::Agent copy = simt::fork_agent();  // fence_too_early 2
    simt::read(tile, sizeof tile, copy, simt::Proxy::async);
    simt::join_agent(copy);
    out[0] = tile[0];
}

__global__ void traps(int* out) {
    if (threadIdx.x == 7) __trap();  // traps 1
    out[threadIdx.x] = 1;
}

// Slow: all words of a warp's access are one bank's, then two of each quarter's.
__global__ void bank_conflicts(float* out) {
    __shared__ float column[32 * 32];
    alignas(16) __shared__ float4 pairs[64];
    column[32 * threadIdx.x] = 1.0f;  // bank_conflicts 1
    pairs[2 * threadIdx.x] = float4{};  // bank_conflicts 2
    __syncwarp();
    pairs[threadIdx.x] = float4{};
    __syncwarp();
    out[threadIdx.x] = column[0] + pairs[0].x;
}

// Right: by the writers after their writes, or by the thread that starts the copy.
__global__ void fenced_by_writers(int* out) {
    __shared__ int tile[32];
    tile[threadIdx.x] = threadIdx.x;
    simt::proxy_fence();
    __syncthreads();
    if (threadIdx.x != 0) return;
    const simt::Agent copy = simt::fork_agent();
    simt::read(tile, sizeof tile, copy, simt::Proxy::async);
    simt::join_agent(copy);
    tile[0] = 1;
    out[0] = tile[0];
}

__global__ void fenced_by_one(int* out) {
    __shared__ int tile[32];
    tile[threadIdx.x] = threadIdx.x;
    __syncthreads();
    if (threadIdx.x != 0) return;
    simt::proxy_fence();
    const simt::Agent copy = simt::fork_agent();
    simt::read(tile, sizeof tile, copy, simt::Proxy::async);
    simt::join_agent(copy);
    out[0] = tile[0];
}
