// Attention for processors that multiply bf16 themselves: VDPBF16PS (Zen 4, Cooper Lake) or AMX
// (Sapphire Rapids), whichever this file was compiled for.
#pragma once

#include "attention.h"

namespace bigops {

// False where the file was compiled without bf16 products or the system withholds their state.
bool attention_bf16_available();

// attention_forward of attention.h for bf16 query, key, value and out; lse is float32.
void attention_forward_bf16(const AttentionProblem& p, const View& query, const View& key,
                            const View& value, const View& out, const View& lse);

// attention_backward of attention.h for bf16, without the gradient of bias.
void attention_backward_bf16(const AttentionProblem& p, const AttentionSaved& saved,
                             const AttentionGradients& gradients);

// The same for float32, with products of three bf16 an element. That takes AMX, sequences long
// enough and numbers in range (parts_bf16.h); which sequences are done is returned, none if empty.
// What is written of the others means nothing.
std::vector<bool> attention_forward_split(const AttentionProblem& problem, const View& query,
                                          const View& key, const View& value, const View& out,
                                          const View& lse);
std::vector<bool> attention_backward_split(const AttentionProblem& problem,
                                           const AttentionSaved& saved,
                                           const AttentionGradients& gradients);

}  // namespace bigops
