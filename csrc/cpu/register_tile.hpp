// GEMM micro-kernel (register tile). ROWS × VECTORS vectors of sums stay in registers; each vector loaded from the right
// serves all rows, each number from the left all vectors. A sum runs from its first term to its last.
//
// Loops over sums are unrolled by name: else GCC 11 and 12 keep some of the sums in memory, at a third of the speed.
#pragma once
#include <cstddef>

#include "simd.hpp"

namespace warploom {

// Term k of row r is at[r * row + k * term]; of bfloat16, terms are pairs.
template <class T>
struct TileRows {
    const T* at;
    ptrdiff_t row, term;
};

// Sixteen columns from 16 · v on of term k begin at at[v * vector + k * term].
template <class T>
struct TileColumns {
    const T* at;
    ptrdiff_t vector, term;
};

template <class V, int ROWS, int VECTORS>
WARPLOOM_INLINE void clear_tile(V (&sums)[ROWS][VECTORS]) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = V{};
}

template <class V, int ROWS, int VECTORS>
WARPLOOM_INLINE void load_tile(V (&sums)[ROWS][VECTORS], const float* y, ptrdiff_t row) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) load_as(y + r * row + v * lanes_of<V>, sums[r][v]);
}

template <class V, int ROWS, int VECTORS>
WARPLOOM_INLINE void store_tile(const V (&sums)[ROWS][VECTORS], float* y, ptrdiff_t row) {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) store_as(y + r * row + v * lanes_of<V>, sums[r][v]);
}

// sums += a · b, in float32, of at least one term (else GCC 11 keeps the sums twice, for the loop and for none).
template <class V, int ROWS, int VECTORS>
WARPLOOM_INLINE void multiply_tile(V (&sums)[ROWS][VECTORS], TileRows<float> a, TileColumns<float> b, int terms) {
    constexpr int lanes = lanes_of<V>;
    do {
        V x[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) load_as(b.at + v * lanes / 16 * b.vector + v * lanes % 16, x[v]);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sums[r][v] += x[v] * a.at[r * a.row];
        a.at += a.term, b.at += b.term;
    } while (--terms);
}

#ifdef __AVX512F__
#define WARPLOOM_BF16 __attribute__((target("avx512bf16")))

// The same of pairs of bfloat16, both products of a pair in one instruction.
template <int ROWS, int VECTORS>
WARPLOOM_BF16 inline void multiply_tile(__m512 (&sums)[ROWS][VECTORS], TileRows<bfloat16> a, TileColumns<bfloat16> b, int pairs) {
    for (; pairs > 0; --pairs, a.at += a.term, b.at += b.term) {
        __m512bh x[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) x[v] = (__m512bh)_mm512_loadu_si512(b.at + v * b.vector);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            int32_t pair;
            std::memcpy(&pair, a.at + r * a.row, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x[v], both);
        }
    }
}
#endif

}  // namespace warploom
