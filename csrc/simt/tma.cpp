// The copy engine: "cp.async.bulk, cp.async.bulk.tensor, cp.reduce.async.bulk, cp.reduce.async.bulk.tensor".
// A load is carried out when no thread can go on without one; a store reads shared memory when its thread
// waits for that, and writes when it waits for that or the block ends.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <map>
#include <random>
#include <string>

#include "block.h"
#include "boxes.h"
#include "include/cuda_bf16.h"
#include "include/cuda_fp16.h"
#include "instructions.h"

namespace bigops::simt {
namespace {

constexpr int kTensorAlignment = 128, kBulkAlignment = 16;

template <class T>
void add_to(char* memory, const char* value) {
    T term;
    std::memcpy(&term, value, sizeof term);
    std::atomic_ref<T>(*reinterpret_cast<T*>(memory)).fetch_add(term);
}
template <class Small>
void add_small(char* memory, const char* value) {
    Small term;
    std::memcpy(&term, value, sizeof term);
    const std::atomic_ref<uint16_t> bits(*reinterpret_cast<uint16_t*>(memory));
    uint16_t before = bits.load();
    while (!bits.compare_exchange_weak(before, (Small::from_bits(before) + term).bits)) {
    }
}

void add(DType dtype, char* memory, const char* value) {
    switch (dtype) {
        case DType::f32: return add_to<float>(memory, value);
        case DType::f16: return add_small<__half>(memory, value);
        case DType::bf16: return add_small<__nv_bfloat16>(memory, value);
        case DType::i32: return add_to<int32_t>(memory, value);
        default: fatal(Finding::misuse, "no addition of the copy engine's for this element type");
    }
}

// ---- Loads

struct Load {
    Rows rows;
    char* shared;
    uint64_t* barrier;
    Agent agent;
    std::string issued;  // where
};

struct Loads {
    std::deque<Load> pending;
    std::minstd_rand random{static_cast<uint32_t>(options().seed + 1)};

    Loads() {
        when_idle([this] { return complete_one(); });
    }
    ~Loads() {
        if (!pending.empty() && !Block::current()->launch().stopped)
            report(Finding::misuse, "the block ends before " + std::to_string(pending.size()) +
                                        " loads were waited for, the first of them issued at " +
                                        pending.front().issued);
    }
    // They come in any order.
    bool complete_one() {
        if (pending.empty()) return false;
        size_t which = 0;
        if (options().order == Order::reverse) which = pending.size() - 1;
        if (options().order == Order::shuffled) which = random() % pending.size();
        const Load load = std::move(pending[which]);
        pending.erase(pending.begin() + static_cast<std::ptrdiff_t>(which));
        copy_in(load.rows, load.shared, load.agent);
        mbarrier_complete_bytes(load.barrier, static_cast<uint32_t>(load.rows.bytes()), load.agent);
        end_agent(load.agent);
        return true;
    }
};

void load(Rows rows, void* shared, uint64_t* barrier, int alignment, const char* instruction) {
    require_shared(shared, static_cast<size_t>(alignment), instruction);
    check_mbarrier(barrier);
    block_state<Loads>().pending.push_back(
        {std::move(rows), static_cast<char*>(shared), barrier, fork_agent(), here()});
}

// ---- Stores

struct Store {
    Rows rows;
    char* shared;
    bool add;
    DType dtype;
    Agent agent;
    std::string issued;  // where
    std::vector<char> content = {};
    bool was_read = false;

    void take() {
        if (std::exchange(was_read, true)) return;
        content = taken_out(rows, shared, agent);
    }
    void give() {
        for (size_t i = 0; i < rows.rows.size(); ++i) {
            const size_t bytes = rows.existing(i);
            if (bytes == 0) continue;
            char* to = rows.rows[i].data;
            const char* from = &content[rows.offset(i)];
            if (!add) {
                write(to, bytes, agent, Proxy::async);
                std::memcpy(to, from, bytes);
                continue;
            }
            const auto element = static_cast<size_t>(rows.element_bytes);
            for (size_t at = 0; at < bytes; at += element) {
                if (dtype == DType::i32) atomic(to + at, element, agent, Proxy::async);
                else atomic_sum(to + at, element, agent, Proxy::async);
                simt::add(dtype, to + at, from + at);
            }
        }
    }
};

struct ThreadStores {
    // Groups of which only the reading was waited for are written in the end; all but these before.
    static constexpr size_t kKept = 8;

    std::deque<std::vector<Store>> groups;  // committed, not yet written
    std::vector<Store> open;
    Clock written;  // by those that were kept no longer

    void shorten() {
        for (; groups.size() > kKept; groups.pop_front())
            for (Store& store : groups.front()) {
                if (!store.was_read) return;
                store.give();
                release(written, store.agent);
                end_agent(store.agent);
            }
    }
};

struct Stores {
    std::map<int, ThreadStores> of_thread;

