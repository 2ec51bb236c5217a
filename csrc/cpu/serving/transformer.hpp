// The whole model except its head, in one call: embedding, blocks, final norm.
#pragma once
#include <memory>
#include <vector>

#include "cpu/serving/block.hpp"

namespace warploom {

struct Table {  // rows as wide as the stream; no rows: nothing is looked up
    const void* rows;
    bool half;
    int64_t count;
};

class Transformer {
public:
    Transformer(int width, Table embedding, float embedding_scale, Table positions,
                std::vector<std::shared_ptr<Block>> blocks, Norm norm);

    int width() const { return width_; }

    // `hidden` (tokens, width) becomes the normalized stream after the last layer; `pages` are those of each layer,
    // which names one of the `rotations`; `chosen` is the adapter of each token, -1 for none, or no adapters at all. A
    // token, position or adapter out of range throws out_of_range.
    void run(const int64_t* tokens, const Step& step, const std::vector<Pages>& pages,
             const std::vector<Rotation>& rotations, const int32_t* chosen, float* hidden) const;

private:
    int width_;
    Table embedding_, positions_;
    float embedding_scale_;
    std::vector<std::shared_ptr<Block>> blocks_;
    Norm norm_;
};

}  // namespace warploom
