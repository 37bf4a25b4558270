#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "../view.h"

namespace bigops {

// What one parameter's update touches.
enum AdamRole : int { kParam, kGrad, kExpAvg, kExpAvgSq, kMaxExpAvgSq, kAdamRoles };

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

struct AdamOptions {
    double lr = 0;
    double beta1 = 0;
    double beta2 = 0;
    double eps = 0;
    double weight_decay = 0;
    bool decoupled_weight_decay = false;
    bool amsgrad = false;
    bool maximize = false;
    double grad_scale = 1;  // gradients count as divided by it
    double max_grad_norm = std::numeric_limits<double>::infinity();
    double total_norm = 0;  // of the gradients as they are, before grad_scale
};

// Advances every step count and updates parameters and states in place.
void adam(const AdamTensors& tensors, const AdamOptions& options);

// The sum of all gradients' squares, in double; the same bits for any number of threads.
double squared_norm(const AdamTensors& tensors);

}  // namespace bigops
