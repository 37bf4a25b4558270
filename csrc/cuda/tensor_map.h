// Tensor maps: how the copy engine is told where a tensor lies and which boxes of it are asked for. "Tensors"
// and "tensormap" in the PTX ISA; cuTensorMapEncodeTiled in the driver's API.
#pragma once

#include <stdexcept>
#include <string>

#include "../view.h"
#include "device/launch.h"
#include "device/layout.h"
#include "device/tma.h"

namespace bigops::cuda {

// What the copy engine takes; an error names what it does not.
inline void check_map(const void* data, DType dtype, int rank, const uint64_t* sizes,
                      const uint64_t* byte_strides, const uint32_t* box, device::Swizzle swizzle) {
    const auto fail = [](const std::string& why) { throw std::invalid_argument("tensor map: " + why); };
    const int element = dtype == DType::f32 ? 4 : 2;
    if (dtype != DType::f32 && dtype != DType::bf16 && dtype != DType::f16)
        fail("the dtype must be float32, bfloat16 or float16");
    if (rank < 2 || rank > 5) fail("from 2 to 5 dimensions, got " + std::to_string(rank));
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0) fail("the data must be aligned to 16 bytes");
    for (int i = 0; i < rank; ++i) {
        const std::string of = " of dimension " + std::to_string(i);
        if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32) fail("the size" + of + " is out of range");
        if (box[i] == 0 || box[i] > 256) fail("the box" + of + " must be from 1 to 256");
        if (i > 0 && (byte_strides[i - 1] % 16 != 0 || byte_strides[i - 1] >= uint64_t{1} << 40))
            fail("the stride" + of + " must be a multiple of 16 bytes below 2^40");
    }
    const int row = static_cast<int>(box[0]) * element;
    if (row % 16 != 0) fail("a row of the box must be a multiple of 16 bytes");
    if (row > static_cast<int>(swizzle)) fail("a row of the box must fit in the swizzle's span");
}

#ifdef BIGOPS_SIMT
}  // namespace bigops::cuda
#include "../simt/tensor_map.h"
#else

// Sizes, strides (in bytes, of all dimensions but the innermost) and box run from the innermost dimension.
inline device::TensorMap tiled_map(const void* data, DType dtype, int rank, const uint64_t* sizes,
                                   const uint64_t* byte_strides, const uint32_t* box,
                                   device::Swizzle swizzle) {
    check_map(data, dtype, rank, sizes, byte_strides, box, swizzle);
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
        check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                               cudaEnableDefault, &result),
              "cuTensorMapEncodeTiled");
        if (result != cudaDriverEntryPointSuccess)
            throw std::runtime_error("this driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<Encode>(found);
    }();
    const CUtensorMapDataType type = dtype == DType::f32    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                     : dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    const CUtensorMapSwizzle mode = swizzle == device::Swizzle::b128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                    : swizzle == device::Swizzle::b64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                                      : CU_TENSOR_MAP_SWIZZLE_32B;
    const uint32_t steps[] = {1, 1, 1, 1, 1};
    device::TensorMap map;
    const CUresult result = encode(
        &map, type, static_cast<uint32_t>(rank), const_cast<void*>(data), sizes, byte_strides, box,
        steps, CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result));
    return map;
}

}  // namespace bigops::cuda

#endif
