// One layer of the model in one call: norm, attention over pages, norm, feed-forward.
#pragma once
#include <memory>
#include <vector>

#include "cpu/serving/matrix.hpp"
#include "cpu/serving/paged_attention.hpp"

namespace warploom {

enum class NormKind { none, rms, layer };
enum class Activation { swiglu, gelu, relu, relu2 };

struct Norm {
    NormKind kind = NormKind::none;
    float eps = 0;
    std::vector<float> weight, bias;
};

// What has come joins the stream, of which `normed` becomes the norm.
void join_and_normalize(const Norm& norm, float* stream, const float* delta, int n, float* normed);

struct BlockShape {
    int width, heads, kv_heads, head_dim, hidden;
    int window;
    float softcap, scale, qk_eps;
    Activation activation;
};

struct Rotation {  // (max length, columns) of cosines and sines; no columns: no rotation
    const float* cos;
    const float* sin;
    int columns;
    int64_t rows;
};

// The C++ twin of the model's Block. `stream` and `delta` (tokens, width) become what they are after this layer.
class Block {
public:
    Block(BlockShape shape, Norm attention_norm, Norm ffn_norm, std::vector<float> q_norm, std::vector<float> k_norm,
          std::shared_ptr<Matrix> qkv, std::shared_ptr<Matrix> output, std::shared_ptr<Matrix> up,
          std::shared_ptr<Matrix> down);

    void run(float* stream, float* delta, const Step& step, const Pages& pages, const Rotation& rotation) const;

private:
    void rope(float* qkv, int64_t position, const Rotation& rotation) const;

    BlockShape shape_;
    Norm attention_norm_, ffn_norm_;
    std::vector<float> q_norm_, k_norm_;
    std::shared_ptr<Matrix> qkv_, output_, up_, down_;
};

}  // namespace warploom
