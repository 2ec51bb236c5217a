// Bounds check of indices that come from tensors.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

namespace warploom {

[[noreturn]] __attribute__((noinline, cold)) inline void refuse_index(const char* name, int64_t index, int64_t count) {
    throw std::out_of_range(std::string(name) + " " + std::to_string(index) + " is out of range: there are " +
                            std::to_string(count));
}

// Returns the index if it is within range, else throws with both numbers: an IndexError in Python.
inline __attribute__((always_inline)) int64_t within(int64_t index, int64_t count, const char* name) {
    if (uint64_t(index) >= uint64_t(count)) refuse_index(name, index, count);
    return index;
}

}  // namespace warploom
