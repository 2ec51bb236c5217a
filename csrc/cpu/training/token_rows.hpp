// Fused token-wise parts of a Transformer block (everything but attention), in two passes over tiles of 64 rows:
//
//     NormQkvRope   residual add, norm, QKV projection, RoPE
//     OutProjMlp    output projection, residual add, norm, gated feed-forward
//
// Between one product and the next a tile stays in the cache of its thread. Only what the backward pass reads is written
// to memory: the sums, 1 / rms, q, k, v and the gate's two halves. Backward, the same tiles go the other way, make the
// normed rows and the feed-forward's middle anew, and leave side by side what the gradients of weights are products of.
//
// T is float, or bfloat16 where `has_fast_pairs`. Every tensor is contiguous. C channels of the stream, J = all heads' numbers, H·D those of the queries, F hidden.
#pragma once
#include <cstdint>

#include "cpu/training/gemm.hpp"
#include "cpu/training/pointwise.hpp"

namespace warploom {

template <class T>
struct NormQkvRope {
    int batch, time, channels, heads, key_heads, head_width, half;
    float eps;
    const T *norm, *qkv;  // weights (C), (J, C)
    const float *cos, *sin;
    int64_t table_stride, table_rows;
    const int64_t* positions;
    T* sum;  // (N, C)
    float* inverse;  // (N)

    void forward(const T* delta, const T* stream, T* q, T* k, T* v) const;

    struct Gradients {
        const T *q, *k, *v, *sum;             // what arrives
        T *stream, *heads, *normed;           // (N, C), (N, J), (N, C)
        bool packed;                          // heads and normed: as operands of a product over tokens (gemm.hpp)
        float* partial;                       // (chunks, C)
        T* norm;                              // (C)
    };
    void backward(const Gradients& d) const;

private:
    template <class Work>
    void rope(float sign, const Work& work) const;
};

template <class T>
struct OutProjMlp {
    int rows, channels, gathered, hidden;  // N, C, H·D, F
    float eps;
    const T *output, *norm, *gate_up, *down;  // weights (C, H·D), (C), (2F, C), (C, F)
    T* sum;          // (N, C)
    float* inverse;  // (N)
    T* both;         // (N, 2F)

    void forward(const T* heads, const T* stream, T* delta) const;

    struct Gradients {
        const T *sum, *delta;                          // what arrives
        T *stream, *heads, *both, *middle, *normed;    // (N, C), (N, H·D), (N, 2F), (N, F), (N, C)
        float* partial;                                // (chunks, C)
        T* norm;                                       // (C)
        const T* gathered;                             // (N, H·D): the heads of the forward pass
        T *of_delta, *of_stream, *of_gathered;         // packed, as are both, middle and normed then; or null
    };
    void backward(const Gradients& d) const;
};

// Fused LM head and cross-entropy, in tiles too: logits, losses, and where rows have upstream gradients those of logits, of hidden
// rows and the operands of the weight's. No logits are kept.
template <class T>
struct HeadLoss {
    Rows<const T> hidden;    // (N, C)
    Panels<T> forth, back;   // the weight (V, C): for logits, and for the gradients of hidden rows, if those are wanted
    CrossEntropy<T> losses;  // whose logits are nowhere
    Rows<T> d_hidden;        // (N, C)
    T *left, *right;         // packed gradients of logits, and hidden rows; or null

    void run() const;
};

}  // namespace warploom
