// What attention's two passes on Hopper share: tiles of (batch, head, row, column) tensors, and how they come
// to shared memory.
#pragma once

#include "attention_device.h"
#include "device/launch.h"
#include "device/mma.h"
#include "device/tma.h"
#include "device/wgmma.h"
#include "tensor_map.h"

namespace bigops::cuda {

template <class Tile>
device::TensorMap map_of(const View& view) {
    if (view.numel() == 0) return {};  // no tile of it is ever loaded
    const uint64_t sizes[] = {static_cast<uint64_t>(view.shape[3]), static_cast<uint64_t>(view.shape[2]),
                              static_cast<uint64_t>(view.shape[1]), static_cast<uint64_t>(view.shape[0])};
    const auto bytes = [&](int dim) { return static_cast<uint64_t>(view.strides[dim]) * 2; };
    const uint64_t strides[] = {bytes(2), bytes(1), bytes(0)};
    const uint32_t box[] = {Tile::kBlockColumns, Tile::kRows, 1, 1};
    return tiled_map(view.data, view.dtype, 4, sizes, strides, box, Tile::kSwizzle);
}

template <class Tile>
BIGOPS_DEVICE void load_tile(const Tile& tile, const device::TensorMap* map, uint64_t* full, int row,
                             int head, int batch) {
    device::mbarrier_arrive_expect(full, Tile::kBytes);
#pragma unroll
    for (int i = 0; i < Tile::kBlocks; ++i)
        device::tma_load(tile.block(i), map, full, i * Tile::kBlockColumns, row, head, batch);
}

// The last rows of a packed sequence, zeros behind them: what follows in memory is the next sequence's,
// and a weight of 0 would make a NaN there one here. By the whole producer warp.
template <class Tile>
BIGOPS_DEVICE void load_tail(const Tile& tile, const typename Tile::Element* data, int64_t row_stride,
                             int rows, uint64_t* full) {
    constexpr int kChunks = Tile::kColumns / 8;
#pragma unroll 1  // a producer has few registers
    for (int i = device::lane_id(); i < Tile::kRows * kChunks; i += device::kWarp) {
        const int row = i / kChunks, column = i % kChunks * 8;
        uint4 chunk = make_uint4(0, 0, 0, 0);
        if (row < rows) chunk = *reinterpret_cast<const uint4*>(data + row * row_stride + column);
        *reinterpret_cast<uint4*>(tile.at(row, column)) = chunk;
    }
    device::fence_proxy_async();
    __syncwarp();
    if (device::lane_id() == 0) device::mbarrier_arrive(full);
}

}  // namespace bigops::cuda
