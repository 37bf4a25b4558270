// Attention's forward pass for Hopper: FlashAttention-3's scheme (Shah et al. 2024) in the device header's
// words. Two producer warps keep rings of key and value tiles filled by TMA; two or three warpgroups each
// own 64 rows. What makes it fast:
// - wgmma reads both operands from where TMA put them; weights stay in registers as the second product's A;
// - within a warpgroup the scores of the next keys are computed while the softmax of these runs and the
//   product with the values before is under way; between warpgroups named barriers make one's products
//   run beside the other's softmax ("ping-pong");
// - blocks are persistent: they draw tiles, heaviest first, from a common counter, and the producer fetches
//   the next tile's keys while this one's output is stored.
#pragma once

#include "attention_sm90.h"

namespace bigops::cuda {

struct AttentionForwardArguments {
    device::TensorMap query, key, value;
    void* out;
    float* lse;
    int64_t out_batch, out_head, out_row;  // strides in elements
    int64_t lse_batch, lse_head;
    const void* value_data;  // for the last keys of a packed sequence, see load_tail
    int64_t value_head, value_row;
    unsigned* drawn;  // 0 at first; null where every tile has a block of its own
    int tiles;
    AttentionSizes sizes;
};

// kQueries: with two, a tile's first scores are computed while the output of the tile before is stored.
template <class T_, int kHeadSize_, int kBlockKeys_, int kConsumers_, int kQueries_, int kStages_ = 2>
struct ForwardTiles {
    using T = T_;
    static constexpr int kHeadSize = kHeadSize_, kBlockKeys = kBlockKeys_;
    static constexpr int kConsumers = kConsumers_;  // warpgroups of 64 rows
    static constexpr int kBlockRows = 64 * kConsumers;
    static constexpr int kQueries = kQueries_, kStages = kStages_, kTilesAhead = 2;
    static constexpr int kThreads = device::kWarpgroup * (kConsumers + 1);
    // setmaxnreg: 64 K registers are shared out; producers need few.
    static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32;
    static constexpr int kConsumerRegisters = kConsumers == 2 ? 240 : 160;

    using Query = device::SharedTile<T, kBlockRows, kHeadSize>;
    using Key = device::SharedTile<T, kBlockKeys, kHeadSize>;
    using Value = device::SharedTile<T, kBlockKeys, kHeadSize>;

    struct Barriers {
        uint64_t query_full[kQueries], query_empty[kQueries];
        uint64_t key_full[kStages], key_empty[kStages];
        uint64_t value_full[kStages], value_empty[kStages];
        uint64_t tile_full[kTilesAhead], tile_empty[kTilesAhead];
        int tile[kTilesAhead];  // numbers, which the producer draws for all
    };
    static constexpr int kQueryBytes = kQueries * Query::kBytes;
    static constexpr int kTileBytes = kQueryBytes + kStages * (Key::kBytes + Value::kBytes);
    static constexpr int kSharedBytes = kTileBytes + static_cast<int>(sizeof(Barriers));

    BIGOPS_DEVICE static Query query(int stage) {
        return {device::dynamic_shared() + stage * Query::kBytes};
    }
    BIGOPS_DEVICE static Key key(int stage) {
        return {device::dynamic_shared() + kQueryBytes + stage * Key::kBytes};
    }
    BIGOPS_DEVICE static Value value(int stage) {
        return {device::dynamic_shared() + kQueryBytes + kStages * Key::kBytes +
                stage * Value::kBytes};
    }
    BIGOPS_DEVICE static Barriers& barriers() {
        return *reinterpret_cast<Barriers*>(device::dynamic_shared() + kTileBytes);
    }
};

// A tile's place, which is decoded anew where it is needed again: a number costs fewer registers.
template <class Tiles>
struct Tile {
    TileOrder order;
    Sequence sequence;
    int low, high;  // its first and last row

    BIGOPS_DEVICE Tile(const AttentionSizes& sizes, int number)
        : order(sizes, (sizes.query_len + Tiles::kBlockRows - 1) / Tiles::kBlockRows, number),
          sequence(sizes, order.batch), low(order.row_block * Tiles::kBlockRows),
          high(min(low + Tiles::kBlockRows, sequence.query_len) - 1) {}
    // Past the end of a packed sequence that is shorter than the longest.
    BIGOPS_DEVICE bool empty() const { return low > high; }
    BIGOPS_DEVICE KeyBlocks<Tiles::kBlockKeys> blocks() const { return {sequence, low, high}; }
};

// A place in a ring of kStages, and the parity of the phase that its barrier is in.
template <int kStages>
struct RingPlace {
    int stage = 0;
    uint32_t parity = 0;

