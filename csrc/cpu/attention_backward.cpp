// Attention backward. With P = exp(scale * query key^T + mask - lse), which needs no second softmax,
//   grad_value = P^T grad_out
//   dS         = P * (grad_out value^T - delta),  delta_i = sum_d grad_out_id out_id - grad_lse_i
//   grad_query = scale * dS key,  grad_key = scale * dS^T query
// FlashAttention-2's backward (Dao, 2023): a task is a block of keys of one head; it walks over the
// queries that see it and keeps grad_key and grad_value of its block to itself. Keys are the lanes:
// key^T and value^T are packed once per task, queries and grad_out are only broadcast, and P and dS
// come out just as the three products that use them want them.
//
// grad_query gathers from every task of a head. Instead of atomics or of computing scores twice, a
// block of queries takes its key blocks in turn, first to last: a task waits until the one before
// it has passed. Tasks start in that order too, so the oldest running one never waits and the
// others follow a block behind; the sum's order, hence every bit, is the same for any number of
// threads. One head keeps all threads busy.
#include <atomic>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "attention_bf16.h"
#include "attention_scores.h"
#include "microkernel.h"
#include "threads.h"

namespace bigops {
namespace {

// Queries of a tile: P and dS, 16 KiB each at 64 keys, and the rows they multiply alternate in L1.
constexpr int64_t kQueryBlock = 64;

template <class C>
struct BackwardScratch {
    static constexpr int64_t W = kTileLanes<C>;
    // key^T, value^T, keys, grad_key^T, grad_value^T of a task; P, dS, query, grad_out of a tile
    C *key_t, *value_t, *keys, *grad_key_t, *grad_value_t, *p, *ds, *queries, *grads, *addend;
    int64_t* offsets;

    BackwardScratch(const AttentionProblem& p_, Layout& layout) {
        const int64_t d = round_up(p_.head_size, kLanes<C>), dv = round_up(p_.value_size, kLanes<C>);
        key_t = layout.take<C>(d * W);
        value_t = layout.take<C>(dv * W);
        keys = layout.take<C>(W * d);
        grad_key_t = layout.take<C>(d * W);
        grad_value_t = layout.take<C>(dv * W);
        p = layout.take<C>(kQueryBlock * W);
        ds = layout.take<C>(kQueryBlock * W);
        queries = layout.take<C>(kQueryBlock * d);
        grads = layout.take<C>(kQueryBlock * dv);
        addend = layout.take<C>(W);
        offsets = layout.take<int64_t>(std::max(kQueryBlock, W));
    }
};

template <class T>
class Backward {
    using C = compute_t<T>;
    using Turn = std::atomic<int32_t>;
    static constexpr int L = kLanes<C>;
    static constexpr int64_t W = kTileLanes<C>;
    static constexpr C kInfinity = std::numeric_limits<C>::infinity();

   public:
    Backward(const AttentionProblem& problem, const View& grad_out, const View* grad_lse,
             const View& query, const View& key, const View& value, const View& out,
             const View& lse, const AttentionGradients& gradients)
        : p(problem), sequence(p.sequence(0)), grad_out(grad_out), grad_lse(grad_lse), query(query),
          key(key), value(value), mask(p.options.bias), out(out), lse(lse),
          grad_query(gradients.query), grad_key(gradients.key), grad_value(gradients.value) {}

