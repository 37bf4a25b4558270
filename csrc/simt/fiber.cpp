#include "fiber.h"

#include <sys/mman.h>

#include <cstring>
#include <stdexcept>

#ifdef BIGOPS_SIMT_ADDRESS
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace bigops::simt {
namespace {

constexpr size_t kPage = 4096;
// The sanitizer's red zones make frames several times as large.
#ifdef BIGOPS_SIMT_ADDRESS
constexpr size_t kStack = 512 * 1024;
#else
constexpr size_t kStack = 128 * 1024;
#endif
constexpr size_t kSlot = kStack + kPage;

#ifdef BIGOPS_SIMT_ADDRESS
// Who is left by the switch under way, whose stack the sanitizer learns on arrival.
thread_local Resume* leaving = nullptr;
#endif

}  // namespace

#if defined(__x86_64__)

// bigops_simt_switch(save: rdi, to: rsi). Stack, frame and callee-saved registers, and the rounding
// modes; everything else the ABI lets a call destroy.
asm(R"(
    .text
    .p2align 4
    .type bigops_simt_switch, @function
bigops_simt_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    subq $8, %rsp
    stmxcsr (%rsp)
    fnstcw 4(%rsp)
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    ldmxcsr (%rsp)
    fldcw 4(%rsp)
    addq $8, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size bigops_simt_switch, . - bigops_simt_switch
)");
extern "C" __attribute__((visibility("hidden"))) void bigops_simt_switch(void** save, void* to);

#endif

void switch_fiber(Resume& from, Resume& to) {
#ifdef BIGOPS_SIMT_ADDRESS
    leaving = &from;
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
#if defined(__x86_64__)
    bigops_simt_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
    fiber_started(from);
}

void fiber_started([[maybe_unused]] Resume& fiber) {
#ifdef BIGOPS_SIMT_ADDRESS
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &bottom, &size);
    if (leaving && !leaving->bottom) {
        leaving->bottom = bottom;
        leaving->size = size;
    }
#endif
}

Stacks::~Stacks() {
    if (low_) munmap(reinterpret_cast<void*>(low_), size_);
}

void Stacks::reserve(int count) {
    const size_t size = static_cast<size_t>(count) * kSlot;
    if (size <= size_) return;
    if (low_) munmap(reinterpret_cast<void*>(low_), size_);
    low_ = 0;
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("simt: no memory for the threads' stacks");
    low_ = reinterpret_cast<uintptr_t>(memory);
    size_ = size;
    for (int i = 0; i < count; ++i)
        mprotect(reinterpret_cast<void*>(low_ + static_cast<size_t>(i) * kSlot), kPage, PROT_NONE);
}

void Stacks::prepare(int i, Resume& fiber, void (*entry)()) {
    char* bottom = reinterpret_cast<char*>(low_) + static_cast<size_t>(i) * kSlot + kPage;
    fiber.bottom = bottom;
    fiber.size = kStack;
    fiber.fake_stack = nullptr;
#ifdef BIGOPS_SIMT_ADDRESS
    // A block that was given up left its frames' red zones.
    __asan_unpoison_memory_region(bottom, kStack);
#endif
#if defined(__x86_64__)
    // As the switch finds it: modes, six registers (a zero frame pointer ends back traces), entry,
    // and no return address, at which the stack is aligned as after a call.
    void** top = reinterpret_cast<void**>(bottom + kStack);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int k = 0; k < 6; ++k) *--top = nullptr;
    uint32_t modes[2] = {};
    asm volatile("stmxcsr %0\n\tfnstcw %1" : "=m"(modes[0]), "=m"(modes[1]));
    memcpy(--top, modes, sizeof modes);
    fiber.stack_pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = bottom;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
#endif
}

uintptr_t Stacks::top_of(uintptr_t address) const {
    return low_ + ((address - low_) / kSlot + 1) * kSlot;
}

}  // namespace bigops::simt
