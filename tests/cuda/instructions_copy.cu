// cp.async, and mbarriers with bulk copies.
#include "instructions.h"

#include "../../csrc/cuda/device/async_copy.h"

namespace test {

constexpr int kPlaces = 3;         // of a ring
constexpr int kChunkFloats = 512;  // four for each of 128 threads

// out[i] = 2 x[i] chunk by chunk through a ring of shared memory; floats from `valid` on are read as zeros.
__global__ void cp_async_ring(const float* x, float* out, int chunks, int valid) {
    alignas(16) __shared__ float ring[kPlaces][kChunkFloats];
    const int at = 4 * static_cast<int>(threadIdx.x);
    const auto start = [&](int chunk) {
        const int from = chunk * kChunkFloats + at;
        if (chunk < chunks) device::cp_async_16(&ring[chunk % kPlaces][at], x + from, from < valid);
        device::cp_async_commit();
    };
    for (int chunk = 0; chunk < kPlaces - 1; ++chunk) start(chunk);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        device::cp_async_wait<kPlaces - 2>();
        __syncthreads();  // others' copies are there too, and the place before was read by all
        start(chunk + kPlaces - 1);
        for (int i = static_cast<int>(threadIdx.x); i < kChunkFloats; i += kThreads)
            out[chunk * kChunkFloats + i] = 2.0f * ring[chunk % kPlaces][i];
    }
}

// A producer thread fills the ring by bulk copies; three warps add the chunks up.
__global__ void mbarrier_ring(const float* x, float* out, int chunks) {
    alignas(128) __shared__ float ring[kPlaces][kChunkFloats];
    __shared__ uint64_t full[kPlaces], empty[kPlaces];
    if (threadIdx.x == 0) {
        for (int i = 0; i < kPlaces; ++i) {
            device::mbarrier_init(&full[i], 1);
            device::mbarrier_init(&empty[i], 96);
        }
        device::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        if (threadIdx.x != 0) return;
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const int place = chunk % kPlaces;
            const uint32_t turn = static_cast<uint32_t>(chunk / kPlaces);
            device::mbarrier_wait(&empty[place], (turn & 1) ^ 1);
            device::mbarrier_arrive_expect(&full[place], sizeof ring[place]);
            for (int half = 0; half < 2; ++half)
                device::bulk_load(ring[place] + half * kChunkFloats / 2,
                                  x + chunk * kChunkFloats + half * kChunkFloats / 2, &full[place],
                                  sizeof ring[place] / 2);
        }
    } else {
        const int first = static_cast<int>(threadIdx.x) - 32;
        float sums[(kChunkFloats + 95) / 96] = {};
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const int place = chunk % kPlaces;
            device::mbarrier_wait(&full[place], static_cast<uint32_t>(chunk / kPlaces) & 1);
            for (int k = 0, i = first; i < kChunkFloats; i += 96, ++k) sums[k] += ring[place][i];
            device::mbarrier_arrive(&empty[place]);
        }
        for (int k = 0, i = first; i < kChunkFloats; i += 96, ++k) out[i] = sums[k];
    }
}

// global += 1 row of floats, by the copy engine, from `times` blocks.
__global__ void bulk_reduce(float* global, const float* x) {
    alignas(128) __shared__ float row[kChunkFloats];
    copy16(row, x, sizeof row);
    publish();
    if (threadIdx.x == 0) {
        device::bulk_reduce_add(global, row, sizeof row);
        device::bulk_commit();
        device::bulk_wait_read<0>();
    }
}

}  // namespace test

extern "C" void copy_cp_async(const float* x, float* out, int64_t chunks, int64_t valid) {
    bigops::cuda::launch("cp_async_ring", test::cp_async_ring, {dim3(1), dim3(128)}, x, out,
                         static_cast<int>(chunks), static_cast<int>(valid));
}
extern "C" void copy_mbarrier(const float* x, float* out, int64_t chunks) {
    bigops::cuda::launch("mbarrier_ring", test::mbarrier_ring, {dim3(1), dim3(128)}, x, out,
                         static_cast<int>(chunks));
}
extern "C" void copy_bulk_reduce(float* global, const float* x, int64_t times) {
    bigops::cuda::launch("bulk_reduce", test::bulk_reduce,
                         {dim3(static_cast<unsigned>(times)), dim3(128)}, global, x);
}
