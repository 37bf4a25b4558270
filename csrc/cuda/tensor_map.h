// Describes a tensor in global memory to the copy engine (device/tma.h). Driver API, "Tensor Map Object
// Management": cuTensorMapEncodeTiled, cuTensorMapEncodeIm2col, whose rules are checked here first, as
// the driver says no more than "invalid value". Dimensions run from the innermost, whose stride is one
// element. What is refused is a std::runtime_error that names the argument.
#pragma once

#include "../view.h"
#include "device/launch.h"
#include "device/layout.h"
#include "device/tma.h"

#include <optional>
#include <stdexcept>
#include <string>

namespace bigops::cuda {

// None: the rows of a box lie one after the other. Otherwise a row is as long as the swizzle's span.
using RowSwizzle = std::optional<device::Swizzle>;

// The four-dimensional tensor of images (channels, width, height, images) that a convolution walks over.
struct Im2col {
    uint64_t sizes[4], byte_strides[3];
    // Where the filter's first tap may lie: from lower to (size - 1) + upper, in width and height. With
    // padding p, F taps and dilation d: lower = -p, upper = p - (F - 1) d.
    int lower[2], upper[2];
    uint32_t steps[2];          // the convolution's strides
    uint32_t channels, pixels;  // that come at once
};

namespace tensor_map {

constexpr int kMaxRank = 5;
constexpr uint64_t kMaxSize = uint64_t{1} << 32, kMaxStride = uint64_t{1} << 40;
constexpr uint32_t kMaxBox = 256, kMaxStep = 8, kMaxPixels = 1024;
constexpr int kChunk = 16;  // bytes: what addresses, strides and a box's rows are multiples of

inline void require(bool holds, const std::string& message) {
    if (!holds) throw std::runtime_error("tensor map: " + message);
}

inline std::string name(const char* array, int i) {
    return std::string(array) + "[" + std::to_string(i) + "]";
}

inline void require_range(uint64_t value, uint64_t low, uint64_t high, const std::string& what) {
    require(value >= low && value <= high, what + " must be " + std::to_string(low) + " to " +
                                               std::to_string(high) + ", got " +
                                               std::to_string(value));
}

inline int element_bytes(DType dtype) {
    switch (dtype) {
        case DType::f64:
        case DType::i64: return 8;
        case DType::f32:
        case DType::i32: return 4;
        case DType::bf16:
        case DType::f16: return 2;
        default: return 1;
    }
}

inline void check_tensor(const void* data, int rank, const uint64_t* sizes,
                         const uint64_t* byte_strides) {
    require(data != nullptr && reinterpret_cast<uintptr_t>(data) % kChunk == 0,
            "data must be a multiple of 16 bytes");
    for (int i = 0; i < rank; ++i) require_range(sizes[i], 1, kMaxSize, name("sizes", i));
    for (int i = 0; i + 1 < rank; ++i) {
        const std::string what = name("byte_strides", i) + " (of dimension " + std::to_string(i + 1) +
                                 ")";
        require(byte_strides[i] % kChunk == 0,
                what + " must be a multiple of 16, got " + std::to_string(byte_strides[i]));
        require(byte_strides[i] < kMaxStride,
                what + " must be less than 2^40, got " + std::to_string(byte_strides[i]));
    }
}

// A narrower row than the span would be allowed, but lies at the span's distance from the next one.
inline void check_row(uint32_t elements, DType dtype, RowSwizzle swizzle, const std::string& what) {
    const uint32_t bytes = elements * static_cast<uint32_t>(element_bytes(dtype));
    require(bytes % kChunk == 0,
            what + " must span a multiple of 16 bytes, got " + std::to_string(bytes));
    require(!swizzle || bytes == static_cast<uint32_t>(*swizzle),
            what + " must span the swizzle's " +
                std::to_string(swizzle ? static_cast<int>(*swizzle) : 0) + " bytes, got " +
                std::to_string(bytes));
}

inline void check_tiled(const void* data, DType dtype, int rank, const uint64_t* sizes,
                        const uint64_t* byte_strides, const uint32_t* box, RowSwizzle swizzle,
                        const uint32_t* steps) {
    require_range(static_cast<uint64_t>(rank), 1, kMaxRank, "rank");
    check_tensor(data, rank, sizes, byte_strides);
    for (int i = 0; i < rank; ++i) {
        require_range(box[i], 1, kMaxBox, name("box", i));
        if (steps) require_range(steps[i], 1, kMaxStep, name("steps", i));
    }
    require(!steps || steps[0] == 1, "steps[0] must be 1: the innermost dimension has no step");
    check_row(box[0], dtype, swizzle, "box[0]");
}

inline void check_im2col(const void* data, DType dtype, const Im2col& walk, RowSwizzle swizzle) {
    check_tensor(data, 4, walk.sizes, walk.byte_strides);
    for (int i = 0; i < 2; ++i) {
        require(walk.lower[i] >= -128 && walk.lower[i] <= 127,
                name("lower", i) + " must be -128 to 127, got " + std::to_string(walk.lower[i]));
        require(walk.upper[i] >= -128 && walk.upper[i] <= 127,
                name("upper", i) + " must be -128 to 127, got " + std::to_string(walk.upper[i]));
        require(walk.lower[i] <= static_cast<int64_t>(walk.sizes[1 + i]) - 1 + walk.upper[i],
                name("upper", i) + " leaves the filter no position");
        require_range(walk.steps[i], 1, kMaxStep, name("steps", i));
    }
    require_range(walk.channels, 1, kMaxBox, "channels");
    require_range(walk.pixels, 1, kMaxPixels, "pixels");
    check_row(walk.channels, dtype, swizzle, "channels");
}

#ifdef BIGOPS_SIMT

inline device::TensorMap described(device::TensorMap::Mode mode, const void* data, DType dtype,
                                   int rank, const uint64_t* sizes, const uint64_t* byte_strides,
                                   RowSwizzle swizzle) {
    device::TensorMap map;
    map.mode = mode;
    map.dtype = dtype;
    map.rank = rank;
    map.element_bytes = element_bytes(dtype);
    map.swizzle = swizzle ? static_cast<int>(*swizzle) : 0;
    map.data = static_cast<char*>(const_cast<void*>(data));
    for (int i = 0; i < rank; ++i) {
        map.sizes[i] = sizes[i];
        map.strides[i] = i == 0 ? static_cast<uint64_t>(map.element_bytes) : byte_strides[i - 1];
        map.steps[i] = 1;
    }
    return map;
}

#else

inline CUtensorMapDataType driver_type(DType dtype) {
    switch (dtype) {
        case DType::f64: return CU_TENSOR_MAP_DATA_TYPE_FLOAT64;
        case DType::f32: return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
        case DType::bf16: return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        case DType::f16: return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
        case DType::i64: return CU_TENSOR_MAP_DATA_TYPE_INT64;
        case DType::i32: return CU_TENSOR_MAP_DATA_TYPE_INT32;
        default: return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    }
}

inline CUtensorMapSwizzle driver_swizzle(RowSwizzle swizzle) {
    if (!swizzle) return CU_TENSOR_MAP_SWIZZLE_NONE;
    switch (*swizzle) {
        case device::Swizzle::b32: return CU_TENSOR_MAP_SWIZZLE_32B;
        case device::Swizzle::b64: return CU_TENSOR_MAP_SWIZZLE_64B;
        default: return CU_TENSOR_MAP_SWIZZLE_128B;
    }
}

// From the driver that is loaded, so that nothing has to be linked with libcuda.
template <class Function>
Function* driver_function(const char* name) {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result), name);
    require(result == cudaDriverEntryPointSuccess && function != nullptr,
            std::string("the driver has no ") + name + " (CUDA 12.0 is the first that has)");
    return reinterpret_cast<Function*>(function);
}

