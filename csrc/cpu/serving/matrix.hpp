// A weight matrix as the decoder keeps it: packed for the order in which it is read, multiplied row by row.
#pragma once
#include <cstdint>
#include <vector>

#include "simd.hpp"

namespace warploom {

constexpr int kGroup = 64;               // columns that share a scale in 8 bits, and are rotated together
constexpr float kRotated = 1.0f / 8;     // 1 / √64: what `hadamard` leaves out

// What a matrix multiplies with: float32 as it comes, rounded to bfloat16, or quantized to 8 bits.
enum class Format { floats, halves, int8 };

// Activations: float rows `stride` apart, and the same in the format that the matrix asks for, prepared row by row.
struct Rows {
    const float* values = nullptr;
    int64_t stride = 0;
    int count = 0;
    Format format = Format::floats;
    int columns = 0;                // of the prepared rows: padded to whole pairs or groups
    std::vector<bfloat16> halves;   // (count, columns)
    std::vector<int8_t> int8;       // (count, columns)
    std::vector<float> scales;      // (count, groups)
    std::vector<int32_t> starts;    // (count, groups): −128 · Σ of the group

    void point(const float* values, int64_t stride, int count, int n, Format format);
    void prepare(int row, int n);
};

class Matrix {
public:
    virtual ~Matrix() = default;
    virtual int outputs() const = 0;
    virtual int columns() const = 0;
    virtual Format format() const = 0;

    // y (rows, outputs) = x · weightᵀ + bias, shared among the workers. A row's bits do not depend on the other rows.
    virtual void multiply(const Rows& x, float* y) const = 0;

    // The same for float rows that lie side by side, prepared as the matrix wants them.
    void multiply(const float* x, int rows, float* y) const;
};

}  // namespace warploom
