// Token sampling from one row of logits: as kernels/sample.py, with the same random numbers.
#pragma once
#include <cstdint>

namespace warploom {

constexpr float kGreedyBelow = 1e-4f;  // a temperature below is greedy: at 1e-40 its reciprocal would be infinite

struct Draw {
    float temperature;
    int32_t top_k;
    float top_p, min_p;
    int64_t seed, position;
};

// A NaN counts as −inf. Where the largest logit over the temperature is not finite, the first of the largest is taken.
int64_t sample_row(const float* logits, int vocabulary, const Draw& draw);

}  // namespace warploom
