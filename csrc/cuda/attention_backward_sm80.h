// Attention's backward pass by mma.sync: FlashAttention-2's scheme (Dao 2023, algorithm 2). A block
// owns keys of one key head and goes through the query tiles, of all heads that share the keys,
// which see them:
//     S = Q K^T, P = exp(S - lse), dV += P^T dO, dP = dO V^T,
//     dS = P * (dP - delta), dK += dS^T Q, dQ += dS K.
// What makes it fast:
// - dK and dV stay in registers, half of their columns in each warp, for 16 or 32 keys;
// - P and dS pass through shared memory, where each product reads them by the rows or by the
//   columns that suit it: 32 x 32 numbers a warp and product need fewer bytes of shared memory than
//   16 x 64;
// - the next queries' cp.async is under way beside the products;
// - dQ is added up in memory by whole lines: in the order in which a warp's registers hold it,
//   which the conversion afterwards undoes.
#pragma once

#include "attention_backward_prepare.h"
#include "attention_forward_sm80.h"

namespace bigops::cuda::sm80 {

template <class T>
struct BackwardArguments {
    Rows<const T> query, key, value, grad_out;
    Rows<T> grad_key, grad_value;
    BackwardWorkspace workspace;
    AttentionSizes sizes;
    int head_group;  // key heads whose tiles are done together, so that their queries stay in L2
    bool deterministic;
};

template <class T_, int kHeadSize_, int kBlockQueries_, int kBlockKeys_, int kWarps_, int kStages_>
struct BackwardTiles {
    using T = T_;
    static constexpr int kHeadSize = kHeadSize_, kWarps = kWarps_, kStages = kStages_;
    static constexpr int kBlockQueries = kBlockQueries_, kBlockKeys = kBlockKeys_;
    static constexpr int kThreads = kWarps * device::kWarp;

    // What of each product's result is a warp's.
    struct Scores {  // queries x keys
        static constexpr int kRows = kBlockQueries / 2, kColumns = kBlockKeys / (kWarps / 2);
    };
    struct Grad {  // keys x head size
        static constexpr int kRows = kBlockKeys / (kWarps / 2), kColumns = kHeadSize / 2;
    };
    struct Sums {  // queries x head size
        static constexpr int kAcross = kHeadSize % (8 * kWarps) == 0 ? kWarps / 2 : 2;
        static constexpr int kRows = kBlockQueries / (kWarps / kAcross);
        static constexpr int kColumns = kHeadSize / kAcross;
    };

    using Query = device::SharedTile<T, kBlockQueries, kHeadSize>;  // and grad_out
    using Key = device::SharedTile<T, kBlockKeys, kHeadSize>;       // and value
    using Weight = device::SharedTile<T, kBlockQueries, kBlockKeys>;
    static constexpr int kValue = Key::kBytes, kQuery = 2 * Key::kBytes;
    static constexpr int kGradOut = kQuery + kStages * Query::kBytes;
    static constexpr int kWeights = kGradOut + kStages * Query::kBytes;
    static constexpr int kGradScores = kWeights + Weight::kBytes;
    static constexpr int kRowNumbers = kGradScores + Weight::kBytes;
    static constexpr int kSharedBytes = kRowNumbers + kStages * 2 * kBlockQueries * 4;

    BIGOPS_DEVICE static char* at(int place) { return device::dynamic_shared() + place; }
    BIGOPS_DEVICE static Key key() { return {at(0)}; }
    BIGOPS_DEVICE static Key value() { return {at(kValue)}; }
    BIGOPS_DEVICE static Query query(int stage) { return {at(kQuery + stage * Query::kBytes)}; }
    BIGOPS_DEVICE static Query grad_out(int stage) { return {at(kGradOut + stage * Query::kBytes)}; }
    BIGOPS_DEVICE static Weight weights() { return {at(kWeights)}; }
    BIGOPS_DEVICE static Weight grad_scores() { return {at(kGradScores)}; }
    BIGOPS_DEVICE static float* lse(int stage) {
        return reinterpret_cast<float*>(at(kRowNumbers)) + stage * 2 * kBlockQueries;
    }
    BIGOPS_DEVICE static float* delta(int stage) { return lse(stage) + kBlockQueries; }
};

// Where the numbers of a tile of dQ lie: warp after warp, its 16 rows by 16 rows, then by a
// fragment's numbers, then by lane.
template <class Tiles>
struct LaneSums {
    using Sums = typename Tiles::Sums;
    static constexpr int kRows = Tiles::kBlockQueries, kHeadSize = Tiles::kHeadSize;
    static constexpr int kCount = Sums::kColumns / 2, kOfWarp = kCount * Sums::kRows / 16 * 32;

