// What a layer does with each token by itself, which is all of it but attention, in two passes over tiles of 64 rows:
//
//     NormQkvRope      what has come joins the stream; norm; queries, keys and values; rotation
//     OutProjMlp    output projection; it joins the stream; norm; gated feed-forward
//
// Between one product and the next a tile stays in the cache of its thread. Only what the backward pass reads is written
// to memory: the sums, 1 / rms, q, k, v and the gate's two halves. Backward, the same tiles go the other way, make the
// normed rows and the feed-forward's middle anew, and leave side by side what the gradients of weights are products of.
//
// Every tensor is contiguous. C channels of the stream, J = all heads' numbers, H·D those of the queries, F hidden.
#pragma once
#include <cstdint>

#include "cpu/training/pointwise.hpp"

namespace warploom {

struct NormQkvRope {
    int batch, time, channels, heads, key_heads, head_width, half;
    float eps;
    const float *norm, *qkv;  // weights (C), (J, C)
    const float *cos, *sin;
    int64_t table_stride, table_rows;
    const int64_t* positions;
    float *sum, *inverse;  // (N, C), (N)

    void forward(const float* delta, const float* stream, float* q, float* k, float* v) const;

    struct Gradients {
        const float *q, *k, *v, *sum;                  // what arrives
        float *stream, *heads, *normed, *partial, *norm;  // (N, C), (N, J), (N, C), (chunks, C), (C)
    };
    void backward(const Gradients& d) const;

private:
    template <class Work>
    void rope(float sign, const Work& work) const;
};

struct OutProjMlp {
    int rows, channels, gathered, hidden;  // N, C, H·D, F
    float eps;
    const float *output, *norm, *gate_up, *down;  // weights (C, H·D), (C), (2F, C), (C, F)
    float *sum, *inverse, *both;                  // (N, C), (N), (N, 2F)

    void forward(const float* heads, const float* stream, float* delta) const;

    struct Gradients {
        const float *sum, *delta;                                             // what arrives
        float *stream, *heads, *both, *middle, *normed, *partial, *norm;  // (N, C), (N, H·D), (N, 2F), (N, F), …
    };
    void backward(const Gradients& d) const;
};

}  // namespace warploom
