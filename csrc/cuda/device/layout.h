// Where elements of a tile lie in shared memory, and how a wgmma descriptor says so. The same source on
// the GPU and under the CPU model, which decodes descriptors by the ISA's tables of its own.
#pragma once

#include "warp.h"

namespace bigops::device {

// Bytes of a row after which a swizzled tile starts its next block of columns.
enum class Swizzle : int { b32 = 32, b64 = 64, b128 = 128 };

// "Shared Memory Matrix Layout", "Swizzling Modes": the 16-byte chunk's number within a row is XORed with
// the number of the 128-byte line, modulo the chunks that a row has. `offset` counts from a 1024-byte
// boundary.
template <Swizzle kSwizzle>
__host__ BIGOPS_DEVICE constexpr uint32_t swizzled(uint32_t offset) {
    constexpr uint32_t kChunks = static_cast<uint32_t>(kSwizzle) / 16;
    return offset ^ ((offset >> 7 & (kChunks - 1)) << 4);
}

// A tile of kRows x kColumns 16-bit elements as TMA writes it: blocks of columns one after the other, each
// block's rows 128 (64, 32) bytes long, swizzled. Must start at a multiple of 1024 bytes.
template <class T, int kRows_, int kColumns_>
struct SharedTile {
    static_assert(sizeof(T) == 2 && kColumns_ % 16 == 0 && kRows_ % 8 == 0);
    using Element = T;
    static constexpr int kRows = kRows_, kColumns = kColumns_;
    static constexpr Swizzle kSwizzle = kColumns % 64 == 0   ? Swizzle::b128
                                        : kColumns % 32 == 0 ? Swizzle::b64
                                                             : Swizzle::b32;
    static constexpr int kRowBytes = static_cast<int>(kSwizzle);
    static constexpr int kBlockColumns = kRowBytes / 2;
    static constexpr int kBlocks = kColumns / kBlockColumns;
    static constexpr int kBlockBytes = kRows * kRowBytes;
    static constexpr int kBytes = kBlocks * kBlockBytes;

    char* data;

    // Of the 16-byte chunk that begins with this element: column % 8 == 0.
    __host__ BIGOPS_DEVICE static constexpr uint32_t offset(int row, int column) {
        const int within = row * kRowBytes + column % kBlockColumns * 2;
        return static_cast<uint32_t>(column / kBlockColumns * kBlockBytes) +
               swizzled<kSwizzle>(static_cast<uint32_t>(within));
    }
    BIGOPS_DEVICE T* block(int i) const { return reinterpret_cast<T*>(data + i * kBlockBytes); }
    BIGOPS_DEVICE char* at(int row, int column) const { return data + offset(row, column); }
};

// "Matrix Descriptor Format" of wgmma: address, leading and stride byte offsets in units of 16 bytes, and
// the swizzle in the top two bits.
__host__ BIGOPS_DEVICE constexpr uint64_t wgmma_descriptor(uint32_t address, uint32_t leading,
                                                           uint32_t stride, Swizzle swizzle) {
    const uint64_t mode = swizzle == Swizzle::b128 ? 1 : swizzle == Swizzle::b64 ? 2 : 3;
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
           static_cast<uint64_t>((leading & 0x3ffff) >> 4) << 16 |
           static_cast<uint64_t>((stride & 0x3ffff) >> 4) << 32 | mode << 62;
}

// The same, `offset` bytes further. An addition that cannot carry out of the address: one instruction for a
// step, where the address would take five to encode anew.
__host__ BIGOPS_DEVICE constexpr uint64_t advanced(uint64_t descriptor, uint32_t offset) {
    return (descriptor & ~uint64_t{0xffffffff}) | (static_cast<uint32_t>(descriptor) + (offset >> 4));
}

// The operand whose K runs along a tile's columns ("K-major"): rows from `row` on (a multiple of 8), the
// step-th 16 columns. Eight rows follow the eight before at `stride`; a step stays within one block, so
// `leading` has no meaning.
template <class Tile>
BIGOPS_DEVICE uint64_t along_columns(const Tile& tile, int row, int step) {
    constexpr int kSteps = Tile::kBlockColumns / 16;
    const uint64_t first = wgmma_descriptor(shared_address(tile.data + row * Tile::kRowBytes), 16,
                                            8 * Tile::kRowBytes, Tile::kSwizzle);
    return advanced(first, step / kSteps * Tile::kBlockBytes + step % kSteps * 32);
}

// The operand whose K runs along a tile's rows ("MN-major", kTrans = 1): the step-th 16 rows, columns
// from block `block` on. `leading` leads to the next block of columns, `stride` to the next eight rows.
template <class Tile>
BIGOPS_DEVICE uint64_t along_rows(const Tile& tile, int block, int step) {
    const uint64_t first = wgmma_descriptor(shared_address(tile.data + block * Tile::kBlockBytes),
                                            Tile::kBlockBytes, 8 * Tile::kRowBytes, Tile::kSwizzle);
    return advanced(first, step * 16 * Tile::kRowBytes);
}

}  // namespace bigops::device
