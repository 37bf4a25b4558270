#include "block.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "findings.h"

#ifdef BIGOPS_SIMT_ADDRESS
#include <sanitizer/asan_interface.h>
#endif

namespace bigops::simt {
namespace {

// Reached from kernels at every access, hence the fastest way to a thread's own variable.
__attribute__((tls_model("initial-exec"))) thread_local constinit Block* running = nullptr;

constexpr size_t kSwizzlePeriod = 1024;
// Hopper keeps the first kilobyte of a block's shared memory for itself.
constexpr uint32_t kFirstShared = 1024;
// All ones is NaN in every floating-point format.
constexpr int kPoison = 0xff;

std::string ranges(const std::vector<int>& threads) {
    std::string text;
    for (size_t i = 0; i < threads.size();) {
        size_t k = i;
        while (k + 1 < threads.size() && threads[k + 1] == threads[k] + 1) ++k;
        if (!text.empty()) text += ", ";
        text += std::to_string(threads[i]);
        if (k > i) text += "-" + std::to_string(threads[k]);
        i = k + 1;
    }
    return text;
}

}  // namespace

extern "C" Context* bigops_simt_context() { return running ? &running->context : nullptr; }

Options& options() {
    static Options options;
    return options;
}

Block* Block::current() { return running; }

Block::Block() {
    dynamic_ = static_cast<char*>(::operator new(kMaxShared, std::align_val_t(kSwizzlePeriod)));
}

Block::~Block() { ::operator delete(dynamic_, std::align_val_t(kSwizzlePeriod)); }

void Block::run(Launch& launch, uint3 index) {
    launch_ = &launch;
    const dim3 block = launch.shape.block;
    size_ = static_cast<int>(block.x * block.y * block.z);
    context = {{0, 0, 0}, index, block, launch.shape.grid};
    random_.seed(static_cast<uint32_t>(options().seed + index.x + 977 * index.y + 7919 * index.z));

    static_ = tls_block(launch.module);
    static_bytes_ = launch.module.tls_bytes;
    dynamic_bytes_ = launch.shape.shared_bytes;
    static_window_ =
        kFirstShared + static_cast<uint32_t>(reinterpret_cast<uintptr_t>(static_) % kSwizzlePeriod);
    dynamic_window_ = (static_window_ + static_cast<uint32_t>(static_bytes_ + kSwizzlePeriod - 1)) /
                      kSwizzlePeriod * kSwizzlePeriod;
    last_region_ = nullptr;
#ifdef BIGOPS_SIMT_ADDRESS
    __asan_unpoison_memory_region(dynamic_, kMaxShared);
#endif
    if (static_) memset(static_, kPoison, static_bytes_);
    memset(dynamic_, kPoison, dynamic_bytes_);
#ifdef BIGOPS_SIMT_ADDRESS
    __asan_poison_memory_region(dynamic_ + dynamic_bytes_, kMaxShared - dynamic_bytes_);
#endif
    races_.start(*this, size_);

    stacks_.reserve(size_);
    if (static_cast<int>(threads_.size()) < size_) threads_.resize(static_cast<size_t>(size_));
    for (int i = 0; i < size_; ++i) {
        Thread& thread = threads_[static_cast<size_t>(i)];
        const auto flat = static_cast<unsigned>(i);
        thread.index = {flat % block.x, flat / block.x % block.y, flat / (block.x * block.y)};
        thread.state = State::runnable;
        thread.quiet = 0;
        stacks_.prepare(i, thread.resume, &Block::entry);
    }
    meetings_.clear();
    ready_.clear();
    for (int i = 0; i < size_; ++i)
        ready_.push_back(options().order == Order::reverse ? size_ - 1 - i : i);
    alive_ = size_;
    idle_hooks.clear();
    done_hooks.clear();
    polls_ = 0;
    in_body_ = false;

    running = this;
    try {
        run_threads();
        for (auto& hook : done_hooks) hook();
        races_.tell(launch.grid_races);
        banks_.end(launch.bank_totals);
    } catch (const Stopped&) {
        launch.stopped = true;
    }
    for (auto& [type, object] : objects_) object.destroy(object.object);
    objects_.clear();
    running = nullptr;
}

uint64_t Block::number() const {
    const uint3 at = context.block;
    return (static_cast<uint64_t>(at.z) * context.grid_size.y + at.y) * context.grid_size.x + at.x;
}

void* Block::object(std::type_index type, void* (*make)(), void (*destroy)(void*)) {
    const auto [it, added] = objects_.try_emplace(type, Object{nullptr, destroy});
    if (added) it->second.object = make();
    return it->second.object;
}

// ---- Scheduling

void Block::entry() {
    Block& block = *running;
    fiber_started(block.thread().resume);
    try {
        block.launch_->call();
    } catch (const std::exception& error) {
        report(Finding::misuse, std::string("the kernel threw: ") + error.what());
    }
    block.exit_thread();
}

void Block::resume(int thread) {
    now_ = thread;
    context.thread = threads_[static_cast<size_t>(thread)].index;
    on_fiber_ = true;
    switch_fiber(scheduler_, threads_[static_cast<size_t>(thread)].resume);
    on_fiber_ = false;
}

void Block::leave() { switch_fiber(thread().resume, scheduler_); }

int Block::next_thread() {
    size_t i = 0;
    if (options().order == Order::shuffled) i = random_() % ready_.size();
    const int thread = ready_[i];
    ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(i));
    return thread;
}

