// A weight matrix in its own precision, float32 or bfloat16, summed in float32.
//
// Weights lie as (N / 16, C, 16 outputs), bfloat16 in pairs of columns (N / 16, C / 2, 16 outputs, 2): a vector of
// outputs advances down the columns together, each lane one chain of multiply-adds from the first column to the
// last. The order never changes, so neither do the bits.
//
// bfloat16 weights are widened as they are read and meet float32 activations. Intel's cores without tiles multiply
// pairs of bfloat16 at half the rate of float32 (0.45 instructions a cycle against 1.85), AMD's at twice that rate: there
// activations are rounded to bfloat16, and that instruction is used.
#pragma once
#include <memory>
#include <vector>

#include "cpu/serving/matrix.hpp"

namespace warploom {

template <class T>
class DenseMatrix : public Matrix {
public:
    DenseMatrix(const float* weight, int outputs, int columns, const float* bias);

    int outputs() const override { return outputs_; }
    int columns() const override { return columns_; }
    RowFormat format() const override;
    using Matrix::multiply;
    void multiply(const Activations& x, float* y) const override;

    // Parts of a product, blocks of outputs, each computed by one thread. With `places` (scatter), row r of a part is
    // added to row places[r] of y.
    int parts() const;
    void multiply_part(int part, const Activations& x, float* y, int64_t y_stride, const int* places = nullptr) const;

private:
    int outputs_, columns_, padded_;
    std::shared_ptr<uint8_t> memory_;
    T* weights_;
    std::vector<float> bias_;
};

extern template class DenseMatrix<float>;
extern template class DenseMatrix<bfloat16>;

}  // namespace warploom
