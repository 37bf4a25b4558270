// Where torch keeps what is asked of a tensor object, so that it can be brought into the caches first.
//
// A step comes when the backward pass has pushed thousands of objects out of them. Asked one by one,
// each waits for a handful of lines, one after the other; prefetches are dropped where the page is not
// known either; plain loads that do not depend on each other wait for many at once (a thousand
// parameters with their states: 1.8 ms become 0.6). No header of torch's says where to look and no
// answer rests on it but one: it is known as far as tensors made for the purpose have it there.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <cstring>

namespace bigops {

class TensorMemory {
   public:
    static const TensorMemory& get() {
        static const TensorMemory found;
        return found;
    }

    // Objects of exactly torch's classes; with their memory's records too, or their gradients.
    enum With { kNothing, kStorages, kGrads };
    void touch(const pybind11::handle* tensors, size_t count, With with) const;

    // Whether objects, gradients and the negative bit are where they are expected.
    std::array<bool, 3> known() const { return {has_impl_, has_grad_, negative_ != 0}; }

    // False for one of exactly torch's classes that is no negative view; true where it has to be asked.
    bool may_be_negative(pybind11::handle tensor) const {
        return !negative_ || (bits_at(impl_of(tensor), keys_) & negative_);
    }

   private:
    static constexpr size_t kWord = sizeof(void*);
    static constexpr size_t kImpl = sizeof(PyObject), kStorage = 2 * kWord, kMeta = 3 * kWord,
                            kGrad = 5 * kWord, kImplSize = 22 * kWord, kObject = 6 * kWord;
    bool has_impl_ = false;
    bool has_grad_ = false;
    size_t keys_ = 0;
    uint64_t negative_ = 0;  // 0: not known

    static uint64_t bits_at(const char* address, size_t offset) {
        uint64_t bits;
        std::memcpy(&bits, address + offset, sizeof bits);
        return bits;
    }
    static const char* word_at(const char* address, size_t offset) {
        return reinterpret_cast<const char*>(bits_at(address, offset));
    }
    static const char* impl_of(pybind11::handle tensor) {
        return word_at(reinterpret_cast<const char*>(tensor.ptr()), kImpl);
    }

    TensorMemory();
    void find_impl(const pybind11::module_& torch);
    void find_grad(const pybind11::module_& torch);
    void find_negative(const pybind11::module_& torch);
};

}  // namespace bigops
