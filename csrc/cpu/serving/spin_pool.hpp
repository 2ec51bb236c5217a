// SpinPool: thread pool for parallel loops of a few microseconds (spin-waiting workers, work stealing).
//
// A decoding step is some hundred loops over small pieces of work, each too short to wake a sleeping thread for. So workers
// look for the next loop for a moment before they sleep. Each thread has a run of neighboring tasks, whose memory it reads
// in one piece, and takes them one by one; then it helps the others: where the machine is busy and a worker does not get to
// run, the caller simply does its tasks too.
//
// What a task throws ends the loop and is thrown to the caller. A forked child has none of its parent's threads, and locks
// and sleepers as they were at that moment: it begins with a pool of its own, which starts as many threads when it is used.
#pragma once
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace warploom {

class SpinPool {
public:
    static SpinPool& shared();

    // Sets the number of threads of a loop, the caller included; fewer where the system has no more.
    void resize(int threads);
    int size() const { return size_.load(std::memory_order_relaxed); }

    // Calls work(task) for every task below `tasks`, in any order, and returns when all are done.
    template <class Work>
    void run(int tasks, const Work& work) {
        if (tasks > 1 && size() < wanted_.load(std::memory_order_relaxed)) resize(wanted_);
        if (tasks <= 1 || size() == 1 || !caller_.try_lock()) {
            for (int task = 0; task < tasks; ++task) work(task);
            return;
        }
        std::lock_guard<std::mutex> held(caller_, std::adopt_lock);
        start(tasks, [](const void* w, int task) { (*static_cast<const Work*>(w))(task); }, &work);
    }

    explicit SpinPool(int threads) : wanted_(threads) {}
    ~SpinPool() { resize(1); }

private:
    using Call = void (*)(const void*, int);

    void start(int tasks, Call call, const void* work);
    void take(int thread);
    void serve(int thread);

    struct alignas(64) Share {  // of a loop's tasks: those from `next` to `end` are left
        std::atomic<int> next{0};
        int end = 0;
    };

    std::vector<std::thread> threads_;
    std::mutex caller_, sleep_;
    std::condition_variable wake_;
    std::vector<Share> shares_;  // one per thread, the caller's first
    std::atomic<int> asleep_{0};
    std::atomic<int> size_{1}, wanted_;
    std::atomic<bool> stop_{false}, failed_{false};
    std::exception_ptr failure_;  // what the first task that failed threw
    // On a cache line of its own: workers poll it while others write (false sharing).
    alignas(64) std::atomic<unsigned> epoch_{0};
    std::atomic<bool> open_{false};
    Call call_ = nullptr;
    const void* work_ = nullptr;
    alignas(64) std::atomic<int> inside_{0};
};

// Calls work(row) for every row. Rows are shared out in runs: one row is too little to hand to another thread.
template <class Work>
void each_row(int rows, const Work& work) {
    constexpr int run = 4;
    SpinPool::shared().run((rows + run - 1) / run, [&](int task) {
        for (int row = task * run; row < std::min(rows, (task + 1) * run); ++row) work(row);
    });
}

}  // namespace warploom
