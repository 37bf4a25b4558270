// Attention's backward pass for Hopper: FlashAttention-3's scheme (Shah et al. 2024, section 3.2 and the
// public kernel's schedule) in the device header's words. A block owns keys of one key head and goes through
// the query tiles, of all heads that share the keys, which see them:
//     S^T = K Q^T, P^T = exp(S^T - lse), dV += P^T dO, dP^T = V dO^T,
//     dS^T = P^T * (dP^T - delta), dK += dS^T Q, dQ += dS K.
// What makes it fast:
// - scores are computed transposed, 64 keys a warpgroup, so that P^T and dS^T leave the accumulators as the
//   register operand of the next product; only dS goes through shared memory, for dQ;
// - the product with dO runs while dS is computed, the one with Q while dQ is put down;
// - dQ is added up in memory by the copy engine: a warp of its own per warpgroup sends whole tiles in the
//   order in which registers hold them, which the conversion afterwards undoes (beside tiles of 256 columns
//   there is no room for that: there registers are added to memory);
// - a producer warp keeps rings of query and grad_out tiles filled by TMA.
#pragma once

#include "attention_backward_tiles_sm90.h"

namespace bigops::cuda {

// What every role does: it goes through the block's query tiles, head by head.
template <class Tiles>
struct BackwardRole {
    const AttentionBackwardArguments& arguments;
    const typename Tiles::KeyTile& tile = Tiles::key_tile();
    typename Tiles::Barriers& barriers = Tiles::barriers();

    BIGOPS_DEVICE bool packed() const { return arguments.sizes.cu_seqlens_q != nullptr; }
    BIGOPS_DEVICE int batch() const { return packed() ? 0 : tile.batch; }
    // The first of a tile's rows in the workspace.
    BIGOPS_DEVICE int64_t workspace_row(int head, int block) const {
        const PaddedRows& rows = arguments.workspace.rows;
        return static_cast<int64_t>(head) * rows.total + rows.start(arguments.sizes, tile.batch) +
               block * Tiles::kBlockQueries;
    }
    BIGOPS_DEVICE int* turns(int64_t row) const {
        return arguments.workspace.turns + row / Tiles::kBlockQueries;
    }
    // In a fixed order, that of the keys, sums have the same bits in every run. No second kernel that goes
    // through the keys of each query, since scores and dP, 2 products of 5, would be computed again. Blocks
    // draw their tiles in that order, so whoever is waited for has begun.
    BIGOPS_DEVICE void await_turn(int64_t row, int block) const {
        const int first = tile.sequence.first_key(block * Tiles::kBlockQueries) / Tiles::kBlockKeys;
        const int before = (tile.low / Tiles::kBlockKeys - first) * Tiles::kConsumers;
        while (atomicAdd(turns(row), 0) < before) __nanosleep(20);
        __threadfence();
    }
    BIGOPS_DEVICE void pass_turn(int64_t row) const {
        __threadfence();
        atomicAdd(turns(row), 1);
    }
    // By shuffle, which tells the compiler that the whole warp has the same.
    template <class Work>
    BIGOPS_DEVICE void each_query_tile(Work work) const {
        const int first = device::shuffle(tile.blocks.first, 0);
        const int last = device::shuffle(tile.blocks.last, 0);
        const int group = arguments.sizes.group();
        const int steps = (last - first + 1) * group;
        int head = device::shuffle(tile.head, 0) * group, block = first;
        for (int step = 0; step < steps; ++step) {
            work(step, head, block);
            if (++block > last) {
                block = first;
                ++head;
            }
        }
    }
    BIGOPS_DEVICE static int stage_of(int step) { return step % Tiles::kStages; }
    // Of the phase that this step's tiles come in.
    BIGOPS_DEVICE static uint32_t parity_of(int step) { return step / Tiles::kStages % 2; }
};

template <class Tiles>
struct BackwardProducer : BackwardRole<Tiles> {
    using BackwardRole<Tiles>::arguments, BackwardRole<Tiles>::tile, BackwardRole<Tiles>::barriers;