void Block::run_threads() {
    while (alive_ > 0) {
        if (!ready_.empty()) {
            lose_patience();
            resume(next_thread());
            if (launch_->stopped) throw Stopped();
        } else if (!poll()) {
            deadlock();
        }
    }
}

// Whether anybody can go on now.
bool Block::poll() {
    do {
        for (int i = 0; i < size_; ++i) {
            Thread& thread = threads_[static_cast<size_t>(i)];
            if (thread.state != State::waiting) continue;
            now_ = i;
            context.thread = thread.index;
            if (thread.ready()) make_ready(i);
        }
        if (!ready_.empty()) {
            if (options().order == Order::reverse) std::reverse(ready_.begin(), ready_.end());
            return true;
        }
    } while (std::any_of(idle_hooks.begin(), idle_hooks.end(), [](auto& hook) { return hook(); }));
    return false;
}

void Block::make_ready(int thread) {
    threads_[static_cast<size_t>(thread)].state = State::runnable;
    ready_.push_back(thread);
    polls_ = 0;
}

// A thread that polls may wait for another block, hence a time and not a count.
void Block::yield() {
    Thread& self = thread();
    self.pc = kernel_pc();
    self.state = State::polling;
    ready_.push_back(now_);
    if (polls_++ == 0) first_poll_ = std::chrono::steady_clock::now();
    leave();
    self.state = State::runnable;
}

void Block::lose_patience() {
    if (polls_ % 1024 != 1023) return;
    std::this_thread::yield();
    const std::chrono::duration<double> past = std::chrono::steady_clock::now() - first_poll_;
    if (past.count() > options().patience) deadlock();
}

void Block::stop() {
    launch_->stopped = true;
    if (!on_fiber_) throw Stopped();
    leave();  // run_threads does not come back
    __builtin_unreachable();
}

void Block::wait_until(FunctionRef<bool()> ready, std::string_view what, Site site) {
    Thread& self = thread();
    self.ready = ready;
    self.what = what;
    self.site = site;
    self.pc = kernel_pc();
    self.state = State::waiting;
    ++self.quiet;
    leave();
    --self.quiet;
}

