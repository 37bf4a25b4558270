// Stackful coroutines of one OS thread: a switch saves what the ABI says a callee preserves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace bigops::simt {

// Where a fiber, or the OS thread's own stack, goes on.
struct Resume {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    // For the sanitizer: the stack that is switched to, and what it keeps of one that is left.
    const void* bottom = nullptr;
    size_t size = 0;
    void* fake_stack = nullptr;
};

// Continues at `to` and returns when something switches back to `from`.
void switch_fiber(Resume& from, Resume& to);
// What runs first in every fiber has to call this before anything else.
void fiber_started(Resume& fiber);

// Stacks with a page below each that nobody may touch; kept for the next block.
class Stacks {
public:
    Stacks() = default;
    ~Stacks();
    Stacks(const Stacks&) = delete;
    Stacks& operator=(const Stacks&) = delete;

    void reserve(int count);
    // `fiber` will start in `entry`, which must not return.
    void prepare(int i, Resume& fiber, void (*entry)());
    bool contains(uintptr_t address) const { return address - low_ < size_; }
    // The highest address of the stack that holds this one.
    uintptr_t top_of(uintptr_t address) const;

private:
    uintptr_t low_ = 0;
    size_t size_ = 0;
};

}  // namespace bigops::simt
