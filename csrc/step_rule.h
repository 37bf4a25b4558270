// What the optimizers' update rules share, for the CPU's vectors and the GPU's scalars.
#pragma once

#if defined(__CUDACC__)
#define BIGOPS_BOTH __host__ __device__ __forceinline__
#else
#define BIGOPS_BOTH inline
#endif

namespace bigops {

// What one parameter's update touches: the first two of every optimizer, then its states.
enum StepRole : int { kParam, kGrad, kFirstState };

// What gradients are multiplied by as they are read: torch.nn.utils.clip_grad_norm_'s coefficient
// for gradients of this norm (compared such that a NaN comes through), the loss scale and the sign.
template <class T>
BIGOPS_BOTH T grad_factor(T max_grad_norm, bool maximize, T total_norm, T grad_scale) {
    const T clip = max_grad_norm / (total_norm / grad_scale + T(1e-6));
    return (maximize ? T(-1) : T(1)) * (clip > T(1) ? T(1) : clip) / grad_scale;
}

}  // namespace bigops
