// Drawing one token from one row of logits: the C++ twin of kernels/sample.py, with the same numbers.
#pragma once
#include <cstdint>

namespace warploom {

struct Draw {
    float temperature;
    int32_t top_k;
    float top_p, min_p;
    int64_t seed, position;
};

int64_t sample_row(const float* logits, int vocabulary, const Draw& draw);

}  // namespace warploom
