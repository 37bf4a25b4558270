// What every device header starts from. Under the CPU model (BIGOPS_SIMT, csrc/simt/) the CUDA words
// mean what csrc/simt/cuda.h says; layout, descriptor and tile arithmetic is the same source there.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define BIGOPS_DEVICE __device__ __forceinline__

namespace bigops::device {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarp = 32;
constexpr int kWarpgroup = 128;

}  // namespace bigops::device
