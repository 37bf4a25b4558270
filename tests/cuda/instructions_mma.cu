// mma.sync, ldmatrix and stmatrix of one warp.
#include "instructions.h"

#include "../../csrc/cuda/device/mma.h"

namespace test {

// d (16 x 8) = c + a (16 x depth) * b (8 x depth)^T. Fragments are fetched as the ISA's figures have them.
template <class T>
__global__ void mma_m16n8k16(const T* a, const T* b, const float* c, float* d, int depth) {
    const int group = device::lane_id() / 4, pair = device::lane_id() % 4 * 2;
    const auto two = [depth](const T* matrix, int row, int column) {
        return *reinterpret_cast<const uint32_t*>(matrix + row * depth + column);
    };
    float sum[4] = {c[group * 8 + pair], c[group * 8 + pair + 1], c[(group + 8) * 8 + pair],
                    c[(group + 8) * 8 + pair + 1]};
    for (int k = 0; k < depth; k += 16) {
        const uint32_t left[4] = {two(a, group, k + pair), two(a, group + 8, k + pair),
                                  two(a, group, k + pair + 8), two(a, group + 8, k + pair + 8)};
        device::mma_m16n8k16<T>(sum, left, two(b, group, k + pair), two(b, group, k + pair + 8));
    }
    d[group * 8 + pair] = sum[0];
    d[group * 8 + pair + 1] = sum[1];
    d[(group + 8) * 8 + pair] = sum[2];
    d[(group + 8) * 8 + pair + 1] = sum[3];
}

__global__ void mma_tf32(const float* a, const float* b, const float* c, float* d, int depth) {
    const int group = device::lane_id() / 4, in_group = device::lane_id() % 4, pair = in_group * 2;
    const auto one = [depth](const float* matrix, int row, int column) {
        return device::to_tf32(matrix[row * depth + column]);
    };
    float sum[4] = {c[group * 8 + pair], c[group * 8 + pair + 1], c[(group + 8) * 8 + pair],
                    c[(group + 8) * 8 + pair + 1]};
    for (int k = 0; k < depth; k += 8) {
        const uint32_t left[4] = {one(a, group, k + in_group), one(a, group + 8, k + in_group),
                                  one(a, group, k + in_group + 4), one(a, group + 8, k + in_group + 4)};
        device::mma_m16n8k8_tf32(sum, left, one(b, group, k + in_group),
                                 one(b, group, k + in_group + 4));
    }
    d[group * 8 + pair] = sum[0];
    d[group * 8 + pair + 1] = sum[1];
    d[(group + 8) * 8 + pair] = sum[2];
    d[(group + 8) * 8 + pair + 1] = sum[3];
}

// from: four matrices of 8 x 8, rows one after the other; out: 32 lanes' four registers.
template <bool kTransposed>
__global__ void ldmatrix(const uint16_t* from, uint32_t* out) {
    alignas(16) __shared__ uint16_t matrices[4 * 64];
    copy16(matrices, from, sizeof matrices);
    __syncthreads();
    const int lane = device::lane_id();
    uint32_t r[4];
    if (kTransposed) device::ldmatrix_x4_trans(r, matrices + 8 * lane);
    else device::ldmatrix_x4(r, matrices + 8 * lane);
    for (int i = 0; i < 4; ++i) out[4 * lane + i] = r[i];
}

// The other way round.
template <bool kTransposed>
__global__ void stmatrix(const uint32_t* registers, uint16_t* out) {
    alignas(16) __shared__ uint16_t matrices[4 * 64];
    const int lane = device::lane_id();
    uint32_t r[4];
    for (int i = 0; i < 4; ++i) r[i] = registers[4 * lane + i];
    if (kTransposed) device::stmatrix_x4_trans(matrices + 8 * lane, r);
    else device::stmatrix_x4(matrices + 8 * lane, r);
    __syncthreads();
    copy16(out, matrices, sizeof matrices);
}

}  // namespace test

extern "C" void mma_bf16(const test::bf16* a, const test::bf16* b, const float* c, float* d,
                         int64_t depth) {
    bigops::cuda::launch("mma_m16n8k16", test::mma_m16n8k16<test::bf16>, {dim3(1), dim3(32)}, a, b,
                         c, d, static_cast<int>(depth));
}
extern "C" void mma_f16(const test::f16* a, const test::f16* b, const float* c, float* d,
                        int64_t depth) {
    bigops::cuda::launch("mma_m16n8k16", test::mma_m16n8k16<test::f16>, {dim3(1), dim3(32)}, a, b, c,
                         d, static_cast<int>(depth));
}
extern "C" void mma_tf32(const float* a, const float* b, const float* c, float* d, int64_t depth) {
    bigops::cuda::launch("mma_tf32", test::mma_tf32, {dim3(1), dim3(32)}, a, b, c, d,
                         static_cast<int>(depth));
}
extern "C" void mma_ldmatrix(const uint16_t* from, uint32_t* out, int64_t transposed) {
    bigops::cuda::launch("ldmatrix", transposed ? test::ldmatrix<true> : test::ldmatrix<false>,
                         {dim3(1), dim3(32)}, from, out);
}
extern "C" void mma_stmatrix(const uint32_t* registers, uint16_t* out, int64_t transposed) {
    bigops::cuda::launch("stmatrix", transposed ? test::stmatrix<true> : test::stmatrix<false>,
                         {dim3(1), dim3(32)}, registers, out);
}
