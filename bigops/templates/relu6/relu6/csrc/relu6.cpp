// relu6 on the CPU: a register of lanes at a time, every thread a stretch of memory.
#include "relu6.h"

#include "cpu/threads.h"
#include "cpu/vec.h"

using namespace bigops;

namespace {

// step(i, count) for every register: elements i to i + count, all lanes but in the last one.
template <class A, class Step>
void for_each_register(int64_t numel, const Step& step) {
    constexpr int64_t kStep = kLanes<A>;
    const int64_t whole = numel / kStep * kStep;
#pragma omp parallel for num_threads(threads_for(static_cast<double>(numel)))
    for (int64_t i = 0; i < whole; i += kStep) step(i, kLanes<A>);
    if (whole < numel) step(whole, static_cast<int>(numel - whole));
}

template <class Kernel>
void with_type(DType dtype, const Kernel& kernel) {
    switch (dtype) {
        case DType::f32: return kernel(float{});
        case DType::f64: return kernel(double{});
        case DType::bf16: return kernel(bf16{});
        case DType::f16: return kernel(f16{});
        default: require(false, "relu6 takes floating tensors");
    }
}

}  // namespace

void forward(const View& x, const View& out) {
    require(x.numel() == out.numel() && x.dtype == out.dtype, "x and out differ");
    with_type(x.dtype, [&]<class T>(T) {
        using A = compute_t<T>;
        for_each_register<A>(x.numel(), [&](int64_t i, int count) {
            const Vec<A> v = load(x.ptr<T>() + i, count), zero = {}, six = splat<A>(6);
            store(out.ptr<T>() + i, select(v < zero, zero, select(v > six, six, v)), count);
        });
    });
}

void backward(const View& grad_out, const View& x, const View& grad_x) {
    require(x.numel() == grad_x.numel() && x.dtype == grad_x.dtype, "x and grad_x differ");
    require(x.numel() == grad_out.numel() && x.dtype == grad_out.dtype, "x and grad_out differ");
    with_type(x.dtype, [&]<class T>(T) {
        using A = compute_t<T>;
        for_each_register<A>(x.numel(), [&](int64_t i, int count) {
            const Vec<A> v = load(x.ptr<T>() + i, count), zero = {}, six = splat<A>(6);
            const Vec<A> grad = load(grad_out.ptr<T>() + i, count);
            const auto passes = (v >= zero) & (v <= six);
            store(grad_x.ptr<T>() + i, select(passes, grad, zero), count);
        });
    });
}
