#include "cpu/serving/spin_pool.hpp"

#include <chrono>
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#else
static int getpid() { return 0; }
#endif

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

Workers& Workers::shared() {
    static Workers* workers = new Workers;  // never destroyed: threads may outlive static destruction
    return *workers;
}

void Workers::resize(int threads) {
    std::lock_guard<std::mutex> held(caller_);
    if (owner_ != int(getpid())) {  // after a fork the threads are the parent's: leave them be
        new (&threads_) std::vector<std::thread>;
        asleep_ = inside_ = 0;
        owner_ = int(getpid());
    }
    if (size() == threads) return;
    stop_ = true;
    epoch_.fetch_add(1);
    { std::lock_guard<std::mutex> lock(sleep_); }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
    threads_.clear();
    stop_ = false;
    for (int i = 1; i < threads; ++i) threads_.emplace_back([this] { serve(); });
}

void Workers::start(int tasks, Call call, const void* work) {
    tasks_ = tasks, call_ = call, work_ = work;
    next_.store(0);
    open_.store(true);
    epoch_.fetch_add(1);
    if (asleep_.load() > 0) {
        { std::lock_guard<std::mutex> lock(sleep_); }
        wake_.notify_all();
    }
    take();
    open_.store(false);  // whoever comes now stays out; wait for those inside
    wait_until([&] { return inside_.load() == 0; });
}

void Workers::take() {
    for (int task; (task = next_.fetch_add(1)) < tasks_;) call_(work_, task);
}

void Workers::serve() {
    unsigned seen = epoch_.load();
    while (!stop_.load()) {
        inside_.fetch_add(1);
        if (open_.load()) take();
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
