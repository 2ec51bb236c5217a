// Zeroed memory in huge pages where the system has them: fewer TLB misses.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace warploom {

constexpr size_t kHugePage = size_t(2) << 20;

// Aligned to 128 bytes, or to a huge page if it is that large; freed by `release`, which needs its size.
inline void* allocate_zeroed(size_t size) {
#if defined(__linux__)
    if (size >= kHugePage) {
        // Fresh pages are zero; a multiple of huge pages begins at one of them once the surplus is given back.
        void* got = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (got == MAP_FAILED) throw std::bad_alloc();
        char* raw = static_cast<char*>(got);
        const size_t head = (kHugePage - reinterpret_cast<uintptr_t>(raw) % kHugePage) % kHugePage;
        if (head) munmap(raw, head);
        munmap(raw + head + size, kHugePage - head);
        madvise(raw + head, size, MADV_HUGEPAGE);  // advice: without such pages it is as good as any memory
        return raw + head;
    }
#endif
#if defined(_WIN32)
    void* memory = _aligned_malloc(size, 128);
#else
    void* memory = std::aligned_alloc(128, size);
#endif
    if (!memory) throw std::bad_alloc();
    return std::memset(memory, 0, size);
}

inline void release(void* memory, [[maybe_unused]] size_t size) {
#if defined(__linux__)
    if (size >= kHugePage) {
        if (memory) munmap(memory, size);
        return;
    }
#endif
#if defined(_WIN32)
    _aligned_free(memory);
#else
    std::free(memory);
#endif
}

}  // namespace warploom
