// cp.async: "Asynchronous copy completion mechanisms: async-group". A group of a thread's copies is carried
// out when that thread waits for it. The copies of a warp that belong to equally numbered groups are one
// agent's: what any of its lanes had seen when it issued them, they have.
#include <cstring>
#include <deque>
#include <map>
#include <string>

#include "block.h"
#include "instructions.h"

namespace bigops::simt {
namespace {

constexpr int kBytes = 16;

struct Copy {
    void* shared;
    const void* global;  // null: zeros
};

struct Group {
    std::vector<Copy> copies;
    std::string issued;  // where the first was
};

struct ThreadCopies {
    std::deque<Group> groups;  // committed
    Group open;
    uint64_t committed = 0, done = 0;  // how many groups
};

struct WarpAgent {
    Agent agent;
    int users;  // threads that have copies in this group
};

struct Copies {
    std::map<int, ThreadCopies> of_thread;
    std::map<std::pair<int, uint64_t>, WarpAgent> agents;  // of a warp's group

    ~Copies() {
        if (Block::current()->launch().stopped) return;
        size_t left = 0;
        std::string where;
        const auto count = [&](const Group& group) {
            left += group.copies.size();
            if (where.empty()) where = group.issued;
        };
        for (const auto& [thread, copies] : of_thread) {
            for (const Group& group : copies.groups) count(group);
            count(copies.open);
        }
        if (left > 0)
            report(Finding::misuse, "the block ends before " + std::to_string(left) +
                                        " copies were waited for that cp.async started at " + where);
    }
};

}  // namespace

void cp_async_16(void* shared, const void* global, bool valid) {
    require_shared(shared, kBytes, "cp.async");
    if (reinterpret_cast<uintptr_t>(global) % kBytes != 0)
        fatal(Finding::misaligned, "cp.async: the global address is no multiple of 16");
    auto& all = block_state<Copies>();
    ThreadCopies& mine = all.of_thread[thread_index()];
    auto [it, fresh] = all.agents.try_emplace({warp(), mine.committed}, WarpAgent{0, 0});
    WarpAgent& agent = it->second;
    if (fresh) agent.agent = fork_agent();
    if (mine.open.copies.empty()) {
        ++agent.users;
        mine.open.issued = here();
    }
    if (kRaces) {
        Clock seen;
        copy_clock(seen);
        acquire(seen, agent.agent);
    }
    mine.open.copies.push_back({shared, valid ? global : nullptr});
}

void cp_async_commit() {
    ThreadCopies& mine = block_state<Copies>().of_thread[thread_index()];
    mine.groups.push_back(std::exchange(mine.open, {}));
    ++mine.committed;
}

void cp_async_wait(int pending) {
    auto& all = block_state<Copies>();
    ThreadCopies& mine = all.of_thread[thread_index()];
    for (; mine.groups.size() > static_cast<size_t>(pending); mine.groups.pop_front(), ++mine.done) {
        const Group& group = mine.groups.front();
        if (group.copies.empty()) continue;
        const auto it = all.agents.find({warp(), mine.done});
        const Agent agent = it->second.agent;
        for (const Copy& copy : group.copies) {
            write(copy.shared, kBytes, agent, Proxy::generic);
            if (copy.global) {
                read(copy.global, kBytes, agent, Proxy::generic);
                std::memcpy(copy.shared, copy.global, kBytes);
            } else {
                std::memset(copy.shared, 0, kBytes);
            }
        }
        join_agent(agent);
        if (--it->second.users == 0) {
            end_agent(agent);
            all.agents.erase(it);
        }
    }
}

}  // namespace bigops::simt
