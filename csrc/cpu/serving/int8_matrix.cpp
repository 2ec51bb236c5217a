#include "cpu/serving/int8_matrix.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>

#include "cpu/serving/hadamard.hpp"
#include "cpu/serving/half.hpp"
#include "simd.hpp"
#include "cpu/serving/spin_pool.hpp"
#include "x86.hpp"

namespace warploom {

namespace {

constexpr int kLanes = 16;       // outputs of one vector
constexpr int kBlock = 4;        // vectors of outputs of one task
constexpr int kAhead = 8192;      // bytes that are requested before they are needed, alone
constexpr int kQuad = kGroup / 4;  // steps of four columns in a group

// Of one group and `vectors` vectors of outputs: lines of four columns of 16 outputs, vector by vector, then the scales.
constexpr size_t scales_at(int vectors) { return size_t(vectors) * kGroup * kLanes; }
constexpr size_t group_bytes(int vectors) { return scales_at(vectors) + size_t(vectors + 1) / 2 * 64; }

struct Tile {
    const uint8_t* data;  // of a block: group after group
    const float *scales, *bias;
    int vectors, groups;
};

// The plain meaning of the kernel: sums of integers group by group, then of floats; rows of `y` lie `width` apart.
WARPLOOM_CLONES void multiply_plain(const Tile& t, const Rows& x, int row, int rows, float* y, int width) {
    for (int r = row; r < row + rows; ++r, y += width) {
        const int8_t* values = x.int8.data() + size_t(r) * x.columns;
        for (int v = 0; v < t.vectors; ++v) {
            float total[kLanes] = {};
            for (int g = 0; g < t.groups; ++g) {
                const uint8_t* group = t.data + g * group_bytes(t.vectors);
                const uint16_t* halves = reinterpret_cast<const uint16_t*>(group + scales_at(t.vectors)) + v * kLanes;
                int32_t sums[kLanes];
                std::fill(sums, sums + kLanes, x.starts[size_t(r) * t.groups + g]);
                for (int k = 0; k < kGroup; ++k) {
                    const uint8_t* line = group + (k / 4 * t.vectors + v) * 64 + k % 4;
                    for (int lane = 0; lane < kLanes; ++lane) sums[lane] += int32_t(line[lane * 4]) * values[g * kGroup + k];
                }
                const float scale = x.scales[size_t(r) * t.groups + g];
                for (int lane = 0; lane < kLanes; ++lane)
                    total[lane] = std::fma(float(sums[lane]) * from_half(halves[lane]), scale, total[lane]);
            }
            for (int lane = 0, n = v * kLanes; lane < kLanes; ++lane, ++n)
                y[n] = std::fma(total[lane], t.scales[n], t.bias[n]);
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

// ROWS × VECTORS integer sums in registers, from vector `v` on: each weight vector loaded serves all rows, each activation all
// vectors. After each group they join float sums, which may lie in memory.
template <int ROWS, int VECTORS>
WARPLOOM_VNNI inline void tile_vnni(const Tile& t, int v, const Rows& x, int row, float* y, int width) {
    __m512 total[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int i = 0; i < VECTORS; ++i) total[r][i] = _mm512_setzero_ps();
    const size_t vectors = VECTORS == kBlock ? kBlock : t.vectors, line = vectors * 64, size = group_bytes(int(vectors));
    const int8_t* values = x.int8.data() + size_t(row) * x.columns;
    const float* scales = x.scales.data() + size_t(row) * t.groups;
    const int32_t* starts = x.starts.data() + size_t(row) * t.groups;
    const uint8_t* w = t.data + size_t(v) * 64;
    for (int g = 0; g < t.groups; ++g, w += size, values += kGroup) {
        __m512i sums[ROWS][VECTORS];
        for (int r = 0; r < ROWS; ++r)
            for (int i = 0; i < VECTORS; ++i) sums[r][i] = _mm512_set1_epi32(starts[size_t(r) * t.groups + g]);
#pragma GCC unroll 2
        for (int k = 0; k < kQuad; ++k) {
            __m512i weight[VECTORS];
            for (int i = 0; i < VECTORS; ++i) {
                weight[i] = _mm512_loadu_si512(w + k * line + i * 64);
                if (ROWS == 1) _mm_prefetch(reinterpret_cast<const char*>(w + k * line + i * 64 + kAhead), _MM_HINT_T0);
            }
            for (int r = 0; r < ROWS; ++r) {
                int32_t four;
                std::memcpy(&four, values + size_t(r) * x.columns + k * 4, 4);
                const __m512i activation = _mm512_set1_epi32(four);
                for (int i = 0; i < VECTORS; ++i) meet(sums[r][i], weight[i], activation);
            }
        }
        __m512 weight[VECTORS];
        const uint8_t* halves = w + scales_at(int(vectors)) - v * 64 + v * 32;
        for (int i = 0; i < VECTORS; ++i)
            weight[i] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + i * 32)));
        for (int r = 0; r < ROWS; ++r) {
            const __m512 scale = _mm512_set1_ps(scales[size_t(r) * t.groups + g]);
            for (int i = 0; i < VECTORS; ++i)
                total[r][i] = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][i]), weight[i]), scale, total[r][i]);
        }
    }
    for (int i = 0; i < VECTORS; ++i) {
        const int n = (v + i) * kLanes;
        const __m512 scale = _mm512_loadu_ps(t.scales + n), bias = _mm512_loadu_ps(t.bias + n);
        for (int r = 0; r < ROWS; ++r)
            _mm512_storeu_ps(y + size_t(r) * width + n, _mm512_fmadd_ps(total[r][i], scale, bias));
    }
}

