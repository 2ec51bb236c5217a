// What `classify` finds out about 64 bytes: one bit a byte.
#pragma once

#include <cstdint>

namespace warploom {

struct Masks {
    uint64_t letter, upper, digit, blank, other_space, newline, apostrophe, slash, high;
};

}  // namespace warploom
