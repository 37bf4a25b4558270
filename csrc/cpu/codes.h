// States of an optimizer as 8-bit codes: a block of kCodeBlock elements shares a float, its largest
// size, and each element is an 8-bit float relative to it (block-wise as Dettmers et al. 2022, "8-bit
// optimizers via block-wise quantization"). A float and no table, since rounding to one is integer
// arithmetic in lanes, and since like their dynamic code it keeps digits over many orders of
// magnitude, which a linear code does not: an average of squares that became 0 would divide by eps.
// Rounding is up or down in proportion to where a number lies between two codes: to the nearest, an
// average that moves by a thousandth a step would never leave its code. What decides is a hash of the
// number itself, so that results are the same in every run. bigops/reference/codes.py says the same.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "step_lists.h"
#include "vec.h"

namespace bigops {

constexpr int64_t kCodeBlock = 256;

namespace codes {

// Three bits of mantissa; of exponent four beside a sign, or five. 1.875 is the largest.
constexpr int kMantissa = 3, kShift = 23 - kMantissa;
constexpr float kLargest = 1.875f;
template <bool kSigned>
constexpr int32_t kTop = kSigned ? 127 : 255;
template <bool kSigned>
constexpr int32_t kBias = (kSigned ? 127 - 15 : 127 - 31) << 23;
constexpr int32_t kSign = std::numeric_limits<int32_t>::min();

template <bool kSigned>
inline VecF decode(VecI code, float scale) {
    const VecI size = code & kTop<kSigned>;
    VecI bits = (size << kShift) + kBias<kSigned>;
    bits = size == 0 ? VecI{} : bits;
    if constexpr (kSigned) bits |= (code << 24) & kSign;
    return std::bit_cast<VecF>(bits) * scale;
}

// A positive number without a sign becomes no 0.
template <bool kSigned>
inline VecI encode(VecF x, float inverse_scale) {
    typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
    const Words hash = std::bit_cast<Words>(x) * 0x9E3779B1u;
    const VecI bits = std::bit_cast<VecI>(x * inverse_scale);
    const VecI size = (kSigned ? bits & ~kSign : bits) - kBias<kSigned>;
    VecI code = ((size < 0 ? VecI{} : size) + std::bit_cast<VecI>(hash >> (32 - kShift))) >> kShift;
    code = code > kTop<kSigned> ? VecI{} + kTop<kSigned> : code;
    if constexpr (kSigned) return code | (bits >> 24 & 0x80);
    return (code == 0) & (bits > 0) ? VecI{} + 1 : code;
}

// What a block's largest size makes of it; sizes below the smallest normal number become 0.
struct Scale {
    float scale = 0, inverse = 0;

    explicit Scale(float largest) {
        if (!(largest >= kLargest * std::numeric_limits<float>::min())) return;
        scale = largest * (1 / kLargest);
        inverse = kLargest / largest;
    }
};

template <bool kSigned>
inline VecF size_of(VecF x) {
    return kSigned ? std::bit_cast<VecF>(std::bit_cast<VecI>(x) & ~kSign) : x;
}

inline VecI load_codes(const uint8_t* p) {
#if defined(__AVX512F__)  // of which GCC 12 makes ten instructions
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return std::bit_cast<VecI>(_mm512_cvtepu8_epi32(bytes));
#else
    return load_bytes<float>(p);
#endif
}
inline VecI load_codes(const uint8_t* p, int count) {
    uint8_t lanes[kLanes<float>] = {};
    std::memcpy(lanes, p, static_cast<size_t>(count));
    return load_codes(lanes);
}
inline void store_codes(uint8_t* p, VecI code) { store_bytes<float>(p, code); }
inline void store_codes(uint8_t* p, VecI code, int count) {
    uint8_t lanes[kLanes<float>];
    store_codes(lanes, code);
    std::memcpy(p, lanes, static_cast<size_t>(count));
}

}  // namespace codes
}  // namespace bigops
