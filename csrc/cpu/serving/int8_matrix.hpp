// A weight matrix in 8 bits, multiplied by activations in 8 bits.
//
// Decoding is bound by reading weights, and 8 bits are a quarter of float32. Rows of the weight and rows of activations (when
// they arrive) are rotated in groups of 64 columns (hadamard.hpp), and each group is rounded with a scale of its own, so that
// one large number costs its neighbors no precision. Products and sums of integers are exact, and the groups are added in one
// fixed order: a row's result does not depend on how many rows there are, nor on the CPU's vectors.
//
// Weights lie as the dot-product instruction wants them, one stream in the order of reading: for every 64 outputs and
// group (16 steps of 4 columns, 4 vectors of outputs, 16 outputs, 4 columns), then their scales in half precision. They are
// offset by 128 to be unsigned; each group's sum starts at −128 · Σ activations, which takes the offset out again.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/serving/matrix.hpp"

namespace warploom {

class Int8Matrix : public Matrix {
public:
    // `weight` is (outputs, columns), `bias` (outputs) or null.
    Int8Matrix(const float* weight, int outputs, int columns, const float* bias);

    int outputs() const override { return outputs_; }
    int columns() const override { return columns_; }
    Format format() const override { return Format::int8; }
    using Matrix::multiply;
    void multiply(const Rows& x, float* y) const override;

private:
    void block(const Rows& x, int number, int count, float* y) const;

    int outputs_, columns_, groups_;
    std::vector<uint8_t, InLines<uint8_t>> data_;
    std::vector<float> scales_, bias_;  // of the outputs: what their groups' scales are counted in
};

// Whether the CPU's dot products are used where it has them, or the plain loop: the bits are the same.
void use_byte_products(bool vectors);

}  // namespace warploom
