// Attention's backward pass with bf16 products: FlashAttention-2's (Dao, 2023), as in
// attention_backward.cpp, whose account of tasks and turns holds here too: a task is a block of
// keys of one key head, which walks over the blocks of queries that see it, and a block of queries
// adds up its gradient from its key blocks in their order, whatever the threads do.
//
// The five products want their operands in different orders. With scores kept a row a query,
//   S = query key^T, dP = grad_out value^T, grad_query = dS key
// take rows of queries from the left, and
//   grad_value^T = grad_out^T P, grad_key^T = query^T dS
// take P and dS as panels, whose rows are pairs of queries: the form in which two rows of softmax
// come out of the registers. So nothing quadratic is ever transposed; queries and grad_out are
// packed once a call, both ways around, and keys and values once a task.
#include "attention_bf16.h"

#if !defined(__AVX512BF16__)

namespace bigops {

void attention_backward_bf16(const AttentionProblem&, const AttentionSaved&,
                             const AttentionGradients&) {
    require(false, "attention_backward_bf16 was compiled without bf16 products");
}

std::vector<bool> attention_backward_split(const AttentionProblem&, const AttentionSaved&,
                                           const AttentionGradients&) {
    return {};
}

}  // namespace bigops

#else

#include <atomic>
#include <cmath>

#include "attention_weights_bf16.h"
#include "threads.h"

namespace bigops {
namespace {

template <class T>
struct Backward {
    using Turn = std::atomic<int32_t>;

    const AttentionProblem& p;
    const AttentionSaved& saved;
    const AttentionGradients& gradients;
    SplitRanges& ranges;

    PackedQueries<T> packed{p, saved, gradients.sinks != nullptr};
    Weights<T> weights{p, packed, gradients.sinks != nullptr};
    int64_t depth = packed.depth, columns = packed.columns;
    Pieces query_blocks{p.batch, p.heads, [this](int64_t b) {
                            return divide_up(p.sequence(b).query_len, kQueryBlock);
                        }};
    Pieces key_blocks{p.batch, p.kv_heads, [this](int64_t b) {
                          const Sequence s = p.sequence(b);
                          return divide_up(s.key_len, keys_of_task(p, s));
                      }};
    // What a query's row gathers from its key blocks: grad_query, and for the sinks' gradient dS.
    Aligned<float> sums = allocate<float>(gradients.query ? packed.rows * depth : 0);
    Aligned<float> residues = allocate<float>(gradients.sinks ? packed.rows : 0);
    std::vector<Turn> turns = std::vector<Turn>(query_blocks.total());