inline void check_driver(CUresult result, const char* function, const void* data, int rank,
                         const uint64_t* sizes, const uint64_t* byte_strides) {
    if (result == CUDA_SUCCESS) return;
    std::string text = std::string(function) + " refused with error " + std::to_string(result) +
                       ": data at " + std::to_string(reinterpret_cast<uintptr_t>(data)) + ", sizes";
    for (int i = 0; i < rank; ++i) text += " " + std::to_string(sizes[i]);
    text += ", byte_strides";
    for (int i = 0; i + 1 < rank; ++i) text += " " + std::to_string(byte_strides[i]);
    require(false, text);
}

#endif

}  // namespace tensor_map

// Boxes of `box` elements. Of a dimension with a step, box counts the elements stepped over, so that
// ceil(box / step) come.
inline device::TensorMap tiled_map(const void* data, DType dtype, int rank, const uint64_t* sizes,
                                   const uint64_t* byte_strides, const uint32_t* box,
                                   RowSwizzle swizzle, const uint32_t* steps = nullptr) {
    tensor_map::check_tiled(data, dtype, rank, sizes, byte_strides, box, swizzle, steps);
#ifdef BIGOPS_SIMT
    device::TensorMap map = tensor_map::described(device::TensorMap::Mode::tiled, data, dtype, rank,
                                                  sizes, byte_strides, swizzle);
    for (int i = 0; i < rank; ++i) {
        map.box[i] = box[i];
        if (steps) map.steps[i] = steps[i];
    }
#else
    static const auto encode =
        tensor_map::driver_function<decltype(cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled");
    const cuuint32_t ones[tensor_map::kMaxRank] = {1, 1, 1, 1, 1};
    device::TensorMap map;
    const CUresult result = encode(
        &map, tensor_map::driver_type(dtype), static_cast<cuuint32_t>(rank), const_cast<void*>(data),
        sizes, byte_strides, box, steps ? steps : ones, CU_TENSOR_MAP_INTERLEAVE_NONE,
        tensor_map::driver_swizzle(swizzle), CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    tensor_map::check_driver(result, "cuTensorMapEncodeTiled", data, rank, sizes, byte_strides);
#endif
    return map;
}

// For device::tma_load_im2col.
inline device::TensorMap im2col_map(const void* data, DType dtype, const Im2col& walk,
                                    RowSwizzle swizzle) {
    tensor_map::check_im2col(data, dtype, walk, swizzle);
#ifdef BIGOPS_SIMT
    device::TensorMap map = tensor_map::described(device::TensorMap::Mode::im2col, data, dtype, 4,
                                                  walk.sizes, walk.byte_strides, swizzle);
    for (int i = 0; i < 2; ++i) {
        map.lower[i] = walk.lower[i];
        map.upper[i] = walk.upper[i];
        map.steps[1 + i] = walk.steps[i];
    }
    map.channels = walk.channels;
    map.pixels = walk.pixels;
#else
    static const auto encode =
        tensor_map::driver_function<decltype(cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col");
    const cuuint32_t steps[] = {1, walk.steps[0], walk.steps[1], 1};
    device::TensorMap map;
    const CUresult result = encode(
        &map, tensor_map::driver_type(dtype), 4, const_cast<void*>(data), walk.sizes,
        walk.byte_strides, walk.lower, walk.upper, walk.channels, walk.pixels, steps,
        CU_TENSOR_MAP_INTERLEAVE_NONE, tensor_map::driver_swizzle(swizzle),
        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    tensor_map::check_driver(result, "cuTensorMapEncodeIm2col", data, 4, walk.sizes,
                             walk.byte_strides);
#endif
    return map;
}

}  // namespace bigops::cuda
