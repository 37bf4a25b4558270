// Every op's file in this folder adds its kernels to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace bigops {

// OpenMP keeps a number of threads for each thread, and torch hands torch.set_num_threads' to a
// thread when that first asks for it: before a kernel runs here for the first time.
struct TorchThreads {
    TorchThreads() {
        thread_local bool asked = false;
        if (asked) return;
        pybind11::module_::import("torch").attr("get_num_threads")();
        asked = true;
    }
};

// What every kernel is called under: torch's number of threads, and no GIL.
struct Unlocked {
    TorchThreads threads;
    pybind11::gil_scoped_release release;
};

void bind_attention(pybind11::module_& m);
void bind_batch_norm_act(pybind11::module_& m);
void bind_conv2d(pybind11::module_& m);
void bind_adam(pybind11::module_& m);
void bind_collected(pybind11::module_& m);
void bind_decode_attention(pybind11::module_& m);
void bind_max_pool2d(pybind11::module_& m);
void bind_sgd(pybind11::module_& m);

}  // namespace bigops
