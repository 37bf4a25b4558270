// Attention forward: out = softmax(scale * query key^T + mask) value, and the log-sum-exp of each
// row. FlashAttention-2 (Dao, 2023) on a CPU: parallel over batch x heads x blocks of queries; a
// block walks once over the keys with an online softmax (Milakov and Gimelshein, 2018), so that
// nothing quadratic exists.
//
// Everything is kept transposed, one query a lane: scores^T = key query^T and
// out^T = value^T weights. Maxima, sums and rescaling of rows are then plain vector arithmetic, and
// keys and values are only ever broadcast, so that fp32 ones are read where they lie; just the
// query block is transposed, once. The query heads that share a key head (GQA) are rows of one
// block and read each key together.
#include <cmath>
#include <type_traits>

#include "attention.h"
#include "attention_bf16.h"
#include "attention_scores.h"
#include "microkernel.h"
#include "threads.h"

namespace bigops {
namespace {

// Rows of a task: fewer, and each key is read too often; more, and a head of 1024 queries no longer
// splits well. Keys of a tile: their weights and values share a 48 KiB L1 at head size 64.
constexpr int64_t kRowBlock = 64;
constexpr int64_t kKeyBlock = 64;

template <class C>
struct ForwardScratch {
    static constexpr int64_t W = kTileLanes<C>;

    struct Panel {  // the rows that the lanes of one tile hold
        C *query, *out, *max, *sum;
    };
    Panel panels[kRowBlock / W];
    C *scores, *keys, *values, *addend;
    int64_t* offsets;

    ForwardScratch(const AttentionProblem& p, Layout& layout) {
        for (Panel& panel : panels) {
            panel.query = layout.take<C>(p.head_size * W);
            panel.out = layout.take<C>(p.value_size * W);
            panel.max = layout.take<C>(W);
            panel.sum = layout.take<C>(W);
        }
        scores = layout.take<C>(kKeyBlock * W);
        keys = layout.take<C>(kKeyBlock * round_up(p.head_size, kLanes<C>));
        values = layout.take<C>(kKeyBlock * round_up(p.value_size, kLanes<C>));
        addend = layout.take<C>(W * kKeyBlock);
        offsets = layout.take<int64_t>(std::max(W, kKeyBlock));
    }
};

// Turns a tile's scores, still to be multiplied by `scale` > 0, into weights and brings the rows'
// maxima (in the same unit) and sums, and what out has gathered under the old maxima, up to date.
template <class C, int V>
void online_softmax(int64_t keys, C scale, C* scores, C* max, C* sum, C* out, int64_t value_size) {
    constexpr int L = kLanes<C>;
    constexpr int64_t W = kTileLanes<C>;
    Vec<C> top[V], reference[V], alpha[V], total[V];
    for (int v = 0; v < V; ++v) top[v] = load(max + v * L);
    for (int64_t k = 0; k < keys; ++k)
        for (int v = 0; v < V; ++v) top[v] = vmax(load(scores + k * W + v * L), top[v]);
    Vec<C> risen = {};
    for (int v = 0; v < V; ++v) {
        const Vec<C> old = load(max + v * L);
        // A row that has seen only -inf so far keeps weights of 2^-inf = 0, not 2^(inf - inf).
        const Vec<C> never = splat(-std::numeric_limits<C>::infinity());
        reference[v] = select(top[v] == never, Vec<C>{}, top[v] * scale);
        alpha[v] = weight(old * scale - reference[v]);
        risen = select(top[v] > old, splat(C(1)), risen);
        store(max + v * L, top[v]);
        total[v] = Vec<C>{};
    }
    for (int64_t k = 0; k < keys; ++k)
        for (int v = 0; v < V; ++v) {
            const Vec<C> p = weight(fma(load(scores + k * W + v * L), splat(scale), -reference[v]));
            total[v] += p;
            store(scores + k * W + v * L, p);
        }
    for (int v = 0; v < V; ++v) store(sum + v * L, fma(load(sum + v * L), alpha[v], total[v]));
    if (bigops::max(risen) > 0)
        for (int64_t d = 0; d < value_size; ++d)
            for (int v = 0; v < V; ++v)
                store(out + d * W + v * L, load(out + d * W + v * L) * alpha[v]);
}

template <class C, int V = 1>
void online_softmax(int64_t vectors, int64_t keys, C scale, C* scores, C* max, C* sum, C* out,
                    int64_t value_size) {
    if constexpr (V < kTileVectors)
        if (vectors > V)
            return online_softmax<C, V + 1>(vectors, keys, scale, scores, max, sum, out, value_size);
    online_softmax<C, V>(keys, scale, scores, max, sum, out, value_size);
}

template <class T>
class Forward {
    using C = compute_t<T>;
    static constexpr int L = kLanes<C>;
    static constexpr int64_t W = kTileLanes<C>;