    BIGOPS_DEVICE static int first_row(int warp) { return warp / Sums::kAcross * Sums::kRows; }
    BIGOPS_DEVICE static int first_column(int warp) {
        return warp % Sums::kAcross * Sums::kColumns;
    }
    BIGOPS_DEVICE static int row(int place) {
        return first_row(place / kOfWarp) + place % kOfWarp / (32 * kCount) * 16 + place % 32 / 4 +
               place / 64 % 2 * 8;
    }
    BIGOPS_DEVICE static int column(int place) {
        return first_column(place / kOfWarp) + place / 32 % kCount / 4 * 8 + place % 4 * 2 +
               place / 32 % 2;
    }
};

template <class Tiles, bool kCapped>
struct Backward {
    using T = typename Tiles::T;
    static constexpr int kBlockQueries = Tiles::kBlockQueries, kBlockKeys = Tiles::kBlockKeys;
    static constexpr int kHeadSize = Tiles::kHeadSize, kStages = Tiles::kStages;
    using ScoresPart = typename Tiles::Scores;
    using GradPart = typename Tiles::Grad;
    using SumsPart = typename Tiles::Sums;
    using Scores = device::Fragment<ScoresPart::kColumns>;
    using Grad = device::Fragment<GradPart::kColumns>;
    using Sums = device::Fragment<SumsPart::kColumns>;
    static constexpr int kScoreTiles = ScoresPart::kRows / 16, kGradTiles = GradPart::kRows / 16;
    static constexpr int kSumTiles = SumsPart::kRows / 16;
    template <class Tile>
    using Loader = device::RowLoader<Tile, Tiles::kThreads>;

    const BackwardArguments<T>& arguments;
    KeyTileOrder order;
    const AttentionSizes& sizes = arguments.sizes;
    Sequence sequence{sizes, order.batch};
    int batch = sizes.cu_seqlens_q != nullptr ? 0 : order.batch;
    int low = order.key_block * kBlockKeys;
    int keys = sequence.key_len - low;
    QueryBlocks<kBlockQueries> blocks{sequence, low, kBlockKeys};
    // The warp's parts of the products.
    BIGOPS_DEVICE static int warp() {
        return static_cast<int>(device::anew(threadIdx.x)) / device::kWarp;
    }
    int score_row = warp() % 2 * ScoresPart::kRows, score_key = warp() / 2 * ScoresPart::kColumns;
    BIGOPS_DEVICE static int grad_key_row() { return warp() / 2 * GradPart::kRows; }
    BIGOPS_DEVICE static int grad_column() { return warp() % 2 * GradPart::kColumns; }

    // A tile of queries, of all heads that share the keys.
    struct Turn {
        int head, block;
    };
    int group = sizes.group();
    BIGOPS_DEVICE Turn first_turn() const { return {order.head * group, blocks.first}; }
    BIGOPS_DEVICE void advance(Turn& turn) const {
        if (turn.block++ < blocks.last) return;
        turn.block = blocks.first;
        ++turn.head;
    }
    BIGOPS_DEVICE bool is_last(const Turn& turn) const {
        return turn.block == blocks.last && turn.head == (order.head + 1) * group - 1;
    }
    // The tile's first row in the workspace, whose tiles are ours: no division then.
    BIGOPS_DEVICE int64_t workspace_row(const Turn& turn) const {
        const PaddedRows rows = {kBlockQueries, arguments.workspace.rows.total};
        return static_cast<int64_t>(turn.head) * rows.total + rows.start(sizes, order.batch) +
               turn.block * kBlockQueries;
    }

    BIGOPS_DEVICE void load_keys(const Rows<const T>& from, const typename Tiles::Key& to) const {
        Loader<typename Tiles::Key>(from.at(batch, order.head, sequence.key_start + low), from.row)
            .load(to, from.row, keys);
    }
    BIGOPS_DEVICE void load_queries(const Rows<const T>& from, const Turn& turn,
                                    const typename Tiles::Query& to) const {
        const int row = turn.block * kBlockQueries;
        Loader<typename Tiles::Query>(from.at(batch, turn.head, sequence.query_start + row), from.row)
            .load(to, from.row, sequence.query_len - row);
    }
    BIGOPS_DEVICE void load(const Turn& turn, int stage) const {
        load_queries(arguments.query, turn, Tiles::query(stage));
        load_queries(arguments.grad_out, turn, Tiles::grad_out(stage));
        constexpr int kChunks = kBlockQueries / 4;
        const int thread = static_cast<int>(threadIdx.x), chunk = thread % kChunks * 4;
        if (thread < 2 * kChunks) {
            const BackwardWorkspace& workspace = arguments.workspace;
            const float* from = thread < kChunks ? workspace.lse : workspace.delta;
            float* to = thread < kChunks ? Tiles::lse(stage) : Tiles::delta(stage);
            device::cp_async_16(to + chunk, from + workspace_row(turn) + chunk);
        }
        device::cp_async_commit();
    }