void Block::exit_thread() {
    const int exiting = now_;
    thread().state = State::exited;
    polls_ = 0;
    --alive_;
    for (size_t i = meetings_.size(); i-- > 0;) {
        Meeting& meeting = meetings_[i];
        if (!meeting.member(exiting)) continue;
        check_members(meeting);
        if (meeting.arrived == meeting.count) finish(i, {});
    }
    leave();
}

// Where it waits: as its call says, or if that is within the model, as its code says.
std::string Block::where(const Thread& thread) const {
    const std::string_view file = thread.site.file_name();
    if (thread.state == State::polling || file.empty() || file.find("/simt/") != file.npos)
        return place(thread.pc, launch_->module.low);
    return std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(thread.site.line());
}

void Block::disagree(const std::string& message) {
    Found found = {Finding::mismatch, message};
    found.block = context.block;
    found.thread = context.thread;
    add_finding(std::move(found), message);
    stop();
}

// A barrier is also passed if the rest has exited, as hardware does; nothing else is.
void Block::check_members(Meeting& meeting) {
    for (int i = 0; i < meeting.count; ++i) {
        const int member = meeting.first + i;
        if (!meeting.member(member) || meeting.here[static_cast<size_t>(i)] || !exited(member))
            continue;
        const Thread& waiting = threads_[static_cast<size_t>(meeting.opener)];
        const std::string at = where(waiting);
        Found found = {Finding::not_reached, std::string(meeting.key) + " at " + at +
                                                 " was not reached by thread " +
                                                 std::to_string(member) + ", which has exited"};
        found.block = context.block;
        found.thread = threads_[static_cast<size_t>(member)].index;
        add_finding(std::move(found), at);
        if (meeting.body) stop();
        meeting.here[static_cast<size_t>(i)] = true;
        ++meeting.arrived;
    }
}

void Block::meet(int first, int count, uint32_t mask, const char* key, void* operand,
                 FunctionRef<void(void* const*)> body, bool order, Site site) {
    Thread& self = thread();
    self.key = key;
    self.site = site;
    self.pc = kernel_pc();
    const auto it = std::find_if(meetings_.begin(), meetings_.end(), [&](const Meeting& open) {
        return open.first == first && open.count == count && open.mask == mask &&
               !open.here[static_cast<size_t>(now_ - first)];
    });
    const auto index = static_cast<size_t>(it - meetings_.begin());
    if (it == meetings_.end()) {
        Meeting open = {first, count, 0, mask, key, site, order, true, now_, {}, {}};
        open.operands.resize(static_cast<size_t>(count));
        open.here.resize(static_cast<size_t>(count));
        if (count <= kWarpSize)
            for (int i = 0; i < count; ++i)
                if (!(mask >> i & 1)) {
                    ++open.arrived;
                    open.here[static_cast<size_t>(i)] = true;
                }
        meetings_.push_back(std::move(open));
    }
    Meeting& meeting = meetings_[index];
    if (!meeting.member(now_))
        disagree(std::string(key) + " of thread " + std::to_string(now_) + " at " + where(self) +
                 ": this lane is not in its own mask");
    const auto slot = static_cast<size_t>(now_ - first);
    meeting.operands[slot] = operand;
    meeting.here[slot] = true;
    ++meeting.arrived;

    // Whom this thread has to agree with on the line: everybody, or at a barrier its warp.
    int peer = meeting.opener;
    if (order)
        for (int i = now_ / kWarpSize * kWarpSize; i < now_; ++i)
            if (i >= first && threads_[static_cast<size_t>(i)].state == State::meeting) peer = i;
    const Thread& other = threads_[static_cast<size_t>(peer)];
    const bool same_line =
        (order && peer / kWarpSize != now_ / kWarpSize) || peer == now_ ||
        (site.line() == other.site.line() && !strcmp(site.file_name(), other.site.file_name()));
    if (strcmp(meeting.key, key) != 0 || !same_line)
        disagree(std::string(key) + " of thread " + std::to_string(now_) + " at " + where(self) +
                 " meets " + other.key + " of thread " + std::to_string(peer) + " at " +
                 where(other));
    if (meeting.arrived - 1 == 0 || meeting.opener == now_) check_members(meeting);

    if (meetings_[index].arrived == count) {
        ++self.quiet;
        finish(index, body);
        --self.quiet;
        return;
    }
    self.state = State::meeting;
    leave();
}

