#include "cpu/training/gemm.hpp"

#include <algorithm>

#include "simd.hpp"
#include "cpu/training/omp_threads.hpp"

namespace warploom {

namespace {

constexpr int kRows = 8;     // of a register tile: 8 × 3 sums leave 8 of AVX-512's 32 registers
constexpr int kTerms = 192;  // of a panel stay in the first cache

// Widths add up to any multiple of 16 without a 16 where it can be: that one leaves most registers idle.
int width_of(int left) { return left == 64 || left < 48 ? std::min(left, 32) : 48; }

// The micro-kernel (BLIS): ROWS × COLUMNS sums in registers; each vector of weights loaded serves all rows.
template <int ROWS, int COLUMNS>
WARPLOOM_INLINE void micro_kernel(const float* x, int64_t x_row, const float* w, int terms, float* y, int64_t y_row, bool add) {
    f16 total[ROWS][COLUMNS / 16] = {};
    if (add)
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < COLUMNS / 16; ++v) total[r][v] = load(y + r * y_row + v * 16);
    for (int term = 0; term < terms; ++term, w += COLUMNS)
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < COLUMNS / 16; ++v) total[r][v] += load(w + v * 16) * x[r * x_row + term];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < COLUMNS / 16; ++v) store(y + r * y_row + v * 16, total[r][v]);
}

template <int COLUMNS>
WARPLOOM_INLINE void panel(Rows<const float> x, const float* w, int terms, Rows<float> y, int first, int last) {
    for (int from = 0; from < terms; from += kTerms, w += kTerms * COLUMNS) {
        const int some = std::min(kTerms, terms - from);
        int row = first;
        for (; row + kRows <= last; row += kRows)
            micro_kernel<kRows, COLUMNS>(x[row] + from, x.stride, w, some, y[row], y.stride, from > 0);
        for (; row < last; ++row) micro_kernel<1, COLUMNS>(x[row] + from, x.stride, w, some, y[row], y.stride, from > 0);
    }
}

WARPLOOM_CLONES void pack_panel(const float* w, int terms, int columns, bool over, int first, int width, float* to) {
    if (over) {
        for (int term = 0; term < terms; ++term)
            for (int c = 0; c < width; c += 16) store(to + term * width + c, load(w + int64_t(term) * columns + first + c));
        return;
    }
    for (int c = 0; c < width; c += 16)
        for (int term = 0; term < terms; term += 16)
            transpose_16x16(w + int64_t(first + c) * terms + term, terms, to + term * width + c, width);
}

}  // namespace

Panels pack(const float* w, int terms, int columns, bool over, float* to) {
    parallel_for((columns + 47) / 48, [&](int panel) {
        int first = 0;
        while (panel-- > 0) first += width_of(columns - first);
        pack_panel(w, terms, columns, over, first, width_of(columns - first), to + int64_t(first) * terms);
    });
    return {terms, columns, to};
}

WARPLOOM_CLONES void multiply(Rows<const float> x, const Panels& w, Rows<float> y, int first, int last) {
    for (int column = 0, width; column < w.columns; column += width) {
        width = width_of(w.columns - column);
        const float* at = w.at + int64_t(column) * w.terms;
        const Rows<float> to{y.at + column, y.stride};
        if (width == 48)
            panel<48>(x, at, w.terms, to, first, last);
        else if (width == 32)
            panel<32>(x, at, w.terms, to, first, last);
        else
            panel<16>(x, at, w.terms, to, first, last);
    }
}

bool has_panels() {
#ifdef __x86_64__
    return __builtin_cpu_supports("avx512f");
#else
    return false;
#endif
}

}  // namespace warploom
