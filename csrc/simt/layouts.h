// Where instructions expect what, written from the PTX ISA's sections and figures (named at each), and on
// purpose not from csrc/cuda/device/layout.h: a mistake must not be shared by kernel and model.
#pragma once

#include <cstdint>

namespace bigops::simt::layouts {

// An element of a matrix.
struct Place {
    int row, column;
};

// ---- Registers of a warp. The ISA's groupID is lane / 4, its threadID_in_group lane % 4.

// "Matrix Fragments for mma.m16n8k16 with floating point type": the i-th of a lane's 8 elements of A
// (row m, column k), two per register, the first in the low half; of its 4 of B (row k, column n); and of
// its 4 of C and D (row m, column n).
constexpr Place mma_m16n8k16_a(int lane, int i) {
    const bool upper = (0 <= i && i < 2) || (4 <= i && i < 6);
    return {upper ? lane / 4 : lane / 4 + 8, lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
constexpr Place mma_m16n8k16_b(int lane, int i) {
    return {lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0), lane / 4};
}
constexpr Place mma_m16n8_c(int lane, int i) {
    return {i < 2 ? lane / 4 : lane / 4 + 8, lane % 4 * 2 + (i & 1)};
}

// "Matrix Fragments for mma.m16n8k8", .tf32: one element per register.
constexpr Place mma_m16n8k8_tf32_a(int lane, int i) {
    return {i == 0 || i == 2 ? lane / 4 : lane / 4 + 8, i < 2 ? lane % 4 : lane % 4 + 4};
}
constexpr Place mma_m16n8k8_tf32_b(int lane, int i) {
    return {i == 0 ? lane % 4 : lane % 4 + 4, lane / 4};
}

// "Warp-level matrix load instruction: ldmatrix", and stmatrix: the first of the two elements of an 8x8
// matrix in a lane's register; the second is in the next column. With .trans the matrix is transposed.
constexpr Place ldmatrix_fragment(int lane) { return {lane / 4, lane % 4 * 2}; }

// "Register Fragments and Shared Memory Matrix Layouts" of wgmma.m64nNk16: the i-th of a thread's N / 2
// elements of D, and of its 8 of A. Warp w of the warpgroup has rows 16 w to 16 w + 15.
constexpr Place wgmma_d(int thread, int i) {
    const int warp = thread / 32, lane = thread % 32;
    return {warp * 16 + lane / 4 + (i / 2 % 2 == 0 ? 0 : 8), i / 4 * 8 + lane % 4 * 2 + i % 2};
}
constexpr Place wgmma_a(int thread, int i) {
    const int warp = thread / 32, lane = thread % 32;
    return {warp * 16 + lane / 4 + (i / 2 % 2 == 0 ? 0 : 8), i / 4 * 8 + lane % 4 * 2 + i % 2};
}

// ---- Swizzles: "Swizzling Modes" of tensors, and of wgmma's shared memory. Memory is lines of 128 bytes,
// each of 8 chunks of 16; a figure's row says where a line's chunks lie. Lines count from address 0.

constexpr int kChunk = 16, kLine = 128;

constexpr uint8_t kSwizzle128[8][8] = {
    {0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6}, {2, 3, 0, 1, 6, 7, 4, 5},
    {3, 2, 1, 0, 7, 6, 5, 4}, {4, 5, 6, 7, 0, 1, 2, 3}, {5, 4, 7, 6, 1, 0, 3, 2},
    {6, 7, 4, 5, 2, 3, 0, 1}, {7, 6, 5, 4, 3, 2, 1, 0},
};
constexpr uint8_t kSwizzle64[4][8] = {
    {0, 1, 2, 3, 4, 5, 6, 7},
    {1, 0, 3, 2, 5, 4, 7, 6},
    {2, 3, 0, 1, 6, 7, 4, 5},
    {3, 2, 1, 0, 7, 6, 5, 4},
};
constexpr uint8_t kSwizzle32[2][8] = {
    {0, 1, 2, 3, 4, 5, 6, 7},
    {1, 0, 3, 2, 5, 4, 7, 6},
};

// Where the byte that would lie at `address` lies. `swizzle`: 128, 64, 32 or 0 bytes.
constexpr uint32_t swizzled(uint32_t address, int swizzle) {
    const uint32_t line = address / kLine, chunk = address % kLine / kChunk;
    uint32_t to = chunk;
    if (swizzle == 128) to = kSwizzle128[line % 8][chunk];
    if (swizzle == 64) to = kSwizzle64[line % 4][chunk];
    if (swizzle == 32) to = kSwizzle32[line % 2][chunk];
    return line * kLine + to * kChunk + address % kChunk;
}

// ---- wgmma's operands in shared memory

// "Matrix Descriptor Format"
struct MatrixDescriptor {
    uint32_t address, leading, stride;  // bytes
    int base_offset, swizzle;
    bool reserved_zero;  // the bits that the format leaves out
};
constexpr MatrixDescriptor decode(uint64_t bits) {
    constexpr uint64_t kFields =
        0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
    constexpr int kModes[4] = {0, 128, 64, 32};
    return {static_cast<uint32_t>(bits & 0x3fff) * 16,
            static_cast<uint32_t>(bits >> 16 & 0x3fff) * 16,
            static_cast<uint32_t>(bits >> 32 & 0x3fff) * 16,
            static_cast<int>(bits >> 49 & 7),
            kModes[bits >> 62],
            (bits & ~kFields) == 0};
}

// Bytes after which a mode's pattern repeats, whose start the format wants aligned so.
constexpr uint32_t pattern_bytes(int swizzle) {
    return swizzle == 0 ? 16 : 8u * static_cast<uint32_t>(swizzle);
}

// "Strides" and "Canonical Layouts" (Leading and Stride Dimension Byte Offset), in chunks of 8 16-bit
// elements. The matrix is K-major where a chunk's elements follow each other in K: `line` is then the row
// m or n and `chunk` counts in k. It is MN-major where they follow in m or n: `line` is then k and `chunk`
// counts in m or n. The result is an address before the swizzle.
//   K-major   none: ((8, n), 2) : ((1 chunk, stride), leading)
//             else: ((8, n), 2) : ((swizzle, stride), 1 chunk)
//   MN-major  none: ((1, n), (8, k)) : ((-, stride), (1 chunk, leading))
//             else: ((swizzle / 16, n), (8, k)) : ((1 chunk, leading), (swizzle, stride))
constexpr uint32_t k_major(const MatrixDescriptor& d, int line, int chunk) {
    const auto l = static_cast<uint32_t>(line), c = static_cast<uint32_t>(chunk);
    if (d.swizzle == 0) return d.address + l % 8 * kChunk + l / 8 * d.stride + c * d.leading;
    return d.address + l % 8 * static_cast<uint32_t>(d.swizzle) + l / 8 * d.stride + c * kChunk;
}
constexpr uint32_t mn_major(const MatrixDescriptor& d, int line, int chunk) {
    const auto l = static_cast<uint32_t>(line), c = static_cast<uint32_t>(chunk);
    if (d.swizzle == 0) return d.address + c * d.stride + l % 8 * kChunk + l / 8 * d.leading;
    const auto row = static_cast<uint32_t>(d.swizzle), chunks = row / kChunk;
    return d.address + c % chunks * kChunk + c / chunks * d.leading + l % 8 * row + l / 8 * d.stride;
}

}  // namespace bigops::simt::layouts
