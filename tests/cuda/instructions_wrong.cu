// Kernels that are right with mistake 0 and have one mistake with each other number: what the CPU model says
// to each is in tests/test_simt_instructions.py, which numbers them in this order.
#include "instructions.h"

#include "../../csrc/cuda/device/async_copy.h"
#include "../../csrc/cuda/device/mma.h"
#include "../../csrc/cuda/device/tile.h"
#include "../../csrc/cuda/device/wgmma.h"

namespace test {

__global__ void wrong_cp_async(const float* x, float* out, int mistake) {
    enum { right, no_wait, waits_for_older, no_barrier, no_commit, overtakes_readers, misaligned, stray };
    alignas(16) __shared__ float place[kThreads * 4 + 4];
    const int t = static_cast<int>(threadIdx.x), other = 4 * ((t + 40) % kThreads);
    float* to = place + 4 * t;
    if (mistake == stray) to = out + 4 * t;
    device::cp_async_16(to, x + 4 * t + (mistake == misaligned));
    if (mistake != no_commit) device::cp_async_commit();
    if (mistake == waits_for_older) device::cp_async_wait<1>();
    else if (mistake != no_wait) device::cp_async_wait<0>();
    if (mistake != no_barrier) __syncthreads();
    float sum = place[other];
    if (mistake != overtakes_readers) __syncthreads();
    device::cp_async_16(place + 4 * t, x + 4 * t);
    device::cp_async_commit();
    device::cp_async_wait<0>();
    sum += place[4 * t];
    out[t] = sum;
}

__global__ void wrong_mbarrier(const float* x, float* out, int mistake) {
    enum {
        right,
        no_init,
        no_barrier_after_init,
        no_init_fence,
        overwritten,
        initialised_twice,
        arrives_twice,
        expects_too_much,
        expects_too_little,
        no_wait,
        wrong_parity,
        overtakes_readers,
        misaligned_load,
        never_waited
    };
    alignas(128) __shared__ float place[kThreads];
    __shared__ uint64_t full, empty;
    const int t = static_cast<int>(threadIdx.x);
    const bool first = t == 0;
    if (first && mistake != no_init) {
        device::mbarrier_init(&full, 1);
        device::mbarrier_init(&empty, kThreads);
        if (mistake == initialised_twice) device::mbarrier_init(&full, 1);
        if (mistake != no_init_fence) device::fence_mbarrier_init();
    }
    if (mistake != no_barrier_after_init) __syncthreads();
    if (mistake == overwritten) {
        if (first) full = 0;
        __syncthreads();
    }
    const auto load = [&](int from) {
        uint32_t expected = sizeof place;
        if (mistake == expects_too_much) expected += 16;
        if (mistake == expects_too_little) expected -= 16;
        device::mbarrier_arrive_expect(&full, expected);
        if (mistake == arrives_twice) device::mbarrier_arrive(&full);
        device::bulk_load(place, x + from + (mistake == misaligned_load), &full, sizeof place);
    };
    if (first) load(0);
    if (mistake != no_wait) device::mbarrier_wait(&full, mistake == wrong_parity ? 1 : 0);
    float sum = place[(t + 40) % kThreads];
    device::mbarrier_arrive(&empty);
    if (first) {
        if (mistake != overtakes_readers) device::mbarrier_wait(&empty, 0);
        load(kThreads);
    }
    if (mistake == never_waited) return;
    device::mbarrier_wait(&full, 1);
    sum += place[t];
    out[t] = sum;
}

// A box of 8 rows of 64 16-bit elements goes out; with `reduce` floats are added as well.
__global__ void wrong_store(const __grid_constant__ device::TensorMap map, const char* x, int mistake) {
    enum {
        right,
        no_fence,
        fence_before_write,
        no_commit,
        no_wait,
        overwrites,
        misaligned_box,
        wrong_rank,
        no_map
    };
    char* box = device::dynamic_shared();
    const int t = static_cast<int>(threadIdx.x);
    if (mistake == fence_before_write) device::fence_proxy_async();
    copy16(box, x, 1024);
    if (mistake != no_fence && mistake != fence_before_write) device::fence_proxy_async();
    __syncthreads();
    if (t == 0) {
        const char* from = box + (mistake == misaligned_box ? 64 : 0);
        if (mistake == no_map) {
            const device::TensorMap none = {};
            device::tma_store(&none, from, 0, 0, 0, 0);
        }
        device::tma_store(&map, from, 0, 0, 0, 0);
        if (mistake != no_commit) device::bulk_commit();
        if (mistake != no_wait && mistake != overwrites) device::bulk_wait_read<0>();
    }
    __syncthreads();
    if (mistake == no_wait) return;
    copy16(box, x, 1024);
    if (mistake == overwrites && t == 0) device::bulk_wait_read<0>();
}

// Blocks add rows to the same sums, in turn: who passes the turn on has to have added.
__global__ void adds_in_turn(float* sums, int* turn, int waits) {
    alignas(16) __shared__ float row[32];
    row[threadIdx.x] = 1.0f;
    device::fence_proxy_async();
    __syncwarp();
    if (threadIdx.x != 0) return;
    while (atomicAdd(turn, 0) != static_cast<int>(blockIdx.x)) __nanosleep(20);
    __threadfence();
    device::bulk_reduce_add(sums, row, sizeof row);
    device::bulk_commit();
    if (waits) device::bulk_wait<0>();
    else device::bulk_wait_read<0>();
    __threadfence();
    atomicAdd(turn, 1);
}

__global__ void wrong_wgmma(const bf16* a, const bf16* b, float* out, int mistake) {
    enum {
        right,
        no_proxy_fence,
        no_fence,
        no_second_fence,
        writes_after_fence,
        no_commit,
        no_wait,
        writes_under_way,
        overwrites_operand,
        operand_off_pattern,
        descriptors_differ,
        three_warps,
        reserved_bits,
        out_of_bounds
    };
    using Tile = device::SharedTile<bf16, 64, 64>;
    const int t = static_cast<int>(threadIdx.x);
    const Tile left = {device::dynamic_shared()};
    const Tile right_tile = {device::dynamic_shared() + Tile::kBytes +
                             (mistake == operand_off_pattern ? 256 : 0)};
    fill(left, a);
    fill(right_tile, b);
    if (mistake != no_proxy_fence) device::fence_proxy_async();
    __syncthreads();
    if (mistake == three_warps && t / 32 == 3) return;
    device::Fragment<64> d;
    device::clear(d);
    const auto multiply = [&](int add) {
        for (int step = 0; step < 4; ++step) {
            uint64_t from = device::along_columns(right_tile, 0, step);
            if (mistake == descriptors_differ && t == 77) from += 2;
            if (mistake == reserved_bits) from |= 1ull << 53;
            if (mistake == out_of_bounds) from += 60 * 1024 / 16;
            device::Wgmma<64, bf16>::shared<0, 0>(d.d, device::along_columns(left, 0, step), from,
                                                  add || step > 0);
        }
        if (mistake != no_commit) device::wgmma_commit();
    };
    if (mistake != no_fence) device::wgmma_fence();
    multiply(0);
    device::wgmma_wait<0>();
    for (float& x : d.d) x *= 2.0f;
    if (mistake != no_second_fence && mistake != no_fence) device::wgmma_fence();
    if (mistake == writes_after_fence) d.d[5] += 1.0f;
    multiply(1);
    if (mistake == overwrites_operand) fill(right_tile, a);
    if (mistake == writes_under_way) d.d[5] = 1.0f;
    if (mistake != no_wait) device::wgmma_wait<0>();
    for (int i = 0; i < d.kCount; ++i)
        out[(t / 32 * 16 + d.row(d.half(i))) * 64 + d.column(i)] = d.d[i];
}

__global__ void wrong_registers(const bf16* a, const bf16* b, float* out, int mistake) {
    enum { right, no_fence, written_after_fence, written_under_way };
    using Tile = device::SharedTile<bf16, 64, 64>;
    const int t = static_cast<int>(threadIdx.x);
    const Tile right_tile = {device::dynamic_shared()};
    fill(right_tile, b);
    publish();
    device::Fragment<64> d;
    uint32_t left[4];
    for (int step = 0; step < 4; ++step) {
        const auto load = [&] {
            for (int i = 0; i < 4; ++i)
                left[i] = *reinterpret_cast<const uint32_t*>(
                    a + (t / 32 * 16 + device::lane_id() / 4 + i % 2 * 8) * 64 + 16 * step + i / 2 * 8 +
                    device::lane_id() % 4 * 2);
        };
        if (mistake == written_after_fence) device::wgmma_fence();
        load();
        if (mistake == right || mistake == written_under_way) device::wgmma_fence();
        if (mistake == no_fence && step == 0) device::wgmma_fence();
        device::Wgmma<64, bf16>::registers<1>(d.d, left, device::along_rows(right_tile, 0, step),
                                              step > 0);
        device::wgmma_commit();
        if (mistake == written_under_way) left[2] = 0;
        device::wgmma_wait<0>();
    }
    for (int i = 0; i < d.kCount; ++i)
        out[(t / 32 * 16 + d.row(d.half(i))) * 64 + d.column(i)] = d.d[i];
}

__global__ void wrong_warp(float* out, int mistake) {
    enum {
        right,
        barrier_0,
        no_multiple,
        counts_differ,
        nobody_arrives,
        arrives_for_nothing,
        no_barrier,
        registers_27,
        half_a_warpgroup,
        ldmatrix_misaligned,
        ldmatrix_too_early,
        ldmatrix_diverged,
        stmatrix_to_global
    };
    alignas(16) __shared__ float numbers[kThreads];
    const int t = static_cast<int>(threadIdx.x);
    numbers[t] = out[t];
    const bool reader = t >= 64;
    const int id = mistake == barrier_0 ? 0 : 1;
    const int count = mistake == no_multiple ? 120 : mistake == counts_differ && reader ? 96 : 128;
    if (!reader && mistake != nobody_arrives) device::named_barrier_arrive(id, count);
    if (reader && mistake != no_barrier) device::named_barrier_sync(id, count);
    if (mistake == arrives_for_nothing && !reader) device::named_barrier_arrive(id, count);
    if (reader) out[t] = numbers[t - 64];
    if (mistake == registers_27) device::registers_decrease<27>();
    if (mistake != half_a_warpgroup || t < 64) device::registers_decrease<64>();
    uint32_t r[4];
    if (mistake != ldmatrix_too_early) __syncthreads();
    const float* row = numbers + 4 * ((t + 32) % 32);
    if (mistake == ldmatrix_misaligned) row += 1;
    if (mistake != ldmatrix_diverged || t % 2 == 0) device::ldmatrix_x4(r, row);
    if (mistake == stmatrix_to_global) device::stmatrix_x4(out + 4 * (t % 32), r);
}

__global__ void __launch_bounds__(384, 1) wrong_pool(int mistake) {
    enum { right, nobody_gives, decreases_upwards, enough_for_one };
    if (threadIdx.x >= 128) device::registers_increase<240>();
    else if (mistake == decreases_upwards) device::registers_decrease<240>();
    else if (mistake == enough_for_one) device::registers_decrease<96>();
    else if (mistake != nobody_gives) device::registers_decrease<24>();
}

}  // namespace test

