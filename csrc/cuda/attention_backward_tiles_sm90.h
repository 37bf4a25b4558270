// Attention's backward pass on Hopper: what a call is, which keys a block owns and which query tiles it goes
// through, and where everything lies in shared memory.
#pragma once

#include "attention_backward_prepare.h"
#include "attention_sm90.h"

namespace bigops::cuda {

// A tensor's rows; strides count elements.
struct Rows {
    void* data;
    int64_t batch, head, row;

    template <class T>
    BIGOPS_DEVICE T* at(int of_batch, int of_head, int of_row) const {
        return static_cast<T*>(data) + of_batch * batch + of_head * head + of_row * row;
    }
};

struct AttentionBackwardArguments {
    device::TensorMap query, grad_out, key, value;
    BackwardWorkspace workspace;
    AttentionSizes sizes;
    int head_group;  // key heads whose tiles are done together, so that their queries stay in L2
    bool deterministic;
    // For the last rows of packed sequences, see load_tail.
    Rows query_data, grad_out_data, key_data, value_data;
    Rows grad_key, grad_value;
};

// A block's keys, and the query tiles that see them.
template <int kBlockQueries, int kBlockKeys>
struct KeyTile {
    int head, batch;
    Sequence sequence;
    int low;  // the first key
    QueryBlocks<kBlockQueries> blocks;

    BIGOPS_DEVICE KeyTile(const AttentionSizes& sizes, const KeyTileOrder& order)
        : head(order.head), batch(order.batch), sequence(sizes, order.batch),
          low(order.key_block * kBlockKeys), blocks(sequence, low, kBlockKeys) {}
    // Past the end of a packed sequence that is shorter than the longest.
    BIGOPS_DEVICE bool empty() const { return low >= sequence.key_len; }
    BIGOPS_DEVICE bool unseen() const { return blocks.last < blocks.first; }
};

// How two warpgroups share the product dQ = dS K of a query tile.
enum class Share {
    rows,                // 64 queries each
    columns,             // half of the columns each
    columns_transposed,  // the same as dQ^T = K^T dS^T, for tiles that are no multiple of 64 queries
};

template <class T_, int kHeadSize_, int kBlockQueries_, bool kCapped_>
struct BackwardTiles {
    using T = T_;
    static constexpr bool kCapped = kCapped_;  // scores have a softcap, whose derivative takes registers
    static constexpr int kHeadSize = kHeadSize_, kBlockQueries = kBlockQueries_;
    // Of a wide head a warpgroup's registers hold half of the gradients' columns: two warpgroups then share
    // 64 keys, and weights pass through shared memory, too.
    static constexpr bool kWide = kHeadSize > 128;
    // dQ goes to memory from registers, where shared memory has no room for it.
    static constexpr bool kDirect = kWide;
    static constexpr int kConsumers = 2, kBlockKeys = kWide ? 64 : 64 * kConsumers, kStages = 2;
    static constexpr int kThreads = device::kWarpgroup * (kConsumers + 1);
    // setmaxnreg: 64 K registers are shared out; the rest needs few.
    static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
    static constexpr Share kShare = kBlockQueries == 128      ? Share::rows
                                    : kBlockQueries % 64 == 0 ? Share::columns
                                                              : Share::columns_transposed;

    using Query = device::SharedTile<T, kBlockQueries, kHeadSize>;  // and grad_out
    using Key = device::SharedTile<T, kBlockKeys, kHeadSize>;       // and value
    using GradScores = device::SharedTile<T, kBlockQueries, kBlockKeys>;
    static constexpr int kSums = kBlockQueries * kHeadSize / kConsumers;  // of one warpgroup

