// The process in which kernels run under AddressSanitizer, which has to be there before anything is
// allocated: bigops/simt.py writes a request to its input and reads the answer from its output.
//
//   request: path of the kernel's shared object, then BigopsSimtLaunch with `function` an offset in
//            it, then buffers (misalignment, size, bytes), then pointers (where they are to be
//            written: buffer or -1 for the launch, offset; where they point: buffer, offset)
//   answer:  error text, findings, the buffers' bytes; each with its length before it
#include <dlfcn.h>
#include <link.h>
#include <sanitizer/asan_interface.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "python.h"

namespace {

FILE* answer;  // what a kernel prints goes to the standard error instead

[[noreturn]] void fail(const std::string& message) {
    fprintf(stderr, "%s\n", message.c_str());
    exit(3);
}

void take(void* to, size_t bytes) {
    if (bytes > 0 && fread(to, 1, bytes, stdin) != bytes) fail("the request ends early");
}

template <class T>
T take() {
    T value;
    take(&value, sizeof value);
    return value;
}

void give(const void* from, size_t bytes) {
    const uint64_t length = bytes;
    fwrite(&length, sizeof length, 1, answer);
    if (bytes > 0) fwrite(from, 1, bytes, answer);
}

// Allocated alone and with the tensor's own alignment, so that red zones lie around it.
struct Buffer {
    char* data;
    uint64_t bytes;
};

Buffer take_buffer() {
    constexpr size_t kAlignment = 256;
    const auto misalignment = take<uint64_t>(), bytes = take<uint64_t>();
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, misalignment + bytes) != 0) fail("out of memory");
    __asan_poison_memory_region(memory, misalignment);
    Buffer buffer = {static_cast<char*>(memory) + misalignment, bytes};
    take(buffer.data, bytes);
    return buffer;
}

}  // namespace

int main() {
    answer = fdopen(dup(STDOUT_FILENO), "wb");
    dup2(STDERR_FILENO, STDOUT_FILENO);
    std::string path(take<uint64_t>(), '\0');
    take(path.data(), path.size());
    auto launch = take<BigopsSimtLaunch>();
    std::vector<Buffer> buffers(take<uint64_t>());
    for (Buffer& buffer : buffers) buffer = take_buffer();
    for (auto left = take<uint64_t>(); left > 0; --left) {
        const auto where = take<int64_t>();
        const auto offset = take<uint64_t>();
        const auto target = take<uint64_t>(), target_offset = take<uint64_t>();
        char* at = where < 0 ? reinterpret_cast<char*>(&launch)
                             : buffers.at(static_cast<size_t>(where)).data;
        const char* pointer = buffers.at(target).data + target_offset;
        memcpy(at + offset, &pointer, sizeof pointer);
    }
    void* handle = dlopen(path.c_str(), RTLD_NOW);
    if (!handle) fail(dlerror());
    link_map* map = nullptr;
    dlinfo(handle, RTLD_DI_LINKMAP, &map);
    launch.function =
        reinterpret_cast<char*>(map->l_addr) + reinterpret_cast<uintptr_t>(launch.function);
    for (const Buffer& buffer : buffers)
        bigops_simt_add_region(buffer.data, buffer.bytes, "a tensor");
    const char* error = bigops_simt_run(&launch);
    give(error ? error : "", error ? strlen(error) : 0);
    const char* findings = bigops_simt_take_findings();
    give(findings, strlen(findings));
    for (const Buffer& buffer : buffers) give(buffer.data, buffer.bytes);
    fflush(answer);
    _Exit(0);  // nothing of the launch has to be freed
}
