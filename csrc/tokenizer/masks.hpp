// Character-class bit masks of 64 bytes, as `classify` makes them.
#pragma once

#include <cstdint>

namespace warploom {

struct Masks {
    uint64_t letter, upper, digit, blank, other_space, newline, apostrophe, slash, high;
    uint64_t ideograph;  // first bytes of U+5000 to 8FFF and B000 to CFFF: all of them are letters without case
    uint64_t wide[5] = {};  // where characters of 2, 3 and 4 bytes begin, once they are decoded
};

}  // namespace warploom
