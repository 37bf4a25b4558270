// Attention for processors that multiply bf16 themselves: VDPBF16PS (Zen 4, Cooper Lake) or AMX
// (Sapphire Rapids), whichever this file was compiled for.
#pragma once

#include "attention.h"

namespace bigops {

// False where the file was compiled without bf16 products or the system withholds their state.
bool attention_bf16_available();

// attention_forward of attention.h for bf16 query, key, value and out; lse is float32.
void attention_forward_bf16(const View& query, const View& key, const View& value,
                            const AttentionOptions& options, const View& out, const View& lse);

// attention_backward of attention.h for the same, without the gradient of bias.
void attention_backward_bf16(const View& grad_out, const View* grad_lse, const View& query,
                             const View& key, const View& value, const AttentionOptions& options,
                             const View& out, const View& lse,
                             const AttentionGradients& gradients);

}  // namespace bigops