    void run() {
        query_blocks = divide_up(sequence.query_len, kQueryBlock);
        const int64_t rows = p.batch * p.heads * sequence.query_len;
        // grad_query is summed up in place where it can hold the sum.
        in_place = grad_query && std::is_same_v<T, C> && grad_query->strides[3] == 1 &&
                   p.head_size % L == 0;
        sum_pitch = round_up(p.head_size, L);
        const Scratch row_memory(rows * 2 * static_cast<int64_t>(sizeof(C)));
        const Scratch sum_memory(grad_query && !in_place
                                     ? rows * sum_pitch * static_cast<int64_t>(sizeof(C))
                                     : 0);
        lse_of_row = reinterpret_cast<C*>(row_memory.at(0));
        delta_of_row = lse_of_row + rows;
        sums = reinterpret_cast<C*>(sum_memory.at(0));
        std::vector<Turn> turn_memory(
            static_cast<size_t>(grad_query ? p.batch * p.heads * query_blocks : 0));
        turns = turn_memory.data();

        Layout measure(nullptr);
        BackwardScratch<C>(p, measure);
        const int threads = threads_for(2.5 * p.operations);
        const Scratch memory(measure.size() * threads);
        const int64_t kv_heads = p.batch * p.kv_heads;
        const int64_t tasks = divide_up(sequence.key_len, W) * kv_heads;
        std::atomic<int64_t> next_task = 0;
#pragma omp parallel num_threads(threads)
        {
            Layout layout(memory.at(measure.size() * omp_get_thread_num()));
            const BackwardScratch<C> scratch(p, layout);
#pragma omp for collapse(2)
            for (int64_t head = 0; head < p.batch * p.heads; ++head)
                for (int64_t i = 0; i < sequence.query_len; i += W)
                    prepare_rows(head / p.heads, head % p.heads, i, scratch);
            // Handed out one by one and in order, which the turns rely on; under a causal mask
            // that is also heaviest first.
            for (int64_t task = next_task++; task < tasks; task = next_task++)
                key_block(task % kv_heads / p.kv_heads, task % p.kv_heads, task / kv_heads, scratch);
        }
    }

   private:
    static int64_t offset(const View& view, int64_t b, int64_t h, int64_t i) {
        return b * view.strides[0] + h * view.strides[1] + i * view.strides[2];
    }

    int64_t row_of(int64_t b, int64_t h, int64_t i) const {
        return (b * p.heads + h) * sequence.query_len + i;
    }

    // lse and delta of up to W queries, one a lane. delta is summed up as tile_matmul sums up
    // grad_out value^T: where a row's weight is all on one key, out is that key's value, and what
    // must cancel does, to the last bit.
    void prepare_rows(int64_t b, int64_t h, int64_t i, const BackwardScratch<C>& s) const {
        const int64_t rows = std::min(W, sequence.query_len - i);
        const auto transpose = [&](const View& view, C* packed) {
            for (int64_t r = 0; r < rows; ++r) s.offsets[r] = r * view.strides[2];
            pack_transposed<T>({view.ptr<T>() + offset(view, b, h, i), s.offsets, view.strides[3]},
                               rows, p.value_size, C(1), packed, W);
        };
        C *grads = s.value_t, *outs = s.grad_value_t, *deltas = s.addend;
        transpose(grad_out, grads);
        transpose(out, outs);
        for (int64_t lane = 0; lane < rows; lane += L) {
            Vec<C> delta = {};
            for (int64_t k = 0; k < p.value_size; k += kChain) {
                Vec<C> chain = {};
                for (int64_t d = k; d < std::min(k + kChain, p.value_size); ++d)
                    chain = fma(load(grads + d * W + lane), load(outs + d * W + lane), chain);
                delta += chain;
            }
            store(deltas + lane, delta);
        }
        for (int64_t r = 0; r < rows; ++r) {
            const C row_lse = lse.ptr<C>()[offset(lse, b, h, i + r)];
            const bool dead = row_lse == -kInfinity;  // nothing to attend: P = 0, whatever grad_lse
            const C from_lse = grad_lse ? grad_lse->ptr<C>()[offset(*grad_lse, b, h, i + r)] : C(0);
            lse_of_row[row_of(b, h, i + r)] = dead ? kInfinity : row_lse;
            delta_of_row[row_of(b, h, i + r)] = dead ? C(0) : deltas[r] - from_lse;
            if (grad_query && (sequence.key_len == 0 || sequence.end_key(i + r) == 0)) {
                T* g = grad_query->ptr<T>() + offset(*grad_query, b, h, i + r);
                for (int64_t d = 0; d < p.head_size; ++d)
                    g[d * grad_query->strides[3]] = from_float<T>(0);
            }
        }
    }

    struct Tile {
        const C* data;
        int64_t pitch, step;
    };

