// The CPU model's tensor map: what cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col are told, kept as
// it is. Dimensions run from the innermost.
#pragma once

#include <cstdint>

#include "../view.h"

namespace bigops::simt {

struct alignas(64) TensorMap {
    static constexpr int kMaxRank = 5;
    enum class Mode : uint8_t { none, tiled, im2col };

    Mode mode = Mode::none;  // none: never encoded
    DType dtype = DType::u8;
    int rank = 0, element_bytes = 0;
    int swizzle = 0;  // bytes of a row that is swizzled, or 0
    char* data = nullptr;
    uint64_t sizes[kMaxRank] = {}, strides[kMaxRank] = {};  // strides in bytes, the innermost included
    uint32_t steps[kMaxRank] = {};                          // "element strides", "traversal strides"
    uint32_t box[kMaxRank] = {};                            // tiled
    // im2col: which filter positions there are, as distances from the first and the last pixel; and how
    // many pixels and channels come.
    int lower[2] = {}, upper[2] = {};
    uint32_t channels = 0, pixels = 0;
};

}  // namespace bigops::simt