using namespace bigops;

void wrong_cp_async(const float* x, float* out, int64_t mistake) {
    cuda::launch("wrong_cp_async", test::wrong_cp_async, {dim3(1), dim3(128)}, x, out,
                 static_cast<int>(mistake));
}
void wrong_mbarrier(const float* x, float* out, int64_t mistake) {
    cuda::launch("wrong_mbarrier", test::wrong_mbarrier, {dim3(1), dim3(128)}, x, out,
                 static_cast<int>(mistake));
}
void wrong_store(const char* x, char* out, int64_t mistake) {
    const uint64_t sizes[] = {64, 8, 1, 1}, strides[] = {128, 1024, 1024};
    const uint32_t box[] = {64, 8, 1, 1};
    const int rank = mistake == 7 ? 3 : 4;
    const auto map = cuda::tiled_map(out, DType::bf16, rank, sizes, strides, box, device::Swizzle::b128);
    cuda::launch("wrong_store", test::wrong_store, {dim3(1), dim3(128), 2048}, map, x,
                 static_cast<int>(mistake));
}
void wrong_wgmma(const test::bf16* a, const test::bf16* b, float* out, int64_t mistake) {
    cuda::launch("wrong_wgmma", test::wrong_wgmma, {dim3(1), dim3(128), 2 * 64 * 64 * 2 + 256}, a, b,
                 out, static_cast<int>(mistake));
}
void wrong_registers(const test::bf16* a, const test::bf16* b, float* out, int64_t mistake) {
    cuda::launch("wrong_registers", test::wrong_registers, {dim3(1), dim3(128), 64 * 64 * 2}, a, b, out,
                 static_cast<int>(mistake));
}
void wrong_warp(float* out, int64_t mistake) {
    cuda::launch("wrong_warp", test::wrong_warp, {dim3(1), dim3(128)}, out, static_cast<int>(mistake));
}
void wrong_pool(int64_t mistake) {
    cuda::launch("wrong_pool", test::wrong_pool, {dim3(1), dim3(384)}, static_cast<int>(mistake));
}

