// Causal attention for training on a CPU, in float32: every query over the keys up to its own, forward and backward.
//
// A task takes one key head of one sequence, with the query heads that share it, so no two tasks add to the same sum
// and results do not depend on the number of threads. Queries go by blocks of 64, four vectors: scores lie as (keys,
// queries), so that maxima and sums over keys need no step across the lanes of a vector. Products go by register
// tiles, and what lies above the diagonal is left out to the tile. The backward pass makes its weights anew from each
// query's log-sum, which costs a seventh of the products and keeps no table of weights in memory.
#pragma once
#include <cstdint>

namespace warploom {

// A tensor (batch, time, heads, width) with unit stride inside its heads.
template <class T>
struct HeadsOf {
    T* at;
    int64_t batch, time, head;
    T* operator()(int b, int t, int h) const { return at + b * batch + t * time + h * head; }
};

struct DenseAttention {
    int batch, time, heads, key_heads, width;  // width: a multiple of 16
    float scale;
    HeadsOf<const float> q, k, v;
    HeadsOf<float> out;
    float* log_sums;  // (batch, heads, time)

    void forward() const;
    void backward(HeadsOf<const float> d_out, HeadsOf<float> dq, HeadsOf<float> dk, HeadsOf<float> dv) const;
};

}  // namespace warploom
