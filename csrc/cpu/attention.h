// What every attention kernel on the CPU shares: the sizes of a problem, its options, which keys a
// query sees, and the checks of what Python passes. The kernels are declared at the end;
// bigops/ops/attention.py says what they compute.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "../view.h"
#include "vec.h"

namespace bigops {

// Everything beyond query, key and value; null, negative or zero is off.
struct AttentionOptions {
    const View* bias = nullptr;          // (batch, heads, queries, keys), expanded: added, or bool
    const View* sinks = nullptr;         // (heads)
    const View* alibi_slopes = nullptr;  // (batch, heads)
    const View* seed = nullptr;          // int64, one element
    const View *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;  // int32, (batch + 1)
    int64_t left = -1, right = -1;
    bool top_left = false;
    double scale = 1, softcap = 0, dropout_p = 0;
};

// One sequence of a batch. Queries and keys are counted within it; its first ones are the rows
// query_start and key_start of the tensors' `batch`-th entry.
struct Sequence {
    int64_t index, batch;
    int64_t query_start, key_start, query_len, key_len;
    int64_t lower, upper;  // query i sees key j iff i + lower <= j <= i + upper

    // Query i sees the keys [first_key(i), end_key(i)); neither ever decreases with i.
    int64_t first_key(int64_t i) const { return std::clamp<int64_t>(i + lower, 0, key_len); }
    int64_t end_key(int64_t i) const { return std::clamp<int64_t>(i + upper + 1, 0, key_len); }
    // Key j is seen by the queries [first_query(j), end_query(j)); neither ever decreases with j.
    int64_t first_query(int64_t j) const { return std::clamp<int64_t>(j - upper, 0, query_len); }
    int64_t end_query(int64_t j) const { return std::clamp<int64_t>(j - lower + 1, 0, query_len); }

    // ALiBi's distance of query i and key j is |i + alignment() - j|, however masks are aligned.
    int64_t alignment() const { return key_len - query_len; }

    template <class T>
    T* query_row(const View& view, int64_t head, int64_t i) const {
        return view.ptr<T>() + batch * view.strides[0] + head * view.strides[1] +
               (query_start + i) * view.strides[2];
    }
    template <class T>
    T* key_row(const View& view, int64_t head, int64_t j) const {
        return view.ptr<T>() + batch * view.strides[0] + head * view.strides[1] +
               (key_start + j) * view.strides[2];
    }
};

// query (batch, heads, query_rows, head_size), key (batch, kv_heads, key_rows, head_size),
// value (batch, kv_heads, key_rows, value_size); query head h reads key head h / group. Packed
// sequences are rows of one entry: the tensors' first dimension is 1 then, and `batch` counts
// sequences.
struct AttentionProblem {
    int64_t batch, heads, kv_heads, group, query_rows, key_rows, head_size, value_size;
    AttentionOptions options;
    const std::vector<bool>* elsewhere = nullptr;  // sequences that look empty here
    double operations;  // of the forward pass if nothing were hidden; the backward has 2.5 times more

    bool any_here() const {
        return !elsewhere || std::find(elsewhere->begin(), elsewhere->end(), false) !=
                                 elsewhere->end();
    }
    bool packed() const { return options.cu_seqlens_q != nullptr; }
    bool adds_to_scores() const { return options.bias || options.alibi_slopes; }

    Sequence sequence(int64_t b) const {
        Sequence s{b, b, 0, 0, query_rows, key_rows, 0, 0};
        if (packed()) {
            const int32_t* q = options.cu_seqlens_q->ptr<int32_t>() + b;
            const int32_t* k = options.cu_seqlens_k->ptr<int32_t>() + b;
            s = {b, 0, q[0], k[0], q[1] - q[0], k[1] - k[0], 0, 0};
        }
        if (elsewhere && (*elsewhere)[static_cast<size_t>(b)]) s.query_len = s.key_len = 0;
        // Beyond these bounds nothing changes any more, and no sum overflows.
        const int64_t far = s.query_len + s.key_len;
        const int64_t diagonal = options.top_left ? 0 : s.alignment();
        s.lower = options.left < 0 ? -far : diagonal - std::min(options.left, far);
        s.upper = options.right < 0 ? far : diagonal + std::min(options.right, far);
        return s;
    }

