// Stochastic gradient descent with momentum (Polyak 1964) or Nesterov's (Sutskever et al. 2013), in
// torch.optim.SGD's form, over a whole list of parameters in one call: the rule is csrc/sgd_rule.h's,
// the walk step.h's. With momentum it moves 20 bytes a parameter in fp32, without 12.
#include "sgd.h"

#include "step.h"

namespace bigops {
namespace {

template <class T, bool kMomentum>
struct SgdStep {
    static constexpr int kStates = kMomentum ? 1 : 0;
    static constexpr bool kSigned[kMostStates] = {true, true, true};
    SgdNumbers<T> numbers;

    void operator()(Vec<T> grad, Vec<T>& param, Vec<T> (&states)[kMostStates]) const {
        sgd_rule<kMomentum, Math<T>>(numbers, grad, param, states[0]);
    }
};

}  // namespace

void sgd(const StepTensors& list, const SgdOptions& options, double factor) {
    step_over(list, [&](size_t, auto types, auto update) {
        using T = compute_t<typename decltype(types)::P>;
        SgdNumbers<T> numbers(options);
        numbers.factor = static_cast<T>(factor);
        options.momentum != 0 ? update(SgdStep<T, true>{numbers})
                              : update(SgdStep<T, false>{numbers});
    });
}

}  // namespace bigops