    // A tile of which `count` rows are the sequence's own; by the whole warp.
    template <class Tile>
    BIGOPS_DEVICE void load(const Tile& to, const device::TensorMap* map, uint64_t* full,
                            const Rows& rows, int head, int row, int count) const {
        if (this->packed() && count < Tile::kRows)
            load_tail(to, rows.at<const typename Tile::Element>(0, head, row), rows.row, count, full);
        else if (device::lane_id() == 0)
            load_tile(to, map, full, row, head, this->batch());
    }
    BIGOPS_DEVICE void load_row_numbers(float* to, const float* numbers, uint64_t* full, int head,
                                        int block) const {
        constexpr uint32_t kBytes = Tiles::kBlockQueries * sizeof(float);
        if (device::lane_id() != 0) return;
        device::mbarrier_arrive_expect(full, kBytes);
        device::bulk_load(to, numbers + this->workspace_row(head, block), full, kBytes);
    }
    BIGOPS_DEVICE void run() const {
        if (tile.unseen()) return;
        const int key_row = tile.sequence.key_start + tile.low;
        const int keys = tile.sequence.key_len - tile.low;
        load(Tiles::key(), &arguments.key, &barriers.key_full, arguments.key_data, tile.head, key_row,
             keys);
        load(Tiles::value(), &arguments.value, &barriers.value_full, arguments.value_data, tile.head,
             key_row, keys);
        this->each_query_tile([&](int step, int head, int block) {
            const int low = block * Tiles::kBlockQueries;
            const int row = tile.sequence.query_start + low, count = tile.sequence.query_len - low;
            const int stage = this->stage_of(step);
            const uint32_t parity = this->parity_of(step) ^ 1;
            uint64_t* full = &barriers.query_full[stage];
            device::mbarrier_wait(&barriers.query_empty[stage], parity);
            load_row_numbers(Tiles::lse(stage), arguments.workspace.lse, full, head, block);
            load(Tiles::query(stage), &arguments.query, full, arguments.query_data, head, row, count);
            full = &barriers.grad_out_full[stage];
            // redundant: whoever has released the queries had released this before
            device::mbarrier_wait(&barriers.grad_out_empty[stage], parity);
            load_row_numbers(Tiles::delta(stage), arguments.workspace.delta, full, head, block);
            load(Tiles::grad_out(stage), &arguments.grad_out, full, arguments.grad_out_data, head, row,
                 count);
        });
    }
};

// Named barriers, 0 being __syncthreads'.
constexpr int kGradScoresWritten = 1;
BIGOPS_DEVICE int sums_empty_barrier(int group) { return 2 + group; }
BIGOPS_DEVICE int sums_full_barrier(int group) { return 4 + group; }
constexpr int kSumsThreads = device::kWarpgroup + device::kWarp;

// The warp that adds a warpgroup's share of dQ to memory.
template <class Tiles>
struct SumsWriter : BackwardRole<Tiles> {
    using BackwardRole<Tiles>::arguments, BackwardRole<Tiles>::tile;
    int group;

