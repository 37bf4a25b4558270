// A task owns a tile of the gradient's own elements and visits every tile of scores, over batch,
// heads, queries and keys, that was computed with them, in one order: no sum crosses threads, and
// nothing of the size of all scores exists. Where bias is broadcast over queries or keys, a tile of
// scores is summed up along them first.
#include "attention_grad_bias.h"

namespace bigops {
namespace {

// Rows of a tile of the gradient: keys are packed once for all of them.
constexpr int64_t kRows = 4 * kQueryBlock;

template <class T>
class GradBias {
    using C = compute_t<T>;
    static constexpr int L = kLanes<C>;
    static constexpr int64_t W = GradientTile<T>::W;

   public:
    GradBias(const AttentionProblem& problem, const AttentionSaved& saved,
             const RowTerms<T>& terms, const View& gradient)
        : p(problem), saved(saved), terms(terms), gradient(gradient),
          one_row(gradient.shape[2] == 1), one_column(gradient.shape[3] == 1) {}

    void run() const {
        const int64_t row_tiles = divide_up(gradient.shape[2], kRows);
        const int64_t column_tiles = divide_up(gradient.shape[3], W);
        const int64_t planes = gradient.shape[0] * gradient.shape[1];
        Layout measure(nullptr);
        Arena(*this, measure);
        const int threads = threads_for(p.operations);
        const bigops::Arena memory(measure.size() * threads);
#pragma omp parallel num_threads(threads)
        {
            Layout layout(memory.at(measure.size() * omp_get_thread_num()));
            Arena scratch(*this, layout);
#pragma omp for collapse(3) schedule(dynamic, 1)
            for (int64_t plane = 0; plane < planes; ++plane)
                for (int64_t row = 0; row < row_tiles; ++row)
                    for (int64_t column = 0; column < column_tiles; ++column)
                        tile(plane / gradient.shape[1], plane % gradient.shape[1], row * kRows,
                             column * W, scratch);
        }
    }

   private:
    struct Arena {
        GradientTile<T> tile;
        C* sum;  // a row of the gradient's tile has W columns

        Arena(const GradBias& of, Layout& layout)
            : tile(of.p, of.saved, of.terms, layout), sum(layout.take<C>(kRows * W)) {}
    };

    // The gradient's rows [i, i + kRows) and columns [j, j + W), or the only ones it has.
    void tile(int64_t b, int64_t h, int64_t i, int64_t j, Arena& to) const {
        const int64_t rows = std::min(kRows, gradient.shape[2] - i);
        const int64_t columns = std::min(W, gradient.shape[3] - j);
        std::fill_n(to.sum, rows * W, C(0));
        for_broadcast(0, b, p.batch, [&](int64_t of_batch) {
            const Sequence s = p.sequence(of_batch);
            const int64_t row_end = one_row ? s.query_len : std::min(i + rows, s.query_len);
            const int64_t key_end = one_column ? s.key_len : std::min(j + columns, s.key_len);
            for_broadcast(1, h, p.heads, [&](int64_t head) {
                for (int64_t key = j; key < key_end; key += W)
                    add(s, head, one_row ? 0 : i, row_end, key, std::min(W, key_end - key), to);
            });
        });
        for (int64_t r = 0; r < rows; ++r)
            store_bias_row(gradient, b, h, i + r, j, columns, to.sum + r * W);
    }

    // What of `all` the gradient's element `at` of this dimension stands for.
    template <class Visit>
    void for_broadcast(int dim, int64_t at, int64_t all, const Visit& visit) const {
        if (gradient.shape[dim] == all) return visit(at);
        for (int64_t n = 0; n < all; ++n) visit(n);
    }

    // dS of the queries [begin, end) and keys [j, j + keys), which the gradient's tile stands for.
    void add(const Sequence& s, int64_t head, int64_t begin, int64_t end, int64_t j, int64_t keys,
             Arena& to) const {
        const int64_t seen_from = std::max(begin, s.first_query(j));
        const int64_t seen_to = std::min(end, s.end_query(j + keys - 1));
        if (seen_from >= seen_to) return;
        to.tile.take_keys(s, head / p.group, j, keys, nullptr);
        for (int64_t i = seen_from; i < seen_to; i += kQueryBlock) {
            const int64_t rows = std::min(kQueryBlock, seen_to - i);
            to.tile.compute(s, head, i, rows, j, keys, true, true);
            if (one_row) add_tile(rows, keys, to.tile.raw, to.sum, 0);
            else add_tile(rows, keys, to.tile.raw, to.sum + (i - begin) * W, W);
        }
    }

    void add_tile(int64_t rows, int64_t keys, const C* raw, C* sum, int64_t sum_pitch) const {
        if (one_column) {
            C total = 0;
            for (int64_t r = 0; r < rows; ++r) {
                C row = 0;
                for (int64_t k = 0; k < keys; ++k) row += raw[r * W + k];
                if (sum_pitch) sum[r * sum_pitch] += row;
                total += row;
            }
            if (!sum_pitch) sum[0] += total;
            return;
        }
        for (int64_t lane = 0; lane < keys; lane += L) {
            const int count = static_cast<int>(std::min<int64_t>(L, keys - lane));
            Vec<C> total = {};  // a sum of sums rounds off less than one chain
            for (int64_t r = 0; r < rows; ++r) {
                const C* at = raw + r * W + lane;
                const Vec<C> x = count == L ? load(at) : load(at, count);
                C* to = sum + r * sum_pitch + lane;
                if (sum_pitch) store(to, load(to) + x);
                else total += x;
            }
            if (!sum_pitch) store(sum + lane, load(sum + lane) + total);
        }
    }

