// Memory for a kernel's pieces: one allocation, cut up once their sizes are known.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "microkernel.h"

namespace bigops {

// One allocation handed out in pieces aligned for vectors.
class Arena {
   public:
    explicit Arena(int64_t bytes)
        : memory_(static_cast<char*>(std::aligned_alloc(kAlign, static_cast<size_t>(
                                                                    round_up(bytes + 1, kAlign)))),
                  &std::free) {
        if (!memory_) throw std::bad_alloc();
    }
    char* at(int64_t offset) const { return memory_.get() + offset; }

    static constexpr int64_t kAlign = 64;

   private:
    std::unique_ptr<char, decltype(&std::free)> memory_;
};

// Lays out pieces of an Arena: first with a null base to learn the size, then for real.
class Layout {
   public:
    explicit Layout(char* base) : base_(base) {}
    template <class C>
    C* take(int64_t count) {
        const int64_t at = size_;
        size_ += round_up(count * static_cast<int64_t>(sizeof(C)), Arena::kAlign) + kStagger;
        return base_ ? reinterpret_cast<C*>(base_ + at) : nullptr;
    }
    int64_t size() const { return size_; }

   private:
    // Pieces a multiple of 4096 bytes apart would look alike to the store buffer ("4K aliasing").
    static constexpr int64_t kStagger = 2 * Arena::kAlign;
    char* base_;
    int64_t size_ = 0;
};

}  // namespace bigops