    Tile tile(const View& view, int64_t b, int64_t h, int64_t i, int64_t count, C* packed,
              int64_t* offsets) const {
        const T* first = view.ptr<T>() + offset(view, b, h, i);
        if constexpr (std::is_same_v<T, C>) {
            if (view.strides[3] == 1) return {first, view.strides[2], 1};
        }
        for (int64_t r = 0; r < count; ++r) offsets[r] = r * view.strides[2];
        const int64_t pitch = round_up(view.shape[3], L);
        pack_rows<T>({first, offsets, view.strides[3]}, count, view.shape[3], packed, pitch);
        return {packed, pitch, 1};
    }

    void key_block(int64_t b, int64_t kv_head, int64_t block, const BackwardScratch<C>& s) const {
        const int64_t j = block * W, keys = std::min(W, sequence.key_len - j);
        for (int64_t r = 0; r < keys; ++r) s.offsets[r] = r * key.strides[2];
        const Rows<const T> key_rows{key.ptr<T>() + offset(key, b, kv_head, j), s.offsets,
                                     key.strides[3]};
        pack_transposed<T>(key_rows, keys, p.head_size, C(1), s.key_t, W);
        pack_rows<T>(key_rows, keys, p.head_size, s.keys, round_up(p.head_size, L));
        for (int64_t r = 0; r < keys; ++r) s.offsets[r] = r * value.strides[2];
        pack_transposed<T>({value.ptr<T>() + offset(value, b, kv_head, j), s.offsets,
                            value.strides[3]},
                           keys, p.value_size, C(1), s.value_t, W);
        std::fill_n(s.grad_key_t, p.head_size * W, C(0));
        std::fill_n(s.grad_value_t, p.value_size * W, C(0));

        for (int64_t h = kv_head * p.group; h < (kv_head + 1) * p.group; ++h)
            for (int64_t qb = sequence.first_query(j) / kQueryBlock; qb < query_blocks; ++qb)
                query_block(b, h, qb, block, keys, s);

        if (grad_key) write(*grad_key, s.grad_key_t, b, kv_head, j, keys, s.offsets);
        if (grad_value) write(*grad_value, s.grad_value_t, b, kv_head, j, keys, s.offsets);
    }

    void query_block(int64_t b, int64_t h, int64_t qb, int64_t kb, int64_t keys,
                     const BackwardScratch<C>& s) const {
        const int64_t i = qb * kQueryBlock, rows = std::min(kQueryBlock, sequence.query_len - i);
        const int64_t vectors = divide_up(keys, L);
        const Tile q = tile(query, b, h, i, rows, s.queries, s.offsets);
        const Tile g = tile(grad_out, b, h, i, rows, s.grads, s.offsets);
        tile_matmul(rows, vectors, p.head_size, q.data, q.pitch, q.step, s.key_t, W, s.p, W, false);
        if (grad_query || grad_key)
            tile_matmul(rows, vectors, p.value_size, g.data, g.pitch, g.step, s.value_t, W, s.ds, W,
                        false);
        weights(b, h, i, rows, kb * W, keys, s);
        if (grad_value)
            tile_matmul(p.value_size, vectors, rows, g.data, g.step, g.pitch, s.p, W,
                        s.grad_value_t, W, true);
        if (grad_key)
            tile_matmul(p.head_size, vectors, rows, q.data, q.step, q.pitch, s.ds, W, s.grad_key_t,
                        W, true);
        if (grad_query) add_grad_query(b, h, qb, kb, rows, keys, s);
    }

    // Scores in s.p become P, grad_out value^T in s.ds becomes scale * dS.
    void weights(int64_t b, int64_t h, int64_t i, int64_t rows, int64_t j, int64_t keys,
                 const BackwardScratch<C>& s) const {
        const C scale = static_cast<C>(p.options.scale);
        const bool needs_ds = grad_query || grad_key;
        for (int64_t r = 0; r < rows; ++r) {
            const C row_lse = lse_of_row[row_of(b, h, i + r)], delta = delta_of_row[row_of(b, h, i + r)];
            C *scores = s.p + r * W, *ds = s.ds + r * W;
            // A masked score is rounded as forward rounded it before lse is taken off; the scores
            // that forward left unrounded stay so.
            const C after = mask ? row_lse : C(0);
            if (mask) addend_row(p, p.sequence(b), h, i + r, j, keys, C(1), s.addend);
            else std::fill_n(s.addend, W, -row_lse);
            if (sequence.end_key(i + r) < j + keys)
                for (int64_t k = std::max<int64_t>(0, sequence.end_key(i + r) - j); k < keys; ++k)
                    s.addend[k] = -kInfinity;
            for (int64_t lane = 0; lane < W; lane += L) {
                const Vec<C> x = weight(
                    fma(load(scores + lane), splat(scale), load(s.addend + lane)) - after);
                store(scores + lane, x);
                if (needs_ds) store(ds + lane, x * (load(ds + lane) - delta) * scale);
            }
        }
    }

