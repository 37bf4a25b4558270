// Attention forward: out = softmax(scale * query key^T + bias) value, and the log-sum-exp of each
// row. FlashAttention-2 (Dao, 2023) on a CPU: parallel over batch x heads x blocks of queries; a
// block walks once over the keys with an online softmax (Milakov and Gimelshein, 2018), so that
// nothing quadratic exists.
//
// Everything is kept transposed, one query a lane: scores^T = key query^T and
// out^T = value^T weights. Maxima, sums and rescaling of rows are then plain vector arithmetic, and
// keys and values are only ever broadcast, so that only the
// query block is ever transposed, once. The query heads that share a key head (GQA) are rows of one
// block and read each key together.
#include <cmath>
#include <type_traits>

#include "attention.h"
#include "attention_bf16.h"
#include "attention_panel.h"
#include "attention_rows.h"
#include "threads.h"

namespace bigops {
namespace {

// Keys of a tile: their weights and values share a 48 KiB L1 at head size 64.
constexpr int64_t kKeyBlock = 64;
static_assert(kKeyBlock % kDropoutKeys == 0);

// Rows of a task, which reads its keys and values once: the more the better (256 are 10% faster
// than 64), as long as every thread has tasks enough.
constexpr int64_t kMostRows = 256, kFewestRows = 64;
constexpr int64_t kTasksOfThread = 8;

template <class C>
struct ForwardScratch {
    static constexpr int64_t W = kTileLanes<C>;

    std::vector<Panel<C>> panels;
    C *scores, *keys, *values, *addend;
    int64_t* offsets;

    ForwardScratch(const AttentionProblem& p, int64_t rows, Layout& layout) {
        for (int64_t r = 0; r < rows; r += W) panels.emplace_back(p, layout);
        scores = layout.take<C>(kKeyBlock * W);
        keys = layout.take<C>(kKeyBlock * packed_pitch<C>(p.head_size));
        values = layout.take<C>(kKeyBlock * packed_pitch<C>(p.value_size));
        addend = layout.take<C>(W * kKeyBlock);
        offsets = layout.take<int64_t>(std::max(W, kKeyBlock));
    }
};

template <class T>
class Forward {
    using C = compute_t<T>;
    static constexpr int L = kLanes<C>;
    static constexpr int64_t W = kTileLanes<C>;
    static constexpr C kInfinity = std::numeric_limits<C>::infinity();

   public:
    Forward(const AttentionProblem& problem, const View& query, const View& key, const View& value,
            const View& out, const View& lse)
        : p(problem), query(query), key(key), value(value), out(out), lse(lse),
          dropout(p.options.seed, p.options.dropout_p),
          sign(p.options.scale == 0 ? C(0) : static_cast<C>(std::copysign(1.0, p.options.scale))),
          scale(p.options.scale == 0 ? C(1) : static_cast<C>(std::abs(p.options.scale))),
          to_score(p.options, p.options.scale == 0 ? 1.0 : std::abs(p.options.scale)),
          maps(p.adds_to_scores() || p.options.softcap > 0) {}

    void run() const {
        const int threads = threads_for(p.operations);
        int64_t rows = kMostRows;
        std::vector<RowBlock> blocks = row_blocks(rows);
        while (rows > kFewestRows &&
               static_cast<int64_t>(blocks.size()) * p.kv_heads < kTasksOfThread * threads)
            blocks = row_blocks(rows /= 2);
        // Under a causal mask the last block has the most keys; started last it would leave the
        // other threads idle.
        std::stable_sort(blocks.begin(), blocks.end(), [&](const RowBlock& a, const RowBlock& b) {
            return keys_of(a, rows) > keys_of(b, rows);
        });
        const auto tasks = static_cast<int64_t>(blocks.size()) * p.kv_heads;
        Layout measure(nullptr);
        ForwardScratch<C>(p, rows, measure);
        const Arena memory(measure.size() * threads);
#pragma omp parallel num_threads(threads)
        {
            Layout layout(memory.at(measure.size() * omp_get_thread_num()));
            ForwardScratch<C> scratch(p, rows, layout);
#pragma omp for schedule(dynamic, 1) nowait
            for (int64_t task = 0; task < tasks; ++task) {
                const RowBlock& at = blocks[static_cast<size_t>(task / p.kv_heads)];
                block(p.sequence(at.sequence), task % p.kv_heads, at.first, rows, scratch);
            }
        }
        for_rows_of_no_sequence(p, p.options.cu_seqlens_q, p.query_rows, [&](int64_t row) {
            clear_row<T>(out, row);
            for (int64_t h = 0; h < p.heads; ++h)
                lse.ptr<C>()[h * lse.strides[1] + row * lse.strides[2]] = -kInfinity;
        });
    }

