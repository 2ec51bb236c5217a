#include "cpu/serving/int8_matrix.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd.hpp"
#include "cpu/serving/spin_pool.hpp"
#include "x86.hpp"

namespace warploom {

namespace {

constexpr int kLanes = 16;       // outputs of one vector
constexpr int kBlock = 4;        // vectors of outputs of one task
constexpr int kQuad = kGroup / 4;  // steps of four columns in a group

struct Tile {
    const uint8_t* weights;  // of the first vector of outputs
    size_t stride;           // bytes from one vector of outputs to the next
    const float *scales, *bias;
    int groups, columns;

    Tile from(int vector) const {
        return {weights + vector * stride, stride, scales + vector * kLanes, bias + vector * kLanes, groups, columns};
    }
};

// The plain meaning of the kernel: sums of integers group by group, then of floats; rows of `y` lie `width` apart.
WARPLOOM_CLONES void multiply_plain(const Tile& t, int vectors, const Rows& x, int row, int rows, float* y, int width) {
    for (int r = 0; r < rows; ++r) {
        const int8_t* values = x.int8.data() + size_t(row + r) * t.columns;
        for (int v = 0; v < vectors; ++v) {
            float total[kLanes] = {};
            for (int g = 0; g < t.groups; ++g) {
                int32_t sums[kLanes];
                const uint8_t* w = t.weights + v * t.stride + size_t(g) * kGroup * kLanes;
                std::fill(sums, sums + kLanes, x.starts[size_t(row + r) * t.groups + g]);
                for (int k = 0; k < kGroup; ++k)
                    for (int lane = 0; lane < kLanes; ++lane)
                        sums[lane] += int32_t(w[(k / 4) * 64 + lane * 4 + k % 4]) * values[g * kGroup + k];
                const float scale = x.scales[size_t(row + r) * t.groups + g];
                for (int lane = 0; lane < kLanes; ++lane) total[lane] = std::fma(float(sums[lane]), scale, total[lane]);
            }
            for (int lane = 0, n = v * kLanes; lane < kLanes; ++lane, ++n)
                y[size_t(r) * width + n] = total[lane] * t.scales[n] + t.bias[n];
        }
    }
}

#ifdef WARPLOOM_X86
#define WARPLOOM_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

// sums += weights · activations, four columns a lane. Spelled out: with the intrinsic, GCC 12 copies every sum to another
// register and back at every step, twice as many instructions as there are products.
WARPLOOM_VNNI inline void meet(__m512i& sums, __m512i weights, __m512i activations) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(activations));
}

// ROWS × VECTORS integer sums in registers: each weight vector loaded serves all rows, each activation all vectors. After
// each group they join float sums, which may lie in memory.
template <int ROWS, int VECTORS>
WARPLOOM_VNNI inline void tile_vnni(const Tile& t, const Rows& x, int row, float* y, int width) {
    __m512 total[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) total[r][v] = _mm512_setzero_ps();
    const int8_t* values = x.int8.data() + size_t(row) * t.columns;
    const float* scales = x.scales.data() + size_t(row) * t.groups;
    const int32_t* starts = x.starts.data() + size_t(row) * t.groups;
    for (int g = 0; g < t.groups; ++g) {
        __m512i sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_set1_epi32(starts[size_t(r) * t.groups + g]);
        const uint8_t* w = t.weights + size_t(g) * kGroup * kLanes;
        const int8_t* a = values + g * kGroup;
#pragma GCC unroll 2
        for (int k = 0; k < kQuad; ++k) {
            __m512i weight[VECTORS];
            for (int v = 0; v < VECTORS; ++v) weight[v] = _mm512_loadu_si512(w + v * t.stride + k * 64);
            for (int r = 0; r < ROWS; ++r) {
                int32_t four;
                std::memcpy(&four, a + size_t(r) * t.columns + k * 4, 4);
                const __m512i activation = _mm512_set1_epi32(four);
                for (int v = 0; v < VECTORS; ++v) meet(sums[r][v], weight[v], activation);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            const __m512 scale = _mm512_set1_ps(scales[size_t(r) * t.groups + g]);
            for (int v = 0; v < VECTORS; ++v)
                total[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[r][v]), scale, total[r][v]);
        }
    }
    for (int v = 0; v < VECTORS; ++v) {
        const __m512 scale = _mm512_loadu_ps(t.scales + v * kLanes), bias = _mm512_loadu_ps(t.bias + v * kLanes);
        for (int r = 0; r < ROWS; ++r)
            _mm512_storeu_ps(y + size_t(r) * width + v * kLanes, _mm512_fmadd_ps(total[r][v], scale, bias));
    }
}

