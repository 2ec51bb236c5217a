// Memory layout of packed (quantized) weights, and the interface of the micro-kernels, one per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cpu/serving/matrix.hpp"

namespace warploom {

// Quantization format: 8 or 4 bits in groups of columns with a scale: code · scale + minimum, or table[code] · scale;
// without either, codes are offset by 128 or 8. `rotate`: each 64 columns were Hadamard-transformed.
struct Layout {
    int bits = 8, group = 64;  // 16, 32 or 64 columns
    bool minimum = false, rotate = true, has_table = false;
    int8_t table[16] = {};

    int zero() const { return minimum ? 0 : bits == 8 || has_table ? 128 : 8; }
};

namespace packed {

constexpr int kLanes = 16;     // outputs of one vector
constexpr int kBlock = 3;      // vectors of outputs of one task: twelve sums of four rows, whole and float, fit the registers
constexpr int kRows = 4;       // rows of activations of one tile

// A group of a block of `vectors` vectors of outputs: lines of 64 bytes, 16 outputs with four columns each (of 4 bits eight: the
// low halves are the first four), vector by vector; then scales and minima in half precision.
inline int lines(const Layout& l) { return l.group * l.bits / 32; }
inline size_t scales_at(const Layout& l, int vectors) { return size_t(vectors) * lines(l) * 64; }
inline size_t group_bytes(const Layout& l, int vectors) {
    return scales_at(l, vectors) + size_t(vectors * (l.minimum ? 2 : 1) + 1) / 2 * 64;
}

// A block of outputs for some rows: y (rows, width) = x · weightsᵀ · units + bias. Weights `ahead` bytes further are
// prefetched: of every `mask` + 1 lines the one numbered `phase`.
struct Tile {
    const Layout* layout;
    const uint8_t* data;
    const float *units, *bias;
    int vectors, groups;
    size_t ahead;
    int phase, mask;
};

// Rows `row` to `row` + `rows` (at most kRows) of the activations.
using Multiply = void (*)(const Tile&, const Activations&, int row, int rows, float* y, int width);

void multiply_plain(const Tile&, const Activations&, int row, int rows, float* y, int width);
Multiply multiply_avx512();  // null where the CPU or the compiler has it not
Multiply multiply_avxvnni();
Multiply multiply_avx2();
Multiply multiply_neon();

}  // namespace packed
}  // namespace warploom
