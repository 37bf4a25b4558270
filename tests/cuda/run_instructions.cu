// All instruction kernels as one shared object for a GPU; tests/instructions.py builds and calls it.
#include "instructions_copy.cu"
#include "instructions_mma.cu"
#include "instructions_tma.cu"
#include "instructions_warp.cu"
#include "instructions_wgmma.cu"

// Calls a function of the above and waits for its kernels. Null, or what went wrong. By x86-64's (and
// AArch64's) calling convention a function that takes fewer arguments ignores the others.
extern "C" const char* run_instructions(void* function, const int64_t (&a)[9]) {
    using F = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
    static std::string error;
    try {
        reinterpret_cast<F>(function)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8]);
        bigops::cuda::check(cudaDeviceSynchronize(), "the kernel");
        return nullptr;
    } catch (const std::exception& thrown) {
        error = thrown.what();
        return error.c_str();
    }
}