    BIGOPS_DEVICE void run() const {
        this->each_query_tile([&](int step, int head, int block) {
            const int64_t row = this->workspace_row(head, block);
            if (step > 0) {
                if (device::lane_id() == 0) device::bulk_wait_read<0>();
                // redundant: the barrier counts lane 0 too, which comes when it has waited
                __syncwarp();
                device::named_barrier_arrive(sums_empty_barrier(group), kSumsThreads);
            }
            device::named_barrier_sync(sums_full_barrier(group), kSumsThreads);
            if (device::lane_id() != 0) return;
            if (arguments.deterministic) this->await_turn(row, block);
            device::bulk_reduce_add(
                arguments.workspace.grad_query + row * Tiles::kHeadSize + group * Tiles::kSums,
                Tiles::sums(group), Tiles::kSums * 4);
            device::bulk_commit();
            if (!arguments.deterministic) return;
            device::bulk_wait<0>();
            this->pass_turn(row);
        });
        if (device::lane_id() == 0) device::bulk_wait_read<0>();
    }
};

template <class Tiles>
struct BackwardConsumer : BackwardRole<Tiles> {
    using BackwardRole<Tiles>::arguments, BackwardRole<Tiles>::tile, BackwardRole<Tiles>::barriers;
    using T = typename Tiles::T;
    static constexpr int kHeadSize = Tiles::kHeadSize, kBlockQueries = Tiles::kBlockQueries;
    static constexpr bool kWide = Tiles::kWide;
    // A warpgroup's scores, transposed: 64 keys; and its part of the gradients, 64 keys too.
    static constexpr int kScoreQueries = kWide ? kBlockQueries / 2 : kBlockQueries;
    static constexpr int kColumns = kWide ? kHeadSize / 2 : kHeadSize;
    using Scores = device::Fragment<kScoreQueries>;
    using Operand = uint32_t[kScoreQueries / 16][4];
    using Grad = device::Fragment<kColumns>;
    // Of 96 columns each warpgroup needs 48, but 32 lie together: it computes 64.
    using Sums = device::Fragment<Tiles::kShare == Share::columns_transposed ? kBlockQueries
                                  : kWide                                    ? kColumns
                                                                             : 64>;

    int group;  // which of the consumers

    BIGOPS_DEVICE int first_key() const { return kWide ? 0 : 64 * group; }
    BIGOPS_DEVICE int first_query() const { return kWide ? kScoreQueries * group : 0; }
    BIGOPS_DEVICE int first_column() const { return kWide ? kColumns * group : 0; }
    BIGOPS_DEVICE int warp_key() const {
        return first_key() + static_cast<int>(threadIdx.x) % device::kWarpgroup / device::kWarp * 16;
    }
    BIGOPS_DEVICE void release(uint64_t* empty) const {
        if (device::lane_id() == 0) device::mbarrier_arrive(empty);
    }

