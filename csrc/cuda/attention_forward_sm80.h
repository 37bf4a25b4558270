// Attention's forward pass by mma.sync, for every GPU from Ampere on: FlashAttention-2's scheme
// (Dao 2023). A block owns kBlockRows queries, a warp 16 or 32 of them, and walks over the keys
// that they see. What makes it fast:
// - scores and weights never leave registers: the accumulators of the first product lie as the
//   second wants its left operand;
// - keys and values pass by turns through one ring of tiles, so that the next ones' cp.async is
//   under way beside the products and the softmax of these, at one barrier a tile;
// - a warp reads each piece of a key or value tile once for 32 rows: at 16, ldmatrix alone would
//   take all of shared memory's bandwidth on an A100 (256 bytes for an instruction of two clocks).
#pragma once

#include "../view.h"
#include "attention_device.h"
#include "device/launch.h"
#include "device/warp_mma.h"

namespace bigops::cuda::sm80 {

// A tensor (batch, heads, rows, head size); strides in elements.
template <class T>
struct Rows {
    T* data;
    int64_t batch, head, row;

    BIGOPS_DEVICE T* at(int b, int h, int first) const {
        return data + b * batch + h * head + first * row;
    }
};
template <class T>
Rows<T> rows_of(const View& view) {
    return {view.ptr<T>(), view.strides[0], view.strides[1], view.strides[2]};
}

template <class T>
struct ForwardArguments {
    Rows<const T> query, key, value;
    Rows<T> out;
    Rows<float> lse;
    AttentionSizes sizes;
};

template <class T_, int kHeadSize_, int kWarps_, int kRowTiles_, int kBlockKeys_, int kSlots_>
struct ForwardTiles {
    using T = T_;
    static constexpr int kHeadSize = kHeadSize_, kBlockKeys = kBlockKeys_;
    static constexpr int kRowTiles = kRowTiles_;  // of 16 rows, in each warp
    static constexpr int kThreads = kWarps_ * device::kWarp;
    static constexpr int kWarpRows = 16 * kRowTiles, kBlockRows = kWarps_ * kWarpRows;
    static constexpr int kSlots = kSlots_;
    static_assert(kSlots == 2 || kSlots == 3);

    using Query = device::SharedTile<T, kBlockRows, kHeadSize>;
    using Key = device::SharedTile<T, kBlockKeys, kHeadSize>;  // and values
    static constexpr int kSharedBytes = Query::kBytes + kSlots * Key::kBytes;

    BIGOPS_DEVICE static Query query() { return {device::dynamic_shared()}; }
    BIGOPS_DEVICE static Key slot(int i) {
        return {device::dynamic_shared() + Query::kBytes + i * Key::kBytes};
    }
};

template <class Tiles>
struct Forward {
    using T = typename Tiles::T;
    static constexpr int kHeadSize = Tiles::kHeadSize, kBlockKeys = Tiles::kBlockKeys;
    static constexpr int kRowTiles = Tiles::kRowTiles;
    using Scores = device::Fragment<kBlockKeys>;
    using Output = device::Fragment<kHeadSize>;

    const ForwardArguments<T>& arguments;
    const AttentionSizes& sizes = arguments.sizes;
    TileOrder order{sizes, (sizes.query_len + Tiles::kBlockRows - 1) / Tiles::kBlockRows,
                    static_cast<int>(blockIdx.x)};
    Sequence sequence{sizes, order.batch};
    int batch = sizes.cu_seqlens_q != nullptr ? 0 : order.batch;
    int low = order.row_block * Tiles::kBlockRows;
    int rows = min(Tiles::kBlockRows, sequence.query_len - low);
    int warp_row = static_cast<int>(threadIdx.x) / device::kWarp * Tiles::kWarpRows;
    KeyBlocks<kBlockKeys> blocks{sequence, low, low + rows - 1};

    // The ring's tiles: keys of the last block, their values, keys of the block before, ...
    int slot = 0;  // of the next tile that is used
    int block[2] = {blocks.last, blocks.last};  // the next one to load of keys, of values
    using Loader = device::RowLoader<typename Tiles::Key, Tiles::kThreads>;
    Loader loader[2] = {loader_of(arguments.key), loader_of(arguments.value)};

