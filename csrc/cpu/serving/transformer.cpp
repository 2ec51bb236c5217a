#include "cpu/serving/transformer.hpp"

#include <algorithm>

#include "simd.hpp"
#include "cpu/serving/spin_pool.hpp"

namespace warploom {

namespace {

WARPLOOM_CLONES void add_row(const Table& table, int64_t row, int width, float* to) {
    if (!table.rows) return;
    if (table.half) {
        const bfloat16* from = static_cast<const bfloat16*>(table.rows) + row * width;
        for (int i = 0; i < width; ++i) to[i] += widen(from[i]);
    } else {
        const float* from = static_cast<const float*>(table.rows) + row * width;
        for (int i = 0; i < width; ++i) to[i] += from[i];
    }
}

}  // namespace

Transformer::Transformer(int width, Table embedding, Table positions, std::vector<std::shared_ptr<Block>> blocks,
                         Norm norm)
    : width_(width), embedding_(embedding), positions_(positions), blocks_(std::move(blocks)), norm_(std::move(norm)) {}

void Transformer::run(const int64_t* tokens, const Step& step, const std::vector<Pages>& pages,
                      const Rotation& rotation, float* hidden) const {
    thread_local Floats streams, deltas;
    streams.assign(size_t(step.tokens) * width_, 0.0f), deltas.assign(streams.size(), 0.0f);
    float *stream = streams.data(), *delta = deltas.data();
    each_row(step.tokens, [&](int t) {
        add_row(embedding_, tokens[t], width_, stream + size_t(t) * width_);
        add_row(positions_, step.positions[t], width_, stream + size_t(t) * width_);
    });
    for (size_t layer = 0; layer < blocks_.size(); ++layer) blocks_[layer]->run(stream, delta, step, pages[layer], rotation);
    each_row(step.tokens, [&](int t) {
        const size_t at = size_t(t) * width_;
        join_and_normalize(norm_, stream + at, delta + at, width_, hidden + at);
    });
}

}  // namespace warploom