    const AttentionProblem& p;
    const AttentionSaved& saved;
    const RowTerms<T>& terms;
    const View& gradient;
    const bool one_row, one_column;
};

template <class Apply>
void with_dtype(const View& view, const Apply& apply) {
    switch (view.dtype) {
        case DType::f64: return apply(double{});
        case DType::f32: return apply(float{});
        case DType::bf16: return apply(bf16{});
        case DType::f16: return apply(f16{});
        default: require(false, "bias' gradient must be floating point");
    }
}

}  // namespace

void clear(const View& gradient) {
    with_dtype(gradient, [&]<class G>(G) {
        const auto& n = gradient.shape;
        const auto& stride = gradient.strides;
        for (int64_t b = 0; b < n[0]; ++b)
            for (int64_t h = 0; h < n[1]; ++h)
                for (int64_t i = 0; i < n[2]; ++i)
                    for (int64_t j = 0; j < n[3]; ++j)
                        gradient.ptr<G>()[b * stride[0] + h * stride[1] + i * stride[2] +
                                          j * stride[3]] = G{};
    });
}

template <class C>
void store_bias_row(const View& gradient, int64_t b, int64_t h, int64_t i, int64_t j, int64_t count,
                    const C* values) {
    with_dtype(gradient, [&]<class G>(G) {
        const int64_t stride = gradient.strides[3];
        G* row = gradient.ptr<G>() + b * gradient.strides[0] + h * gradient.strides[1] +
                 i * gradient.strides[2] + j * stride;
        for (int64_t k = 0; k < count; ++k)
            row[k * stride] = from_float<G>(static_cast<compute_t<G>>(values[k]));
    });
}

template <class T>
void attention_grad_bias(const AttentionProblem& p, const AttentionSaved& saved,
                         const RowTerms<T>& terms, const View& gradient) {
    GradBias<T>(p, saved, terms, gradient).run();
}

template <class T>
void refine_rows(const AttentionProblem& p, const AttentionSaved& saved, const RowTerms<T>& terms) {
    using C = compute_t<T>;
    constexpr int64_t W = GradientTile<T>::W;
    const std::vector<RowBlock> blocks =
        blocks_of(p, kQueryBlock, [](const Sequence& s) { return s.query_len; });
    const auto tasks = static_cast<int64_t>(blocks.size()) * p.heads;
    Layout measure(nullptr);
    GradientTile<T>(p, saved, terms, measure);
    const int threads = threads_for(p.operations);
    const bigops::Arena memory(measure.size() * threads);
#pragma omp parallel num_threads(threads)
    {
        Layout layout(memory.at(measure.size() * omp_get_thread_num()));
        GradientTile<T> tile(p, saved, terms, layout);
        tile.measures = true;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks; ++task) {
            const RowBlock& block = blocks[static_cast<size_t>(task / p.heads)];
            const Sequence s = p.sequence(block.sequence);
            const int64_t h = task % p.heads, i = block.first;
            const int64_t rows = std::min(kQueryBlock, s.query_len - i);
            double weights[kQueryBlock] = {}, products[kQueryBlock] = {};
            for (int64_t j = s.first_key(i) / W * W; j < s.end_key(i + rows - 1); j += W) {
                const int64_t keys = std::min(W, s.key_len - j);
                tile.take_keys(s, h / p.group, j, keys, nullptr);
                tile.compute(s, h, i, rows, j, keys, true, false);
                for (int64_t r = 0; r < rows; ++r)
                    for (int64_t k = 0; k < keys; ++k) {
                        weights[r] += static_cast<double>(tile.weights[r * W + k]);
                        products[r] += static_cast<double>(tile.grads[r * W + k]);
                    }
            }
            for (int64_t r = 0; r < rows; ++r) {
                const int64_t at = terms.row_of(s, h, i + r);
                if (weights[r] == 0) continue;
                if (p.options.sinks)
                    weights[r] += static_cast<double>(std::exp(p.sink<C>(h) - terms.lse[at]));
                const double from_lse =
                    saved.grad_lse
                        ? static_cast<double>(*s.query_row<C>(*saved.grad_lse, h, i + r))
                        : 0;
                terms.share[at] = static_cast<C>(1 / weights[r]);
                terms.delta[at] = static_cast<C>(products[r] / weights[r] - from_lse);
            }
        }
    }
}

template void store_bias_row(const View&, int64_t, int64_t, int64_t, int64_t, int64_t,
                             const float*);
template void store_bias_row(const View&, int64_t, int64_t, int64_t, int64_t, int64_t,
                             const double*);
#define INSTANTIATE(T)                                                                     \
    template void refine_rows(const AttentionProblem&, const AttentionSaved&,              \
                              const RowTerms<T>&);                                         \
    template void attention_grad_bias(const AttentionProblem&, const AttentionSaved&,      \
                                      const RowTerms<T>&, const View&)
INSTANTIATE(double);
INSTANTIATE(float);
INSTANTIATE(bf16);
INSTANTIATE(f16);
#undef INSTANTIATE

}  // namespace bigops
