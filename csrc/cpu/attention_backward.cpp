// Attention backward. With P = exp(scale * query key^T + bias - lse), no second softmax,
//   grad_value = P^T grad_out
//   dS         = P * (grad_out value^T - delta),  delta_i = sum_d grad_out_id out_id - grad_lse_i
//   grad_query = scale * dS key,  grad_key = scale * dS^T query
// (GradientTile says what dropout and softcap make of it.)
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
#include <cmath>
#include <type_traits>
#include <vector>

#include "attention.h"
#include "attention_bf16.h"
#include "attention_grad_bias.h"
#include "attention_gradient.h"
#include "attention_rows.h"
#include "layout.h"
#include "microkernel.h"
#include "threads.h"

namespace bigops {
namespace {

template <class T>
class Backward {
    using C = compute_t<T>;
    using Turn = std::atomic<int32_t>;
    static constexpr int L = kLanes<C>;
    static constexpr int64_t W = GradientTile<T>::W;

    struct Arena {
        GradientTile<T> tile;
        C *keys, *grad_key_t, *grad_value_t;  // of a task
        int64_t* offsets;

        Arena(const Backward& of, Layout& layout)
            : tile(of.p, of.saved, of.terms, layout),
              keys(layout.take<C>(W * round_up(of.p.head_size, L))),
              grad_key_t(layout.take<C>(of.p.head_size * W)),
              grad_value_t(layout.take<C>(of.p.value_size * W)),
              offsets(layout.take<int64_t>(W)) {}
    };

   public:
    Backward(const AttentionProblem& problem, const AttentionSaved& saved,
             const RowTerms<T>& terms, const AttentionGradients& gradients)
        : p(problem), saved(saved), terms(terms), grad_query(gradients.query),
          grad_key(gradients.key), grad_value(gradients.value),
          grad_bias(is_full(gradients.bias, p) ? gradients.bias : nullptr) {}

    void run() {
        // grad_query is summed up in place where it can hold the sum.
        in_place = grad_query && std::is_same_v<T, C> && grad_query->strides[3] == 1 &&
                   p.head_size % L == 0;
        sum_pitch = round_up(p.head_size, L);
        const int64_t rows = saved.query.shape[0] * p.heads * p.query_rows;
        const bigops::Arena sum_memory(
            grad_query && !in_place ? rows * sum_pitch * static_cast<int64_t>(sizeof(C)) : 0);
        sums = reinterpret_cast<C*>(sum_memory.at(0));
        first_turn.assign(1, 0);
        for (int64_t b = 0; b < p.batch; ++b)
            first_turn.push_back(first_turn.back() +
                                 p.heads * divide_up(p.sequence(b).query_len, kQueryBlock));
        std::vector<Turn> turn_memory(static_cast<size_t>(grad_query ? first_turn.back() : 0));
        turns = turn_memory.data();
        clear_what_no_tile_reaches();
        if (grad_bias) clear(*grad_bias);

        // Block after block of all sequences, the order within one that the turns rely on.
        std::vector<RowBlock> blocks = blocks_of(p, W, [](const Sequence& s) { return s.key_len; });
        std::stable_sort(blocks.begin(), blocks.end(), [](const RowBlock& a, const RowBlock& b) {
            return a.first < b.first;
        });
        const auto tasks = static_cast<int64_t>(blocks.size()) * p.kv_heads;
        Layout measure(nullptr);
        Arena(*this, measure);
        const int threads = threads_for(2.5 * p.operations);
        const bigops::Arena memory(measure.size() * threads);
        std::atomic<int64_t> next_task = 0;
#pragma omp parallel num_threads(threads)
        {
            Layout layout(memory.at(measure.size() * omp_get_thread_num()));
            Arena scratch(*this, layout);
            // Handed out one by one and in order; under a causal mask that is also heaviest first.
            for (int64_t task = next_task++; task < tasks; task = next_task++) {
                const RowBlock& block = blocks[static_cast<size_t>(task / p.kv_heads)];
                key_block(p.sequence(block.sequence), task % p.kv_heads, block.first, scratch);
            }
        }
    }

