#include "cpu/serving/weight_memory.hpp"

#include <algorithm>
#include <mutex>

#include "huge_pages.hpp"

namespace warploom {

namespace {

constexpr size_t kRun = size_t(64) << 20;

size_t whole(size_t bytes, size_t grain) { return (bytes + grain - 1) / grain * grain; }

struct Run {
    size_t size, used = 0;
    uint8_t* at;

    explicit Run(size_t bytes) : size(whole(bytes, kHugePage)), at(static_cast<uint8_t*>(allocate_zeroed(size))) {}
    Run(const Run&) = delete;
    ~Run() { release(at, size); }
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
