#include "cpu/serving/low_rank.hpp"

#include <algorithm>

#include "cpu/index.hpp"
#include "cpu/serving/spin_pool.hpp"

namespace warploom {

namespace {

constexpr int kTokens = 32;  // of one adapter whose A·x is one task

struct DownTask {
    int adapter, first, count;  // of the sorted tokens
};

struct UpTask {
    int adapter, up, part;
};

}  // namespace

void AdapterTokens::sort(const int32_t* chosen, int count, int adapters) {
    tokens.clear(), begin.assign(1, 0);
    for (int t = 0; t < count; ++t)
        if (chosen[t] != -1) within(chosen[t], adapters, "adapter");
    for (int a = 0; a < adapters; ++a) {
        for (int t = 0; t < count; ++t)
            if (chosen[t] == a) tokens.push_back(t);
        begin.push_back(int(tokens.size()));
    }
}

bool fit(const LowRanks& adapters, int outputs, int columns) {
    return std::all_of(adapters.begin(), adapters.end(), [&](const auto& factors) {
        return !factors || (factors->down->columns() == columns &&
                            std::all_of(factors->ups.begin(), factors->ups.end(), [&](const UpFactor& up) {
                                return up.row >= 0 && up.rank >= 0 && up.row + int64_t(up.matrix->outputs()) <= outputs &&
                                       up.rank + int64_t(up.matrix->columns()) <= factors->down->outputs();
                            }));
    });
}

void add_low_rank(const LowRanks& adapters, const AdapterTokens& rows, const float* x, int64_t stride, float* y, int outputs) {
    thread_local std::vector<DownTask> down_tasks;
    thread_local std::vector<UpTask> up_tasks;
    thread_local Floats products;
    auto& downs = down_tasks;  // the caller's, whichever thread works on them
    auto& ups = up_tasks;
    downs.clear(), ups.clear();
    int64_t rank = 0;  // the largest: products of all adapters lie as far apart
    for (int a = 0; a < int(adapters.size()); ++a) {
        if (!adapters[a] || rows.begin[a] == rows.begin[a + 1]) continue;
        const LowRank& factors = *adapters[a];
        rank = std::max<int64_t>(rank, factors.down->outputs());
        for (int first = rows.begin[a]; first < rows.begin[a + 1]; first += kTokens)
            downs.push_back({a, first, std::min(kTokens, rows.begin[a + 1] - first)});
        for (int up = 0; up < int(factors.ups.size()); ++up)
            for (int part = 0; part < factors.ups[up].matrix->parts(); ++part) ups.push_back({a, up, part});
    }
    products.resize(rows.tokens.size() * rank);
    float* z = products.data();
    SpinPool::shared().run(int(downs.size()), [&](int i) {
        const DownTask task = downs[i];
        const auto& down = *adapters[task.adapter]->down;
        const int n = down.columns(), *tokens = &rows.tokens[task.first];
        thread_local Floats gathered;
        Activations mine;
        if (tokens[task.count - 1] - tokens[0] == task.count - 1) {  // side by side: read where they lie
            mine.point(x + tokens[0] * stride, stride, task.count, n, down.format());
        } else {
            gathered.resize(size_t(task.count) * n);
            for (int r = 0; r < task.count; ++r) std::copy_n(x + tokens[r] * stride, n, gathered.data() + size_t(r) * n);
            mine.point(gathered.data(), n, task.count, n, down.format());
        }
        for (int part = 0; part < down.parts(); ++part) down.multiply_part(part, mine, z + task.first * rank, rank);
    });
    SpinPool::shared().run(int(ups.size()), [&](int i) {
        const UpTask task = ups[i];
        const UpFactor& up = adapters[task.adapter]->ups[task.up];
        const int first = rows.begin[task.adapter], count = rows.begin[task.adapter + 1] - first;
        Activations mine;
        mine.point(z + first * rank + up.rank, rank, count, up.matrix->columns(), up.matrix->format());
        up.matrix->multiply_part(task.part, mine, y + up.row, outputs, &rows.tokens[first]);
    });
}

}  // namespace warploom