    BIGOPS_DEVICE void advance() {
        if (++stage == kStages) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// What every role does: it takes the tiles in the order in which they were drawn.
template <class Tiles>
struct ForwardRole {
    const AttentionForwardArguments& arguments;
    typename Tiles::Barriers& barriers = Tiles::barriers();

    BIGOPS_DEVICE void release(uint64_t* barrier) const {
        if (device::lane_id() == 0) device::mbarrier_arrive(barrier);
    }
    BIGOPS_DEVICE int batch_of(const Tile<Tiles>& tile) const {
        return arguments.sizes.cu_seqlens_q != nullptr ? 0 : tile.order.batch;
    }
    // By shuffle, which tells the compiler that the whole warp has the same.
    BIGOPS_DEVICE Tile<Tiles> tile_at(int stage) const {
        return {arguments.sizes, device::shuffle(barriers.tile[stage], 0)};
    }
    // Whether there is a tile at this place.
    BIGOPS_DEVICE bool await_tile(const RingPlace<Tiles::kTilesAhead>& place) const {
        device::mbarrier_wait(&barriers.tile_full[place.stage], place.parity);
        return device::shuffle(barriers.tile[place.stage], 0) < arguments.tiles;
    }
    BIGOPS_DEVICE void release_tile(int stage) const {
        __syncwarp();
        release(&barriers.tile_empty[stage]);
    }
};

// The warp that draws tiles and loads their queries and keys.
template <class Tiles>
struct KeyProducer : ForwardRole<Tiles> {
    using ForwardRole<Tiles>::arguments, ForwardRole<Tiles>::barriers;
    RingPlace<Tiles::kStages> place;
    RingPlace<Tiles::kQueries> query_place;

    BIGOPS_DEVICE void load_key(const Sequence& sequence, int block, int head, int batch) {
        device::mbarrier_wait(&barriers.key_empty[place.stage], place.parity ^ 1);
        if (device::lane_id() == 0)
            load_tile(Tiles::key(place.stage), &arguments.key, &barriers.key_full[place.stage],
                      sequence.key_start + block * Tiles::kBlockKeys, head, batch);
        place.advance();
    }
    BIGOPS_DEVICE void load(int number) {
        const Tile<Tiles> tile(arguments.sizes, number);
        const auto blocks = tile.blocks();
        if (blocks.none()) return;
        const int batch = this->batch_of(tile), head = tile.order.head / arguments.sizes.group();
        load_key(tile.sequence, blocks.last, head, batch);
        device::mbarrier_wait(&barriers.query_empty[query_place.stage], query_place.parity ^ 1);
        if (device::lane_id() == 0)
            load_tile(Tiles::query(query_place.stage), &arguments.query,
                      &barriers.query_full[query_place.stage],
                      tile.sequence.query_start + tile.low, tile.order.head, batch);
        query_place.advance();
        for (int block = blocks.last - 1; block >= blocks.first; --block)
            load_key(tile.sequence, block, head, batch);
    }
    BIGOPS_DEVICE void run() {
        RingPlace<Tiles::kTilesAhead> ahead;
        int number = static_cast<int>(blockIdx.x);
        while (true) {
            device::mbarrier_wait(&barriers.tile_empty[ahead.stage], ahead.parity ^ 1);
            if (device::lane_id() == 0) {
                barriers.tile[ahead.stage] = number;
                device::mbarrier_arrive(&barriers.tile_full[ahead.stage]);
            }
            ahead.advance();
            if (number >= arguments.tiles) return;
            int next = arguments.tiles;
            if (arguments.drawn != nullptr && device::lane_id() == 0)
                next = static_cast<int>(gridDim.x + atomicAdd(arguments.drawn, 1u));
            load(number);
            number = device::shuffle(next, 0);
        }
    }
};

// The warp that loads values.
template <class Tiles>
struct ValueProducer : ForwardRole<Tiles> {
    using ForwardRole<Tiles>::arguments, ForwardRole<Tiles>::barriers;
    RingPlace<Tiles::kStages> place;

    BIGOPS_DEVICE void load(const Tile<Tiles>& tile) {
        const auto blocks = tile.blocks();
        const Sequence& sequence = tile.sequence;
        const bool packed = arguments.sizes.cu_seqlens_k != nullptr;
        const int batch = this->batch_of(tile), head = tile.order.head / arguments.sizes.group();
        for (int block = blocks.last; block >= blocks.first; --block) {
            uint64_t* full = &barriers.value_full[place.stage];
            device::mbarrier_wait(&barriers.value_empty[place.stage], place.parity ^ 1);
            const int start = block * Tiles::kBlockKeys, rest = sequence.key_len - start;
            if (packed && rest < Tiles::kBlockKeys) {
                const auto* values = static_cast<const typename Tiles::T*>(arguments.value_data) +
                                     head * arguments.value_head +
                                     (sequence.key_start + start) * arguments.value_row;
                load_tail(Tiles::value(place.stage), values, arguments.value_row, rest, full);
            } else if (device::lane_id() == 0) {
                load_tile(Tiles::value(place.stage), &arguments.value, full,
                          sequence.key_start + start, head, batch);
            }
            place.advance();
        }
    }
    BIGOPS_DEVICE void run() {
        for (RingPlace<Tiles::kTilesAhead> ahead; this->await_tile(ahead); ahead.advance()) {
            load(this->tile_at(ahead.stage));
            this->release_tile(ahead.stage);
        }
    }
};

template <class Tiles>
struct ForwardConsumer : ForwardRole<Tiles> {
    using ForwardRole<Tiles>::arguments, ForwardRole<Tiles>::barriers, ForwardRole<Tiles>::release;
    using T = typename Tiles::T;
    static constexpr int kHeadSize = Tiles::kHeadSize, kBlockKeys = Tiles::kBlockKeys;
    static constexpr int kRowChunks = kHeadSize / 8;  // of 16 bytes
    using Scores = device::Fragment<kBlockKeys>;
    using Output = device::Fragment<kHeadSize>;
    using Weights = uint32_t[kBlockKeys / 16][4];

    int group;  // which of the consumers
    RingPlace<Tiles::kStages> key_place, value_place;
    RingPlace<Tiles::kQueries> query_place;
    RingPlace<Tiles::kTilesAhead> tile_place;

    // Ping-pong: a group issues its products when the one before it has issued its own.
    static constexpr int kPair = 2 * device::kWarpgroup;
    BIGOPS_DEVICE int turn_barrier(int of) const { return 1 + of; }
    BIGOPS_DEVICE void first_turn() const {
        if (group == Tiles::kConsumers - 1) device::named_barrier_arrive(turn_barrier(0), kPair);
    }
    BIGOPS_DEVICE void wait_turn() const {
        device::named_barrier_sync(turn_barrier(group), kPair);
    }
    BIGOPS_DEVICE void pass_turn() const {
        device::named_barrier_arrive(turn_barrier((group + 1) % Tiles::kConsumers), kPair);
    }
    // After the last tile: the turn that nobody will take.
    BIGOPS_DEVICE void last_turn() const {
        if (group == 0) wait_turn();
    }

    // scores = query * key^T
    BIGOPS_DEVICE void issue_scores(const typename Tiles::Query& query, Scores& scores) const {
        const auto key = Tiles::key(key_place.stage);
        device::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHeadSize / 16; ++step)
            device::Wgmma<kBlockKeys, T>::template shared<0, 0>(
                scores.d, device::along_columns(query, 64 * group, step),
                device::along_columns(key, 0, step), step != 0);
        device::wgmma_commit();
    }
    // output += weights * value
    BIGOPS_DEVICE void issue_output(Output& output, const Weights& weights) const {
        const auto value = Tiles::value(value_place.stage);
        device::wgmma_pin(output.d);
        device::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kBlockKeys / 16; ++step)
            device::Wgmma<kHeadSize, T>::template registers<1>(
                output.d, weights[step], device::along_rows(value, 0, step), 1);
        device::wgmma_commit();
    }

