// Causal attention for training on a CPU: every query over the keys up to its own, forward and backward. Tensors are float32 or
// bfloat16; in between all is float32, but on CPUs that multiply pairs of bfloat16 fast (pair_attention.hpp).
//
// A task takes one key head of one sequence, with the query heads that share it, so no two tasks add to the same sum
// and results do not depend on the number of threads. Queries go by blocks of 64, four vectors: scores lie as (keys,
// queries), so that maxima and sums over keys need no step across the lanes of a vector. Products go by register
// tiles, and what lies above the diagonal is left out to the tile. The backward pass makes its weights anew from each
// query's largest score and the logarithm of its weights' sum, which costs a seventh of the products and keeps no table
// of weights in memory.
//
// It is as exact as the plain formula, which a backward pass in FlashAttention's way is not. Its two numbers a query are
// not added up: where scores are in the hundreds, the rounding of that log-sum-exp is 250 times the formula's error. And
// the mean of a query's slopes is that of the very weights and slopes at hand, not the dot product of its result and its
// gradient, whose rounding no longer cancels: ten times the error where few keys share the weight. That takes the scores
// of a block of queries over all keys in the cache, as the forward pass does.
#pragma once
#include <cstdint>

#include "simd.hpp"

namespace warploom {

// A tensor (batch, time, heads, width) with unit stride inside its heads.
template <class T>
struct HeadsOf {
    T* at;
    int64_t batch, time, head;
    T* operator()(int b, int t, int h) const { return at + b * batch + t * time + h * head; }
};

template <class T>
struct DenseAttention {
    int batch, time, heads, key_heads, width;  // width: a multiple of 16
    float scale;
    HeadsOf<const T> q, k, v;
    float* stats;  // (2, batch, heads, time): largest scores, and logarithms of the sums of exp(score - largest)
    float* peaks(int b, int t, int h) const { return stats + (int64_t(b) * heads + h) * time + t; }
    float* spreads(int b, int t, int h) const { return peaks(batch + b, t, h); }

    void forward(HeadsOf<T> out) const;
    void backward(HeadsOf<const T> d_out, HeadsOf<T> dq, HeadsOf<T> dk, HeadsOf<T> dv) const;
};

}  // namespace warploom
