#include "cpu/serving/weight_memory.hpp"

#include <algorithm>
#include <mutex>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace warploom {

namespace {

constexpr size_t kHuge = size_t(2) << 20, kRun = size_t(64) << 20;

size_t whole(size_t bytes, size_t grain) { return (bytes + grain - 1) / grain * grain; }

struct Run {
    size_t size, used = 0;
    uint8_t *mapped, *at;

    explicit Run(size_t bytes) : size(whole(bytes, kHuge)) {
#if defined(__linux__)
        void* got = mmap(nullptr, size + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (got == MAP_FAILED) throw std::bad_alloc();
        mapped = static_cast<uint8_t*>(got);
        at = mapped + whole(reinterpret_cast<uintptr_t>(mapped), kHuge) - reinterpret_cast<uintptr_t>(mapped);
        madvise(at, size, MADV_HUGEPAGE);  // advice: without such pages the run is as good as any memory
#else
        mapped = new uint8_t[size + 64]();
        at = mapped + whole(reinterpret_cast<uintptr_t>(mapped), 64) - reinterpret_cast<uintptr_t>(mapped);
#endif
    }
    Run(const Run&) = delete;
    ~Run() {
#if defined(__linux__)
        munmap(mapped, size + kHuge);
#else
        delete[] mapped;
#endif
    }
};

}  // namespace

std::shared_ptr<uint8_t> weight_memory(size_t bytes) {
    static std::mutex one_at_a_time;
    static std::weak_ptr<Run> last;  // only its matrices keep it
    std::lock_guard<std::mutex> held(one_at_a_time);
    std::shared_ptr<Run> run = last.lock();
    if (!run || run->size - run->used < bytes) last = run = std::make_shared<Run>(std::max(bytes, kRun));
    uint8_t* at = run->at + run->used;
    run->used = std::min(run->size, whole(run->used + bytes, 64));
    return {run, at};
}

}  // namespace warploom
