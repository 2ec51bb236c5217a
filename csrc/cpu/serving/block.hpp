// A Transformer block in one call: norm, paged attention, norm, feed-forward.
#pragma once
#include <memory>
#include <vector>

#include "cpu/elementwise.hpp"
#include "cpu/serving/low_rank.hpp"
#include "cpu/serving/matrix.hpp"
#include "cpu/serving/paged_attention.hpp"

namespace warploom {

enum class NormKind { none, rms, layer };

struct Norm {
    NormKind kind = NormKind::none;
    float eps = 0;
    std::vector<float> weight, bias;
};

// Residual add and norm: stream += delta, normed = norm(stream).
void join_and_normalize(const Norm& norm, float* stream, const float* delta, int n, float* normed);

// The hidden layer of a feed-forward in place; `up` holds gate and up when it is gated.
void gate_row(Gate gate, bool gated, float* up, int hidden);

enum class QKNorm { head, whole, after };              // each head; all heads together; each head once it is rotated
enum class Residual { serial, parallel, shared };  // both sublayers read one stream; and one norm of it

struct BlockShape {
    int width, heads, kv_heads, head_dim, hidden;
    int window;
    float softcap, scale, qk_eps;
    Gate activation;
    bool gated;
    QKNorm qk_norm;
    Residual residual;
    float residual_scale;
    int rotation;              // which of the model's; -1: none
    std::vector<float> sinks;  // (heads), or none
};

struct BlockNorms {  // before a sublayer, and of what it gives
    Norm attention, attention_post, ffn, ffn_post;
    std::vector<float> q, k;
};

struct Rotation {  // (max length, columns) of cosines and sines; no columns: no rotation
    const float* cos;
    const float* sin;
    const float* growth;  // (max length): factor of queries by position; null: none
    int columns;
    int64_t rows;
};

// C++ executor of the model's Block. `stream` and `delta` (tokens, width) are updated in place.
class Block {
public:
    Block(BlockShape shape, BlockNorms norms, std::shared_ptr<Matrix> qkv, std::shared_ptr<Matrix> output,
          std::shared_ptr<Matrix> up, std::shared_ptr<Matrix> down, std::vector<LowRanks> adapters);

    int rotation() const { return shape_.rotation; }
    int adapters() const { return int(adapters_[0].size()); }
    void run(float* stream, float* delta, const Step& step, const Pages& pages, const Rotation& rotation,
             const AdapterTokens* adapted) const;

private:
    void normalize_heads(float* qkv) const;
    void rope(float* qkv, int64_t position, const Rotation& rotation) const;

    BlockShape shape_;
    BlockNorms norms_;
    std::shared_ptr<Matrix> qkv_, output_, up_, down_;
    std::vector<LowRanks> adapters_;  // of these four
};

}  // namespace warploom
