// The update of stochastic gradient descent with momentum, stated once for the CPU's vectors and
// the GPU's scalars. Math is as in adam_rule.h.
#pragma once

#include <limits>

#include "step_rule.h"

namespace bigops {

struct SgdOptions {
    double lr = 0;
    double momentum = 0;
    double dampening = 0;
    double weight_decay = 0;
    bool nesterov = false;
    bool maximize = false;
    bool is_first_step = false;  // momentum buffers hold nothing yet
    double max_grad_norm = std::numeric_limits<double>::infinity();
};

// The options as the update wants them.
template <class T>
struct SgdNumbers {
    T factor = 1;
    T minus_lr, momentum, weight, l2;
    bool coupled, nesterov, is_first_step;

    explicit SgdNumbers(const SgdOptions& o)
        : minus_lr(static_cast<T>(-o.lr)),
          momentum(static_cast<T>(o.momentum)),
          weight(static_cast<T>(1 - o.dampening)),
          l2(static_cast<T>(o.weight_decay)),
          coupled(o.weight_decay != 0),
          nesterov(o.nesterov),
          is_first_step(o.is_first_step) {}
};

// Without momentum there is no buffer.
template <bool kMomentum, class Math, class T = typename Math::Scalar,
          class V = typename Math::Lanes>
BIGOPS_BOTH void sgd_rule(const SgdNumbers<T>& n, V grad, V& param, V& momentum_buffer) {
    grad = n.factor * grad;
    if (n.coupled) grad = Math::fma(n.l2, param, grad);
    if constexpr (kMomentum) {
        momentum_buffer =
            n.is_first_step ? grad : Math::fma(n.momentum, momentum_buffer, n.weight * grad);
        grad = n.nesterov ? Math::fma(n.momentum, momentum_buffer, grad) : momentum_buffer;
    }
    param = Math::fma(n.minus_lr, grad, param);
}

}  // namespace bigops
