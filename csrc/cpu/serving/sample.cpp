#include "cpu/serving/sample.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "simd.hpp"

namespace warploom {

namespace {

// Four words of Philox-4x32-10 for a counter under a 64-bit key.
struct Philox {
    uint32_t key[2], high[2];

    Philox(int64_t seed, int64_t position)
        : key{uint32_t(seed), uint32_t(uint64_t(seed) >> 32)},
          high{uint32_t(position), uint32_t(uint64_t(position) >> 32)} {}

    void words(uint32_t counter, uint32_t out[4]) const {
        uint32_t c0 = counter, c1 = high[0], c2 = high[1], c3 = 0, k0 = key[0], k1 = key[1];
        for (int round = 0; round < 10; ++round) {
            const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
            const uint32_t next = uint32_t(p1 >> 32) ^ c1 ^ k0, other = uint32_t(p0 >> 32) ^ c3 ^ k1;
            c1 = uint32_t(p1), c3 = uint32_t(p0), c0 = next, c2 = other;
            k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        }
        out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
    }
};

// An exponentially distributed number, −log(1 − v) of a uniform v, exact where v is small.
inline float exponential(uint32_t bits) {
    const float v = std::min((float(bits) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
    if (v < 1.0f / 64) return v * (1 + v * (0.5f + v * (1.0f / 3 + v * 0.25f)));
    return -std::log(1 - v);
}

// weights = logits · heat, a NaN as −inf; the largest is returned.
float scale(const float* logits, int n, float heat, float* weights) {
    float peak = -INFINITY;
    for (int i = 0; i < n; ++i) {
        const float x = logits[i] * heat;
        peak = std::max(peak, weights[i] = x == x ? x : -INFINITY);
    }
    return peak;
}

// weights = exp(weights − peak)
void exponentiate(float* weights, int n, float peak) {
    int i = 0;
    for (; i + 16 <= n; i += 16) store(weights + i, exp(load(weights + i) - peak));
    for (; i < n; ++i) weights[i] = std::exp(weights[i] - peak);
}

// Where the largest logit stands, the first of equals; 0 where all are −inf or no number.
int64_t first_largest(const float* logits, int n) {
    f16 most = f16{} - INFINITY;
    int i = 0;
    for (; i + 16 <= n; i += 16) {
        const f16 more = load(logits + i);
        most = larger(more, most);
    }
    float peak = largest(most);
    for (; i < n; ++i) peak = std::max(peak, logits[i]);
    return peak == -INFINITY ? 0 : std::find(logits, logits + n, peak) - logits;
}

// The weight of the last token that top-p keeps: of the largest weights, the fewest that hold the share `top_p`.
float smallest_of_share(const std::vector<float>& weights, float floor, float top_p) {
    double mass = 0;
    for (float weight : weights) mass += weight >= floor ? weight : 0.0;
    std::vector<float> largest;
    for (float cut = 0.01f;; cut = cut > 1e-7f ? cut * 0.01f : 0.0f) {  // rarely more than the first round
        double held = 0;
        largest.clear();
        for (float weight : weights)
            if (weight >= floor && weight >= cut && weight > 0) largest.push_back(weight), held += weight;
        if (held >= top_p * mass || cut == 0) break;
    }
    std::sort(largest.begin(), largest.end(), std::greater<float>());
    double above = 0;
    size_t last = 0;
    for (size_t i = 0; i < largest.size() && above < top_p * mass; ++i) last = i, above += largest[i];
    return largest[last];
}

float kept_from(const std::vector<float>& weights, const Draw& draw) {
    float floor = 0;
    if (draw.top_k > 0 && draw.top_k < int(weights.size())) {
        std::vector<float> order(weights);
        std::nth_element(order.begin(), order.begin() + draw.top_k - 1, order.end(), std::greater<float>());
        floor = order[draw.top_k - 1];
    }
    if (draw.top_p < 1) floor = smallest_of_share(weights, floor, draw.top_p);
    return std::max(floor, draw.min_p);
}

}  // namespace

int64_t sample_row(const float* logits, int vocabulary, const Draw& draw) {
    if (!(draw.temperature >= kGreedyBelow)) return first_largest(logits, vocabulary);
    thread_local std::vector<float> weights;
    weights.resize(vocabulary);
    const float heat = 1 / draw.temperature;
    const float peak = scale(logits, vocabulary, heat, weights.data());
    if (!std::isfinite(peak)) return first_largest(weights.data(), vocabulary);
    exponentiate(weights.data(), vocabulary, peak);
    const float floor = kept_from(weights, draw);
    const Philox random(draw.seed, draw.position);

    // A race: token i arrives at e_i / weight_i, and the first wins. As −log(1 − v) ≥ v, most tokens are seen to be late
    // without a logarithm.
    int64_t winner = std::max_element(weights.begin(), weights.end()) - weights.begin();
    float best = -INFINITY, limit = INFINITY;
    const auto enter = [&](int i, uint32_t bits) {
        if (!(weights[i] >= floor) || float(bits) * 0x1p-32f > weights[i] * limit) return;
        const float key = logits[i] * heat - std::log(exponential(bits));
        if (key > best) best = key, winner = i, limit = std::exp(peak - best) * 1.0001f;
    };
    for (int i = 0; i < vocabulary; i += 4) {
        const int count = std::min(4, vocabulary - i);
        if (*std::max_element(&weights[i], &weights[i] + count) < floor) continue;
        uint32_t bits[4];
        random.words(uint32_t(i / 4), bits);
        for (int w = 0; w < count; ++w) enter(i + w, bits[w]);
    }
    return winner;
}

}  // namespace warploom
