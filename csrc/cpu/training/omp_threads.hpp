// Parallel-for on PyTorch's own OpenMP threads.
//
// Between two matrix products torch's threads wait in a spin for their next one. A second pool would fight them for the
// cores, so loops that run between products use the same threads, by the addresses of three functions of the library
// that torch has loaded. Without it (another platform, another runtime) and in a forked child, which has none of these
// threads, a pass runs on the calling thread. What a task throws is thrown to the caller.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>

namespace warploom {

struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags);
    int (*number)();  // of this thread
    int (*size)();
};
inline OpenMP openmp = {};

// Calls work(task) for every task below `tasks`, and returns when all are done. Every thread begins with the same share
// of the tasks each time, so that it finds in its cache what it wrote there in the pass before; then it helps others.
template <class Work>
void parallel_for(int tasks, const Work& work) {
    static constexpr int kShares = 64;
    struct Job {
        const Work& work;
        const int tasks;
        std::atomic<int> next[kShares] = {};
        std::atomic<bool> failed{false};
        std::exception_ptr failure = nullptr;  // what the first task that failed threw
    } job{work, tasks};
    const auto take = [](void* p) {
        Job& job = *static_cast<Job*>(p);
        const int mine = openmp.number(), shares = std::min(openmp.size(), kShares);
        for (int i = 0; i < shares; ++i) {
            const int64_t share = (mine + i) % shares;
            const int first = int(job.tasks * share / shares), end = int(job.tasks * (share + 1) / shares);
            for (int task; !job.failed && (task = first + job.next[share].fetch_add(1)) < end;) {
                try {
                    job.work(task);
                } catch (...) {  // the library's threads must not see it
                    if (!job.failed.exchange(true)) job.failure = std::current_exception();
                }
            }
        }
    };
    if (tasks <= 1 || !openmp.parallel) {
        for (int task = 0; task < tasks; ++task) work(task);
        return;
    }
    openmp.parallel(take, &job, 0, 0);  // 0: as many threads as torch uses
    if (job.failure) std::rethrow_exception(job.failure);
}

// Shares out `rows` of `columns` numbers in runs that are long enough to be worth a thread: work(first, last).
template <class Work>
void parallel_for_rows(int rows, int columns, const Work& work) {
    const int run = columns >= 8192 ? 1 : 8192 / (columns > 0 ? columns : 1);
    parallel_for((rows + run - 1) / run, [&](int task) {
        const int first = task * run;
        work(first, rows < first + run ? rows : first + run);
    });
}

}  // namespace warploom