   private:
    std::vector<RowBlock> row_blocks(int64_t rows) const {
        return blocks_of(p, rows, [&](const Sequence& s) { return s.query_len * p.group; });
    }

    int64_t keys_of(const RowBlock& block, int64_t rows) const {
        const Sequence s = p.sequence(block.sequence);
        const int64_t last = std::min(block.first + rows, s.query_len * p.group) - 1;
        return s.end_key(query_of(last)) - s.first_key(query_of(block.first));
    }

    // What scores are still to be multiplied by when softmax gets them.
    C unit() const { return maps ? C(1) : scale; }

    // Row r of a key head is query r / group of its (r % group)-th query head: rows that are
    // neighbours see about as many keys.
    int64_t query_of(int64_t row) const { return row / p.group; }

    void row_offsets(const View& view, int64_t row, int64_t count, int64_t* offsets) const {
        for (int64_t r = 0; r < count; ++r)
            offsets[r] =
                query_of(row + r) * view.strides[2] + (row + r) % p.group * view.strides[1];
    }

    void start(const Sequence& s, int64_t head, int64_t row, int64_t count, Panel<C>& panel,
               int64_t* offsets) const {
        row_offsets(query, row, count, offsets);
        pack_transposed<T>({s.query_row<const T>(query, head, 0), offsets, query.strides[3]}, count,
                           p.head_size, sign, panel.query, W);
        panel.clear(p.value_size);
        panel.count = count;
        panel.vectors = divide_up(count, L);
        panel.key_begin = s.first_key(query_of(row)) / kKeyBlock * kKeyBlock;
        panel.key_end = s.end_key(query_of(row + count - 1));
        if (!p.options.alibi_slopes && !dropout) return;
        for (int64_t r = 0; r < W; ++r) {
            const int64_t at = row + std::min(r, count - 1);
            const int64_t h = head + at % p.group;
            panel.slope[r] = -p.alibi_slope<C>(s.index, h);
            panel.position[r] = static_cast<C>(query_of(at) + s.alignment());
            panel.number[r] = static_cast<uint32_t>(query_of(at));
            panel.plane[r] = static_cast<uint32_t>(s.index * p.heads + h);
        }
    }

    void block(const Sequence& s, int64_t kv_head, int64_t first_row, int64_t most_rows,
               ForwardScratch<C>& scratch) const {
        const int64_t rows = std::min(most_rows, p.group * s.query_len - first_row);
        const int64_t head = kv_head * p.group;
        auto& panels = scratch.panels;
        for (int64_t r = 0; r < rows; r += W)
            start(s, head, first_row + r, std::min(W, rows - r), panels[r / W], scratch.offsets);
        const int64_t end = panels[(rows - 1) / W].key_end;
        // Worth it where many rows read them: 7% at head size 128, 14% at 256.
        const bool copies = rows >= kMostRows / 2;
        for (int64_t j = panels[0].key_begin; j < end; j += kKeyBlock) {
            const int64_t keys = std::min(kKeyBlock, end - j);
            const auto k = tile_of(key, s.key_row<const T>(key, kv_head, j), keys, scratch.keys,
                                   scratch.offsets, copies);
            const auto v = tile_of(value, s.key_row<const T>(value, kv_head, j), keys,
                                   scratch.values, scratch.offsets, copies);
            for (int64_t r = 0; r < rows; r += W) {
                const Panel<C>& panel = panels[r / W];
                const int64_t seen = std::min(keys, panel.key_end - j);
                if (seen <= 0 || j < panel.key_begin) continue;
                tile_matmul(seen, panel.vectors, p.head_size, k.data, k.pitch, 1, panel.query, W,
                            scratch.scores, W, false);
                if (maps) map_scores(s, head, first_row + r, j, seen, panel, scratch);
                hide_unseen(s, first_row + r, j, seen, panel, scratch.scores);
                online_softmax(seen, unit(), scratch.scores, panel, p.value_size);
                if (dropout) drop_weights(dropout, j, seen, panel, scratch.scores);
                tile_matmul(p.value_size, panel.vectors, seen, v.data, 1, v.pitch, scratch.scores,
                            W, panel.out, W, true);
            }
        }
        for (int64_t r = 0; r < rows; r += W)
            finish(s, head, first_row + r, panels[r / W], scratch.offsets);
    }

