// TMA: boxes with swizzles, steps and out-of-bounds fill; stores, additions; the im2col walk.
#include "instructions.h"

namespace test {

// What Python says: numbers in this order, four where there are four.
struct Plan {
    int64_t dtype, rank, swizzle;
    int64_t sizes[4], strides[4], box[4], steps[4], at[4];
    int64_t lower[2], upper[2], channels, pixels, offset[2];  // im2col
    int64_t bytes;                                            // of a box
};

cuda::RowSwizzle swizzle_of(const Plan& plan) {
    if (plan.swizzle == 0) return std::nullopt;
    return static_cast<device::Swizzle>(plan.swizzle);
}

device::TensorMap tiled_map(const void* data, const Plan& plan) {
    uint64_t sizes[4], strides[4];
    uint32_t box[4], steps[4];
    for (int i = 0; i < 4; ++i) {
        sizes[i] = static_cast<uint64_t>(plan.sizes[i]);
        if (i > 0) strides[i - 1] = static_cast<uint64_t>(plan.strides[i]);
        box[i] = static_cast<uint32_t>(plan.box[i]);
        steps[i] = static_cast<uint32_t>(plan.steps[i]);
    }
    return cuda::tiled_map(data, static_cast<DType>(plan.dtype), static_cast<int>(plan.rank), sizes,
                           strides, box, swizzle_of(plan), steps);
}

struct Point {
    int c[4];
};

enum class How { tiled2, tiled3, tiled4, im2col };

// out: the bytes that come, as they lie in shared memory.
template <How kHow>
__global__ void tma_load(const __grid_constant__ device::TensorMap map, char* out, Point at,
                         Point offset, int bytes) {
    char* box = device::dynamic_shared();
    auto* full = reinterpret_cast<uint64_t*>(box + bytes);
    if (threadIdx.x == 0) {
        device::tma_prefetch(&map);
        device::mbarrier_init(full, 1);
        device::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        device::mbarrier_arrive_expect(full, static_cast<uint32_t>(bytes));
        const int* c = at.c;
        if constexpr (kHow == How::tiled2) device::tma_load(box, &map, full, c[0], c[1]);
        if constexpr (kHow == How::tiled3) device::tma_load(box, &map, full, c[0], c[1], c[2]);
        if constexpr (kHow == How::tiled4) device::tma_load(box, &map, full, c[0], c[1], c[2], c[3]);
        if constexpr (kHow == How::im2col)
            device::tma_load_im2col(box, &map, full, c[0], c[1], c[2], c[3],
                                    static_cast<uint16_t>(offset.c[0]),
                                    static_cast<uint16_t>(offset.c[1]));
    }
    device::mbarrier_wait(full, 0);
    copy16(out, box, bytes);
}

// from: the bytes of a box as they lie in shared memory.
template <bool kAdd>
__global__ void tma_store(const __grid_constant__ device::TensorMap map, const char* from, Point at,
                          int bytes) {
    char* box = device::dynamic_shared();
    copy16(box, from, bytes);
    publish();
    if (threadIdx.x == 0) {
        const int* c = at.c;
        if (kAdd) device::tma_reduce_add(&map, box, c[0], c[1], c[2], c[3]);
        else device::tma_store(&map, box, c[0], c[1], c[2], c[3]);
        device::bulk_commit();
        device::bulk_wait<0>();
    }
}

Point point(const int64_t (&values)[4]) {
    Point result = {};
    for (int i = 0; i < 4; ++i) result.c[i] = static_cast<int>(values[i]);
    return result;
}

cuda::LaunchConfig one_block(const Plan& plan) {
    return {dim3(1), dim3(kThreads), static_cast<size_t>(plan.bytes) + sizeof(uint64_t)};
}

}  // namespace test

extern "C" void tma_load(const void* data, char* out, const test::Plan* plan) {
    const auto map = test::tiled_map(data, *plan);
    const auto kernel = plan->rank == 2   ? test::tma_load<test::How::tiled2>
                        : plan->rank == 3 ? test::tma_load<test::How::tiled3>
                                          : test::tma_load<test::How::tiled4>;
    bigops::cuda::launch("tma_load", kernel, test::one_block(*plan), map, out, test::point(plan->at),
                         test::Point{}, static_cast<int>(plan->bytes));
}

extern "C" void tma_store(const void* data, const char* from, const test::Plan* plan, int64_t add) {
    const auto map = test::tiled_map(data, *plan);
    bigops::cuda::launch("tma_store", add ? test::tma_store<true> : test::tma_store<false>,
                         test::one_block(*plan), map, from, test::point(plan->at),
                         static_cast<int>(plan->bytes));
}

extern "C" void tma_im2col(const void* data, char* out, const test::Plan* plan) {
    bigops::cuda::Im2col walk = {};
    for (int i = 0; i < 4; ++i) {
        walk.sizes[i] = static_cast<uint64_t>(plan->sizes[i]);
        if (i > 0) walk.byte_strides[i - 1] = static_cast<uint64_t>(plan->strides[i]);
    }
    for (int i = 0; i < 2; ++i) {
        walk.lower[i] = static_cast<int>(plan->lower[i]);
        walk.upper[i] = static_cast<int>(plan->upper[i]);
        walk.steps[i] = static_cast<uint32_t>(plan->steps[1 + i]);
    }
    walk.channels = static_cast<uint32_t>(plan->channels);
    walk.pixels = static_cast<uint32_t>(plan->pixels);
    const auto map = bigops::cuda::im2col_map(data, static_cast<bigops::DType>(plan->dtype), walk,
                                              test::swizzle_of(*plan));
    const test::Point offset = {
        {static_cast<int>(plan->offset[0]), static_cast<int>(plan->offset[1]), 0, 0}};
    bigops::cuda::launch("tma_load_im2col", test::tma_load<test::How::im2col>,
                         test::one_block(*plan), map, out, test::point(plan->at), offset,
                         static_cast<int>(plan->bytes));
}