   public:
    Forward(const AttentionProblem& problem, const View& query, const View& key, const View& value,
            const View& out, const View& lse)
        : p(problem), s(p.sequence(0)), query(query), key(key), value(value),
          mask(p.options.bias), out(out), lse(lse),
          sign(p.options.scale == 0 ? C(0) : static_cast<C>(std::copysign(1.0, p.options.scale))),
          scale(p.options.scale == 0 ? C(1) : static_cast<C>(std::abs(p.options.scale))) {}

    void run() const {
        const int64_t blocks = divide_up(p.group * s.query_len, kRowBlock);
        const int64_t heads = p.batch * p.kv_heads;
        Layout measure(nullptr);
        ForwardScratch<C>(p, measure);
        const int threads = threads_for(p.operations);
        const Scratch memory(measure.size() * threads);
#pragma omp parallel num_threads(threads)
        {
            Layout layout(memory.at(measure.size() * omp_get_thread_num()));
            const ForwardScratch<C> scratch(p, layout);
            // Under a causal mask the last block has the most keys; started last it would leave
            // the other threads idle.
#pragma omp for schedule(dynamic, 1)
            for (int64_t task = 0; task < heads * blocks; ++task) {
                const int64_t head = task % heads;
                const int64_t row = (blocks - 1 - task / heads) * kRowBlock;
                block(head / p.kv_heads, head % p.kv_heads, row, scratch);
            }
        }
    }

   private:
    // What scores are to be multiplied by once a mask, if there is one, has been added.
    C unit() const { return mask ? C(1) : scale; }

    // Row r of a key head is query r / group of its (r % group)-th query head: rows that are
    // neighbours see about as many keys.
    int64_t query_of(int64_t row) const { return row / p.group; }

    void row_offsets(const View& view, int64_t row, int64_t count, int64_t* offsets) const {
        for (int64_t r = 0; r < count; ++r)
            offsets[r] = (row + r) / p.group * view.strides[2] + (row + r) % p.group * view.strides[1];
    }

    static int64_t head_offset(const View& view, int64_t b, int64_t h) {
        return b * view.strides[0] + h * view.strides[1];
    }

    void block(int64_t b, int64_t kv_head, int64_t first_row, const ForwardScratch<C>& scratch) const {
        const int64_t rows = std::min(kRowBlock, p.group * s.query_len - first_row);
        const int64_t limit = s.end_key(query_of(first_row + rows - 1));
        const auto head = kv_head * p.group;
        for (int64_t r = 0; r < rows; r += W) {
            const auto& panel = scratch.panels[r / W];
            row_offsets(query, first_row + r, std::min(W, rows - r), scratch.offsets);
            pack_transposed<T>({query.ptr<T>() + head_offset(query, b, head), scratch.offsets,
                                query.strides[3]},
                               std::min(W, rows - r), p.head_size, sign, panel.query, W);
            for (int64_t lane = 0; lane < W; lane += L) {
                store(panel.max + lane, splat(-std::numeric_limits<C>::infinity()));
                store(panel.sum + lane, Vec<C>{});
            }
            for (int64_t at = 0; at < p.value_size * W; at += L) store(panel.out + at, Vec<C>{});
        }
        for (int64_t j = 0; j < limit; j += kKeyBlock) {
            const int64_t keys = std::min(kKeyBlock, limit - j);
            const Tile k = tile(key, b, kv_head, j, keys, scratch.keys, scratch.offsets);
            const Tile v = tile(value, b, kv_head, j, keys, scratch.values, scratch.offsets);
            for (int64_t r = 0; r < rows; r += W) {
                const auto& panel = scratch.panels[r / W];
                const int64_t count = std::min(W, rows - r);
                const int64_t vectors = divide_up(count, L);
                tile_matmul(keys, vectors, p.head_size, k.data, k.pitch, k.step, panel.query, W,
                            scratch.scores, W, false);
                if (mask) add_mask(b, head, first_row + r, count, j, keys, scratch);
                if (s.end_key(query_of(first_row + r)) < j + keys)
                    hide_future(first_row + r, count, j, keys, scratch.scores);
                online_softmax<C>(vectors, keys, unit(), scratch.scores, panel.max, panel.sum,
                                  panel.out, p.value_size);
                tile_matmul(p.value_size, vectors, keys, v.data, v.step, v.pitch, scratch.scores, W,
                            panel.out, W, true);
            }
        }
        for (int64_t r = 0; r < rows; r += W)
            finish(b, head, first_row + r, std::min(W, rows - r), scratch.panels[r / W],
                   scratch.offsets);
    }

    struct Tile {
        const C* data;
        int64_t pitch, step;
    };