void Block::finish(size_t index, FunctionRef<void(void* const*)> body) {
    Meeting meeting = std::move(meetings_[index]);
    meetings_.erase(meetings_.begin() + static_cast<std::ptrdiff_t>(index));
    std::vector<int> members;
    for (int i = 0; i < meeting.count; ++i)
        if (meeting.member(meeting.first + i) && !exited(meeting.first + i))
            members.push_back(meeting.first + i);
    if (body) {
        in_body_ = true;
        body(meeting.operands.data());
        in_body_ = false;
    }
    if (meeting.order) races_.barrier(members);
    if (options().order == Order::reverse) std::reverse(members.begin(), members.end());
    for (const int member : members)
        if (member != now_ && threads_[static_cast<size_t>(member)].state == State::meeting)
            make_ready(member);
}

void Block::deadlock() {
    std::map<std::string, std::vector<int>> waiting;
    bool only_meetings = true;
    for (int i = 0; i < size_; ++i) {
        const Thread& thread = threads_[static_cast<size_t>(i)];
        const std::string at = where(thread);
        if (thread.state == State::waiting) {
            only_meetings = false;
            waiting["wait for " + thread.what + " at " + at].push_back(i);
        } else if (thread.state == State::meeting) {
            waiting["wait in " + std::string(thread.key) + " at " + at].push_back(i);
        } else if (thread.state == State::polling) {
            only_meetings = false;
            waiting["poll at " + at].push_back(i);
        } else if (thread.state == State::exited) {
            waiting["have exited"].push_back(i);
        }
    }
    std::string text = only_meetings ? "threads meet at different places, so none goes on"
                                     : "no thread can go on";
    std::string key;
    for (const auto& [what, threads] : waiting) {
        text += "; threads " + ranges(threads) + " " + what;
        key += what;
    }
    Found found = {only_meetings ? Finding::mismatch : Finding::deadlock, text};
    found.block = context.block;
    add_finding(std::move(found), key);
    launch_->stopped = true;
    throw Stopped();
}

// ---- Memory

uint32_t Block::shared_address(const void* pointer) const {
    const auto* at = static_cast<const char*>(pointer);
    if (at >= dynamic_ && at <= dynamic_ + dynamic_bytes_)
        return dynamic_window_ + static_cast<uint32_t>(at - dynamic_);
    if (static_ && at >= static_ && at < static_ + static_bytes_)
        return static_window_ + static_cast<uint32_t>(at - static_);
    return 0;
}

void* Block::shared_pointer(uint32_t address) const {
    if (address >= dynamic_window_ && address - dynamic_window_ <= dynamic_bytes_)
        return dynamic_ + (address - dynamic_window_);
    if (address >= static_window_ && address - static_window_ < static_bytes_)
        return static_ + (address - static_window_);
    return nullptr;
}

Block::Space Block::space(uintptr_t address, size_t bytes) {
    if (stacks_.contains(address)) return Space::own;
    const auto within = [&](const void* low, size_t size) {
        const uintptr_t offset = address - reinterpret_cast<uintptr_t>(low);
        return offset < size && bytes <= size - offset;
    };
    if (within(dynamic_, dynamic_bytes_) || within(static_, static_bytes_)) return Space::shared;
    if (last_region_ && last_region_->holds(address, bytes)) return Space::global;
    if (within(&context, sizeof context) || launch_->own.holds(address, bytes)) return Space::own;
    const auto& regions = launch_->regions;
    auto it = std::upper_bound(regions.begin(), regions.end(), address,
                               [](uintptr_t a, const Region& region) { return a < region.low; });
    if (it != regions.begin() && std::prev(it)->holds(address, bytes)) {
        last_region_ = &*std::prev(it);
        return Space::global;
    }
    const Module& module = launch_->module;
    if (address >= module.low && address < module.high) return Space::own;
    return regions.empty() && !within(dynamic_, kMaxShared) ? Space::global : Space::forbidden;
}

