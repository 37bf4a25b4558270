// Small kernels around single instructions of csrc/cuda/device/, each held against its definition by
// tests/instructions.py: under the CPU model in pytest, and on a GPU. Functions that Python calls take
// pointers and 64-bit integers only.
#pragma once

#include "../../csrc/cuda/tensor_map.h"

namespace test {

using namespace bigops;
using device::bf16, device::f16;

constexpr int kThreads = 128;

// What threads write, TMA and wgmma may read afterwards.
__device__ inline void publish() {
    device::fence_proxy_async();
    __syncthreads();
}

__device__ inline void copy16(void* to, const void* from, int bytes) {
    for (int i = static_cast<int>(threadIdx.x); i < bytes / 16; i += static_cast<int>(blockDim.x))
        static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
}

// From kRows x kColumns elements, rows one after the other.
template <class Tile>
__device__ void fill(const Tile& tile, const typename Tile::Element* from) {
    constexpr int kChunks = Tile::kColumns / 8;
    for (int i = static_cast<int>(threadIdx.x); i < Tile::kRows * kChunks;
         i += static_cast<int>(blockDim.x))
        *reinterpret_cast<uint4*>(tile.at(i / kChunks, i % kChunks * 8)) =
            reinterpret_cast<const uint4*>(from)[i];
}

}  // namespace test