    Tile tile(const View& view, int64_t b, int64_t h, int64_t j, int64_t count, C* packed,
              int64_t* offsets) const {
        const T* first = view.ptr<T>() + head_offset(view, b, h) + j * view.strides[2];
        if constexpr (std::is_same_v<T, C>) {
            if (view.strides[3] == 1) return {first, view.strides[2], 1};
        }
        const int64_t pitch = round_up(view.shape[3], L);
        for (int64_t r = 0; r < count; ++r) offsets[r] = r * view.strides[2];
        pack_rows<T>({first, offsets, view.strides[3]}, count, view.shape[3], packed, pitch);
        return {packed, pitch, 1};
    }

    void add_mask(int64_t b, int64_t head, int64_t row, int64_t count, int64_t j, int64_t keys,
                  const ForwardScratch<C>& scratch) const {
        // One row for all queries (a padding mask) needs no transposing.
        if (mask->strides[1] == 0 && mask->strides[2] == 0) {
            addend_row(p, p.sequence(b), head, 0, j, keys, C(1), scratch.addend);
            for (int64_t k = 0; k < keys; ++k)
                for (int64_t lane = 0; lane < W; lane += L) {
                    C* at = scratch.scores + k * W + lane;
                    store(at, fma(load(at), splat(scale), splat(scratch.addend[k])));
                }
            return;
        }
        for (int64_t r = 0; r < count; ++r)
            addend_row(p, p.sequence(b), head + (row + r) % p.group, query_of(row + r), j, keys,
                       C(1), scratch.addend + r * kKeyBlock);
        for (int64_t k = 0; k < keys; k += L)
            for (int64_t lane = 0; lane < count; lane += L) {
                Vec<C> square[L];
                for (int i = 0; i < L; ++i)
                    square[i] = load(scratch.addend + (lane + i) * kKeyBlock + k);
                detail::transpose_square<C>(square);
                for (int i = 0; i < L; ++i) {
                    C* at = scratch.scores + (k + i) * W + lane;
                    store(at, fma(load(at), splat(scale), square[i]));
                }
            }
    }

    void hide_future(int64_t row, int64_t count, int64_t j, int64_t keys, C* scores) const {
        C seen[W] = {};
        for (int64_t r = 0; r < count; ++r)
            seen[r] = static_cast<C>(std::clamp<int64_t>(s.end_key(query_of(row + r)) - j, 0, keys));
        for (int64_t k = 0; k < keys; ++k)
            for (int64_t lane = 0; lane < W; lane += L) {
                C* at = scores + k * W + lane;
                const Vec<C> never = splat(-std::numeric_limits<C>::infinity());
                store(at, select(load(seen + lane) > static_cast<C>(k), load(at), never));
            }
    }

    void finish(int64_t b, int64_t head, int64_t row, int64_t count,
                const typename ForwardScratch<C>::Panel& panel, int64_t* offsets) const {
        for (int64_t lane = 0; lane < count; lane += L) {
            const Vec<C> sum = load(panel.sum + lane);
            const Vec<C> inverse = select(sum == Vec<C>{}, Vec<C>{}, splat(C(1)) / sum);
            for (int64_t d = 0; d < p.value_size; ++d) {
                C* at = panel.out + d * W + lane;
                store(at, load(at) * inverse);
            }
        }
        row_offsets(out, row, count, offsets);
        unpack_transposed<T>(panel.out, W, count, p.value_size,
                             {out.ptr<T>() + head_offset(out, b, head), offsets, out.strides[3]});
        for (int64_t r = 0; r < count; ++r) {
            const double log_sum = std::log(static_cast<double>(panel.sum[r]));
            lse.ptr<C>()[head_offset(lse, b, head + (row + r) % p.group) +
                         query_of(row + r) * lse.strides[2]] =
                static_cast<C>(static_cast<double>(panel.max[r] * unit()) + log_sum);
        }
    }

    const AttentionProblem& p;
    const Sequence s;
    const View &query, &key, &value;
    const View* mask;
    const View &out, &lse;
    // p.scale = sign * scale, scale > 0. The sign goes into the packed query, where it rounds
    // nothing, the scale to the scores: backward does so too, and exp(score - lse) wants the score
    // that lse was summed from.
    const C sign, scale;
};

}  // namespace

void attention_forward(const View& query, const View& key, const View& value,
                       const AttentionOptions& options, const View& out, const View& lse) {
    const AttentionProblem p = attention_problem(query, key, value, options);
    require_rows(query, value, out, lse);
    if (query.dtype == DType::bf16 && attention_bf16_available())
        return attention_forward_bf16(query, key, value, options, out, lse);
    require(options.left < 0 && options.softcap == 0 && options.dropout_p == 0 && !options.sinks &&
                !options.alibi_slopes && !p.packed(),
            "not served yet");
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
