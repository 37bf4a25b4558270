// Shuffles, conversions, exp2, elect, named barriers and setmaxnreg.
#include "instructions.h"

#include "../../csrc/cuda/device/mma.h"

namespace test {

// out: five rows of n words.
__global__ void conversions(const float* x, uint32_t* out, int n) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    out[i] = __float_as_uint(device::exp2_approx(x[i]));
    out[n + i] = __float_as_uint(device::reciprocal_approx(x[i]));
    out[2 * n + i] = device::pack<bf16>(x[i], x[n - 1 - i]);
    out[3 * n + i] = device::pack<f16>(x[i], x[n - 1 - i]);
    out[4 * n + i] = device::to_tf32(x[i]);
}

// out: rows of 64: shuffle from lane 5, shuffle_xor by 1, 2, 4, 8, 16, elected or not, lane.
__global__ void shuffles(const float* x, float* out) {
    const int i = static_cast<int>(threadIdx.x);
    out[i] = device::shuffle(x[i], 5);
    for (int bit = 0; bit < 5; ++bit)
        out[64 * (1 + bit) + i] = device::shuffle_xor(x[i], 1 << bit);
    out[64 * 6 + i] = device::elect_one() ? 1.0f : 0.0f;
    out[64 * 7 + i] = static_cast<float>(device::lane_id());
}

// Two warps hand over numbers through shared memory to two others, `rounds` times: barrier 1 says that they
// are there, barrier 2 that the place is free again; barrier 3 is the readers' own.
__global__ void named_barriers(const float* x, float* out, int rounds) {
    __shared__ float numbers[64];
    __shared__ float sums[2];
    const int i = static_cast<int>(threadIdx.x) % 64;
    if (threadIdx.x < 64) {
        for (int round = 0; round < rounds; ++round) {
            if (round > 0) device::named_barrier_sync(2, 128);
            numbers[i] = x[64 * round + i];
            device::named_barrier_arrive(1, 128);
        }
    } else {
        for (int round = 0; round < rounds; ++round) {
            device::named_barrier_sync(1, 128);
            float sum = numbers[63 - i];
            if (round + 1 < rounds) device::named_barrier_arrive(2, 128);
            for (int bit = 1; bit < 32; bit *= 2) sum += device::shuffle_xor(sum, bit);
            if (i % 32 == 0) sums[i / 32] = sum;
            device::named_barrier_sync(3, 64);
            out[64 * round + i] = sums[0] + sums[1];
            device::named_barrier_sync(3, 64);
        }
    }
}

__global__ void __launch_bounds__(384, 1) register_pool(int* out) {
    if (threadIdx.x < 128) {
        device::registers_decrease<24>();
        out[threadIdx.x] = 24;
    } else {
        device::registers_increase<240>();
        out[threadIdx.x] = 240;
    }
}

}  // namespace test

extern "C" void warp_conversions(const float* x, uint32_t* out, int64_t n) {
    const auto blocks = static_cast<unsigned>((n + 127) / 128);
    bigops::cuda::launch("conversions", test::conversions, {dim3(blocks), dim3(128)}, x, out,
                         static_cast<int>(n));
}
extern "C" void warp_shuffles(const float* x, float* out) {
    bigops::cuda::launch("shuffles", test::shuffles, {dim3(1), dim3(64)}, x, out);
}
extern "C" void warp_named_barriers(const float* x, float* out, int64_t rounds) {
    bigops::cuda::launch("named_barriers", test::named_barriers, {dim3(1), dim3(128)}, x, out,
                         static_cast<int>(rounds));
}
extern "C" void warp_register_pool(int* out) {
    bigops::cuda::launch("register_pool", test::register_pool, {dim3(1), dim3(384)}, out);
}
