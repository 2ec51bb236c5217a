// A weight matrix as the decoder keeps it: packed for the order in which it is read, multiplied row by row.
#pragma once
#include <cstdint>

namespace warploom {

struct Int8Rows;

// Activations: float rows `stride` apart, and the same in 8 bits where the matrix asks for that.
struct Rows {
    const float* values;
    int64_t stride;
    int count;
    const Int8Rows* int8;
};

class Matrix {
public:
    virtual ~Matrix() = default;
    virtual int outputs() const = 0;
    virtual int columns() const = 0;
    virtual bool wants_int8() const = 0;

    // y (rows, outputs) = x · weightᵀ + bias, shared among the workers. A row's bits do not depend on the other rows.
    virtual void multiply(const Rows& x, float* y) const = 0;

    // The same for float rows that lie side by side, prepared as the matrix wants them.
    void multiply(const float* x, int rows, float* y) const;
};

}  // namespace warploom
