// A layer's experts in one call (grouped GEMM): tokens are sorted by expert, each expert multiplies its own as one batch.
#pragma once
#include <memory>
#include <vector>

#include "cpu/elementwise.hpp"
#include "cpu/serving/matrix.hpp"

namespace warploom {

class Experts {
public:
    // For each expert its gate and up in one matrix, and its down.
    Experts(std::vector<std::shared_ptr<Matrix>> gate_up, std::vector<std::shared_ptr<Matrix>> down, Gate activation);

    int width() const { return down_[0]->outputs(); }

    // y (tokens, width) = Σ weight · expert(x) over the `each` experts that a token has chosen, in their order: a row's
    // bits do not depend on the other rows.
    void run(const float* x, const int64_t* chosen, const float* weights, int tokens, int each, float* y) const;

private:
    std::vector<std::shared_ptr<Matrix>> gate_up_, down_;
    Gate activation_;
};

}  // namespace warploom