    BIGOPS_DEVICE Rescaling softmax(OnlineSoftmax& softmax, Scores& scores, const SeenKeys& seen,
                                    const KeyBlocks<kBlockKeys>& blocks, int block) const {
        const AttentionSizes& sizes = arguments.sizes;
        if (sizes.softcap > 0.0f) cap(scores, sizes.scale, sizes.softcap);
        if (!blocks.whole(block)) hide(scores, seen, block * kBlockKeys);
        return softmax.weigh(scores, sizes.log2_unit());
    }

    BIGOPS_DEVICE static void round(const Scores& scores, Weights& weights) {
#pragma unroll
        for (int step = 0; step < kBlockKeys / 16; ++step)
            device::as_operand<T>(scores, step, weights[step]);
    }

    // Whether there is a tile left that has something to compute; others are dealt with on the way.
    BIGOPS_DEVICE bool next_tile() {
        for (; this->await_tile(tile_place); tile_place.advance()) {
            const Tile<Tiles> tile = this->tile_at(tile_place.stage);
            if (!tile.blocks().none()) return true;
            if (!tile.empty()) store_nothing(tile);
            this->release_tile(tile_place.stage);
        }
        return false;
    }
    BIGOPS_DEVICE void await_first_scores() const {
        device::mbarrier_wait(&barriers.query_full[query_place.stage], query_place.parity);
        device::mbarrier_wait(&barriers.key_full[key_place.stage], key_place.parity);
    }
    BIGOPS_DEVICE void key_done() {
        release(&barriers.key_empty[key_place.stage]);
        key_place.advance();
    }
    BIGOPS_DEVICE void value_done() {
        release(&barriers.value_empty[value_place.stage]);
        value_place.advance();
    }

