// Interface of weight matrices for serving: packed in reading order, batch-invariant products.
#pragma once
#include <cstdint>
#include <vector>

#include "simd.hpp"

namespace warploom {

constexpr int kTurned = 64;           // columns that are rotated together
constexpr float kRotated = 1.0f / 8;  // 1 / √64: what `hadamard` leaves out

// Format of activations: float32, rounded to bfloat16, or quantized to 8 bits.
enum class Format { floats, halves, int8 };

// Activation format that a matrix asks for. Integers have a scale for every `group` columns, are Hadamard-rotated in spans
// of 64 before, and have two bytes if `wide`.
struct RowFormat {
    Format number = Format::floats;
    int group = 64;
    bool rotate = false, wide = false;
};

// Activations: float rows `stride` apart, and the same converted (quantized) to the matrix's format, row by row.
struct Activations {
    const float* values = nullptr;
    int64_t stride = 0;
    int count = 0;
    RowFormat format;
    int columns = 0;                // of the prepared rows: padded to whole pairs or spans
    int groups = 0;                 // of the prepared rows
    std::vector<bfloat16> halves;   // (count, columns)
    std::vector<int8_t> int8, low;  // (count, columns): if wide 128 · int8 + low
    std::vector<float> scales;      // (count, groups)
    std::vector<int32_t> sums;      // (count, groups)

    void point(const float* values, int64_t stride, int count, int n, RowFormat format);
    void prepare(int row, int n);
};

class Matrix {
public:
    virtual ~Matrix() = default;
    virtual int outputs() const = 0;
    virtual int columns() const = 0;
    virtual RowFormat format() const = 0;

    // y (rows, outputs) = x · weightᵀ + bias, shared among the workers. A row's bits do not depend on the other rows.
    virtual void multiply(const Activations& x, float* y) const = 0;

    // The same for float rows that lie side by side, prepared as the matrix wants them.
    void multiply(const float* x, int rows, float* y) const;
};

}  // namespace warploom
