// The thread pools under load, for ThreadSanitizer: loops beside loops, beside changes of size, with tasks that throw,
// and in forked children. `make native-test` builds and runs it.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include "tokenizer/interruptible_threads.hpp"
#include "cpu/serving/spin_pool.hpp"

#if defined(__SANITIZE_THREAD__)
#define UNDER_TSAN 1
#elif defined(__has_feature)  // Clang's name for it
#define UNDER_TSAN __has_feature(thread_sanitizer)
#else
#define UNDER_TSAN 0
#endif

using namespace warploom;

namespace {

void check(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(1);
}

void loops(int times) {
    for (int round = 0; round < times; ++round) {
        std::vector<int> seen(37);
        SpinPool::shared().run(37, [&](int task) { seen[task] += task; });
        int total = 0;
        for (int x : seen) total += x;
        check(total == 36 * 37 / 2, "every task is done once");
    }
}

void failures(int times) {
    for (int round = 0; round < times; ++round) {
        std::string what;
        try {
            SpinPool::shared().run(64, [&](int task) {
                if (task % 9 == 5) throw std::out_of_range("task " + std::to_string(task));
            });
        } catch (const std::out_of_range& error) {
            what = error.what();
        }
        check(what.rfind("task ", 0) == 0, "what a task throws reaches the caller");
    }
}

void beside(void (*one)(int), int ones, void (*other)(int), int others) {
    std::thread a(one, ones), b(other, others);
    a.join(), b.join();
}

void resizes(int times) {
    for (int round = 0; round < times; ++round) SpinPool::shared().resize(2 + round % 3);
}

// Children of a parent that has just worked, or works meanwhile, that work and change the size themselves.
void forks(int times, bool busy) {
    std::atomic<bool> stop{false};
    std::thread worker([&] {
        while (busy && !stop) loops(1);
    });
    for (int round = 0; round < times; ++round) {
        loops(1);
        if (round % 4 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // the workers fall asleep
        const pid_t child = fork();
        if (child == 0) {
            alarm(20);
            if (round % 2) SpinPool::shared().resize(2);
            loops(1);
            _exit(SpinPool::shared().size() > 1 ? 0 : 2);
        }
        int status = 0;
        waitpid(child, &status, 0);
        check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child works with threads of its own");
    }
    stop = true;
    worker.join();
}

void stoppable() {
    std::string what;
    try {
        in_parallel(3, [] {}, [](const Checkpoint& pause) {
            static std::atomic<int> number{0};
            if (number++ == 1) throw std::runtime_error("second");
            for (;;) pause(), std::this_thread::yield();
        });
    } catch (const std::runtime_error& error) {
        what = error.what();
    }
    check(what == "second", "what another thread throws reaches the caller");
}

}  // namespace

int main() {
    SpinPool::shared().resize(4);
    beside(loops, 3000, loops, 3000);
    beside(loops, 2000, resizes, 40);
    SpinPool::shared().resize(4);
    beside(failures, 300, loops, 1000);
    stoppable();
#if !UNDER_TSAN  // which cannot follow threads into a child
    forks(200, false);
    forks(200, true);
#endif
    std::puts("the pools are sound");
}