    void start_rows(const Pieces::Piece& piece) const;
    void key_block(const TaskMemory<T>& m, const Pieces::Piece& piece);
    void query_block(const TaskMemory<T>& m, const QueryBlock& q, int64_t n, int64_t count);
    void add_to_rows(const TaskMemory<T>& m, const QueryBlock& q, int64_t n, int first_row,
                     int end_row, int from, int to);
    void write_grad_query(const QueryBlock& q) const;
    void write_transposed(const View& view, const float* packed, float scale, const Sequence& s,
                          int64_t h, int64_t j, int64_t count) const;
    void write_grad_sink(int64_t h) const;
    void run();
};

// A block of queries that no key block visits has its gradient from here.
template <class T>
void Backward<T>::start_rows(const Pieces::Piece& piece) const {
    const QueryBlock q = packed.block(p.sequence(piece.b), piece.h, piece.n);
    if (gradients.sinks) std::fill_n(residues.get() + q.row, q.padded, 0.0f);
    if (!gradients.query) return;
    std::fill_n(sums.get() + q.row * depth, q.padded * depth, 0.0f);
    if (q.first >= q.last) write_grad_query(q);
}

template <class T>
void Backward<T>::key_block(const TaskMemory<T>& m, const Pieces::Piece& piece) {
    const Sequence s = p.sequence(piece.b);
    const int64_t block = keys_of_task(p, s), j = piece.n * block;
    const int64_t count = std::min(block, s.key_len - j);
    const auto rows_of = [&](const View& view) {
        return Rows<T>{s.key_row<T>(view, piece.h, j), view.strides[2], view.strides[3], count,
                       view.shape[3]};
    };
    const auto pack_transposed = [&](const Rows<T>& rows, int64_t size, bf16* panels,
                                     int64_t part) {
        for (int64_t k = 0; k < round_up(count, kGroup); k += kPanel)
            for (int64_t d = 0; d < size; d += kTileDepth)
                pack_columns(rows, k, d, panels + k * size + d * kPanel, part);
    };
    const Rows<T> keys = rows_of(saved.key), values = rows_of(saved.value);
    ranges.take(piece.b, SplitRanges::key, keys);
    ranges.take(piece.b, SplitRanges::value, values);
    pack_transposed(keys, depth, m.key_t.get(), m.key_part);
    pack_transposed(values, columns, m.value_t.get(), m.value_part);
    for (int64_t d = 0; d < depth; d += 2 * kPanel)
        for (int64_t k = 0; k < round_up(count, kGroup); k += 2) {
            bf16* panel = m.keys.get() + d * kMostKeys + k * kPanel;
            pack_rows(keys, k, d, panel, panel + kPanel * kMostKeys, m.key_part);
        }
    std::fill_n(m.grad_key_t.get(), depth * kScoreStride, 0.0f);
    std::fill_n(m.grad_value_t.get(), columns * kScoreStride, 0.0f);

    for (int64_t h = piece.h * p.group; h < (piece.h + 1) * p.group; ++h)
        for (int64_t n = s.first_query(j) / kQueryBlock; n < query_blocks.count(piece.b); ++n) {
            const QueryBlock q = packed.block(s, h, n);
            if (q.first > piece.n) break;
            if (q.last > piece.n) query_block(m, q, piece.n, count);
        }
    const float scale = static_cast<float>(std::abs(p.options.scale));
    if (gradients.key)
        write_transposed(*gradients.key, m.grad_key_t.get(), scale, s, piece.h, j, count);
    if (gradients.value)
        write_transposed(*gradients.value, m.grad_value_t.get(),
                         static_cast<float>(weights.dropout.factor()), s, piece.h, j, count);
}

template <class T>
void Backward<T>::query_block(const TaskMemory<T>& m, const QueryBlock& q, int64_t n,
                              int64_t count) {
    const int64_t j = n * keys_of_task(p, q.s);
    // The keys of this block that queries [r, r + rows) see, in whole groups.
    const auto seen = [&](int64_t r, int64_t rows) {
        const int64_t first = std::clamp<int64_t>(q.s.first_key(q.i + r) - j, 0, count);
        const int64_t end = std::clamp<int64_t>(
            q.s.end_key(q.i + std::min(r + rows, q.count) - 1) - j, 0, count);
        return std::pair(static_cast<int>(first / kGroup * kGroup),
                         first < end ? static_cast<int>(round_up(end, kGroup)) : 0);
    };
    const auto [from, to] = seen(0, q.count);
    int first_row = kQueryBlock, end_row = 0;
    for (int r = 0; r < q.padded; r += kSlab) {
        auto [slab_from, slab_to] = seen(r, kSlab);
        if (slab_from >= slab_to) {
            if (end_row > 0) break;
            continue;
        }
        first_row = std::min(first_row, r);
        end_row = r + kSlab;
        weights.slab(m, q, r, j, slab_from, slab_to);
        const auto clear = [&](int begin, int end) {
            for (int k = begin; k < end; k += kPanel) {
                const int64_t at = k / kPanel * kWeightPanel + r * kPanel;
                for (int part = 0; part < kParts<T>; ++part)
                    for (bf16* panels : {m.weights.get(), m.grad_scores.get()})
                        std::memset(panels + part * m.kPanelsPart + at, 0,
                                    kSlab * kPanel * sizeof(bf16));
            }
            if (begin >= end) return;
            for (int part = 0; part < kParts<T>; ++part)
                for (int i = r; i < r + kSlab; ++i)
                    std::memset(m.grad_score_rows.get() + part * m.kRowsPart + i * kWeightStride +
                                    begin,
                                0, static_cast<size_t>(end - begin) * sizeof(bf16));
        };
        clear(from, slab_from);
        clear(slab_to, to);
    }
    if (first_row < end_row) {
        const auto add = [&](const bf16* left, int64_t left_part, const bf16* panels, float* result,
                             int64_t size) {
            Product<kParts<T>>{
                .left = left + first_row,
                .left_stride = q.padded,
                .left_part = left_part,
                .right = panels + from / kPanel * kWeightPanel + first_row * kPanel,
                .panel_stride = kWeightPanel,
                .right_part = m.kPanelsPart,
                .result = result + from,
                .result_stride = kScoreStride,
                .rows = static_cast<int>(round_up(size, kPanel)),
                .panels = (to - from) / kPanel,
                .depth = end_row - first_row,
                .accumulate = true}
                .run();
        };
        if (gradients.value)
            add(packed.grads_t.get() + q.row * columns, packed.grad_part, m.weights.get(),
                m.grad_value_t.get(), p.value_size);
        if (gradients.key)
            add(packed.queries_t.get() + q.row * depth, packed.query_part, m.grad_scores.get(),
                m.grad_key_t.get(), p.head_size);
    }
    if (gradients.query || gradients.sinks) add_to_rows(m, q, n, first_row, end_row, from, to);
}

// What the queries gather from their key blocks, which take turns, first to last.
template <class T>
void Backward<T>::add_to_rows(const TaskMemory<T>& m, const QueryBlock& q, int64_t n, int first_row,
                              int end_row, int from, int to) {
    // The key block whose turn it is, counted from the first one seen.
    Turn& turn = turns[query_blocks.first(q.b, q.h) + q.n];
    while (turn.load(std::memory_order_acquire) != n - q.first) _mm_pause();
    if (gradients.query) {
        float* sum = sums.get() + q.row * depth;
        if (first_row < end_row)
            Product<kParts<T>>{
                .left = m.grad_score_rows.get() + first_row * kWeightStride + from,
                .left_stride = kWeightStride,
                .left_part = m.kRowsPart,
                .right = m.keys.get() + from * kPanel,
                .panel_stride = kMostKeys * kPanel,
                .right_part = m.key_part,
                .result = sum + first_row * depth,
                .result_stride = depth,
                .rows = end_row - first_row,
                .panels = static_cast<int>(round_up(p.head_size, kPanel)) / kPanel,
                .depth = to - from,
                .accumulate = true}
                .run();
        if (n + 1 == q.last) write_grad_query(q);
    }
    if (gradients.sinks)
        for (int r = first_row; r < end_row; ++r) residues[q.row + r] += m.row_sums[r];
    turn.store(static_cast<int32_t>(n - q.first + 1), std::memory_order_release);
}

template <class T>
void Backward<T>::write_grad_query(const QueryBlock& q) const {
    const View& view = *gradients.query;
    const float scale = static_cast<float>(p.options.scale);
    for (int64_t r = 0; r < q.count; ++r) {
        T* row = q.s.query_row<T>(view, q.h, q.i + r);
        const float* sum = sums.get() + (q.row + r) * depth;
        for (int64_t d = 0; d < p.head_size; d += kPanel)
            store_elements(row + d * view.strides[3], view.strides[3], load(sum + d) * scale,
                           p.head_size - d);
    }
}

template <class T>
void Backward<T>::write_transposed(const View& view, const float* packed, float scale,
                                   const Sequence& s, int64_t h, int64_t j, int64_t count) const {
    for (int64_t k = 0; k < count; k += kPanel)
        for (int64_t d = 0; d < view.shape[3]; d += kPanel) {
            __m512i lines[kPanel];
            for (int r = 0; r < kPanel; ++r)
                lines[r] = _mm512_loadu_si512(packed + (d + r) * kScoreStride + k);
            transpose(lines);
            for (int64_t r = 0; r < std::min<int64_t>(kPanel, count - k); ++r)
                store_elements(s.key_row<T>(view, h, j + k + r) + d * view.strides[3],
                               view.strides[3], _mm512_castsi512_ps(lines[r]) * scale,
                               view.shape[3] - d);
        }
}

// minus the sum of share * (sum_j P_ij dP_ij - grad_lse_i), where the sink's share of a row is
// exp(sink - lse) and the sum is taken from that of dS: delta, which comes from the rounded output,
// is exact enough for dS only.
template <class T>
void Backward<T>::write_grad_sink(int64_t h) const {
    const VecF sink = splat(p.sink<float>(h) * static_cast<float>(kScoreUnit<T>));
    double total = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t first = packed.groups.first(b, h) * kGroup;
        for (int64_t row = first; row < first + packed.groups.count(b) * kGroup; row += kPanel) {
            const VecF share = power<T>(sink + load(packed.shifts.get() + row));
            const VecF products = fma(load(packed.deltas.get() + row), 1.0f - share,
                                      load(residues.get() + row));
            total += sum(share * (products - load(packed.lse_grads.get() + row)));
        }
    }
    gradients.sinks->ptr<float>()[h * gradients.sinks->strides[0]] = static_cast<float>(-total);
}

template <class T>
void Backward<T>::run() {
    const int team = threads_for(2.5 * p.operations);
    std::vector<TaskMemory<T>> scratch;
    for (int t = 0; t < team; ++t) scratch.emplace_back(depth, columns);
    const bool any = gradients.query || gradients.key || gradients.value || gradients.sinks;
    const int64_t tasks = any ? key_blocks.total() : 0;
    std::atomic<int64_t> next_task = 0;
#pragma omp parallel num_threads(team)
    {
        const ProductThread thread;
        const TaskMemory<T>& m = scratch[static_cast<size_t>(omp_get_thread_num())];
#pragma omp for schedule(static)
        for (int64_t n = 0; n < packed.groups.total(); ++n)
            packed.pack(packed.groups.find(n), m.value_t.get(), ranges);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < query_blocks.total(); ++n) start_rows(query_blocks.find(n));
        // Handed out one by one and in order, which the turns rely on.
        for (int64_t task = next_task++; task < tasks; task = next_task++)
            key_block(m, key_blocks.find(task));
        if (gradients.sinks) {
#pragma omp barrier
#pragma omp for schedule(static)
            for (int64_t h = 0; h < p.heads; ++h) write_grad_sink(h);
        }
    }
    const auto clear = [&](const View* gradient, const View* cu_seqlens) {
        if (gradient) fill_outside(p, cu_seqlens, *gradient, gradient->shape[3], T{});
    };
    clear(gradients.query, p.options.cu_seqlens_q);
    clear(gradients.key, p.options.cu_seqlens_k);
    clear(gradients.value, p.options.cu_seqlens_k);
}

}  // namespace

void attention_backward_bf16(const AttentionProblem& p, const AttentionSaved& saved,
                             const AttentionGradients& gradients) {
    require(attention_bf16_available(), "this system withholds the tile registers");
    SplitRanges none(0);
    Backward<bf16>{p, saved, gradients, none}.run();
}

std::vector<bool> attention_backward_split([[maybe_unused]] const AttentionProblem& problem,
                                           [[maybe_unused]] const AttentionSaved& saved,
                                           [[maybe_unused]] const AttentionGradients& gradients) {
#if defined(__AMX_BF16__)
    if (attention_bf16_available())
        return run_split(problem, [&](const AttentionProblem& p, SplitRanges& ranges) {
            Backward<float>{p, saved, gradients, ranges}.run();
        });
#endif
    return {};
}

}  // namespace bigops

#endif
