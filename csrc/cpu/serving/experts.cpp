#include "cpu/serving/experts.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/index.hpp"
#include "cpu/serving/block.hpp"
#include "cpu/serving/spin_pool.hpp"

namespace warploom {

namespace {

void add_scaled(float* to, const float* from, float factor, bool first, int n) {
    if (first)
        for (int i = 0; i < n; ++i) to[i] = from[i] * factor;
    else
        for (int i = 0; i < n; ++i) to[i] = to[i] + from[i] * factor;
}

}  // namespace

Experts::Experts(std::vector<std::shared_ptr<Matrix>> gate_up, std::vector<std::shared_ptr<Matrix>> down, Gate activation)
    : gate_up_(std::move(gate_up)), down_(std::move(down)), activation_(activation) {
    bool fits = !gate_up_.empty() && gate_up_.size() == down_.size();
    for (size_t e = 0; fits && e < down_.size(); ++e)
        fits = gate_up_[e]->outputs() == 2 * down_[e]->columns() && gate_up_[e]->columns() == down_[e]->outputs() &&
               down_[e]->outputs() == down_[0]->outputs() && down_[e]->columns() == down_[0]->columns();
    if (!fits) throw std::invalid_argument("the matrices of experts do not fit each other");
}

void Experts::run(const float* x, const int64_t* chosen, const float* weights, int tokens, int each, float* y) const {
    const int C = width(), F = down_[0]->columns(), count = int(down_.size()), all = tokens * each;
    std::vector<int> begin(count + 1), order(all), place(all);
    for (int a = 0; a < all; ++a) ++begin[within(chosen[a], count, "expert") + 1];
    for (int e = 0; e < count; ++e) begin[e + 1] += begin[e];
    std::vector<int> next(begin.begin(), begin.end() - 1);
    for (int a = 0; a < all; ++a) place[a] = next[chosen[a]]++, order[place[a]] = a / each;

    thread_local Floats rows, hidden, made;
    rows.resize(size_t(all) * C), hidden.resize(size_t(all) * 2 * F), made.resize(size_t(all) * C);
    float *sorted = rows.data(), *inner = hidden.data(), *out = made.data();
    each_row(all, [&](int i) { std::copy_n(x + size_t(order[i]) * C, C, sorted + size_t(i) * C); });
    Activations prepared;
    for (int e = 0; e < count; ++e) {
        const int first = begin[e], n = begin[e + 1] - first;
        if (!n) continue;
        float* mine = inner + size_t(first) * 2 * F;
        gate_up_[e]->multiply(sorted + size_t(first) * C, n, mine);
        prepared.point(mine, 2 * F, n, F, down_[e]->format());
        each_row(n, [&](int i) {
            gate_row(activation_, true, mine + size_t(i) * 2 * F, F);
            prepared.prepare(i, F);
        });
        down_[e]->multiply(prepared, out + size_t(first) * C);
    }
    each_row(tokens, [&](int t) {
        for (int k = 0; k < each; ++k) {
            const int a = t * each + k;
            add_scaled(y + size_t(t) * C, out + size_t(place[a]) * C, weights[a], k == 0, C);
        }
    });
}

}  // namespace warploom
