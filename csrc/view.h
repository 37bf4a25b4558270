// What the kernels see of a tensor: a pointer, sizes and strides. No torch type crosses this line,
// so one build serves every PyTorch release.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace bigops {

constexpr int kMaxDims = 8;

enum class DType : uint8_t { f64, f32, bf16, f16, i64, i32, u8, boolean };

// Strides count elements, not bytes. A view never owns its memory.
struct View {
    void* data = nullptr;
    int ndim = 0;
    int64_t shape[kMaxDims] = {};
    int64_t strides[kMaxDims] = {};
    DType dtype = DType::f32;
    int device_type = 1;  // DLPack's DLDeviceType: 1 CPU, 2 CUDA
    int device_id = 0;
    void* stream = nullptr;  // current stream of a CUDA tensor's device

    template <class T>
    T* ptr() const {
        return static_cast<T*>(data);
    }

    int64_t numel() const {
        int64_t n = 1;
        for (int i = 0; i < ndim; ++i) n *= shape[i];
        return n;
    }

    bool contiguous() const {
        int64_t expected = 1;
        for (int i = ndim - 1; i >= 0; --i) {
            if (shape[i] != 1 && strides[i] != expected) return false;
            expected *= shape[i];
        }
        return true;
    }
};

inline void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

}  // namespace bigops
