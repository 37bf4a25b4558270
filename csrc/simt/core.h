// The CPU model of a GPU's block: threads are fibers of one OS thread, so __shared__ is thread_local;
// where an instruction is collective they meet, where it waits they sleep, and every access can be
// checked against vector clocks. This header is what the CUDA words (cuda.h) and the instructions
// are built from. In the plain build clocks are empty and their functions do nothing.
//
// Code that is the model's own and lies in headers is compiled into the kernel and instrumented
// with it: wrap it in Quiet, or better put it into a .cpp of this folder, which is not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <typeindex>
#include <utility>
#include <vector>

#include "vector_types.h"

namespace bigops::simt {

// The line that asked; for a default argument, the caller's.
using Site = std::source_location;

// A callable that outlives the call it is passed to, and is not owned.
template <class Signature>
class FunctionRef;
template <class R, class... A>
class FunctionRef<R(A...)> {
public:
    FunctionRef() = default;
    template <class F>
        requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef>)
    FunctionRef(F&& f)
        : object_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
          call_([](void* object, A... a) -> R {
              return (*static_cast<std::remove_reference_t<F>*>(object))(std::forward<A>(a)...);
          }) {}
    R operator()(A... a) const { return call_(object_, std::forward<A>(a)...); }
    explicit operator bool() const { return call_ != nullptr; }

private:
    void* object_ = nullptr;
    R (*call_)(void*, A...) = nullptr;
};

// ---- Where we are. Valid within a kernel only.

struct Context {
    uint3 thread, block;
    dim3 block_size, grid_size;
};

// The same object for as long as an OS thread runs a block: only its contents change.
extern "C" __attribute__((const)) Context* bigops_simt_context();

bool in_kernel();
int thread_index();  // within the block, x fastest
int lane();
int warp();
int block_threads();
bool has_exited(int thread);

// ---- Findings

enum class Finding {
    race,           // two accesses, one of them a write, with nothing that orders them
    never_written,  // shared memory read before anything was written there
    out_of_bounds,
    misaligned,
    not_reached,    // a barrier that a thread exited without reaching
    mismatch,       // threads of one collective at different instructions
    deadlock,
    missing_fence,  // written through one proxy, read through the other, no fence between
    misuse,         // anything else that the hardware forbids or leaves undefined
    bank_conflict,  // counted on request: slow, not wrong
};

// Recorded once per kind and place. The line of the kernel that is running is added.
void report(Finding kind, const std::string& message);
// The same, and the launch ends here: what follows would have no meaning.
[[noreturn]] void fatal(Finding kind, const std::string& message);

// ---- Meeting and waiting

// Suspends this thread until ready() holds. It is asked only once no thread of the block can go on,
// so what a thread waits for comes as late as it may. If nobody is ready then and no idle hook helps,
// the block is deadlocked, which is reported with who waits on `what`.
void wait_until(FunctionRef<bool()> ready, std::string_view what, Site site = Site::current());

// Lets the others run: for loops that poll.
void yield();

// Asked, in order, when no thread can go on and before deadlock is declared, until one returns true
// (it has done something, such as completing an asynchronous copy). Registered for this block.
void when_idle(std::function<bool()> hook);
// When all threads have exited: what is left under way then.
void when_done(std::function<void()> hook);

// The operands that threads brought to a collective: [i] is that of thread first + i, on its stack
// (threads outside the mask: null).
template <class T>
class Operands {
public:
    explicit Operands(void* const* operands) : operands_(operands) {}
    T* operator[](int i) const { return static_cast<T*>(operands_[i]); }

private:
    void* const* operands_;
};

// Threads first..first+count-1 (of a warp: those in `mask`) arrive with the same key, the
// instruction's name; the last runs the body once, quietly; then all go on. A thread that exited or
// came with another key is a finding. With order=true it is a memory barrier among them and only
// threads of one warp must be at the same site; with order=false all must, and nothing is ordered.
void meet(int first, int count, uint32_t mask, const char* key, void* operand,
          FunctionRef<void(void* const*)> body, bool order, Site site);

