// The activations that follow a convolution, and their slopes in terms of what is saved for the
// backward pass: of relu, sigmoid and tanh the output says it all; gelu and silu, which take a value
// twice, need what they were given.
#pragma once

#include <cmath>
#include <stdexcept>

#include "vec.h"

namespace bigops {

// As numbered in bigops/ops/activation.py.
enum class Activation : int { none, relu, sigmoid, tanh, gelu, silu };

// P(X <= x) of the standard normal distribution, to 8 + x^2 / 2 ulp in both tails, from erfc(z) =
// t exp(q(t) - z^2), t = 1 / (1 + z / 2): the form of Numerical Recipes, 6.2.2; q fitted here.
inline VecF normal_cdf(VecF x) {
    const VecF z = (x < 0 ? -x : x) * 0.707106781f, t = 1.0f / fma(splat(0.5f), z, splat(1.0f));
    VecF q = splat(0.136296734f);
    q = fma(q, t, splat(-0.633561909f));
    q = fma(q, t, splat(1.04490748f));
    q = fma(q, t, splat(-0.54659831f));
    q = fma(q, t, splat(-0.204747145f));
    q = fma(q, t, splat(0.0677680762f));
    q = fma(q, t, splat(0.011855161f));
    q = fma(q, t, splat(0.391428356f));
    q = fma(q, t, splat(0.998071785f));
    q = fma(q, t, splat(-1.26542018f));
    const VecF tail = 0.5f * t * exp(fma(-0.5f * x, x, q));
    return x < 0 ? tail : 1.0f - tail;
}
inline VecD normal_cdf(VecD x) {
    for (int i = 0; i < kLanes<double>; ++i) x[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752);
    return x;
}

template <class A>
inline Vec<A> normal_density(Vec<A> x) {
    return static_cast<A>(0.39894228040143268) * exp(static_cast<A>(-0.5) * x * x);
}

template <class A>
inline Vec<A> logistic(Vec<A> x) {
    return static_cast<A>(1) / (static_cast<A>(1) + exp(-x));
}

template <Activation kActivation, class A>
inline Vec<A> activate(Vec<A> x) {
    if constexpr (kActivation == Activation::relu) return select(x < 0, Vec<A>{}, x);  // NaN stays
    else if constexpr (kActivation == Activation::sigmoid) return logistic<A>(x);
    else if constexpr (kActivation == Activation::tanh) return tanh(x);
    else if constexpr (kActivation == Activation::gelu) return x * normal_cdf(x);
    else if constexpr (kActivation == Activation::silu) return x * logistic<A>(x);
    else return x;
}

// What is there before it is selected: GCC makes of a load and a select a masked load, which waits
// for its mask, and so of two streams from memory one after the other (1.4 times as long).
template <class V>
inline V in_register(V v) {
#if defined(__x86_64__)
    asm("" : "+v"(v));
#endif
    return v;
}

// The gradient before the activation. As torch's threshold, relu's passes unless the output is <= 0.
template <Activation kActivation, class A>
inline Vec<A> activation_gradient(Vec<A> grad, Vec<A> saved) {
    constexpr A one = 1;
    if constexpr (kActivation == Activation::relu) {
        return select(saved <= 0, Vec<A>{}, in_register(grad));
    } else if constexpr (kActivation == Activation::sigmoid) {
        return grad * saved * (one - saved);
    } else if constexpr (kActivation == Activation::tanh) {
        return grad * (one - saved * saved);
    } else if constexpr (kActivation == Activation::gelu) {
        return grad * fma(saved, normal_density<A>(saved), normal_cdf(saved));
    } else if constexpr (kActivation == Activation::silu) {
        const Vec<A> s = logistic<A>(saved);
        return grad * s * fma(saved, one - s, splat(one));
    } else {
        return grad;
    }
}

// Calls f with the activation as a type: decltype(x)::value is it.
template <class F>
inline void with_activation(Activation activation, F&& f) {
    switch (activation) {
        case Activation::none: return f(std::integral_constant<Activation, Activation::none>{});
        case Activation::relu: return f(std::integral_constant<Activation, Activation::relu>{});
        case Activation::sigmoid: return f(std::integral_constant<Activation, Activation::sigmoid>{});
        case Activation::tanh: return f(std::integral_constant<Activation, Activation::tanh>{});
        case Activation::gelu: return f(std::integral_constant<Activation, Activation::gelu>{});
        case Activation::silu: return f(std::integral_constant<Activation, Activation::silu>{});
    }
    throw std::invalid_argument("unknown activation");
}

}  // namespace bigops
