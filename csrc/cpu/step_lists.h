// Lists of tensors as the optimizers' steps take them.
#pragma once

#include <cstdint>
#include <vector>

#include "../step_rule.h"
#include "../view.h"

namespace bigops {

// After parameter and gradient: states, and the parameter's copy in another dtype.
constexpr int kMostStates = 3, kCopy = kFirstState + kMostStates, kRoles = kCopy + 1;

// How to walk tensors that do not lie alike: dimensions outermost first, strides in elements.
struct StepLayout {
    int ndim = 0;
    int64_t shape[kMaxDims] = {};
    int64_t strides[kRoles][kMaxDims] = {};
};

// One parameter with its gradient and states; a role that is not there is null.
struct StepTensor {
    void* data[kRoles] = {};
    float* scales[kMostStates] = {};  // of states that are codes, see codes.h
    int64_t numel = 0;
    int layout = -1;  // into the layouts; -1 when all roles are dense and lie alike
    DType dtype = DType::f32;        // the parameter's
    DType grad_dtype = DType::f32;   // the same or the copy's
    DType state_dtype = DType::f32;  // the same, bf16, or u8: codes
    DType copy_dtype = DType::f32;
    DType step_dtype = DType::f32;
    void* step = nullptr;  // one number, advanced by the call
};

struct StepTensors {
    std::vector<StepTensor> tensors;
    std::vector<StepLayout> layouts;
};

// The sum of all gradients' squares, in double; the same bits for any number of threads.
double squared_norm(const StepTensors& tensors);

}  // namespace bigops
