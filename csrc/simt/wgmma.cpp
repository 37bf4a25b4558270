// wgmma: "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions". A product is issued by the
// four warps of a warpgroup together and finished by each for its own 16 rows, when that warp waits for the
// group of products it is in: only then are its operands read and its accumulators written. Until then these
// hold a NaN, and who writes to them is found.
#include <array>
#include <bit>
#include <cstring>
#include <deque>
#include <list>
#include <map>
#include <string>

#include "block.h"
#include "instructions.h"
#include "wgmma_operands.h"

namespace bigops::simt {
namespace {

using layouts::MatrixDescriptor;
using layouts::Place;

constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
constexpr uint32_t kUnderWay = 0x7fc5a5a5;  // a NaN
// Registers are remembered by their address in a thread; of this many, the latest.
constexpr size_t kRemembered = 64;

// One warp's lanes' registers: the address in lane 0 names them.
template <class T>
using Lanes = std::array<T*, kWarpSize>;
using Words = std::vector<uint32_t>;

// The variables may be gone.
template <class T>
__attribute__((no_sanitize("address"))) Words contents(const Lanes<T>& lanes, int count) {
    Words words;
    words.reserve(static_cast<size_t>(count * kWarpSize));
    for (const T* registers : lanes)
        for (int i = 0; i < count; ++i) words.push_back(std::bit_cast<uint32_t>(registers[i]));
    return words;
}

// Accumulators of a warp while products with them are under way: the matrix, and how many are to come.
struct Accumulators {
    Lanes<float> registers;
    int columns, products = 0;
    std::array<float, kWgmmaRows * kWgmmaMaxColumns> values;

    int count() const { return columns / 2; }
    float& at(int lane, int i) {
        const Place place = layouts::wgmma_d(lane, i);
        return values[static_cast<size_t>(place.row * columns + place.column)];
    }
    void take() {
        for (int lane = 0; lane < kWarpSize; ++lane)
            for (int i = 0; i < count(); ++i) {
                at(lane, i) = registers[static_cast<size_t>(lane)][i];
                registers[static_cast<size_t>(lane)][i] = std::bit_cast<float>(kUnderWay);
            }
    }
    void give() {
        bool touched = false;
        for (int lane = 0; lane < kWarpSize; ++lane)
            for (int i = 0; i < count(); ++i) {
                float& d = registers[static_cast<size_t>(lane)][i];
                touched = touched || std::bit_cast<uint32_t>(d) != kUnderWay;
                d = at(lane, i);
            }
        if (touched)
            report(Finding::misuse, "accumulators were written while a wgmma with them was under way");
    }
};

// The A operand of a warp: 16 rows behind a descriptor, or registers.
struct LeftOperand {
    bool in_registers = false, transposed = false;
    MatrixDescriptor descriptor = {};
    Lanes<const uint32_t> registers = {};
    Words issued;  // what they held
};

struct Issued {
    Operand16 type;
    Accumulators* to;
    bool add, b_transposed;
    LeftOperand a;
    MatrixDescriptor b;
};

struct ProductGroup {
    std::vector<Issued> products;
    Agent agent = -1;
    std::string issued;  // where the first was
};

template <class T>
struct Remembered {
    Lanes<T> registers;
    int count;
    Words values;  // when they were last used, or at a fence since
    bool fenced;
};

// One warp's products.
struct WarpProducts {
    bool ever_fenced = false;
    ProductGroup open;
    std::deque<ProductGroup> groups;
    std::list<Accumulators> under_way;
    std::deque<Remembered<float>> accumulators;
    std::deque<Remembered<const uint32_t>> operands;

    void fence();
    void issue(int first_lane, int warp_in_group, Operands<Product> threads);
    void finish(int first_lane, int warp_in_group, size_t pending);
    const ProductGroup* unfinished() const {
        for (const ProductGroup& group : groups)
            if (!group.products.empty()) return &group;
        return open.products.empty() ? nullptr : &open;
    }

private:
    Accumulators* started(const Lanes<float>& registers, const Product& product);
    void check_operand(const LeftOperand& a);
};

struct Products {
    std::map<int, WarpProducts> of_warp;

