// GEMM for training, in float32, or bfloat16 with float32 sums. Each sum runs from its first term to its last, so a result
// depends neither on other rows nor on the number of threads.
//
// A weight matrix is packed (as BLIS packs it) in panels of 48, 32 or 16 columns, each panel from its first term to its
// last: what the micro-kernel reads next is what comes next in memory. A few dozen rows are multiplied at the rate of
// thousands, so that a fused pass can go on with these rows while they are in the cache.
#pragma once
#include <cstdint>

#include "cpu/training/pointwise.hpp"

namespace warploom {

// Numbers come in words of 32 bits: a float, or two bfloat16 of neighboring terms.
template <class T>
constexpr int kTogether = 4 / sizeof(T);

template <class T>
struct Panels {
    int terms, columns;  // multiples of 16 words, and of 16
    const T* at;
};

// Packs a matrix w (columns, terms), or with `over` a w (terms, columns), on all threads.
template <class T>
Panels<T> pack(const T* w, int terms, int columns, bool over, T* to);

// y = x · w for the rows from `first` to `last`.
void multiply(Rows<const float> x, const Panels<float>& w, Rows<float> y, int first, int last);
void multiply(Rows<const bfloat16> x, const Panels<bfloat16>& w, Rows<bfloat16> y, int first, int last);

// y = x · w for so many rows, on all threads.
template <class T>
void multiply(Rows<const T> x, const Panels<T>& w, Rows<T> y, int rows);

// The gradient of a weight is a product over tokens: y (outputs, inputs) = Σ left (tokens, outputs)ᵀ · right (tokens, inputs).
// Both are packed by blocks of kBlock tokens, in panels of 16 columns on the left and as a weight's on the right.
constexpr int kBlock = 256;
inline int64_t room_of_tokens(int64_t tokens, int64_t columns) { return (tokens + kBlock - 1) / kBlock * kBlock * columns; }

// Packs the rows from `first`, an even one, to `last`.
template <class T>
void pack_tokens(Rows<const T> x, int first, int last, int columns, bool left, T* to);

// The product, by tasks for so many threads; with `add`, which only floats can have, added to what y holds.
template <class T, class Y>
void multiply_tokens(const T* left, const T* right, int tokens, int outputs, int inputs, Y* y, bool add, int threads);

// Whether this CPU has the registers for these tiles, and a bfloat16 dot product at twice the rate of float32.
bool has_panels();
bool has_fast_pairs();

// Whether these products are faster than PyTorch's: Intel's MKL uses no AVX-512 on AMD CPUs.
bool outruns_library();

}  // namespace warploom