    BIGOPS_DEVICE void run() {
        constexpr bool kBeside = Tiles::kQueries == 2;
        Scores scores;
        first_turn();
        bool more = next_tile();
        const auto start = [&] {
            await_first_scores();
            wait_turn();
            issue_scores(Tiles::query(query_place.stage), scores);
            pass_turn();
            device::wgmma_wait<0>();
            device::wgmma_pin(scores.d);
        };
        if (more) start();
        while (more) {
            const int stage = tile_place.stage, query_stage = query_place.stage;
            tile_place.advance();
            query_place.advance();
            const Tile<Tiles> tile = this->tile_at(stage);
            const auto blocks = tile.blocks();
            const SeenKeys seen(tile.sequence, tile.low + warp_row() + Output::row(0));
            const auto query = Tiles::query(query_stage);
            Output output;
            device::clear(output);
            OnlineSoftmax state;
            Weights weights;
            key_done();
            softmax(state, scores, seen, blocks, blocks.last);
            round(scores, weights);
            for (int block = blocks.last - 1; block >= blocks.first; --block) {
                device::mbarrier_wait(&barriers.key_full[key_place.stage], key_place.parity);
                wait_turn();
                issue_scores(query, scores);
                device::mbarrier_wait(&barriers.value_full[value_place.stage], value_place.parity);
                issue_output(output, weights);
                pass_turn();
                device::wgmma_wait<1>();
                device::wgmma_pin(scores.d);
                key_done();
                const Rescaling rescaling = softmax(state, scores, seen, blocks, block);
                device::wgmma_wait<0>();
                device::wgmma_pin(output.d);
                value_done();
                rescale(output, rescaling);
                round(scores, weights);
            }
            const auto finish = [&] {
                device::wgmma_pin(output.d);
                value_done();
                store(output, state, this->tile_at(stage), query);
                release(&barriers.query_empty[query_stage]);
                this->release_tile(stage);
            };
            // Only the very next one: the producer has no place for a third before this one is done.
            const bool beside = kBeside && this->await_tile(tile_place) &&
                                !this->tile_at(tile_place.stage).blocks().none();
            device::mbarrier_wait(&barriers.value_full[value_place.stage], value_place.parity);
            if (beside) {
                await_first_scores();
                wait_turn();
                issue_output(output, weights);
                issue_scores(Tiles::query(query_place.stage), scores);
                pass_turn();
                device::wgmma_wait<1>();
                finish();
                device::wgmma_wait<0>();
                device::wgmma_pin(scores.d);
            } else {
                issue_output(output, weights);
                device::wgmma_wait<0>();
                finish();
                more = next_tile();
                if (more) start();
            }
        }
        last_turn();
    }

