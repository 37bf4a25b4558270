// Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019), with AMSGrad (Reddi et al.
// 2018), over a whole list of parameters in one call: the rule is csrc/adam_rule.h's, the walk
// step.h's. The update reads four streams and writes three, 28 bytes a parameter in fp32. Scaling,
// clipping and negating the gradient happen as it is read.
#include "adam.h"

#include "step.h"

namespace bigops {
namespace {

template <class T, bool kAmsgrad>
struct AdamStep {
    static constexpr int kStates = kAmsgrad ? 3 : 2;
    // Averages of gradients, of squares.
    static constexpr bool kSigned[kMostStates] = {true, false, false};
    AdamNumbers<T> numbers;

    void operator()(Vec<T> grad, Vec<T>& param, Vec<T> (&states)[kMostStates]) const {
        adam_rule<kAmsgrad, Math<T>>(numbers, grad, param, states[0], states[1], states[2]);
    }
};

double advance(const StepTensor& tensor) {
    if (tensor.step_dtype == DType::f64) return *static_cast<double*>(tensor.step) += 1;
    return static_cast<double>(*static_cast<float*>(tensor.step) += 1);
}

}  // namespace

void adam(const StepTensors& list, const AdamOptions& options, double factor) {
    std::vector<double> steps;
    for (const StepTensor& tensor : list.tensors) steps.push_back(advance(tensor));
    step_over(list, [&](size_t i, auto types, auto update) {
        using T = compute_t<typename decltype(types)::P>;
        AdamNumbers<T> numbers(options, steps[i]);
        numbers.factor = static_cast<T>(factor);
        options.amsgrad ? update(AdamStep<T, true>{numbers}) : update(AdamStep<T, false>{numbers});
    });
}

}  // namespace bigops
