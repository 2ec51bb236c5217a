// Passes over rows for training on a CPU: each reads its operands once, computes in float32, and writes its results once.
//
// T is float or bfloat16. Rows have unit stride inside and any distance between them. Every sum is taken in an order
// that depends on the shapes alone, so results do not depend on the number of threads. What a tensor says is an index is
// compared with what it indexes, row by row.
#pragma once
#include <cstdint>

#include "cpu/elementwise.hpp"
#include "simd.hpp"

namespace warploom {

template <class T>
struct Rows {
    T* at;
    int64_t stride;
    T* operator[](int64_t row) const { return at + row * stride; }
};

// sum = x + residual (where there is a residual); y = sum / rms(sum) · weight; inverse = 1 / rms(sum).
template <class T>
struct NormForward {
    int rows, columns;
    float eps;
    Rows<const T> x, residual;
    const T* weight;
    Rows<T> y, sum;
    float* inverse;
    void run_range(int first, int last) const;  // of the rows; `run` shares all of them out
    void run() const;
};

// dx = d(y)/dx · dy + dsum (where there is one); dweight = Σ dy · x / rms. `partial` holds one row of sums a chunk. Where
// there is a `y`, it becomes once more what the forward pass made.
template <class T>
struct NormBackward {
    static constexpr int kChunk = 64;
    int rows, columns;
    Rows<const T> x, dy, dsum;
    const T* weight;
    const float* inverse;
    Rows<T> dx, y;
    float* partial;
    T* dweight;
    void run_chunk(int chunk) const;
    void reduce() const;
    void run() const;
};

// y = activation(gate) · up; and, where `dy` is given, the gradients of both, and y only if it has a place.
template <class T>
struct Gating {
    Gate kind;
    int rows, columns;
    Rows<const T> gate, up, dy;
    Rows<T> y, dgate, dup;
    void run_range(int first, int last) const;
    void run() const;
};

// Turns column i with column i + half of every head by the angle of its token; `sign` -1 turns back.
template <class T>
struct Rope {
    int batch, time, heads, width, half;
    float sign;
    const T* x;
    int64_t batch_stride, time_stride, head_stride;
    const float *cos, *sin;
    int64_t table_stride, table_rows;
    const int64_t* positions;  // of each token; null: its place in time. One that the tables lack is an out_of_range
    Rows<T> y;                 // a token's heads side by side
    void run_range(int first, int last) const;
    void run() const;
};

// Cross-entropy of each row of logits and, where `upstream` is given, the logits' gradient, in their place if there is none of
// its own. `log_sums` keep the logarithms of sums of exponentials for a gradient without `losses`. A target that is no class and
// not `ignore` is an out_of_range.
template <class T>
struct CrossEntropy {
    int rows, classes;
    int64_t ignore;
    float smoothing, z;
    T* logits;
    const int64_t* targets;
    const float* upstream;
    float* losses;
    float* log_sums;
    T* gradient;
    void run_range(int first, int last) const;
    void run() const;
};

}  // namespace warploom