    // This warp's first row within the tile.
    BIGOPS_DEVICE int warp_row() const {
        return 64 * group + static_cast<int>(threadIdx.x) % device::kWarpgroup / device::kWarp * 16;
    }
    BIGOPS_DEVICE T* out_rows(const Tile<Tiles>& tile) const {
        return static_cast<T*>(arguments.out) + this->batch_of(tile) * arguments.out_batch +
               tile.order.head * arguments.out_head +
               static_cast<int64_t>(tile.sequence.query_start + tile.low + warp_row()) *
                   arguments.out_row;
    }
    BIGOPS_DEVICE void store_lse(const device::PerRow& lse, const Tile<Tiles>& tile) const {
        const int first = tile.low + warp_row();
        float* row = arguments.lse + this->batch_of(tile) * arguments.lse_batch +
                     tile.order.head * arguments.lse_head + tile.sequence.query_start + first;
        if (device::lane_id() % 4 != 0) return;
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (first + Output::row(half) < tile.sequence.query_len)
                row[Output::row(half)] = lse.of[half];
    }

    // Through this warp's own rows of the query tile, so that global memory gets 16 bytes at a time.
    BIGOPS_DEVICE void store(Output& output, OnlineSoftmax& state, const Tile<Tiles>& tile,
                             const typename Tiles::Query& staging) const {
        const int lane = device::lane_id(), rows = tile.sequence.query_len - tile.low - warp_row();
        device::PerRow lse;
        device::scale_rows(output, state.finish(lse));
        store_lse(lse, tile);
#pragma unroll
        for (int step = 0; step < kHeadSize / 16; ++step) {
            uint32_t chunk[4];
            device::as_operand<T>(output, step, chunk);
            device::stmatrix_x4(staging.at(warp_row() + lane % 16, 16 * step + lane / 16 * 8), chunk);
        }
        __syncwarp();
        T* out = out_rows(tile);
#pragma unroll 1  // or eight addresses are kept in registers from tile to tile
        for (int i = lane; i < 16 * kRowChunks; i += device::kWarp) {
            const int row = i / kRowChunks, column = i % kRowChunks * 8;
            if (row < rows)
                *reinterpret_cast<uint4*>(out + row * arguments.out_row + column) =
                    *reinterpret_cast<const uint4*>(staging.at(warp_row() + row, column));
        }
        device::fence_proxy_async();  // TMA writes here next
        __syncwarp();
    }
    // Rows that see no key at all.
    BIGOPS_DEVICE void store_nothing(const Tile<Tiles>& tile) const {
        store_lse({{-kInfinity, -kInfinity}}, tile);
        T* out = out_rows(tile);
        for (int i = device::lane_id(); i < 16 * kRowChunks; i += device::kWarp)
            if (tile.low + warp_row() + i / kRowChunks < tile.sequence.query_len)
                *reinterpret_cast<uint4*>(out + i / kRowChunks * arguments.out_row +
                                          i % kRowChunks * 8) = make_uint4(0, 0, 0, 0);
    }
};

template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, 1)
    attention_forward_sm90_kernel(const __grid_constant__ AttentionForwardArguments arguments) {
    typename Tiles::Barriers& barriers = Tiles::barriers();
    if (threadIdx.x == 0) {
        constexpr uint32_t kWarps = 4 * Tiles::kConsumers;
        for (int stage = 0; stage < Tiles::kQueries; ++stage) {
            device::mbarrier_init(&barriers.query_full[stage], 1);
            device::mbarrier_init(&barriers.query_empty[stage], kWarps);
        }
        for (int stage = 0; stage < Tiles::kStages; ++stage) {
            device::mbarrier_init(&barriers.key_full[stage], 1);
            device::mbarrier_init(&barriers.value_full[stage], 1);
            device::mbarrier_init(&barriers.key_empty[stage], kWarps);
            device::mbarrier_init(&barriers.value_empty[stage], kWarps);
        }
        for (int stage = 0; stage < Tiles::kTilesAhead; ++stage) {
            device::mbarrier_init(&barriers.tile_full[stage], 1);
            device::mbarrier_init(&barriers.tile_empty[stage], kWarps + 1);
        }
        device::fence_mbarrier_init();
    }
    __syncthreads();

    // Warpgroup 0 produces with two warps; setmaxnreg is the whole warpgroup's.
    const int warp = device::shuffle(static_cast<int>(threadIdx.x) / device::kWarp, 0);
    if (warp < 4) {
        device::registers_decrease<Tiles::kProducerRegisters>();
        if (warp == 0) KeyProducer<Tiles>{{arguments}}.run();
        if (warp == 1) ValueProducer<Tiles>{{arguments}}.run();
    } else {
        device::registers_increase<Tiles::kConsumerRegisters>();
        ForwardConsumer<Tiles>{{arguments}, warp / 4 - 1}.run();
    }
}

}  // namespace bigops::cuda