    Stores() {
        when_done([this] { write_rest(); });
    }
    void write_rest() {
        size_t unread = 0;
        std::string where;
        for (auto& [thread, stores] : of_thread) {
            stores.groups.push_back(std::move(stores.open));
            for (auto& group : stores.groups)
                for (Store& store : group) {
                    if (store.was_read) {
                        store.give();
                    } else if (unread++ == 0) {
                        where = store.issued;
                    }
                }
        }
        if (unread > 0)
            report(Finding::misuse,
                   "the block ends, and with it its shared memory, before " + std::to_string(unread) +
                       " bulk stores were committed and waited for (cp.async.bulk.wait_group.read), the "
                       "first of them issued at " + where);
    }
};

void store(Rows rows, const void* shared, bool add, DType dtype, int alignment,
           const char* instruction) {
    require_shared(shared, static_cast<size_t>(alignment), instruction);
    block_state<Stores>().of_thread[thread_index()].open.push_back(
        {std::move(rows), static_cast<char*>(const_cast<void*>(shared)), add, dtype, fork_agent(),
         here()});
}

// ---- What maps must be

struct At {
    int64_t c[TensorMap::kMaxRank] = {};
};

At checked(const TensorMap* map, TensorMap::Mode mode, Coordinates at, const char* instruction) {
    if (reinterpret_cast<uintptr_t>(map) % alignof(TensorMap) != 0)
        fatal(Finding::misaligned, std::string(instruction) + ": a tensor map lies at a multiple of 64");
    if (map->mode == TensorMap::Mode::none)
        fatal(Finding::misuse, std::string(instruction) + ": this tensor map was never encoded");
    if (map->mode != mode)
        fatal(Finding::misuse, std::string(instruction) + ": the tensor map is " +
                                   (mode == TensorMap::Mode::tiled ? "im2col's" : "a tiled one"));
    if (map->rank != static_cast<int>(at.size()))
        fatal(Finding::misuse, std::string(instruction) + " with " + std::to_string(at.size()) +
                                   " coordinates, of a tensor map of " + std::to_string(map->rank) +
                                   " dimensions");
    At result;
    std::copy(at.begin(), at.end(), result.c);
    return result;
}

Rows linear(void* data, uint32_t bytes, int element_bytes, const char* instruction) {
    if (reinterpret_cast<uintptr_t>(data) % kBulkAlignment != 0 || bytes % kBulkAlignment != 0 ||
        bytes == 0)
        fatal(Finding::misaligned, std::string(instruction) +
                                       ": the global address and the number of bytes, " +
                                       std::to_string(bytes) + ", must be multiples of 16");
    Rows rows;
    rows.row_bytes = bytes;
    rows.element_bytes = element_bytes;
    rows.rows = {{static_cast<char*>(data), 0, static_cast<int>(bytes) / element_bytes}};
    return rows;
}

}  // namespace

bool tma_loads_pending() { return !block_state<Loads>().pending.empty(); }

void tma_prefetch(const TensorMap* map) {
    if (map->mode == TensorMap::Mode::none)
        fatal(Finding::misuse, "prefetch.tensormap: this tensor map was never encoded");
}

void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, Coordinates coordinates) {
    const char* name = "cp.async.bulk.tensor, load";
    const At at = checked(map, TensorMap::Mode::tiled, coordinates, name);
    load(tiled_rows(*map, at.c), shared, barrier, kTensorAlignment, name);
}

void tma_load_im2col(void* shared, const TensorMap* map, uint64_t* barrier, Coordinates coordinates,
                     int offset_w, int offset_h) {
    const char* name = "cp.async.bulk.tensor.im2col";
    const At at = checked(map, TensorMap::Mode::im2col, coordinates, name);
    const int offset[2] = {offset_w, offset_h};
    load(im2col_rows(*map, at.c, offset), shared, barrier, kTensorAlignment, name);
}

void bulk_load(void* shared, const void* global, uint64_t* barrier, uint32_t bytes) {
    const char* name = "cp.async.bulk, load";
    load(linear(const_cast<void*>(global), bytes, 1, name), shared, barrier, kBulkAlignment, name);
}

void tma_store(const TensorMap* map, const void* shared, Coordinates coordinates, bool add) {
    const char* name = add ? "cp.reduce.async.bulk.tensor" : "cp.async.bulk.tensor, store";
    const At at = checked(map, TensorMap::Mode::tiled, coordinates, name);
    store(tiled_rows(*map, at.c), shared, add, map->dtype, kTensorAlignment, name);
}

void bulk_reduce_add(float* global, const float* shared, uint32_t bytes) {
    const char* name = "cp.reduce.async.bulk";
    store(linear(global, bytes, sizeof(float), name), shared, true, DType::f32, kBulkAlignment, name);
}

void bulk_commit() {
    ThreadStores& mine = block_state<Stores>().of_thread[thread_index()];
    mine.groups.push_back(std::exchange(mine.open, {}));
}

void bulk_wait(int pending, bool read_only) {
    ThreadStores& mine = block_state<Stores>().of_thread[thread_index()];
    auto& groups = mine.groups;
    const size_t over = groups.size() - std::min(groups.size(), static_cast<size_t>(pending));
    for (size_t i = 0; i < over; ++i)
        for (Store& store : groups[i]) {
            store.take();
            if (!read_only) store.give();
            join_agent(store.agent);
            if (!read_only) end_agent(store.agent);
        }
    if (read_only) {
        mine.shorten();
    } else {
        acquire(mine.written);
        groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(over));
    }
}

}  // namespace bigops::simt