    void add_grad_query(int64_t b, int64_t h, int64_t qb, int64_t kb, int64_t rows, int64_t keys,
                        const BackwardScratch<C>& s) const {
        const int64_t i = qb * kQueryBlock;
        C* sum = sums + row_of(b, h, i) * sum_pitch;
        int64_t pitch = sum_pitch;
        if (in_place) {
            sum = grad_query->ptr<C>() + offset(*grad_query, b, h, i);
            pitch = grad_query->strides[2];
        }
        Turn& turn = turns[(b * p.heads + h) * query_blocks + qb];
        while (turn.load(std::memory_order_acquire) != kb) pause();
        tile_matmul(rows, round_up(p.head_size, L) / L, keys, s.ds, W, 1, s.keys,
                    round_up(p.head_size, L), sum, pitch, kb > 0);
        const bool last = sequence.end_key(i + rows - 1) <= (kb + 1) * W;
        if (last && !in_place)
            for (int64_t r = 0; r < rows; ++r) {
                T* row = grad_query->ptr<T>() + offset(*grad_query, b, h, i + r);
                for (int64_t d = 0; d < p.head_size; d += L)
                    detail::store_strided(row + d * grad_query->strides[3], grad_query->strides[3],
                                          load(sum + r * pitch + d),
                                          static_cast<int>(p.head_size - d));
            }
        turn.store(static_cast<int32_t>(kb + 1), std::memory_order_release);
    }

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    void write(const View& view, const C* packed, int64_t b, int64_t h, int64_t j, int64_t keys,
               int64_t* offsets) const {
        for (int64_t r = 0; r < keys; ++r) offsets[r] = r * view.strides[2];
        unpack_transposed<T>(packed, W, keys, view.shape[3],
                             {view.ptr<T>() + offset(view, b, h, j), offsets, view.strides[3]});
    }

    const AttentionProblem& p;
    const Sequence sequence;
    const View& grad_out;
    const View* grad_lse;
    const View &query, &key, &value;
    const View* mask;
    const View &out, &lse;
    const View *grad_query, *grad_key, *grad_value;

    int64_t query_blocks = 0, sum_pitch = 0;
    bool in_place = false;
    C *lse_of_row = nullptr, *delta_of_row = nullptr, *sums = nullptr;
    Turn* turns = nullptr;
};

}  // namespace

void attention_backward(const View& grad_out, const View* grad_lse, const View& query,
                        const View& key, const View& value, const AttentionOptions& options,
                        const View& out, const View& lse, const AttentionGradients& gradients) {
    const AttentionProblem p = attention_problem(query, key, value, options);
    require_rows(query, value, out, lse);
    require_rows(query, value, grad_out, grad_lse ? *grad_lse : lse);
    require_gradient(gradients.query, query);
    require_gradient(gradients.key, key);
    require_gradient(gradients.value, value);
    require_bias_gradient(gradients.bias, options.bias);
    if (query.dtype == DType::bf16 && attention_bf16_available())
        return attention_backward_bf16(grad_out, grad_lse, query, key, value, options, out, lse,
                                       gradients);
    require(options.left < 0 && options.softcap == 0 && options.dropout_p == 0 && !options.sinks &&
                !options.alibi_slopes && !p.packed() && !gradients.bias && !gradients.sinks,
            "not served yet");
    const auto run = [&]<class T>(T) {
        Backward<T>(p, grad_out, grad_lse, query, key, value, out, lse, gradients).run();
    };
    switch (query.dtype) {
        case DType::f64: return run(double{});
        case DType::f32: return run(float{});
        case DType::bf16: return run(bf16{});
        case DType::f16: return run(f16{});
        default: require(false, "query must be floating point");
    }
}

}  // namespace bigops
