// 16-bit operands of matrix instructions as floats.
#pragma once

#include "include/cuda_bf16.h"
#include "include/cuda_fp16.h"
#include "instructions.h"

namespace bigops::simt {

inline float widen(Operand16 type, uint16_t bits) {
    return type == Operand16::bf16 ? Bf16Format::widen(bits) : HalfFormat::widen(bits);
}

inline uint16_t half_of(uint32_t both, int which) {
    return static_cast<uint16_t>(both >> (16 * which));
}

}  // namespace bigops::simt