template <int ROWS>
WARPLOOM_VNNI inline void cover(const Tile& t, const Rows& x, int row, float* y, int width) {
    if (t.vectors == kBlock) return tile_vnni<ROWS, kBlock>(t, 0, x, row, y, width);
    for (int v = 0; v < t.vectors; ++v) tile_vnni<ROWS, 1>(t, v, x, row, y, width);
}

WARPLOOM_VNNI void multiply_vnni(const Tile& t, const Rows& x, int row, int rows, float* y, int width) {
    switch (rows) {
        case 1: return cover<1>(t, x, row, y, width);
        case 2: return cover<2>(t, x, row, y, width);
        case 3: return cover<3>(t, x, row, y, width);
        default: return cover<4>(t, x, row, y, width);
    }
}
#endif

using Multiply = void (*)(const Tile&, const Rows&, int, int, float*, int);

Multiply multiply_by(bool vectors) {
#ifdef WARPLOOM_X86
    if (vectors && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl"))
        return multiply_vnni;
#endif
    (void)vectors;
    return multiply_plain;
}

std::atomic<Multiply> multiply_rows{multiply_by(true)};
constexpr int kRows = 4;  // rows of activations of one tile

// A row of weights, rotated and rounded: bytes around 128 and a scale a group. What the scales are counted in is returned, a
// power of two, for half precision has but five bits of exponent.
WARPLOOM_CLONES float quantize_row(const float* row, int columns, int groups, uint8_t* bytes, uint16_t* scales) {
    thread_local Floats rotated, peaks;
    rotated.assign(size_t(groups) * kGroup, 0.0f), peaks.resize(groups);
    std::copy(row, row + columns, rotated.begin());
    float peak = 0;
    for (int g = 0; g < groups; ++g) {
        f16 part[kGroup / 16], most = {};
        for (int i = 0; i < kGroup / 16; ++i) part[i] = load(&rotated[g * kGroup + 16 * i]);
        hadamard(part, kGroup / 16);
        for (int i = 0; i < kGroup / 16; ++i) {
            part[i] *= kRotated;
            const f16 size = part[i] < 0.0f ? -part[i] : part[i];
            most = select(size > most, size, most);
            store(&rotated[g * kGroup + 16 * i], part[i]);
        }
        peaks[g] = largest(most), peak = std::max(peak, peaks[g]);
    }
    const float unit = peak > 0 ? std::ldexp(1.0f, std::max(-120, std::ilogb(peak / 127))) : 1;
    for (int g = 0; g < groups; ++g) {
        scales[g] = to_half(peaks[g] / 127 / unit);
        const float scale = from_half(scales[g]) * unit, inverse = scale > 0 ? 1 / scale : 0;
        for (int i = g * kGroup; i < (g + 1) * kGroup; ++i)
            bytes[i] = uint8_t(128 + int(std::nearbyint(std::max(-127.0f, std::min(127.0f, rotated[i] * inverse)))));
    }
    return unit;
}

}  // namespace

