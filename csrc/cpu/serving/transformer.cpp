#include "cpu/serving/transformer.hpp"

#include <algorithm>

#include "cpu/index.hpp"
#include "simd.hpp"
#include "cpu/serving/spin_pool.hpp"

namespace warploom {

namespace {

void add_row(const Table& table, int64_t row, int width, float* to) {
    if (table.half) {
        const bfloat16* from = static_cast<const bfloat16*>(table.rows) + row * width;
        for (int i = 0; i < width; ++i) to[i] += widen(from[i]);
    } else {
        const float* from = static_cast<const float*>(table.rows) + row * width;
        for (int i = 0; i < width; ++i) to[i] += from[i];
    }
}

void look_up(const Table& table, const char* name, int64_t row, int width, float* to) {
    if (table.rows) add_row(table, within(row, table.count, name), width, to);
}

}  // namespace

Transformer::Transformer(int width, Table embedding, float embedding_scale, Table positions,
                         std::vector<std::shared_ptr<Block>> blocks, Norm norm)
    : width_(width), embedding_(embedding), positions_(positions), embedding_scale_(embedding_scale),
      blocks_(std::move(blocks)), norm_(std::move(norm)) {
    for (const auto& block : blocks_)
        if (block->adapters() != blocks_[0]->adapters()) throw std::invalid_argument("layers have different adapters");
}

void Transformer::run(const int64_t* tokens, const Step& step, const std::vector<Pages>& pages,
                      const std::vector<Rotation>& rotations, const int32_t* chosen, float* hidden) const {
    if (pages.size() != blocks_.size())
        throw std::invalid_argument("there are pages for " + std::to_string(pages.size()) + " layers, not for " +
                                    std::to_string(blocks_.size()));
    thread_local AdapterTokens adapted;
    if (chosen) adapted.sort(chosen, step.tokens, blocks_.empty() ? 0 : blocks_[0]->adapters());
    thread_local Floats streams, deltas;
    streams.assign(size_t(step.tokens) * width_, 0.0f), deltas.assign(streams.size(), 0.0f);
    float *stream = streams.data(), *delta = deltas.data();
    each_row(step.tokens, [&](int t) {
        float* row = stream + size_t(t) * width_;
        look_up(embedding_, "token", tokens[t], width_, row);
        for (int i = 0; i < width_ && embedding_scale_ != 1; ++i) row[i] *= embedding_scale_;
        look_up(positions_, "position", step.positions[t], width_, row);
    });
    for (size_t layer = 0; layer < blocks_.size(); ++layer) {
        const int which = blocks_[layer]->rotation();
        const Rotation none{nullptr, nullptr, nullptr, 0, INT64_MAX};
        if (which >= int(rotations.size())) throw std::invalid_argument("a layer's rotation is not given");
        blocks_[layer]->run(stream, delta, step, pages[layer], which < 0 ? none : rotations[which], chosen ? &adapted : nullptr);
    }
    each_row(step.tokens, [&](int t) {
        const size_t at = size_t(t) * width_;
        join_and_normalize(norm_, stream + at, delta + at, width_, hidden + at);
    });
}

}  // namespace warploom