    // scores = keys * queries^T, for dP values and grad_out in their places.
    BIGOPS_DEVICE void issue_scores(Scores& scores, const typename Tiles::Key& keys,
                                    const typename Tiles::Query& queries) const {
        device::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHeadSize / 16; ++step)
            device::Wgmma<kScoreQueries, T>::template shared<0, 0>(
                scores.d, device::along_columns(keys, first_key(), step),
                device::along_columns(queries, first_query(), step), step != 0);
        device::wgmma_commit();
    }
    // grad += operand * rows
    BIGOPS_DEVICE static void issue_grad(Grad& grad, const Operand& operand,
                                         const typename Tiles::Query& rows) {
        device::wgmma_pin(grad.d);
        device::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kBlockQueries / 16; ++step)
            device::Wgmma<kColumns, T>::template registers<1>(grad.d, operand[step],
                                                              device::along_rows(rows, 0, step), 1);
        device::wgmma_commit();
    }
    BIGOPS_DEVICE void issue_grad(Grad& grad, const typename Tiles::GradScores& operand,
                                  const typename Tiles::Query& rows) const {
        device::wgmma_pin(grad.d);
        // redundant: nobody has touched these registers since the scores' fence
        device::wgmma_fence();
#pragma unroll
        for (int step = 0; step < kBlockQueries / 16; ++step)
            device::Wgmma<kColumns, T>::template shared<1, 1>(
                grad.d, device::along_rows(operand, 0, step),
                device::along_rows(rows, first_column() / Tiles::Query::kBlockColumns, step), 1);
        device::wgmma_commit();
    }
    BIGOPS_DEVICE void issue_sums(Sums& sums, const typename Tiles::GradScores& grad_scores) const {
        using Product = device::Wgmma<Sums::kColumns, T>;
        const auto key = Tiles::key();
        const int block = group * (kHeadSize / 2 / Tiles::Key::kBlockColumns);
        // redundant: the last sums were read before the scores' fence
        device::wgmma_fence();
#pragma unroll
        for (int step = 0; step < Tiles::kBlockKeys / 16; ++step) {
            if constexpr (Tiles::kShare == Share::columns_transposed)
                Product::template shared<1, 0>(sums.d, device::along_rows(key, block, step),
                                               device::along_columns(grad_scores, 0, step),
                                               step != 0);
            else if constexpr (Tiles::kShare == Share::columns)
                Product::template shared<0, 1>(sums.d, device::along_columns(grad_scores, 0, step),
                                               device::along_rows(key, block, step), step != 0);
            else
                Product::template shared<0, 1>(
                    sums.d, device::along_columns(grad_scores, 64 * group, step),
                    device::along_rows(key, 0, step), step != 0);
        }
        device::wgmma_commit();
    }

    // Weights that are not seen will be 0.
    BIGOPS_DEVICE void hide(Scores& scores, int block) const {
        int first[2], last[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int key = tile.low + warp_key() + Scores::row(half);
            const bool there = key < tile.sequence.key_len;
            const int query = block * kBlockQueries + first_query();  // of column 0
            first[half] = tile.sequence.first_query(key) - query;
            last[half] = there ? tile.sequence.last_query(key) - query : -1;
        }
#pragma unroll
        for (int i = 0; i < scores.kCount; ++i) {
            const int column = scores.column(i), half = scores.half(i);
            if (column < first[half] || column > last[half]) scores.d[i] = -kInfinity;
        }
    }
    // Scores become weights, and their rounded copies an operand. Of a capped score the weight is
    // multiplied by the cap's derivative, 1 - tanh^2, once its copy is made.
    BIGOPS_DEVICE void weigh(Scores& scores, Operand& weights, const float* lse) const {
        constexpr bool kCapped = Tiles::kCapped;
        const float unit = kCapped ? kLog2E : arguments.sizes.scale * kLog2E;
        const float per_cap = kCapped ? 1.0f / arguments.sizes.softcap : 0.0f;
#pragma unroll
        for (int i = 0; i < scores.kCount; i += 2) {
            const float2 base = *reinterpret_cast<const float2*>(lse + scores.column(i));
            const float x = scores.d[i], y = scores.d[i + 1];
            const float p = device::exp2_approx(fmaf(x, unit, -base.x));
            const float q = device::exp2_approx(fmaf(y, unit, -base.y));
            weights[i / 8][i % 8 / 2] = device::pack<T>(p, q);
            // -infinity where hidden, and p is 0 there.
            scores.d[i] = kCapped ? p * fmaxf(0.0f, 1.0f - x * per_cap * x * per_cap) : p;
            scores.d[i + 1] = kCapped ? q * fmaxf(0.0f, 1.0f - y * per_cap * y * per_cap) : q;
        }
    }
    BIGOPS_DEVICE void weights_of(Scores& scores, Operand& weights, int block, int stage) const {
        if (Tiles::kCapped) cap(scores, arguments.sizes.scale, arguments.sizes.softcap);
        if (!tile.blocks.whole(block)) hide(scores, block);
        weigh(scores, weights, Tiles::lse(stage) + first_query());
    }
    BIGOPS_DEVICE static void grad_scores_of(const Scores& weights, const Scores& grad_weights,
                                             Operand& grad_scores, const float* delta) {
#pragma unroll
        for (int i = 0; i < weights.kCount; i += 2) {
            const float2 base = *reinterpret_cast<const float2*>(delta + weights.column(i));
            grad_scores[i / 8][i % 8 / 2] =
                device::pack<T>(weights.d[i] * (grad_weights.d[i] - base.x),
                                weights.d[i + 1] * (grad_weights.d[i + 1] - base.y));
        }
    }
    // By rows of queries, as the product with keys wants them.
    BIGOPS_DEVICE void put_down(const Operand& operand, const typename Tiles::GradScores& to) const {
        const int lane = device::lane_id();
        char* at = to.at(first_query() + lane / 16 * 8 + lane % 8, warp_key() + lane / 8 % 2 * 8);
#pragma unroll
        for (int step = 0; step < kScoreQueries / 16; ++step)
            device::stmatrix_x4_trans(at + step * 16 * Tiles::GradScores::kRowBytes, operand[step]);
    }
    // Four numbers at a time, and where they lie among the warpgroup's.
    template <class Store>
    BIGOPS_DEVICE void each_four(const Sums& sums, Store store) const {
        constexpr int kCount = Tiles::kSums / device::kWarpgroup;
        constexpr int kSurplus = Sums::kCount - kCount;  // the first warpgroup's last, the second's first
        const int thread = static_cast<int>(threadIdx.x) % device::kWarpgroup;
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
            float four[4];
#pragma unroll
            for (int k = 0; k < 4; ++k)
                four[k] = group == 0 ? sums.d[i + k] : sums.d[i + k + kSurplus];
            store(i * device::kWarpgroup + 4 * thread, four);
        }
    }
    BIGOPS_DEVICE void put_down(const Sums& sums) const {
        float* to = Tiles::sums(group);
        each_four(sums, [&](int place, const float (&four)[4]) {
            *reinterpret_cast<float4*>(to + place) =
                make_float4(four[0], four[1], four[2], four[3]);
        });
    }
    BIGOPS_DEVICE void add(const Sums& sums, int head, int block) const {
        const int64_t row = this->workspace_row(head, block);
        const bool first = threadIdx.x % device::kWarpgroup == 0, ordered = arguments.deterministic;
        const auto meet = [&] {
            device::named_barrier_sync(sums_full_barrier(group), device::kWarpgroup);
        };
        float* to = arguments.workspace.grad_query + row * kHeadSize + group * Tiles::kSums;
        if (ordered && first) this->await_turn(row, block);
        if (ordered) meet();
        each_four(sums, [&](int place, const float (&four)[4]) { device::add_four(to + place, four); });
        // redundant: what the others have added pass_turn's fence covers, since it comes after they have met
        if (ordered) __threadfence();
        if (ordered) meet();
        if (ordered && first) this->pass_turn(row);
    }

    BIGOPS_DEVICE void run() const {
        Grad grad_key, grad_value;
        device::clear(grad_key);
        device::clear(grad_value);
        if (!tile.unseen()) {
            device::mbarrier_wait(&barriers.key_full, 0);
            device::mbarrier_wait(&barriers.value_full, 0);
        }
        this->each_query_tile([&](int step, int head, int block) {
            const int stage = this->stage_of(step);
            const uint32_t parity = this->parity_of(step);
            const auto query = Tiles::query(stage), grad_out = Tiles::grad_out(stage);
            const auto shared_grads = Tiles::grad_scores(stage), shared_weights = Tiles::weights(stage);
            Scores scores, grad_weights;
            device::mbarrier_wait(&barriers.query_full[stage], parity);
            issue_scores(scores, Tiles::key(), query);
            device::mbarrier_wait(&barriers.grad_out_full[stage], parity);
            issue_scores(grad_weights, Tiles::value(), grad_out);
            device::wgmma_wait<1>();
            device::wgmma_pin(scores.d);

            Operand weights, grad_scores;
            weights_of(scores, weights, block, stage);
            if constexpr (kWide)
                put_down(weights, shared_weights);
            else
                issue_grad(grad_value, weights, grad_out);
            device::wgmma_wait<kWide ? 0 : 1>();
            device::wgmma_pin(grad_weights.d);
            grad_scores_of(scores, grad_weights, grad_scores, Tiles::delta(stage) + first_query());
            put_down(grad_scores, shared_grads);
            device::fence_proxy_async();
            device::named_barrier_sync(kGradScoresWritten, Tiles::kConsumers * device::kWarpgroup);

            Sums sums;
            if constexpr (kWide) issue_grad(grad_value, shared_weights, grad_out);
            issue_sums(sums, shared_grads);
            if constexpr (kWide)
                issue_grad(grad_key, shared_grads, query);
            else
                issue_grad(grad_key, grad_scores, query);
            device::wgmma_wait<1>();
            device::wgmma_pin(sums.d);
            release(&barriers.grad_out_empty[stage]);
            if constexpr (Tiles::kDirect) {
                add(sums, head, block);
            } else {
                if (step > 0) device::named_barrier_sync(sums_empty_barrier(group), kSumsThreads);
                put_down(sums);
                device::fence_proxy_async();
                device::named_barrier_arrive(sums_full_barrier(group), kSumsThreads);
            }
            device::wgmma_wait<0>();
            device::wgmma_pin(grad_value.d);
            device::wgmma_pin(grad_key.d);
            release(&barriers.query_empty[stage]);
        });
        store(grad_value, 1.0f, arguments.grad_value);
        store(grad_key, arguments.sizes.scale, arguments.grad_key);
    }

    // Through this warp's own rows of the value tile, which only its own product has read.
    BIGOPS_DEVICE void store(Grad& grad, float factor, const Rows& to) const {
        constexpr int kRowChunks = kColumns / 8;
        const auto staging = Tiles::value();
        const int lane = device::lane_id(), first = tile.low + warp_key();
        device::scale_rows(grad, {{factor, factor}});
#pragma unroll
        for (int step = 0; step < kColumns / 16; ++step) {
            uint32_t chunk[4];
            device::as_operand<T>(grad, step, chunk);
            const int column = first_column() + 16 * step + lane / 16 * 8;
            device::stmatrix_x4(staging.at(warp_key() + lane % 16, column), chunk);
        }
        __syncwarp();
        T* out = to.at<T>(this->batch(), tile.head, tile.sequence.key_start + first);
        for (int i = lane; i < 16 * kRowChunks; i += device::kWarp) {
            const int row = i / kRowChunks, column = first_column() + i % kRowChunks * 8;
            if (first + row < tile.sequence.key_len)
                *reinterpret_cast<uint4*>(out + row * to.row + column) =
                    *reinterpret_cast<const uint4*>(staging.at(warp_key() + row, column));
        }
        __syncwarp();
    }
};