    struct Barriers {
        uint64_t key_full, value_full;
        uint64_t query_full[kStages], query_empty[kStages];
        uint64_t grad_out_full[kStages], grad_out_empty[kStages];
    };
    using KeyTile = cuda::KeyTile<kBlockQueries, kBlockKeys>;
    static constexpr int kGradOut = kStages * Query::kBytes, kKey = 2 * kGradOut;
    static constexpr int kValue = kKey + Key::kBytes, kGradScores = kValue + Key::kBytes;
    static constexpr int kWeights = kGradScores + kStages * GradScores::kBytes;
    static constexpr int kSumsAt = kWeights + (kWide ? kStages * GradScores::kBytes : 0);
    static constexpr int kRowNumbers = kSumsAt + (kDirect ? 0 : kConsumers * kSums * 4);
    static constexpr int kBarriers = kRowNumbers + 2 * kStages * kBlockQueries * 4;
    static constexpr int kKeyTile = kBarriers + static_cast<int>(sizeof(Barriers));
    static constexpr int kSharedBytes = kKeyTile + static_cast<int>(sizeof(KeyTile));

    BIGOPS_DEVICE static char* at(int place) { return device::dynamic_shared() + place; }
    BIGOPS_DEVICE static Query query(int stage) { return {at(stage * Query::kBytes)}; }
    BIGOPS_DEVICE static Query grad_out(int stage) { return {at(kGradOut + stage * Query::kBytes)}; }
    BIGOPS_DEVICE static Key key() { return {at(kKey)}; }
    BIGOPS_DEVICE static Key value() { return {at(kValue)}; }
    // Two, or a warpgroup would have to wait before it writes until the other has read what was before.
    BIGOPS_DEVICE static GradScores grad_scores(int stage) {
        return {at(kGradScores + stage * GradScores::kBytes)};
    }
    BIGOPS_DEVICE static GradScores weights(int stage) {
        return {at(kWeights + stage * GradScores::kBytes)};
    }
    BIGOPS_DEVICE static float* sums(int group) {
        return reinterpret_cast<float*>(at(kSumsAt)) + group * kSums;
    }
    BIGOPS_DEVICE static float* lse(int stage) {
        return reinterpret_cast<float*>(at(kRowNumbers)) + stage * kBlockQueries;
    }
    BIGOPS_DEVICE static float* delta(int stage) { return lse(kStages + stage); }
    BIGOPS_DEVICE static Barriers& barriers() {
        return *reinterpret_cast<Barriers*>(at(kBarriers));
    }
    // Not in registers, of which there are none to spare.
    BIGOPS_DEVICE static KeyTile& key_tile() { return *reinterpret_cast<KeyTile*>(at(kKeyTile)); }
};

// Where the numbers of a tile of dQ lie: warpgroup after warpgroup, then by fours of a fragment's numbers,
// then by thread.
template <class Tiles>
struct FragmentSums {
    static constexpr int kRows = Tiles::kBlockQueries, kHeadSize = Tiles::kHeadSize;

    BIGOPS_DEVICE static int group(int place) { return place / Tiles::kSums; }
    BIGOPS_DEVICE static int thread(int place) { return place / 4 % device::kWarpgroup; }
    BIGOPS_DEVICE static int fragment_row(int place) {
        return thread(place) / device::kWarp * 16 + thread(place) % device::kWarp / 4 +
               place / 2 % 2 * 8;
    }
    BIGOPS_DEVICE static int fragment_column(int place) {
        return place % Tiles::kSums / (4 * device::kWarpgroup) * 8 + thread(place) % 4 * 2 + place % 2;
    }
    BIGOPS_DEVICE static int row(int place) {
        if (Tiles::kShare == Share::columns_transposed) return fragment_column(place);
        return fragment_row(place) + (Tiles::kShare == Share::rows ? 64 * group(place) : 0);
    }
    BIGOPS_DEVICE static int column(int place) {
        const int first = group(place) * (kHeadSize / Tiles::kConsumers);
        if (Tiles::kShare == Share::columns_transposed) return first + fragment_row(place);
        return fragment_column(place) + (Tiles::kShare == Share::columns ? first : 0);
    }
};

}  // namespace bigops::cuda