    ~Products() {
        if (Block::current()->launch().stopped) return;
        for (const auto& [warp, products] : of_warp)
            if (const ProductGroup* group = products.unfinished()) {
                report(Finding::misuse, "the block ends before a wgmma was committed and waited for, "
                                        "issued at " + group->issued);
                break;
            }
    }
};

template <class T>
void remember(std::deque<Remembered<T>>& all, const Lanes<T>& registers, int count) {
    std::erase_if(all, [&](const auto& other) { return other.registers[0] == registers[0]; });
    if (all.size() == kRemembered) all.pop_front();
    all.push_back({registers, count, contents(registers, count), false});
}

template <class T>
const Remembered<T>* recall(const std::deque<Remembered<T>>& all, const Lanes<T>& registers,
                            int count) {
    for (const auto& one : all)
        if (one.registers == registers && one.count == count) return &one;
    return nullptr;
}

// What the threads of a warp have seen, the agent has; and the other way round.
void learn(Agent agent, int first_lane) {
    if (!kRaces) return;
    Clock seen;
    for (int lane = 0; lane < kWarpSize; ++lane) release(seen, first_lane + lane);
    acquire(seen, agent);
}
void teach(Agent agent, int first_lane) {
    if (!kRaces) return;
    Clock seen;
    release(seen, agent);
    for (int lane = 0; lane < kWarpSize; ++lane) acquire(seen, first_lane + lane);
}

void multiply(const Left& left, const Right& right, float* d, int columns) {
    for (int m = 0; m < kWgmmaRows; ++m)
        for (int k = 0; k < kWgmmaDepth; ++k) {
            const float a = left[m][k];
            float* row = d + m * columns;
            for (int n = 0; n < columns; ++n) row[n] += a * right[k][n];
        }
}

// ---- One warp

void WarpProducts::fence() {
    ever_fenced = true;
    const auto note = [](auto& all) {
        for (auto& one : all) {
            one.values = contents(one.registers, one.count);
            one.fenced = true;
        }
    };
    note(accumulators);
    note(operands);
}

// "wgmma.fence must be used to order register accesses between wgmma.mma_async and other operations",
// accumulators of products of one shape under way excepted.
Accumulators* WarpProducts::started(const Lanes<float>& registers, const Product& product) {
    for (Accumulators& one : under_way)
        if (one.registers == registers) {
            if (one.columns != product.columns)
                fatal(Finding::misuse, "wgmma with accumulators of another one, of other shape, under way");
            return &one;
        }
    if (!ever_fenced) report(Finding::misuse, "wgmma before any wgmma.fence");
    if (const auto* known = recall(accumulators, registers, product.columns / 2)) {
        const bool written = product.add && known->values != contents(registers, known->count);
        // What a product overwrites will have been read since it came back.
        if (!known->fenced && (written || !product.add))
            report(Finding::misuse, "wgmma with accumulators that were used since another wgmma, and no "
                                    "wgmma.fence between");
        else if (written)
            report(Finding::misuse, "accumulators were written after the last wgmma.fence");
    }
    Accumulators& fresh = under_way.emplace_back();
    fresh.registers = registers;
    fresh.columns = product.columns;
    fresh.take();
    return &fresh;
}

void WarpProducts::check_operand(const LeftOperand& a) {
    const auto* known = recall(operands, a.registers, 4);
    if (known && known->values != a.issued)
        report(Finding::misuse, "registers of A were written after the last wgmma.fence");
}

void WarpProducts::issue(int first_lane, int warp_in_group, Operands<Product> threads) {
    const int base = warp_in_group * kWarpSize;
    const Product& product = *threads[base];
    Lanes<float> d;
    LeftOperand a;
    a.transposed = product.a_transposed;
    a.in_registers = product.a_registers != nullptr;
    for (size_t lane = 0; lane < kWarpSize; ++lane) {
        d[lane] = threads[base + static_cast<int>(lane)]->d;
        a.registers[lane] = threads[base + static_cast<int>(lane)]->a_registers;
    }
    Accumulators* to = started(d, product);
    ++to->products;
    if (a.in_registers) {
        for (const uint32_t* registers : a.registers)
            a.issued.insert(a.issued.end(), registers, registers + 4);
        check_operand(a);
        remember(operands, a.registers, 4);
    } else {
        a.descriptor = checked_descriptor(product.a, "A");
    }
    if (open.agent < 0) {
        open.agent = fork_agent();
        open.issued = here();
    }
    learn(open.agent, first_lane);
    open.products.push_back(
        {product.type, to, product.add, product.b_transposed, std::move(a), checked_descriptor(product.b, "B")});
}

void WarpProducts::finish(int first_lane, int warp_in_group, size_t pending) {
    for (; groups.size() > pending; groups.pop_front()) {
        ProductGroup& group = groups.front();
        for (const Issued& p : group.products) {
            Left left;
            Right right;
            Accumulators& to = *p.to;
            if (p.a.in_registers) left_of_registers(p.type, p.a.issued, left);
            else
                fetch_left(p.type, p.a.descriptor, p.a.transposed, warp_in_group, group.agent, left);
            fetch_right(p.type, p.b, p.b_transposed, to.columns, group.agent, right);
            if (!p.add)
                std::memset(to.values.data(), 0,
                            sizeof(float) * static_cast<size_t>(kWgmmaRows * to.columns));
            multiply(left, right, to.values.data(), to.columns);
            if (p.a.in_registers && contents(p.a.registers, 4) != p.a.issued)
                report(Finding::misuse,
                       "registers of A were written while a wgmma with them was under way");
            --to.products;
        }
        if (group.agent >= 0) {
            teach(group.agent, first_lane);
            end_agent(group.agent);
        }
    }
    for (auto it = under_way.begin(); it != under_way.end();) {
        if (it->products > 0) {
            ++it;
            continue;
        }
        it->give();
        remember(accumulators, it->registers, it->count());
        it = under_way.erase(it);
    }
}

WarpProducts& products_of(int warp) { return block_state<Products>().of_warp[warp]; }

// The instructions beside the product are each warp's own.
template <class Body>
void whole_warp(const char* key, Site site, Body body) {
    const int first = warp() * kWarpSize;
    if (first + kWarpSize > block_threads())
        fatal(Finding::misuse, std::string(key) + " needs all 32 threads of a warp");
    collective(first, kWarpSize, key, [&] { body(first, products_of(first / kWarpSize)); }, false, site);
}

}  // namespace

void wgmma(const Product& product, Site site) {
    const int first = warp() / kWarps * kThreads;
    if (first + kThreads > block_threads())
        fatal(Finding::misuse, "wgmma needs a whole warpgroup, four warps from a multiple of four on");
    const auto issue = [&](Operands<Product> all) {
        const Product& one = *all[0];
        for (int i = 1; i < kThreads; ++i) {
            const Product& other = *all[i];
            if (one.a != other.a || one.b != other.b || one.columns != other.columns ||
                one.add != other.add || one.type != other.type)
                fatal(Finding::mismatch, "wgmma: threads 0 and " + std::to_string(i) +
                                             " of a warpgroup differ in descriptors, shape or scale-d");
        }
        for (int w = 0; w < kWarps; ++w)
            products_of(first / kWarpSize + w).issue(first + w * kWarpSize, w, all);
    };
    Product mine = product;
    collective(first, kThreads, "wgmma.mma_async", mine, issue, false, site);
}

void wgmma_fence(Site site) {
    whole_warp("wgmma.fence", site, [](int, WarpProducts& warp) { warp.fence(); });
}

void wgmma_commit(Site site) {
    whole_warp("wgmma.commit_group", site, [](int, WarpProducts& warp) {
        warp.groups.push_back(std::exchange(warp.open, {}));
    });
}

void wgmma_wait(int pending, Site site) {
    whole_warp("wgmma.wait_group", site, [pending](int first, WarpProducts& warp) {
        warp.finish(first, first / kWarpSize % kWarps, static_cast<size_t>(pending));
    });
}

}  // namespace bigops::simt
