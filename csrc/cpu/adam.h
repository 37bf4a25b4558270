#pragma once

#include <cstdint>
#include <vector>

#include "../adam_rule.h"
#include "../view.h"

namespace bigops {

// How to walk tensors that do not lie alike: dimensions outermost first, strides in elements.
struct AdamLayout {
    int ndim = 0;
    int64_t shape[kMaxDims] = {};
    int64_t strides[kAdamRoles][kMaxDims] = {};
};

// One parameter with its gradient and states; a role that is not there is null.
struct AdamTensor {
    void* data[kAdamRoles] = {};
    int64_t numel = 0;
    int layout = -1;  // into the layouts; -1 when all roles are dense and lie alike
    DType dtype = DType::f32;
    DType step_dtype = DType::f32;
    void* step = nullptr;  // one number, advanced by the call
};

struct AdamTensors {
    std::vector<AdamTensor> tensors;
    std::vector<AdamLayout> layouts;
};

// Advances every step count and updates parameters and states in place. Gradients count as
// multiplied by `factor`.
void adam(const AdamTensors& tensors, const AdamOptions& options, double factor);

// The sum of all gradients' squares, in double; the same bits for any number of threads.
double squared_norm(const AdamTensors& tensors);

}  // namespace bigops
