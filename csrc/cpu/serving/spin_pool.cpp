#include "cpu/serving/spin_pool.hpp"

#include <chrono>
#include <system_error>
#include <utility>

#include "cpu/forks.hpp"

namespace warploom {

namespace {
constexpr int brisk = 200;  // pauses, some microseconds
constexpr auto patience = std::chrono::microseconds(80);  // longer than the Python between two layers

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    __builtin_ia32_pause();
#endif
}

// Waits a little, but not on a core that the awaited thread may need: on a busy machine both may share one.
template <class Done>
void wait_until(const Done& done) {
    for (int i = 0; !done(); ++i) {
        if (i < brisk)
            pause();
        else
            std::this_thread::yield();
    }
}
}  // namespace

SpinPool& SpinPool::shared() {
    static std::atomic<SpinPool*> pool{new SpinPool(1)};  // never destroyed: threads may outlive static destruction
    static const bool renewed = (in_forked_children([] { pool.store(new SpinPool(pool.load()->wanted_)); }), true);
    (void)renewed;
    return *pool.load(std::memory_order_acquire);
}

void SpinPool::resize(int threads) {
    std::lock_guard<std::mutex> held(caller_);
    wanted_ = threads;
    if (size() == threads) return;
    stop_ = true;
    epoch_.fetch_add(1);
    { std::lock_guard<std::mutex> lock(sleep_); }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    stop_ = false;
    shares_ = std::vector<Share>(threads);
    try {
        for (int thread = 1; thread < threads; ++thread) threads_.emplace_back([this, thread] { serve(thread); });
    } catch (const std::system_error&) {  // the system has no more
    }
    size_ = wanted_ = int(threads_.size()) + 1;
}

void SpinPool::start(int tasks, Call call, const void* work) {
    const int64_t count = size();
    const auto begin = [&](int64_t thread) { return int((tasks * thread + count - 1) / count); };  // the caller has the most
    for (int64_t i = 0; i < count; ++i) shares_[i].next.store(begin(i)), shares_[i].end = begin(i + 1);
    call_ = call, work_ = work;
    open_.store(true);
    epoch_.fetch_add(1);
    if (asleep_.load() > 0) {
        { std::lock_guard<std::mutex> lock(sleep_); }
        wake_.notify_all();
    }
    take(0);
    open_.store(false);  // whoever comes now stays out; wait for those inside
    wait_until([&] { return inside_.load() == 0; });
    if (failed_.exchange(false)) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void SpinPool::take(int thread) {
    const int count = size();
    for (int i = 0; i < count; ++i) {
        Share& share = shares_[(thread + i) % count];
        for (int task; (task = share.next.fetch_add(1)) < share.end;) {
            try {
                if (!failed_.load(std::memory_order_relaxed)) call_(work_, task);  // else the rest is not wanted any more
            } catch (...) {
                if (!failed_.exchange(true)) failure_ = std::current_exception();
            }
        }
    }
}

void SpinPool::serve(int thread) {
    unsigned seen = epoch_.load();
    while (!stop_.load()) {
        inside_.fetch_add(1);
        if (open_.load()) take(thread);
        inside_.fetch_sub(1);
        auto deadline = std::chrono::steady_clock::now() + patience;
        wait_until([&] { return epoch_.load() != seen || std::chrono::steady_clock::now() > deadline; });
        if (epoch_.load() == seen) {
            std::unique_lock<std::mutex> lock(sleep_);
            asleep_.fetch_add(1);
            wake_.wait(lock, [&] { return epoch_.load() != seen; });
            asleep_.fetch_sub(1);
        }
        seen = epoch_.load();
    }
}

}  // namespace warploom
