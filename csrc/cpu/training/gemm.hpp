// GEMM of rows with a weight matrix packed (as BLIS packs it) in panels of 48, 32 or 16 columns, each panel from its
// first term to its last: what the micro-kernel reads next is what comes next in memory. A few dozen rows are
// multiplied at the rate of thousands, so that whoever owns the rows can go on with them while they are in the cache.
#pragma once
#include <cstdint>

#include "cpu/training/pointwise.hpp"

namespace warploom {

struct Panels {
    int terms, columns;  // multiples of 16
    const float* at;
};

// Packs a matrix w (columns, terms), or with `over` a w (terms, columns), on all threads.
Panels pack(const float* w, int terms, int columns, bool over, float* to);

// y = x · w for the rows from `first` to `last`.
void multiply(Rows<const float> x, const Panels& w, Rows<float> y, int first, int last);

// Whether this CPU has the registers for such tiles.
bool has_panels();

}  // namespace warploom