   private:
    // Queries that see no key and rows of no sequence have no gradient.
    void clear_what_no_tile_reaches() const {
        for (int64_t b = 0; grad_query && b < p.batch; ++b) {
            const Sequence s = p.sequence(b);
            for (int64_t i = 0; i < s.query_len; ++i)
                for (int64_t h = 0; s.first_key(i) >= s.end_key(i) && h < p.heads; ++h) {
                    T* row = s.query_row<T>(*grad_query, h, i);
                    for (int64_t d = 0; d < p.head_size; ++d)
                        row[d * grad_query->strides[3]] = from_float<T>(0);
                }
        }
        for_rows_of_no_sequence(p, p.options.cu_seqlens_q, p.query_rows, [&](int64_t row) {
            if (grad_query) clear_row<T>(*grad_query, row);
        });
        for_rows_of_no_sequence(p, p.options.cu_seqlens_k, p.key_rows, [&](int64_t row) {
            if (grad_key) clear_row<T>(*grad_key, row);
            if (grad_value) clear_row<T>(*grad_value, row);
        });
    }

    void key_block(const Sequence& s, int64_t kv_head, int64_t j, Arena& to) {
        const int64_t keys = std::min(W, s.key_len - j);
        to.tile.take_keys(s, kv_head, j, keys, to.keys);
        std::fill_n(to.grad_key_t, p.head_size * W, C(0));
        std::fill_n(to.grad_value_t, p.value_size * W, C(0));
        const int64_t first = s.first_query(j), end = s.end_query(j + keys - 1);
        for (int64_t h = kv_head * p.group; h < (kv_head + 1) * p.group; ++h)
            for (int64_t i = first / kQueryBlock * kQueryBlock; i < end; i += kQueryBlock)
                query_block(s, h, i, j, keys, to);
        if (grad_key) write(*grad_key, to.grad_key_t, s, kv_head, j, keys, to.offsets);
        if (grad_value) write(*grad_value, to.grad_value_t, s, kv_head, j, keys, to.offsets);
    }

    void query_block(const Sequence& s, int64_t h, int64_t i, int64_t j, int64_t keys,
                     Arena& to) {
        GradientTile<T>& tile = to.tile;
        const int64_t rows = std::min(kQueryBlock, s.query_len - i);
        const int64_t vectors = divide_up(keys, L);
        tile.compute(s, h, i, rows, j, keys, grad_query || grad_key || grad_bias, grad_bias);
        const TileRows<C> q = tile.query_rows, g = tile.grad_rows;
        if (grad_bias) write_bias(s, h, i, rows, j, keys, tile.raw);
        if (grad_value)
            tile_matmul(p.value_size, vectors, rows, g.data, 1, g.pitch, tile.weights, W,
                        to.grad_value_t, W, true);
        if (grad_key)
            tile_matmul(p.head_size, vectors, rows, q.data, 1, q.pitch, tile.grads, W,
                        to.grad_key_t, W, true);
        if (grad_query) add_grad_query(s, h, i, rows, j, keys, to);
    }

    void add_grad_query(const Sequence& s, int64_t h, int64_t i, int64_t rows, int64_t j,
                        int64_t keys, const Arena& from) const {
        C* sum = sums + terms.row_of(s, h, i) * sum_pitch;
        int64_t pitch = sum_pitch;
        if (in_place) {
            sum = s.query_row<C>(*grad_query, h, i);
            pitch = grad_query->strides[2];
        }
        // Of the blocks of keys that the queries see, which are neighbours.
        const auto turn = static_cast<int32_t>((j - s.first_key(i) / W * W) / W);
        Turn& now = turns[first_turn[static_cast<size_t>(s.index)] +
                          i / kQueryBlock * p.heads + h];
        while (now.load(std::memory_order_acquire) != turn) pause();
        tile_matmul(rows, round_up(p.head_size, L) / L, keys, from.tile.grads, W, 1, from.keys,
                    round_up(p.head_size, L), sum, pitch, turn > 0);
        const bool last = s.end_key(i + rows - 1) <= j + keys;
        if (last && !in_place)
            for (int64_t r = 0; r < rows; ++r) {
                T* row = s.query_row<T>(*grad_query, h, i + r);
                for (int64_t d = 0; d < p.head_size; d += L)
                    detail::store_strided(row + d * grad_query->strides[3], grad_query->strides[3],
                                          load(sum + r * pitch + d),
                                          static_cast<int>(p.head_size - d));
            }
        now.store(turn + 1, std::memory_order_release);
    }

