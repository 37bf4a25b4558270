#include "wgmma_operands.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "widen.h"

namespace bigops::simt {

using layouts::MatrixDescriptor;

namespace {

// The 16-byte chunks of an operand, of which there are at most 512.
class Chunks {
public:
    // Those with lines [line, line + lines) and chunks [chunk, chunk + chunks).
    Chunks(const MatrixDescriptor& d, bool mn_major, int line, int lines, int chunk, int chunks)
        : chunks_(chunks) {
        uint32_t low = UINT32_MAX, high = 0;
        for (int l = 0; l < lines; ++l)
            for (int c = 0; c < chunks; ++c) {
                const uint32_t plain = mn_major ? layouts::mn_major(d, line + l, chunk + c)
                                                : layouts::k_major(d, line + l, chunk + c);
                const uint32_t address = layouts::swizzled(plain, d.swizzle);
                addresses_[l * chunks + c] = address;
                low = std::min(low, address);
                high = std::max(high, address);
            }
        count_ = lines * chunks;
        low_ = low;
        base_ = static_cast<const char*>(shared_pointer(low));
        if (shared_pointer(high + layouts::kChunk - 1) != base_ + (high - low) + layouts::kChunk - 1)
            fatal(Finding::out_of_bounds, "wgmma: an operand in static and dynamic shared memory at once");
    }
    void read_by(Agent agent) const {
        for (int i = 0; i < count_; ++i) {
            if constexpr (kRaces) read(at(i), layouts::kChunk, agent, Proxy::async);
        }
    }
    // Eight elements.
    const char* at(int line, int chunk) const { return at(line * chunks_ + chunk); }

private:
    const char* at(int i) const { return base_ + (addresses_[i] - low_); }

    int chunks_, count_;
    uint32_t low_, addresses_[2 * kWgmmaMaxColumns];
    const char* base_;
};

void widen8(Operand16 type, const char* chunk, float* to, int stride) {
    uint16_t bits[8];
    std::memcpy(bits, chunk, sizeof bits);
    if (type == Operand16::bf16)
        for (int i = 0; i < 8; ++i) to[i * stride] = Bf16Format::widen(bits[i]);
    else
        for (int i = 0; i < 8; ++i) to[i * stride] = HalfFormat::widen(bits[i]);
}

}  // namespace

MatrixDescriptor checked_descriptor(uint64_t bits, const char* which) {
    const MatrixDescriptor d = layouts::decode(bits);
    const std::string name = std::string("wgmma: the descriptor of ") + which;
    if (!d.reserved_zero) fatal(Finding::misuse, name + " has bits set that the format leaves out");
    if (d.base_offset != 0)
        fatal(Finding::misuse, name + " has a base offset, which the model does not know");
    // Steps within a pattern's first row are fine: the swizzle is of the address.
    if (d.swizzle > 0 &&
        d.address % layouts::pattern_bytes(d.swizzle) >= static_cast<uint32_t>(d.swizzle))
        fatal(Finding::misaligned, name + ": with " + std::to_string(d.swizzle) +
                                       "-byte swizzle and no base offset a matrix begins at a multiple of " +
                                       std::to_string(layouts::pattern_bytes(d.swizzle)) +
                                       " bytes of shared memory, this one at " +
                                       std::to_string(d.address));
    return d;
}

void fetch_right(Operand16 type, const MatrixDescriptor& b, bool transposed, int columns, Agent agent,
                 Right& right) {
    if (transposed) {
        const Chunks chunks(b, true, 0, kWgmmaDepth, 0, columns / 8);
        chunks.read_by(agent);
        for (int k = 0; k < kWgmmaDepth; ++k)
            for (int c = 0; c < columns / 8; ++c) widen8(type, chunks.at(k, c), &right[k][8 * c], 1);
    } else {
        const Chunks chunks(b, false, 0, columns, 0, kWgmmaDepth / 8);
        chunks.read_by(agent);
        for (int n = 0; n < columns; ++n)
            for (int c = 0; c < kWgmmaDepth / 8; ++c)
                widen8(type, chunks.at(n, c), &right[8 * c][n], kWgmmaMaxColumns);
    }
}

void fetch_left(Operand16 type, const MatrixDescriptor& a, bool transposed, int warp_in_group,
                Agent agent, Left& left) {
    if (transposed) {
        const Chunks chunks(a, true, 0, kWgmmaDepth, kWgmmaRows / 8 * warp_in_group, kWgmmaRows / 8);
        chunks.read_by(agent);
        for (int k = 0; k < kWgmmaDepth; ++k)
            for (int c = 0; c < kWgmmaRows / 8; ++c)
                widen8(type, chunks.at(k, c), &left[8 * c][k], kWgmmaDepth);
    } else {
        const Chunks chunks(a, false, kWgmmaRows * warp_in_group, kWgmmaRows, 0, kWgmmaDepth / 8);
        chunks.read_by(agent);
        for (int m = 0; m < kWgmmaRows; ++m)
            for (int c = 0; c < kWgmmaDepth / 8; ++c) widen8(type, chunks.at(m, c), &left[m][8 * c], 1);
    }
}

void left_of_registers(Operand16 type, const std::vector<uint32_t>& words, Left& left) {
    for (int lane = 0; lane < kWarpSize; ++lane)
        for (int i = 0; i < 8; ++i) {
            const layouts::Place at = layouts::wgmma_a(lane, i);
            const uint32_t both = words[static_cast<size_t>(4 * lane + i / 2)];
            left[at.row][at.column] = widen(type, half_of(both, i % 2));
        }
}

}  // namespace bigops::simt
