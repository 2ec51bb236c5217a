// A weight matrix in 8 bits, multiplied by activations in 8 bits.
//
// Decoding is bound by reading weights, and 8 bits are a quarter of float32. Each row of the weight has one scale; each
// row of activations is quantized when it arrives, in groups of 64 columns with a scale of their own, so that one
// large activation costs its neighbours no precision. Products and sums of integers are exact, and the groups are
// added in one fixed order: a row's result does not depend on how many rows there are, nor on the CPU's vectors.
//
// Weights lie as the dot-product instruction wants them: (N / 16, C / 4, 16 outputs, 4 columns), offset by 128 to be
// unsigned; each group's sum starts at −128 · Σ activations, which takes the offset out again.
#pragma once
#include <cstdint>
#include <memory>
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
    void block(const Rows& x, int first, int count, float* y) const;

    int outputs_, columns_, groups_;
    std::unique_ptr<uint8_t[]> memory_;
    uint8_t* weights_;
    std::vector<float> scales_, bias_;
};

}  // namespace warploom