    BIGOPS_DEVICE Loader loader_of(const Rows<const T>& all) const {
        return {all.at(batch, order.head / sizes.group(),
                       sequence.key_start + blocks.last * kBlockKeys),
                all.row};
    }
    // Keys (0) or values (1).
    template <int kWhich>
    BIGOPS_DEVICE void load_next(int to) {
        if (block[kWhich] >= blocks.first) {
            const int64_t stride = kWhich == 0 ? arguments.key.row : arguments.value.row;
            loader[kWhich].load(Tiles::slot(to), stride,
                                sequence.key_len - block[kWhich] * kBlockKeys);
            --block[kWhich];
            loader[kWhich].move(-kBlockKeys * stride);
        }
        device::cp_async_commit();  // of nothing at the end: groups are counted
    }
    // The next tile, once all of it is there. Since all warps have come here nobody reads the tile
    // before it any more, whose slot the tile kSlots - 1 further on gets.
    template <int kWhich>
    BIGOPS_DEVICE typename Tiles::Key next() {
        device::cp_async_wait<Tiles::kSlots - 2>();
        __syncthreads();
        load_next<(kWhich + Tiles::kSlots - 1) % 2>(slot == 0 ? Tiles::kSlots - 1 : slot - 1);
        const auto tile = Tiles::slot(slot);
        slot = slot + 1 == Tiles::kSlots ? 0 : slot + 1;
        return tile;
    }

    BIGOPS_DEVICE void run() {
        if (rows <= 0) return;  // past the end of a sequence that is shorter than the longest
        if (blocks.none()) return store_nothing();
        const Rows<const T>& query = arguments.query;
        device::RowLoader<typename Tiles::Query, Tiles::kThreads>(
            query.at(batch, order.head, sequence.query_start + low), query.row)
            .load(Tiles::query(), query.row, rows);
        load_next<0>(0);
        if (Tiles::kSlots == 3) load_next<1>(1);
        Output output[kRowTiles];
        OnlineSoftmax softmax[kRowTiles];
#pragma unroll
        for (Output& tile : output) device::clear(tile);
#pragma unroll 1
        for (int now = blocks.last; now >= blocks.first; --now) {
            Scores scores[kRowTiles];
#pragma unroll
            for (Scores& tile : scores) device::clear(tile);
            device::multiply(scores, device::left_rows(Tiles::query(), warp_row),
                             device::right_rows(next<0>(), 0));
            device::Weights<T, kRowTiles, kBlockKeys> weights;
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
                if (sizes.softcap > 0.0f) cap(scores[m], sizes.scale, sizes.softcap);
                if (!blocks.whole(now))
                    hide(scores[m], {sequence, low + row_of(m)}, now * kBlockKeys);
                rescale(output[m], softmax[m].weigh(scores[m], sizes.log2_unit()));
                weights.round(m, scores[m]);
            }
            device::multiply(output, weights, device::right_columns<kHeadSize>(next<1>(), 0));
        }
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) stage(output[m], softmax[m], m);
        __syncwarp();
        store();
    }

    // The lane's first row of a row tile, within the block's.
    BIGOPS_DEVICE int row_of(int m) const { return warp_row + 16 * m + Output::row(0); }

    BIGOPS_DEVICE void store_lse(const device::PerRow& lse, int m) const {
        float* to = arguments.lse.at(batch, order.head, sequence.query_start + low + row_of(m));
        if (device::lane_id() % 4 != 0) return;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (row_of(m) + 8 * half < rows) to[8 * half * arguments.lse.row] = lse.of[half];
    }
    // Output goes through the warp's own queries, which only this warp has read, and before the last
    // values' barrier, so that global memory gets 16 bytes at a time.
    BIGOPS_DEVICE void stage(Output& output, OnlineSoftmax& softmax, int m) const {
        device::PerRow lse;
        device::scale_rows(output, softmax.finish(lse));
        store_lse(lse, m);
        device::store(Tiles::query(), warp_row + 16 * m, 0, output);
    }
    // Of each 16 bytes of the warp's rows: its place within the tile.
    template <class Chunk>
    BIGOPS_DEVICE void each_chunk(Chunk chunk) const {
        constexpr int kChunks = kHeadSize / 8;
        T* to = arguments.out.at(batch, order.head, sequence.query_start + low);
#pragma unroll 4
        for (int i = device::lane_id(); i < Tiles::kWarpRows * kChunks; i += device::kWarp) {
            const int row = warp_row + i / kChunks, column = i % kChunks * 8;
            if (row < rows)
                *reinterpret_cast<uint4*>(to + row * arguments.out.row + column) =
                    chunk(row, column);
        }
    }
    BIGOPS_DEVICE void store() const {
        const auto tile = Tiles::query();
        each_chunk([&](int row, int column) {
            return *reinterpret_cast<const uint4*>(tile.at(row, column));
        });
    }
    // Rows that see no key at all.
    BIGOPS_DEVICE void store_nothing() const {
        for (int m = 0; m < kRowTiles; ++m) store_lse({{-kInfinity, -kInfinity}}, m);
        each_chunk([](int, int) { return make_uint4(0, 0, 0, 0); });
    }
};

template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads)
    attention_forward_sm80_kernel(const __grid_constant__ ForwardArguments<typename Tiles::T> arguments) {
    Forward<Tiles>{arguments}.run();
}

}  // namespace bigops::cuda::sm80