std::string Block::describe(uintptr_t address) const {
    const auto* at = reinterpret_cast<const char*>(address);
    if (at >= dynamic_ && at < dynamic_ + kMaxShared)
        return "dynamic shared memory, byte " + std::to_string(at - dynamic_) + " of " +
               std::to_string(dynamic_bytes_);
    if (static_ && at >= static_ && at < static_ + static_bytes_)
        return "__shared__ memory [" + std::to_string(at - static_) + "]";
    // The nearest region: what was overrun lies before it, or, seldom, after it.
    const Region* nearest = nullptr;
    uintptr_t least = UINTPTR_MAX;
    for (const Region& region : launch_->regions) {
        const uintptr_t distance = address < region.low     ? region.low - address
                                   : address >= region.high ? address - region.high
                                                            : 0;
        if (distance >= least) continue;
        least = distance;
        nearest = &region;
    }
    if (!nearest || least > (1 << 24)) return "memory that is not the kernel's";
    return nearest->name + ", byte " +
           std::to_string(static_cast<std::ptrdiff_t>(address - nearest->low)) + " of " +
           std::to_string(nearest->high - nearest->low);
}

// Kernel and model both keep frame pointers.
const void* Block::kernel_pc() const {
    if (!on_fiber_ || in_body_) return threads_[static_cast<size_t>(now_)].pc;
    auto frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    const uintptr_t top = stacks_.top_of(frame);
    while (frame != 0 && frame < top && frame % 8 == 0) {
        const auto* words = reinterpret_cast<const uintptr_t*>(frame);
        if (words[1] >= launch_->module.low && words[1] < launch_->module.high)
            return reinterpret_cast<const void*>(words[1]);
        if (words[0] <= frame) break;
        frame = words[0];
    }
    return nullptr;
}

// ---- What core.h offers

bool in_kernel() { return running != nullptr; }
int thread_index() { return running->now(); }
int lane() { return running->now() % kWarpSize; }
int warp() { return running->now() / kWarpSize; }
int block_threads() { return running->size(); }
bool has_exited(int thread) { return running->exited(thread); }
Agent self() { return running->now(); }

void wait_until(FunctionRef<bool()> ready, std::string_view what, Site site) {
    running->wait_until(ready, what, site);
}
void yield() { running->yield(); }
void when_idle(std::function<bool()> hook) { running->idle_hooks.push_back(std::move(hook)); }
void when_done(std::function<void()> hook) { running->done_hooks.push_back(std::move(hook)); }
void meet(int first, int count, uint32_t mask, const char* key, void* operand,
          FunctionRef<void(void* const*)> body, bool order, Site site) {
    running->meet(first, count, mask, key, operand, body, order, site);
}
void* block_object(std::type_index type, void* (*make)(), void (*destroy)(void*)) {
    return running->object(type, make, destroy);
}

char* dynamic_shared() { return running->dynamic(); }
size_t dynamic_shared_bytes() { return running->launch().shape.shared_bytes; }
uint32_t shared_address(const void* pointer) { return running->shared_address(pointer); }
void* shared_pointer(uint32_t address) {
    void* pointer = running->shared_pointer(address);
    if (!pointer)
        fatal(Finding::out_of_bounds,
              "the shared address " + std::to_string(address) + " is outside of shared memory");
    return pointer;
}

Quiet::Quiet() {
    if (running) ++running->thread().quiet;
}
Quiet::~Quiet() {
    if (running) --running->thread().quiet;
}

}  // namespace bigops::simt