    // What a tile's numbers are for the lane's rows.
    BIGOPS_DEVICE device::PerRow of_rows(const float* numbers, int m) const {
        const float* at = numbers + score_row + 16 * m + Scores::row(0);
        return {{at[0], at[8]}};
    }
    // Scores become weights and go, rounded, to shared memory; then a capped score's is multiplied
    // by the cap's derivative, 1 - tanh^2.
    BIGOPS_DEVICE void weigh(Scores& scores, int m, const Turn& turn, int stage) const {
        if (kCapped) cap(scores, sizes.scale, sizes.softcap);
        if (!blocks.whole(turn.block))
            hide(scores, {sequence, turn.block * kBlockQueries + score_row + 16 * m + Scores::row(0)},
                 low + score_key);
        const device::PerRow lse = of_rows(Tiles::lse(stage), m);
        const float unit = sizes.log2_unit();
        Scores weights;
#pragma unroll
        for (int i = 0; i < scores.kCount; ++i)
            weights.d[i] = device::exp2_approx(fmaf(scores.d[i], unit, -lse.of[scores.half(i)]));
        device::store(Tiles::weights(), score_row + 16 * m, score_key, weights);
        const float per_cap = kCapped ? 1.0f / sizes.softcap : 0.0f;
#pragma unroll
        for (int i = 0; i < scores.kCount; ++i) {
            const float tanh = scores.d[i] * per_cap;
            // A hidden score is -infinity, and its weight is 0.
            scores.d[i] = kCapped ? weights.d[i] * fmaxf(0.0f, 1.0f - tanh * tanh) : weights.d[i];
        }
    }

    BIGOPS_DEVICE void grad_scores_of(const Scores (&weights)[kScoreTiles], int stage) const {
        Scores grads[kScoreTiles];
#pragma unroll
        for (Scores& tile : grads) device::clear(tile);
        device::multiply(grads, device::left_rows(Tiles::grad_out(stage), score_row),
                         device::right_rows(Tiles::value(), score_key));
#pragma unroll
        for (int m = 0; m < kScoreTiles; ++m) {
            const device::PerRow delta = of_rows(Tiles::delta(stage), m);
#pragma unroll
            for (int i = 0; i < Scores::kCount; ++i)
                grads[m].d[i] = weights[m].d[i] * (grads[m].d[i] - delta.of[Scores::half(i)]);
            device::store(Tiles::grad_scores(), score_row + 16 * m, score_key, grads[m]);
        }
    }

    // In a fixed order, that of the keys, sums have the same bits in every run. Blocks draw their
    // tiles in that order, so whoever is waited for has begun.
    BIGOPS_DEVICE void await_turn(int* turns, const Turn& turn) const {
        if (threadIdx.x == 0) {
            const int first = sequence.first_key(turn.block * kBlockQueries) / kBlockKeys;
            while (atomicAdd(turns, 0) < order.key_block - first) {
            }
            __threadfence();
        }
        __syncthreads();
    }
    BIGOPS_DEVICE void pass_turn(int* turns) const {
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            atomicAdd(turns, 1);
        }
    }
    BIGOPS_DEVICE void add_sums(const Turn& turn) const {
        using Order = LaneSums<Tiles>;
        Sums sums[kSumTiles];
#pragma unroll
        for (Sums& tile : sums) device::clear(tile);
        device::multiply(
            sums, device::left_rows(Tiles::grad_scores(), Order::first_row(warp())),
            device::right_columns<SumsPart::kColumns>(Tiles::key(), Order::first_column(warp())));
        const int64_t row = workspace_row(turn);
        int* turns = arguments.workspace.turns + static_cast<int>(row / kBlockQueries);
        float* to = arguments.workspace.grad_query + row * kHeadSize + warp() * Order::kOfWarp +
                    device::anew(threadIdx.x) % device::kWarp;
        if (arguments.deterministic) await_turn(turns, turn);
#pragma unroll
        for (int m = 0; m < kSumTiles; ++m)
#pragma unroll
            for (int i = 0; i < Sums::kCount; ++i)
                atomicAdd(to + (m * Sums::kCount + i) * device::kWarp, sums[m].d[i]);
        if (arguments.deterministic) pass_turn(turns);
    }