// Tensor maps with the mistakes of test::Plan's numbers; nothing is launched.
void wrong_map(const void* data, int64_t which) {
    uint64_t sizes[] = {64, 8, 2}, strides[] = {128, 1024};
    uint32_t box[] = {64, 8, 1}, steps[] = {1, 1, 1};
    int rank = 3;
    auto swizzle = cuda::RowSwizzle(device::Swizzle::b128);
    cuda::Im2col walk = {{64, 9, 7, 2}, {128, 1152, 8064}, {-1, -1}, {-1, -1}, {1, 1}, 64, 32};
    switch (which) {
        case 0: break;
        case 1: data = static_cast<const char*>(data) + 8; break;
        case 2: rank = 6; break;
        case 3: sizes[1] = 0; break;
        case 4: strides[1] = 1000; break;
        case 5: strides[0] = uint64_t{1} << 40; break;
        case 6: box[1] = 257; break;
        case 7: box[0] = 32; break;
        case 8: box[0] = 4, swizzle = std::nullopt; break;
        case 9: steps[2] = 9; break;
        case 10: steps[0] = 2; break;
        case 11: walk.lower[1] = -129; break;
        case 12: walk.upper[0] = -11; break;
        case 13: walk.pixels = 1025; break;
        case 14: walk.steps[1] = 0; break;
        case 15: walk.channels = 32; break;
    }
    cuda::tiled_map(data, DType::bf16, rank, sizes, strides, box, swizzle, steps);
    cuda::im2col_map(data, DType::bf16, walk, device::Swizzle::b128);
}
