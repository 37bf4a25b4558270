// The Adam update, stated once for the CPU's vectors and the GPU's scalars. Math names the types
// (Scalar, and Lanes: some of them) and what C++ has no operator for.
#pragma once

#include <cmath>
#include <limits>

#include "step_rule.h"

namespace bigops {

enum AdamRole : int { kExpAvg = kFirstState, kExpAvgSq, kMaxExpAvgSq, kAdamRoles };

struct AdamOptions {
    double lr = 0;
    double beta1 = 0;
    double beta2 = 0;
    double eps = 0;
    double weight_decay = 0;
    bool decoupled_weight_decay = false;
    bool amsgrad = false;
    bool maximize = false;
    double max_grad_norm = std::numeric_limits<double>::infinity();
};

// What depends on the learning rate and the step, worked out in double.
template <class T>
struct AdamPace {
    T step_size = 0, correction = 0, decay = 0;

    AdamPace() = default;
    BIGOPS_BOTH AdamPace(const AdamOptions& o, double lr, double step)
        : step_size(static_cast<T>(lr / (1 - std::pow(o.beta1, step)))),
          correction(static_cast<T>(1 / std::sqrt(1 - std::pow(o.beta2, step)))),
          decay(static_cast<T>(o.decoupled_weight_decay ? lr * o.weight_decay : 0)) {}
};

// The options and step as the update wants them, worked out in double.
template <class T>
struct AdamNumbers : AdamPace<T> {
    static constexpr T kPart = 2 * std::numeric_limits<T>::epsilon();
    T factor = 1, l2, eps;
    T weight1, beta2_high, beta2_low, weight2;
    T keep, keep_rest;  // 1 - decay in two parts of one sign
    bool mostly_old, coupled;

    AdamNumbers(const AdamOptions& o, double step)
        : l2(static_cast<T>(o.weight_decay)),
          eps(static_cast<T>(o.eps)),
          weight1(static_cast<T>(o.beta1 >= 0.5 ? 1 - o.beta1 : o.beta1)),
          // 0.999 rounded to float is off by 1e-5 of 1 - 0.999, which an average over a thousand
          // steps collects; so beta2 is carried in two parts. Both are positive, since with a
          // part of zero an infinite average would become NaN, which torch's does not.
          beta2_high(std::nextafter(static_cast<T>(o.beta2), T(0))),
          beta2_low(static_cast<T>(o.beta2 - static_cast<double>(beta2_high))),
          weight2(static_cast<T>(1 - o.beta2)),
          mostly_old(o.beta1 >= 0.5),
          coupled(!o.decoupled_weight_decay && o.weight_decay != 0) {
        set(AdamPace<T>(o, o.lr, step));
    }

    // 1 - decay in one number would be off by the same in all steps, and param - decay * param makes
    // an infinite one NaN, which torch's does not.
    BIGOPS_BOTH void set(const AdamPace<T>& pace) {
        static_cast<AdamPace<T>&>(*this) = pace;
        keep = (1 - pace.decay) - kPart;
        keep_rest = (1 - keep) - pace.decay;
    }
};

template <bool kAmsgrad, class Math, class T = typename Math::Scalar, class V = typename Math::Lanes>
BIGOPS_BOTH void adam_rule(const AdamNumbers<T>& n, V grad, V& param, V& exp_avg, V& exp_avg_sq,
                           V& max_exp_avg_sq) {
    grad = n.factor * grad;
    if (n.coupled) grad = Math::fma(n.l2, param, grad);
    // Interpolated from the end that weighs more, which keeps its digits.
    exp_avg = n.mostly_old ? Math::fma(n.weight1, grad - exp_avg, exp_avg)
                           : Math::fma(n.weight1, exp_avg - grad, grad);
    exp_avg_sq = Math::fma(n.beta2_high, exp_avg_sq,
                           Math::fma(n.beta2_low, exp_avg_sq, n.weight2 * (grad * grad)));
    V second = exp_avg_sq;
    if constexpr (kAmsgrad)
        second = max_exp_avg_sq = max_exp_avg_sq > exp_avg_sq ? max_exp_avg_sq : exp_avg_sq;
    const V denominator = n.correction * Math::sqrt(second) + n.eps;
    const V change = n.step_size * (exp_avg / denominator);
    param = n.decay == T(0) ? param - change
                            : Math::fma(n.keep, param, Math::fma(n.keep_rest, param, -change));
}

}  // namespace bigops