    template <class C>
    C sink(int64_t head) const {
        if (!options.sinks) return -std::numeric_limits<C>::infinity();
        return options.sinks->ptr<C>()[head * options.sinks->strides[0]];
    }
    template <class C>
    C alibi_slope(int64_t sequence, int64_t head) const {
        if (!options.alibi_slopes) return C(0);
        const View& slopes = *options.alibi_slopes;
        return slopes.ptr<C>()[sequence * slopes.strides[0] + head * slopes.strides[1]];
    }
};

namespace detail {
// Offsets into memory come from here: their values are checked, not only their sizes.
inline void require_offsets(const View& offsets, int64_t rows) {
    require(offsets.ndim == 1 && offsets.shape[0] >= 1 && offsets.dtype == DType::i32 &&
                offsets.contiguous(),
            "cu_seqlens must be contiguous int32 vectors of batch size + 1 elements");
    const int32_t* at = offsets.ptr<int32_t>();
    const int64_t last = offsets.shape[0] - 1;
    require(at[0] >= 0 && at[last] <= rows && std::is_sorted(at, at + last + 1),
            "cu_seqlens must not decrease nor lie outside of the packed rows");
}

inline void require_options(const AttentionProblem& p, DType dtype, DType row_dtype) {
    const AttentionOptions& o = p.options;
    require(o.left >= -1 && o.right >= -1, "window bounds must be -1 or at least 0");
    require(o.softcap >= 0, "softcap must be 0 or positive");
    require(o.dropout_p >= 0 && o.dropout_p <= 1, "dropout_p must lie between 0 and 1");
    require(o.dropout_p == 0 || (o.seed && o.seed->dtype == DType::i64 && o.seed->numel() == 1),
            "dropout needs a seed, one int64 element");
    require(!o.sinks || (o.sinks->ndim == 1 && o.sinks->shape[0] == p.heads &&
                         o.sinks->dtype == row_dtype),
            "sinks must be (heads) in lse's dtype");
    require(!o.alibi_slopes ||
                (o.alibi_slopes->ndim == 2 && o.alibi_slopes->shape[0] == p.batch &&
                 o.alibi_slopes->shape[1] == p.heads && o.alibi_slopes->dtype == row_dtype),
            "alibi_slopes must be (batch, heads) in lse's dtype");
    if (!o.bias) return;
    const View& bias = *o.bias;
    require(bias.dtype == DType::boolean || bias.dtype == DType::f32 || bias.dtype == dtype,
            "bias must be bool, float32 or of query's dtype");
    require(bias.ndim == 4 && bias.shape[0] == p.batch && bias.shape[1] == p.heads,
            "bias must be expanded to (batch, heads, query length, key length)");
    if (!p.packed())
        require(bias.shape[2] == p.query_rows && bias.shape[3] == p.key_rows,
                "bias must be expanded to (batch, heads, query length, key length)");
    for (int64_t b = 0; b < p.batch; ++b)
        require(p.sequence(b).query_len <= bias.shape[2] && p.sequence(b).key_len <= bias.shape[3],
                "no sequence may be longer than bias");
}
}  // namespace detail

inline AttentionProblem attention_problem(const View& query, const View& key, const View& value,
                                          const AttentionOptions& options) {
    require(query.ndim == 4 && key.ndim == 4 && value.ndim == 4,
            "query, key and value must have 4 dimensions");
    AttentionProblem p;
    p.options = options;
    p.batch = query.shape[0];
    p.heads = query.shape[1];
    p.query_rows = query.shape[2];
    p.head_size = query.shape[3];
    p.kv_heads = key.shape[1];
    p.key_rows = key.shape[2];
    p.value_size = value.shape[3];
    require(key.shape[0] == p.batch && key.shape[3] == p.head_size,
            "key must agree with query in batch and head size");
    require(value.shape[0] == p.batch && value.shape[1] == p.kv_heads &&
                value.shape[2] == p.key_rows,
            "value must agree with key in batch, heads and length");
    require(p.heads == 0 || (p.kv_heads > 0 && p.heads % p.kv_heads == 0),
            "key's heads must divide query's heads");
    require(key.dtype == query.dtype && value.dtype == query.dtype,
            "query, key and value must have one dtype");
    p.group = p.kv_heads > 0 ? p.heads / p.kv_heads : 1;
    require(!options.cu_seqlens_q == !options.cu_seqlens_k,
            "cu_seqlens are given for queries and keys or for neither");
    if (p.packed()) {
        require(p.batch == 1, "packed tensors have one batch entry");
        detail::require_offsets(*options.cu_seqlens_q, p.query_rows);
        detail::require_offsets(*options.cu_seqlens_k, p.key_rows);
        p.batch = options.cu_seqlens_q->shape[0] - 1;
        require(options.cu_seqlens_k->shape[0] == p.batch + 1,
                "cu_seqlens must have one length for queries and keys");
    }
    detail::require_options(p, query.dtype, query.dtype == DType::f64 ? DType::f64 : DType::f32);
    double pairs = 0;
    for (int64_t b = 0; b < p.batch; ++b)
        pairs += static_cast<double>(p.sequence(b).query_len) *
                 static_cast<double>(p.sequence(b).key_len);
    p.operations = 2.0 * pairs * static_cast<double>(p.heads * (p.head_size + p.value_size));
    return p;
}

// Outputs and what the backward saved come from Python as they are: wrong sizes would be followed
// out of bounds.
inline void require_rows(const View& query, const View& value, const View& out, const View& lse) {
    require(out.ndim == 4 && out.shape[0] == query.shape[0] && out.shape[1] == query.shape[1] &&
                out.shape[2] == query.shape[2] && out.shape[3] == value.shape[3] &&
                out.dtype == query.dtype,
            "out and grad_out must be (batch, heads, query length, value size) in query's dtype");
    require(lse.ndim == 3 && lse.shape[0] == query.shape[0] && lse.shape[1] == query.shape[1] &&
                lse.shape[2] == query.shape[2],
            "lse and grad_lse must be (batch, heads, query length)");
    require(lse.dtype == (query.dtype == DType::f64 ? DType::f64 : DType::f32),
            "lse and grad_lse must be float32 (float64 for float64 inputs)");
}

inline void require_gradient(const View* gradient, const View& of) {
    require(!gradient || (gradient->ndim == of.ndim && gradient->dtype == of.dtype &&
                          std::equal(of.shape, of.shape + of.ndim, gradient->shape)),
            "a gradient must have its tensor's shape and dtype");
}

// bias arrives expanded; its gradient has 1 where bias was broadcast.
inline void require_bias_gradient(const View* gradient, const View* bias) {
    if (!gradient) return;
    require(bias && bias->dtype != DType::boolean && gradient->ndim == 4 &&
                gradient->dtype == bias->dtype,
            "bias' gradient needs a bias of its dtype");
    for (int d = 0; d < 4; ++d)
        require(gradient->shape[d] == bias->shape[d] || gradient->shape[d] == 1,
                "a dimension of bias' gradient must be 1 or bias' own");
}

// out and lse are written.
void attention_forward(const View& query, const View& key, const View& value,
                       const AttentionOptions& options, const View& out, const View& lse);

// Everything of a backward pass that is only read.
struct AttentionSaved {
    const View& grad_out;
    const View* grad_lse;
    const View &query, &key, &value, &out, &lse;
};

// Null gradients are not computed; a null grad_lse is zero.
struct AttentionGradients {
    const View *query = nullptr, *key = nullptr, *value = nullptr;
    const View *bias = nullptr, *sinks = nullptr;
};

void attention_backward(const View& grad_out, const View* grad_lse, const View& query,
                        const View& key, const View& value, const AttentionOptions& options,
                        const View& out, const View& lse, const AttentionGradients& gradients);

}  // namespace bigops
