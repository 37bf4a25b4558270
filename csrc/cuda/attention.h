// Attention in CUDA C++: what the binding calls. bigops/ops/attention.py says what is computed.
//
// query (B, H, Sq, D), key and value (B, Hk, Sk, D), out and gradients likewise; lse (B, H, Sq)
// float32, natural logarithm. Packed sequences: (1, H, T, D) views of (T, H, D), lse (1, H, T). A row
// that sees no key has out 0 and lse -inf. D is 64, 96, 128 or 256; bf16 or fp16; the last stride is
// 1, the others are multiples of 8 elements, and data is aligned to 16 bytes: what calls sees to it.
#pragma once

#include "../view.h"

namespace bigops::cuda {

// Key j is seen by query i iff (left < 0 || j >= i + offset - left) && (right < 0 || j <= i + offset + right).
// Of packed sequences the offset is each one's own key length - query length.
struct AttentionOptions {
    double scale = 1;
    int64_t offset = 0;
    int64_t left = -1, right = -1;
    double softcap = 0;
    bool deterministic = false;
};

// cu_seqlens are (sequences + 1) int32 on the device.
struct Packed {
    const View& cu_seqlens_q;
    const View& cu_seqlens_k;
    int64_t max_seqlen_q, max_seqlen_k;
};

// `workspace` holds kAttentionForwardWorkspace bytes, which need not be cleared.
constexpr int64_t kAttentionForwardWorkspace = 16;
void attention_forward_sm90(const View& query, const View& key, const View& value, const View& out,
                            const View& lse, const AttentionOptions& options, const Packed* packed,
                            const View& workspace, void* stream);
void attention_forward_sm80(const View& query, const View& key, const View& value, const View& out,
                            const View& lse, const AttentionOptions& options, const Packed* packed,
                            const View& workspace, void* stream);

// Gradients from grad_out and, unless null, from lse's own gradient. `workspace` holds that many
// bytes, which need not be cleared. Deterministic: the same bits in every run.
int64_t attention_backward_sm90_workspace(const View& query, const View& key, const Packed* packed);
void attention_backward_sm90(const View& grad_out, const View& query, const View& key,
                             const View& value, const View& out, const View& lse,
                             const View* grad_lse, const View& grad_query, const View& grad_key,
                             const View& grad_value, const AttentionOptions& options,
                             const Packed* packed, const View& workspace, void* stream);
int64_t attention_backward_sm80_workspace(const View& query, const View& key, const Packed* packed);
void attention_backward_sm80(const View& grad_out, const View& query, const View& key,
                             const View& value, const View& out, const View& lse,
                             const View* grad_lse, const View& grad_query, const View& grad_key,
                             const View& grad_value, const AttentionOptions& options,
                             const Packed* packed, const View& workspace, void* stream);

}  // namespace bigops::cuda
