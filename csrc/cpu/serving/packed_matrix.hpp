// Quantized weight matrix (8 or 4 bits), multiplied by quantized activations with integer arithmetic (W8A8, W4A8).
//
// Decoding is bound by reading weights, and 8 bits are a quarter of float32. Weights and activations (when they arrive) are
// rounded in groups of columns with a scale of their own, which confines the damage of an outlier; our own formats rotate
// them first (hadamard.hpp). Products and sums of integers are exact, and the groups are added in one fixed
// order: a row's result does not depend on how many rows there are, nor on the CPU's vectors.
//
// A matrix is a list of segments of rows, each with its layout: q, k and v, stored apart and perhaps in different formats,
// are one product here. The groups of all segments have one size, as they share the activations. Weights are stored as the
// dot-product instruction wants them, one stream in the order of reading (packed_layout.hpp).
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/serving/packed_layout.hpp"

namespace warploom {

// Number of groups in a row of weights; with rotation, of columns padded to whole spans.
int groups_of(const Layout& layout, int columns);

// Rows of weights as files and Python hold them: (rows, groups · group) codes, of 4 bits two a byte, the first in the low half;
// (rows, groups) scales and minima in half precision, counted in the units (rows).
struct Codes {
    Layout layout;
    int rows;
    const uint8_t* codes;
    const uint16_t *scales, *minima;
    const float* units;
};

// One row of float weights as codes, a byte each. Eight bits take the largest number of a group as it is, four bits the best
// scale and minimum of a few (least squares). What scales and minima are counted in is returned, a power of two: half
// precision has but five bits of exponent.
//
// With `feedback`, (groups · group)² numbers, what a code loses is taken from the columns after it: row c says how much of the
// error of column c each of them makes good, given how columns move together in the activations (GPTQ; calibrate.py makes it).
float quantize_row(const float* row, int columns, const Layout&, uint8_t* codes, uint16_t* scales, uint16_t* minima,
                   const float* feedback = nullptr);

class PackedMatrix : public Matrix {
public:
    // `bias` (outputs) or null; `wide`: activations of two bytes.
    PackedMatrix(const std::vector<Codes>& segments, int columns, const float* bias, bool wide);

    // From float weights (outputs, columns).
    PackedMatrix(const float* weight, int outputs, int columns, const float* bias, const Layout&, bool wide);

    int outputs() const override { return outputs_; }
    int columns() const override { return columns_; }
    RowFormat format() const override { return format_; }
    using Matrix::multiply;
    void multiply(const Activations& x, float* y) const override;
    size_t bytes() const;

private:
    struct Segment {
        Layout layout;
        int first, outputs, groups;
        size_t bytes;
        std::shared_ptr<uint8_t> data;
        std::vector<float> units, bias;

        void write(int output, const uint8_t* codes, const uint16_t* scales, const uint16_t* minima);
    };

    template <class Make>
    void add(const Layout&, int outputs, const float* bias, const Make& make);
    void block(const Segment&, const Activations& x, int number, float* y) const;

    int outputs_ = 0, columns_;
    RowFormat format_;
    std::vector<Segment> segments_;
};

// Selects the micro-kernels: "avx512", "avxvnni", "avx2", "plain" or "best". False where this CPU or build lacks them.
bool use_packed_loops(const char* name);

}  // namespace warploom
