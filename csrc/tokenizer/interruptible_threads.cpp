#include "tokenizer/interruptible_threads.hpp"

#include <atomic>
#include <chrono>
#include <exception>
#include <future>
#include <vector>

namespace warploom {

namespace {
constexpr auto kBetweenCheckpoints = std::chrono::milliseconds(50);
}

void in_parallel(unsigned threads, const Checkpoint& checkpoint, const std::function<void(const Checkpoint&)>& work) {
    struct Stopped {};
    std::atomic<bool> stopped{false};
    const Checkpoint follow = [&] {
        if (stopped) throw Stopped();
    };
    auto due = std::chrono::steady_clock::now() + kBetweenCheckpoints;
    const Checkpoint lead = [&] {
        follow();
        if (std::chrono::steady_clock::now() < due) return;
        checkpoint();
        due = std::chrono::steady_clock::now() + kBetweenCheckpoints;
    };
    auto attempt = [&](const Checkpoint& pause) {
        try {
            work(pause);
        } catch (...) {
            stopped = true;
            throw;
        }
    };
    std::vector<std::future<void>> others;  // they wait for their threads before they vanish
    try {
        while (others.size() + 1 < threads) others.push_back(std::async(std::launch::async, attempt, std::cref(follow)));
    } catch (const std::exception&) {
    }
    try {
        attempt(lead);
        for (auto& other : others)
            while (other.wait_for(kBetweenCheckpoints) == std::future_status::timeout) checkpoint();
    } catch (const Stopped&) {
    } catch (...) {
        stopped = true;
        throw;
    }
    for (auto& other : others) {
        try {
            other.get();
        } catch (const Stopped&) {
        }
    }
}

}  // namespace warploom