    BIGOPS_DEVICE void run() const {
        if (keys <= 0) return;  // past the end of a sequence that is shorter than the longest
        Grad grad_key[kGradTiles], grad_value[kGradTiles];
#pragma unroll
        for (int m = 0; m < kGradTiles; ++m) {
            device::clear(grad_key[m]);
            device::clear(grad_value[m]);
        }
        if (blocks.first <= blocks.last) {
            load_keys(arguments.key, Tiles::key());
            load_keys(arguments.value, Tiles::value());
            load(first_turn(), 0);
            add_all(grad_key, grad_value);
            __syncthreads();  // the last reads of keys are done
        }
        store_grad(grad_value, 1.0f, Tiles::value(), arguments.grad_value);
        store_grad(grad_key, sizes.scale, Tiles::key(), arguments.grad_key);
    }

    BIGOPS_DEVICE void add_all(Grad (&grad_key)[kGradTiles], Grad (&grad_value)[kGradTiles]) const {
        Turn turn = first_turn();
        int stage = 0;
#pragma unroll 1
        while (true) {
            const bool last = is_last(turn);
            Turn following = turn;
            advance(following);
            // Everybody's loads are here, and everybody is done with the tile before: with its
            // stage, its weights and their gradients.
            device::cp_async_wait<0>();
            __syncthreads();
            if (kStages == 2 && !last) load(following, stage ^ 1);
            Scores scores[kScoreTiles];
#pragma unroll
            for (Scores& tile : scores) device::clear(tile);
            device::multiply(scores, device::left_rows(Tiles::query(stage), score_row),
                             device::right_rows(Tiles::key(), score_key));
#pragma unroll
            for (int m = 0; m < kScoreTiles; ++m) weigh(scores[m], m, turn, stage);
            grad_scores_of(scores, stage);
            __syncthreads();
            device::multiply(
                grad_value, device::left_columns<GradPart::kRows>(Tiles::weights(), grad_key_row()),
                device::right_columns<GradPart::kColumns>(Tiles::grad_out(stage), grad_column()));
            device::multiply(
                grad_key, device::left_columns<GradPart::kRows>(Tiles::grad_scores(), grad_key_row()),
                device::right_columns<GradPart::kColumns>(Tiles::query(stage), grad_column()));
            if (kStages == 1 && !last) {
                __syncthreads();
                load(following, 0);
            }
            add_sums(turn);
            if (last) return;
            turn = following;
            if (kStages == 2) stage ^= 1;
        }
    }

    // Through the warp's own part of a key tile, so that global memory gets 16 bytes at a time.
    BIGOPS_DEVICE void store_grad(Grad (&grad)[kGradTiles], float factor,
                                  const typename Tiles::Key& tile, const Rows<T>& to) const {
        constexpr int kChunks = GradPart::kColumns / 8;
#pragma unroll
        for (int m = 0; m < kGradTiles; ++m) {
            device::scale_rows(grad[m], {{factor, factor}});
            device::store(tile, grad_key_row() + 16 * m, grad_column(), grad[m]);
        }
        __syncwarp();
        T* out = to.at(batch, order.head, sequence.key_start + low);
#pragma unroll 4
        for (int i = device::lane_id(); i < GradPart::kRows * kChunks; i += device::kWarp) {
            const int row = grad_key_row() + i / kChunks, column = grad_column() + i % kChunks * 8;
            if (row < keys)
                *reinterpret_cast<uint4*>(out + row * to.row + column) =
                    *reinterpret_cast<const uint4*>(tile.at(row, column));
        }
    }
};

// kCapped apart, since code that is not run still takes registers.
template <class Tiles, bool kCapped>
__global__ void __launch_bounds__(Tiles::kThreads) attention_backward_sm80_kernel(
    const __grid_constant__ BackwardArguments<typename Tiles::T> arguments) {
    int number = static_cast<int>(blockIdx.x);
    if (arguments.deterministic) {
        int* drawn = reinterpret_cast<int*>(Tiles::at(0));
        if (threadIdx.x == 0) *drawn = atomicAdd(arguments.workspace.drawn, 1);
        __syncthreads();
        number = *drawn;
        __syncthreads();  // keys come here
    }
    const int key_blocks = (arguments.sizes.key_len + Tiles::kBlockKeys - 1) / Tiles::kBlockKeys;
    const KeyTileOrder order(arguments.sizes, arguments.head_group, key_blocks, number);
    Backward<Tiles, kCapped>{arguments, order}.run();
}

}  // namespace bigops::cuda::sm80
