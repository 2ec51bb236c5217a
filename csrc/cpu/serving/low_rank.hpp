// Multi-LoRA: y += s·B·(A·x) beside a layer's products, each token with its own adapter.
#pragma once
#include <memory>
#include <vector>

#include "cpu/serving/dense_matrix.hpp"

namespace warploom {

// The tokens of a step by adapter: those of adapter a are tokens[begin[a]] to tokens[begin[a + 1] - 1].
struct AdapterTokens {
    std::vector<int> tokens, begin;

    // `chosen` (count): the adapter of each token, or -1. An invalid one throws out_of_range.
    void sort(const int32_t* chosen, int count, int adapters);
};

// s·B of one of the layers packed in a matrix: its outputs begin at `row`, its part of A·x at `rank`.
struct UpFactor {
    int row, rank;
    std::shared_ptr<DenseMatrix<float>> matrix;
};

// One adapter's factors of one matrix: A of all layers packed in it, and s·B of each.
struct LowRank {
    std::shared_ptr<DenseMatrix<float>> down;
    std::vector<UpFactor> ups;
};

// One matrix, by adapter; none where an adapter leaves it as it is.
using LowRanks = std::vector<std::shared_ptr<LowRank>>;

// Whether all factors are of a matrix of this shape.
bool fit(const LowRanks& adapters, int outputs, int columns);

// Adds to the rows of y, `outputs` apart, what the adapters change. A token's bits depend on nothing but itself.
void add_low_rank(const LowRanks& adapters, const AdapterTokens& tokens, const float* x, int64_t stride, float* y, int outputs);

}  // namespace warploom