#define WARPLOOM_COVER(ROWS, WIDE)                                                                           \
    for (; v + WIDE <= vectors; v += WIDE) tile_vnni<ROWS, WIDE>(t.from(v), x, row, y + v * kLanes, width);  \
    for (; v < vectors; ++v) tile_vnni<ROWS, 1>(t.from(v), x, row, y + v * kLanes, width);                   \
    break;

WARPLOOM_VNNI void multiply_vnni(const Tile& t, int vectors, const Rows& x, int row, int rows, float* y, int width) {
    int v = 0;
    switch (rows) {
        case 1: WARPLOOM_COVER(1, 4)
        case 2: WARPLOOM_COVER(2, 4)
        case 3: WARPLOOM_COVER(3, 4)
        default: WARPLOOM_COVER(4, 4)
    }
}
#endif

using Multiply = void (*)(const Tile&, int, const Rows&, int, int, float*, int);

Multiply pick_multiply() {
#ifdef WARPLOOM_X86
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return multiply_vnni;
#endif
    return multiply_plain;
}

const Multiply multiply_rows = pick_multiply();
constexpr int kRows = 4;  // rows of activations of one tile

}  // namespace

Int8Matrix::Int8Matrix(const float* weight, int outputs, int columns, const float* bias)
    : outputs_(outputs), columns_(columns), groups_((columns + kGroup - 1) / kGroup) {
    const int vectors = (outputs + kLanes - 1) / kLanes;
    const size_t bytes = size_t(vectors) * kLanes * groups_ * kGroup;
    memory_.reset(new uint8_t[bytes + 64]);
    weights_ = memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64;
    std::memset(weights_, 128, bytes);
    scales_.assign(size_t(vectors) * kLanes, 0.0f), bias_.assign(scales_.size(), 0.0f);
    if (bias) std::copy(bias, bias + outputs, bias_.begin());
    Workers::shared().run(vectors, [&](int vector) {
        for (int lane = 0; lane < kLanes && vector * kLanes + lane < outputs; ++lane) {
            const int n = vector * kLanes + lane;
            const float* row = weight + size_t(n) * columns;
            float peak = 0;
            for (int c = 0; c < columns; ++c) peak = std::max(peak, std::fabs(row[c]));
            scales_[n] = peak / 127;
            uint8_t* to = weights_ + size_t(vector) * kLanes * groups_ * kGroup + lane * 4;
            for (int c = 0; c < columns && peak > 0; ++c)
                to[(c / 4) * 64 + c % 4] = uint8_t(128 + int(std::nearbyint(row[c] / scales_[n])));
        }
    });
}

void Int8Matrix::multiply(const Rows& x, float* y) const {
    const int vectors = (outputs_ + kLanes - 1) / kLanes;
    Workers::shared().run((vectors + kBlock - 1) / kBlock, [&](int task) {
        block(x, task * kBlock, std::min(kBlock, vectors - task * kBlock), y);
    });
}

void Int8Matrix::block(const Rows& x, int first, int count, float* y) const {
    const size_t stride = size_t(kLanes) * groups_ * kGroup;
    const Tile tile = Tile{weights_, stride, scales_.data(), bias_.data(), groups_, groups_ * kGroup}.from(first);
    const int from = first * kLanes, wide = count * kLanes, here = std::min(outputs_ - from, wide);
    float part[kRows * kBlock * kLanes];  // for outputs that fill no whole vector
    for (int row = 0, rows, tiles = (x.count + kRows - 1) / kRows; tiles > 0; row += rows, --tiles) {
        rows = (x.count - row + tiles - 1) / tiles;  // as equal as can be
        float* to = y + size_t(row) * outputs_ + from;
        multiply_rows(tile, count, x, row, rows, here == wide ? to : part, here == wide ? outputs_ : wide);
        for (int r = 0; r < rows && here < wide; ++r) std::copy_n(part + r * wide, here, to + size_t(r) * outputs_);
    }
}

}  // namespace warploom