template <class T, class Body>
void collective(int first, int count, const char* key, T& mine, Body body, bool order,
                Site site = Site::current()) {
    auto call = [&](void* const* all) { body(Operands<T>(all)); };
    meet(first, count, ~0u, key, const_cast<std::remove_const_t<T>*>(&mine), call, order, site);
}

template <class Body>
void collective(int first, int count, const char* key, Body body, bool order,
                Site site = Site::current()) {
    auto call = [&](void* const*) { body(); };
    meet(first, count, ~0u, key, nullptr, call, order, site);
}

// One object of this type per block, made when first asked for and gone with the block: the place
// for mbarriers, groups of copies and the like.
void* block_object(std::type_index type, void* (*make)(), void (*destroy)(void*));
template <class T>
T& block_state() {
    return *static_cast<T*>(block_object(
        typeid(T), [] { return static_cast<void*>(new T()); },
        [](void* object) { delete static_cast<T*>(object); }));
}

// ---- Memory

char* dynamic_shared();  // aligned to 1024 bytes
size_t dynamic_shared_bytes();
// Shared memory's own 32-bit addresses, congruent to the pointers modulo 1024: static first, then
// dynamic. Null and fatal, respectively, for what is no shared memory.
uint32_t shared_address(const void* pointer);
void* shared_pointer(uint32_t address);

enum class Proxy : uint8_t { generic, async };

// Who accesses memory: a thread of the block or asynchronous work.
using Agent = int;
Agent self();

// What an instruction reads and writes on a thread's or agent's behalf: bounds in every build, in the
// race build also races, never-written shared memory and missing fences.
void read(const void* pointer, size_t bytes, Agent agent, Proxy proxy);
void write(void* pointer, size_t bytes, Agent agent, Proxy proxy);
// One read and write that no other atomic one can tear.
void atomic(void* pointer, size_t bytes, Agent agent, Proxy proxy);
// The same for floats, which are sums and not flags: it orders nothing. Where sums must have the same bits
// in every run (Options::same_bits), two of them that nothing orders are a race.
void atomic_sum(void* pointer, size_t bytes, Agent agent, Proxy proxy);

// ---- What orders accesses

// What somebody has seen of everybody: their epochs, and the epochs up to which the async proxy sees
// what the generic proxy wrote.
struct Clock {
    std::vector<uint32_t> seen, async;
    uint32_t heard = 0;  // of other blocks: Races::heard_
};

void acquire(const Clock& clock);
void release(Clock& clock);
void release(Clock& clock, Agent agent);  // what asynchronous work did and saw, when it completes
void copy_clock(Clock& clock);            // replaces: what this thread has seen up to now

// Asynchronous work is unordered with everything after its start, until somebody joins it.
Agent fork_agent();
void join_agent(Agent agent);
// It will access nothing more; its number may be used again.
void end_agent(Agent agent);
void acquire(const Clock& clock, Agent agent);  // work that starts once others have finished

// __threadfence: with an atomic access behind it a release, before it an acquire.
void fence();

// fence.proxy.async: what this thread has seen of generic writes, the async proxy sees too.
void proxy_fence();

// ---- The model's own code in a kernel

// Accesses from here to the end of the scope are not the kernel's.
class Quiet {
public:
    Quiet();
    ~Quiet();
    Quiet(const Quiet&) = delete;
    Quiet& operator=(const Quiet&) = delete;
};

// ---- Launch

struct Shape {
    dim3 grid, block;
    size_t shared_bytes = 0;
};

// Runs `kernel` once per thread. [own, own + own_bytes) holds the arguments, which are copied from.
void run(const void* kernel, const Shape& shape, const void* own, size_t own_bytes,
         FunctionRef<void()> call);

template <class... P>
struct BoundKernel {
    void (*kernel)(P...);
    std::tuple<std::remove_cv_t<P>...> parameters;
    void operator()() { std::apply(kernel, parameters); }
};

template <class... P, class... A>
void launch(void (*kernel)(P...), const Shape& shape, A&&... arguments) {
    BoundKernel<P...> bound{kernel, {static_cast<P>(arguments)...}};
    run(reinterpret_cast<const void*>(kernel), shape, &bound, sizeof bound, bound);
}

}  // namespace bigops::simt