    // Products become scores.
    void map_scores(const Sequence& s, int64_t head, int64_t row, int64_t j, int64_t keys,
                    const Panel<C>& panel, const ForwardScratch<C>& scratch) const {
        const View* bias = p.options.bias;
        const auto each = [&](int64_t k, int64_t lane, Vec<C> addend) {
            C* at = scratch.scores + k * W + lane;
            if (p.options.alibi_slopes) addend += panel.alibi(lane, j + k);
            store(at, to_score(load(at), addend));
        };
        // One row for all queries (a padding mask) needs no transposing, nor does none.
        if (!bias || (bias->strides[1] == 0 && bias->strides[2] == 0)) {
            std::fill_n(scratch.addend, keys, C(0));
            if (bias) bias_row(p, s, head, 0, j, keys, scratch.addend, 0);
            for (int64_t k = 0; k < keys; ++k)
                for (int64_t lane = 0; lane < panel.count; lane += L)
                    each(k, lane, splat(scratch.addend[k]));
            return;
        }
        for (int64_t r = 0; r < panel.count; ++r)
            bias_row(p, s, head + (row + r) % p.group, query_of(row + r), j, keys,
                     scratch.addend + r * kKeyBlock, kKeyBlock);
        for (int64_t k = 0; k < keys; k += L)
            for (int64_t lane = 0; lane < panel.count; lane += L) {
                Vec<C> square[L];
                for (int i = 0; i < L; ++i)
                    square[i] = load(scratch.addend + (lane + i) * kKeyBlock + k);
                detail::transpose_square<C>(square);
                for (int i = 0; i < L; ++i) each(k + i, lane, square[i]);
            }
    }

    void hide_unseen(const Sequence& s, int64_t row, int64_t j, int64_t keys, const Panel<C>& panel,
                     C* scores) const {
        const int64_t last = query_of(row + panel.count - 1);
        if (s.end_key(query_of(row)) >= j + keys && s.first_key(last) <= j) return;
        C first[W], end[W];
        for (int64_t r = 0; r < W; ++r) {
            const int64_t i = std::min(query_of(row + r), last);
            first[r] = static_cast<C>(std::clamp<int64_t>(s.first_key(i) - j, 0, keys));
            end[r] = static_cast<C>(std::clamp<int64_t>(s.end_key(i) - j, 0, keys));
        }
        hide_keys<C>(keys, first, end, scores);
    }

    void finish(const Sequence& s, int64_t head, int64_t row, const Panel<C>& panel,
                int64_t* offsets) const {
        C factors[W] = {};
        for (int64_t r = 0; r < panel.count; ++r) {
            const int64_t h = head + (row + r) % p.group;
            const C top = panel.max[r] * unit(), sink = p.sink<C>(h);
            double log_of = static_cast<double>(top), sum = static_cast<double>(panel.sum[r]);
            factors[r] = sum == 0 ? C(0) : C(1) / panel.sum[r];
            if (sink > -kInfinity) {  // one more score, seen by all, without a value
                log_of = std::max(log_of, static_cast<double>(sink));
                const double shrink = sum == 0 ? 0 : std::exp(static_cast<double>(top) - log_of);
                sum = sum * shrink + std::exp(static_cast<double>(sink) - log_of);
                factors[r] = static_cast<C>(shrink / sum);
            }
            s.query_row<C>(lse, h, query_of(row + r))[0] = static_cast<C>(log_of + std::log(sum));
            factors[r] *= static_cast<C>(dropout.factor());
        }
        for (int64_t d = 0; d < p.value_size; ++d)
            for (int64_t lane = 0; lane < panel.count; lane += L) {
                C* at = panel.out + d * W + lane;
                store(at, load(at) * load(factors + lane));
            }
        row_offsets(out, row, panel.count, offsets);
        unpack_transposed<T>(panel.out, W, panel.count, p.value_size,
                             {s.query_row<T>(out, head, 0), offsets, out.strides[3]});
    }

    const AttentionProblem& p;
    const View &query, &key, &value, &out, &lse;
    const Dropout dropout;
    // The options' scale is sign * scale, scale > 0. The sign goes into the packed query, where it
    // rounds nothing, the scale to the scores: backward does so too, and exp(score - lse) wants the
    // score that lse was summed from.
    const C sign, scale;
    const ScoreMap<C> to_score;
    const bool maps;  // products take more than a factor to become scores
};

}  // namespace

void attention_forward(const View& query, const View& key, const View& value,
                       const AttentionOptions& options, const View& out, const View& lse) {
    AttentionProblem p = attention_problem(query, key, value, options);
    require_rows(query, value, out, lse);
    if (query.dtype == DType::bf16 && attention_bf16_available())
        return attention_forward_bf16(p, query, key, value, out, lse);
    std::vector<bool> done;
    if (query.dtype == DType::f32) done = attention_forward_split(p, query, key, value, out, lse);
    if (!done.empty()) p.elsewhere = &done;
    if (!p.any_here()) return;
    const auto run = [&]<class T>(T) { Forward<T>(p, query, key, value, out, lse).run(); };
    switch (query.dtype) {
        case DType::f64: return run(double{});
        case DType::f32: return run(float{});
        case DType::bf16: return run(bf16{});
        case DType::f16: return run(f16{});
        default: require(false, "query must be floating point");
    }
}

}  // namespace bigops
