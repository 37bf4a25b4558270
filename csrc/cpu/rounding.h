// Stochastic rounding to bf16: up or down in proportion to where a number lies between two, so that
// updates smaller than half a spacing are not lost but happen now and then (Gupta et al. 2015, "Deep
// learning with limited numerical precision"). The bits are Philox's, of counter (element / 8, the
// tensor's number, 0, 0); bigops/reference/rounding.py says the same in Python.
#pragma once

#include "philox.h"
#include "vec.h"

namespace bigops {

// A parameter that is written so.
struct rounded_bf16 : bf16 {};

class RoundingBits {
   public:
    static constexpr int64_t kDrawn = 512;

    RoundingBits(uint64_t seed, int64_t tensor) : seed_(seed), tensor_(tensor) {}

    // Of elements from `first`, a multiple of 8, on.
    void draw(int64_t first) {
        constexpr int kGroups = kVectorBytes / 8;  // calls in a state: one in each 64-bit lane
        constexpr auto lanes = std::make_integer_sequence<int, kGroups>{};
        VecW ascending;
        for (int n = 0; n < kGroups; ++n) ascending[n] = static_cast<uint64_t>(n);
        uint16_t* at = bits_;
        for (int64_t group = 0; group < kDrawn / 8; group += 2 * kGroups) {
            detail::PhiloxState<2> x;
            for (int n = 0; n < 2; ++n) {
                x.word[0][n] = ascending + static_cast<uint64_t>(first / 8 + group + n * kGroups);
                x.word[1][n] = VecW{} + static_cast<uint64_t>(tensor_);
                x.word[2][n] = x.word[3][n] = VecW{};
            }
            detail::philox(x, static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32));
            for (int n = 0; n < 2; ++n) {
                const VecW low = (x.word[0][n] & 0xffffffffu) | x.word[1][n] << 32;
                const VecW high = (x.word[2][n] & 0xffffffffu) | x.word[3][n] << 32;
                for (int half = 0; half < 2; ++half, at += kVectorBytes / 2) {
                    const VecW words = detail::interleave_words(low, high, half, lanes);
                    std::memcpy(at, &words, sizeof words);
                }
            }
        }
    }

    // Numbers from the drawn elements' `index` on; infinity and NaN have nothing to round.
    void store(bf16* p, VecF v, int64_t index) const {
        typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
        Halves drawn;
        std::memcpy(&drawn, bits_ + index, sizeof drawn);
        const VecU raw = std::bit_cast<VecU>(v);
        const VecU sum = (raw + __builtin_convertvector(drawn, VecU)) >> 16;
        const Halves up_or_down = __builtin_convertvector(sum, Halves);
        const Halves nearest = to_bf16_lanes<VecU, Halves>(v);
        typedef int16_t Mask __attribute__((vector_size(kVectorBytes / 2)));
        const auto finite = __builtin_convertvector((raw & 0x7f800000u) != 0x7f800000u, Mask);
        const Halves found = finite ? up_or_down : nearest;
        std::memcpy(p, &found, sizeof found);
    }
    void store(bf16* p, VecF v, int64_t index, int count) const {
        bf16 lanes[kLanes<float>];
        store(lanes, v, index);
        std::memcpy(p, lanes, sizeof(bf16) * static_cast<size_t>(count));
    }

   private:
    alignas(64) uint16_t bits_[kDrawn];
    uint64_t seed_;
    int64_t tensor_;
};

}  // namespace bigops
