// The model's side of csrc/cuda/device/mma.h.
#pragma once

#include <bit>

#include "instructions.h"

namespace bigops::simt {

template <class T>
constexpr Operand16 kOperand16 = std::is_same_v<T, device::bf16> ? Operand16::bf16 : Operand16::f16;

}  // namespace bigops::simt

namespace bigops::device {

template <class T>
BIGOPS_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Site site = Site::current()) {
    simt::mma_m16n8k16(simt::kOperand16<T>, d, a, b0, b1, site);
}
BIGOPS_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                             Site site = Site::current()) {
    simt::mma_m16n8k8_tf32(d, a, b0, b1, site);
}
BIGOPS_DEVICE uint32_t to_tf32(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    const bool finite = (bits & 0x7f800000) != 0x7f800000;
    if (finite) return (bits + 0x1000) & ~0x1fffu;
    return x != x ? 0x7fffffff : bits;
}

BIGOPS_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
    simt::ldmatrix_x4(r, row, false, site);
}
BIGOPS_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::current()) {
    simt::ldmatrix_x4(r, row, true, site);
}
BIGOPS_DEVICE void stmatrix_x4(void* row, const uint32_t (&r)[4], Site site = Site::current()) {
    simt::stmatrix_x4(row, r, false, site);
}
BIGOPS_DEVICE void stmatrix_x4_trans(void* row, const uint32_t (&r)[4], Site site = Site::current()) {
    simt::stmatrix_x4(row, r, true, site);
}

}  // namespace bigops::device