void use_byte_products(bool vectors) { multiply_rows = multiply_by(vectors); }

Int8Matrix::Int8Matrix(const float* weight, int outputs, int columns, const float* bias)
    : outputs_(outputs), columns_(columns), groups_((columns + kGroup - 1) / kGroup) {
    const int vectors = (outputs + kLanes - 1) / kLanes, blocks = (vectors + kBlock - 1) / kBlock;
    data_.resize(size_t(vectors / kBlock) * groups_ * group_bytes(kBlock) + groups_ * group_bytes(vectors % kBlock));
    scales_.assign(size_t(vectors) * kLanes, 0.0f), bias_.assign(scales_.size(), 0.0f);
    if (bias) std::copy(bias, bias + outputs, bias_.begin());
    Workers::shared().run(blocks, [&](int block) {
        thread_local std::vector<uint8_t> bytes;
        thread_local std::vector<uint16_t> scales;
        bytes.resize(size_t(groups_) * kGroup), scales.resize(groups_);
        const int count = std::min(kBlock, vectors - block * kBlock), first = block * kBlock * kLanes;
        const size_t size = group_bytes(count);
        uint8_t* to = data_.data() + size_t(block) * groups_ * group_bytes(kBlock);
        std::memset(to, 0, size * groups_);
        for (int i = 0; i < std::min(count * kLanes, outputs - first); ++i) {
            const float* row = weight + size_t(first + i) * columns;
            scales_[first + i] = quantize_row(row, columns, groups_, bytes.data(), scales.data());
            for (int g = 0; g < groups_; ++g) {
                uint8_t* group = to + g * size + i / kLanes * 64 + i % kLanes * 4;
                for (int k = 0; k < kQuad; ++k) std::memcpy(group + k * count * 64, &bytes[g * kGroup + k * 4], 4);
                std::memcpy(to + g * size + scales_at(count) + i * 2, &scales[g], 2);
            }
        }
    });
}

void Int8Matrix::multiply(const Rows& x, float* y) const {
    const int vectors = (outputs_ + kLanes - 1) / kLanes;
    Workers::shared().run((vectors + kBlock - 1) / kBlock, [&](int task) {
        block(x, task, std::min(kBlock, vectors - task * kBlock), y);
    });
}

void Int8Matrix::block(const Rows& x, int number, int count, float* y) const {
    const int from = number * kBlock * kLanes, wide = count * kLanes, here = std::min(outputs_ - from, wide);
    const uint8_t* data = data_.data() + size_t(number) * groups_ * group_bytes(kBlock);
    const Tile tile{data, &scales_[from], &bias_[from], count, groups_};
    const Multiply multiply = multiply_rows.load(std::memory_order_relaxed);
    float part[kRows * kBlock * kLanes];  // for outputs that fill no whole vector
    for (int row = 0, rows, tiles = (x.count + kRows - 1) / kRows; tiles > 0; row += rows, --tiles) {
        rows = (x.count - row + tiles - 1) / tiles;  // as equal as can be
        float* to = y + size_t(row) * outputs_ + from;
        multiply(tile, x, row, rows, here == wide ? to : part, here == wide ? outputs_ : wide);
        for (int r = 0; r < rows && here < wide; ++r) std::copy_n(part + r * wide, here, to + size_t(r) * outputs_);
    }
}

}  // namespace warploom