template <class Tiles>
__global__ void __launch_bounds__(Tiles::kThreads, 1)
    attention_backward_sm90_kernel(const __grid_constant__ AttentionBackwardArguments arguments) {
    typename Tiles::Barriers& barriers = Tiles::barriers();
    if (threadIdx.x == 0) {
        constexpr uint32_t kWarps = 4 * Tiles::kConsumers;
        device::mbarrier_init(&barriers.key_full, 1);
        device::mbarrier_init(&barriers.value_full, 1);
        for (int stage = 0; stage < Tiles::kStages; ++stage) {
            device::mbarrier_init(&barriers.query_full[stage], 2);  // the tile and its row numbers
            device::mbarrier_init(&barriers.grad_out_full[stage], 2);
            device::mbarrier_init(&barriers.query_empty[stage], kWarps);
            device::mbarrier_init(&barriers.grad_out_empty[stage], kWarps);
        }
        device::fence_mbarrier_init();
        const AttentionSizes& sizes = arguments.sizes;
        const int number = arguments.deterministic ? atomicAdd(arguments.workspace.drawn, 1)
                                                   : static_cast<int>(blockIdx.x);
        const int key_blocks = (sizes.key_len + Tiles::kBlockKeys - 1) / Tiles::kBlockKeys;
        Tiles::key_tile() = {sizes, {sizes, arguments.head_group, key_blocks, number}};
    }
    __syncthreads();
    if (Tiles::key_tile().empty()) return;

    // Warpgroup 0 loads with one warp and adds with two; setmaxnreg is the whole warpgroup's.
    const int warp = device::shuffle(static_cast<int>(threadIdx.x) / device::kWarp, 0);
    if (warp < device::kWarpgroup / device::kWarp) {
        device::registers_decrease<Tiles::kProducerRegisters>();
        if (warp == 0)
            BackwardProducer<Tiles>{arguments}.run();
        else if (!Tiles::kDirect && warp <= Tiles::kConsumers)
            SumsWriter<Tiles>{{arguments}, warp - 1}.run();
    } else {
        device::registers_increase<Tiles::kConsumerRegisters>();
        BackwardConsumer<Tiles>{{arguments}, warp / 4 - 1}.run();
    }
}

}  // namespace bigops::cuda