    static void pause() {
#if defined(__x86_64__)
        _mm_pause();
#endif
    }

    void write(const View& view, const C* packed, const Sequence& s, int64_t h, int64_t j,
               int64_t keys, int64_t* offsets) const {
        for (int64_t r = 0; r < keys; ++r) offsets[r] = r * view.strides[2];
        unpack_transposed<T>(packed, W, keys, view.shape[3],
                             {s.key_row<T>(view, h, j), offsets, view.strides[3]});
    }

    void write_bias(const Sequence& s, int64_t h, int64_t i, int64_t rows, int64_t j, int64_t keys,
                    const C* raw) const {
        for (int64_t r = 0; r < rows; ++r)
            store_bias_row(*grad_bias, s.index, h, i + r, j, keys, raw + r * W);
    }

    const AttentionProblem& p;
    const AttentionSaved& saved;
    const RowTerms<T>& terms;
    const View *grad_query, *grad_key, *grad_value;
    const View* grad_bias;  // where bias is nowhere broadcast: each element is written by one tile

    int64_t sum_pitch = 0;
    bool in_place = false;
    C* sums = nullptr;
    Turn* turns = nullptr;
    std::vector<int64_t> first_turn;  // of each sequence
};

// The sink is a score without a value: its weight exp(sink - lse) gets -delta.
template <class T>
void gradient_of_sinks(const AttentionProblem& p, const RowTerms<T>& terms, const View& gradient) {
    using C = compute_t<T>;
#pragma omp parallel for num_threads(threads_for(2.5 * p.operations))
    for (int64_t h = 0; h < p.heads; ++h) {
        double sum = 0;
        for (int64_t b = 0; b < p.batch; ++b) {
            const Sequence s = p.sequence(b);
            for (int64_t i = 0; i < s.query_len; ++i) {
                const int64_t row = terms.row_of(s, h, i);
                sum -= static_cast<double>(std::exp(p.sink<C>(h) - terms.lse[row]) *
                                           terms.delta[row]);
            }
        }
        gradient.ptr<C>()[h * gradient.strides[0]] = static_cast<C>(sum);
    }
}

// Whether bias' gradient has digits of its own where those of a 16-bit output end: its dtype has
// them, or it is one number a row, the sum of a dS whose elements cancel.
bool shows_roundings(const View& grad_bias, DType of_query) {
    return grad_bias.dtype != of_query || of_query == DType::f32 || grad_bias.shape[3] == 1;
}

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
    require(!gradients.sinks || options.sinks, "sinks' gradient needs sinks");
    if (gradients.sinks) require_gradient(gradients.sinks, *options.sinks);
    const AttentionSaved saved{grad_out, grad_lse, query, key, value, out, lse};
    AttentionGradients wanted = gradients;
    AttentionGradients without_bias = gradients;
    without_bias.bias = nullptr;
    if (query.dtype == DType::bf16 && attention_bf16_available()) {
        attention_backward_bf16(p, saved, without_bias);
        wanted = {.bias = gradients.bias};
    }
    std::vector<bool> done;
    AttentionProblem rest = p;
    // A gradient of bias as large as the scores comes with the others, at no cost.
    if (query.dtype == DType::f32 && !is_full(gradients.bias, p))
        done = attention_backward_split(p, saved, without_bias);
    if (!done.empty()) rest.elsewhere = &done;
    if (!rest.any_here()) wanted = {.bias = gradients.bias};
    if (!wanted.query && !wanted.key && !wanted.value && !wanted.bias && !wanted.sinks) return;
    const auto run = [&]<class T>(T) {
        const RowTerms<T> terms(p, saved);
        // A row that sees one key and a sink is all rounding too. Other gradients must not depend
        // on whether the sinks' is wanted.
        if (options.sinks || (wanted.bias && shows_roundings(*wanted.bias, query.dtype)))
            refine_rows(p, saved, terms);
        if (wanted.query || wanted.key || wanted.value || is_full(wanted.bias, p))
            Backward<T>(rest, saved, terms, wanted).run();
        if (wanted.bias && !is_full(wanted.bias, p))
            attention_grad_bias(p, saved, terms, *wanted.bias);
        if (wanted.sinks) gradient_of_sinks<T>(p, terms, *wanted.sinks);
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
