// A team of threads on loan: the OpenMP threads that torch already has.
//
// Between two matrix products torch's threads wait in a spin for their next one. A second pool would fight them for the
// cores, so passes that run between products borrow them instead: `parallel` is the address of GOMP_parallel in the
// library that torch has loaded. Without it (another platform, another runtime) a pass runs on the calling thread.
#pragma once
#include <atomic>

namespace warploom {

using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
inline Parallel team = nullptr;

// Calls work(task) for every task below `tasks`, in any order, and returns when all are done.
template <class Work>
void share(int tasks, const Work& work) {
    struct Job {
        const Work& work;
        const int tasks;
        std::atomic<int> next{0};
    } job{work, tasks};
    const auto take = [](void* p) {
        Job& job = *static_cast<Job*>(p);
        for (int task; (task = job.next.fetch_add(1)) < job.tasks;) job.work(task);
    };
    if (tasks > 1 && team)
        team(take, &job, 0, 0);  // 0: as many threads as torch uses
    else
        take(&job);
}

// Shares out `rows` of `columns` numbers in runs that are long enough to be worth a thread: work(first, last).
template <class Work>
void share_rows(int rows, int columns, const Work& work) {
    const int run = columns >= 8192 ? 1 : 8192 / (columns > 0 ? columns : 1);
    share((rows + run - 1) / run, [&](int task) {
        const int first = task * run;
        work(first, rows < first + run ? rows : first + run);
    });
}

}  // namespace warploom
