// Aligned memory that outlives a call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace bigops {

// Memory that the calling thread's next call finds again: fresh pages cost more than packing
// operands into them. At most kMost bytes are held between calls.
class KeptMemory {
   public:
    ~KeptMemory() {
        for (const Block& block : blocks_) ::operator delete[](block.data, kAlign);
    }

    static KeptMemory& of_this_thread() {
        static thread_local KeptMemory kept;
        return kept;
    }

    struct Block {
        void* data;
        size_t bytes;
    };
    Block take(size_t bytes) {
        auto best = blocks_.end();
        for (auto it = blocks_.begin(); it != blocks_.end(); ++it)
            if (it->bytes >= bytes && (best == blocks_.end() || it->bytes < best->bytes)) best = it;
        if (best == blocks_.end() || best->bytes / 2 > bytes)
            return {::operator new[](bytes, kAlign), bytes};
        const Block block = *best;
        blocks_.erase(best);
        held_ -= block.bytes;
        return block;
    }
    void give(const Block& block) {
        blocks_.push_back(block);
        held_ += block.bytes;
        for (; held_ > kMost || blocks_.size() > kMostBlocks; blocks_.erase(blocks_.begin())) {
            held_ -= blocks_.front().bytes;
            ::operator delete[](blocks_.front().data, kAlign);
        }
    }

   private:
    static constexpr std::align_val_t kAlign{64};
    static constexpr size_t kMost = size_t{64} << 20, kMostBlocks = 64;
    std::vector<Block> blocks_;
    size_t held_ = 0;
};

template <class T>
struct GiveBack {
    size_t bytes = 0;
    void operator()(T* p) const { KeptMemory::of_this_thread().give({p, bytes}); }
};
template <class T>
using Aligned = std::unique_ptr<T[], GiveBack<T>>;

template <class T>
Aligned<T> allocate(int64_t count) {
    const size_t bytes = std::max<size_t>(64, sizeof(T) * static_cast<size_t>(count));
    const KeptMemory::Block block = KeptMemory::of_this_thread().take(bytes);
    return Aligned<T>(static_cast<T*>(block.data), GiveBack<T>{block.bytes});
}

}  // namespace bigops
