#include "cpu/training/gemm.hpp"

#include <algorithm>

#include "simd.hpp"
#include "cpu/register_tile.hpp"
#include "cpu/training/omp_threads.hpp"

namespace warploom {

namespace {

constexpr int kRows = 8;       // of a register tile: 8 × 3 sums leave 8 of AVX-512's 32 registers
constexpr int kSide = 16;      // columns of a panel on the left
constexpr int kOutputs = 384;  // by kInputs: a task of a product over tokens, whose operands are read from afar once a task
constexpr int kInputs = 384;
constexpr int kTasks = 3;      // a thread, where that takes no tasks of fewer than kLeast outputs
constexpr int kLeast = 48;

// Words of a panel that stay in the first cache. Sums of bfloat16 cannot wait in memory; they run through.
template <class T>
constexpr int kTerms = sizeof(T) == 4 ? 192 : INT32_MAX;

// Widths add up to any multiple of 16 without a 16 where it can be: that one leaves most registers idle.
int width_of(int left) { return left == 64 || left < 48 ? std::min(left, 32) : 48; }

// The micro-kernel (BLIS): ROWS × COLUMNS sums in registers; each vector of weights loaded serves all rows.
template <int ROWS, int COLUMNS, class V = f16>
WARPLOOM_INLINE void micro_kernel(TileRows<float> x, const float* w, int words, float* y, int64_t y_row, bool add) {
    V sums[ROWS][COLUMNS / 16];
    add ? load_tile(sums, y, y_row) : clear_tile(sums);
    multiply_tile(sums, x, {w, 16, COLUMNS}, words);
    store_tile(sums, y, y_row);
}

#ifdef __AVX512F__
WARPLOOM_BF16 inline __m512 sums_in(const float* y) { return _mm512_loadu_ps(y); }
WARPLOOM_BF16 inline __m512 sums_in(const bfloat16*) { return _mm512_setzero_ps(); }
WARPLOOM_BF16 inline void sums_out(float* y, __m512 x) { _mm512_storeu_ps(y, x); }
WARPLOOM_BF16 inline void sums_out(bfloat16* y, __m512 x) {
    const __m256bh rounded = _mm512_cvtneps_pbh(x);
    std::memcpy(y, &rounded, 32);
}

template <int ROWS, int COLUMNS, class Y>
WARPLOOM_BF16 void micro_kernel(TileRows<bfloat16> x, const bfloat16* w, int words, Y* y, int64_t y_row, bool add) {
    constexpr int vectors = COLUMNS / 16;
    __m512 sums[ROWS][vectors];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < vectors; ++v) sums[r][v] = add ? sums_in(y + r * y_row + v * 16) : _mm512_setzero_ps();
    multiply_tile(sums, x, {w, 32, 2 * COLUMNS}, words);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < vectors; ++v) sums_out(y + r * y_row + v * 16, sums[r][v]);
}
#else
template <int ROWS, int COLUMNS, class Y>
void micro_kernel(TileRows<bfloat16>, const bfloat16*, int, Y*, int64_t, bool) {
    __builtin_unreachable();
}
#endif

// Rows of words times one panel.
template <int COLUMNS, class T, class Y>
WARPLOOM_INLINE void panel(TileRows<T> x, const T* w, int words, int rows, Y* y, int64_t y_row) {
    for (int from = 0; from < words;) {
        const int some = std::min(kTerms<T>, words - from);
        int row = 0;
        for (; row + kRows <= rows; row += kRows)
            micro_kernel<kRows, COLUMNS>(TileRows<T>{x.at + row * x.row + from * x.term, x.row, x.term}, w, some, y + row * y_row,
                                         y_row, from > 0);
        for (; row < rows; ++row)
            micro_kernel<1, COLUMNS>(TileRows<T>{x.at + row * x.row + from * x.term, x.row, x.term}, w, some, y + row * y_row,
                                     y_row, from > 0);
        from += some, w += int64_t(some) * COLUMNS * kTogether<T>;
    }
}

template <class T, class Y>
WARPLOOM_INLINE void panels(TileRows<T> x, const T* w, int words, int columns, int rows, Y* y, int64_t y_row) {
    for (int column = 0, width; column < columns; column += width, w += int64_t(width) * words * kTogether<T>) {
        width = width_of(columns - column);
        if (width == 48)
            panel<48>(x, w, words, rows, y + column, y_row);
        else if (width == 32)
            panel<32>(x, w, words, rows, y + column, y_row);
        else
            panel<16>(x, w, words, rows, y + column, y_row);
    }
}

void multiply_rows(TileRows<float> x, const Panels<float>& w, int rows, float* y, int64_t y_row) {
    panels(x, w.at, w.terms, w.columns, rows, y, y_row);
}
void multiply_rows(TileRows<bfloat16> x, const Panels<bfloat16>& w, int rows, bfloat16* y, int64_t y_row) {
    panels(x, w.at, w.terms / 2, w.columns, rows, y, y_row);
}

// Sixteen words of one column each, from a row, or from two rows of which the second may be missing.
WARPLOOM_INLINE void pack_words(const float* row, const float*, float* to) { store(to, load(row)); }
WARPLOOM_INLINE void pack_words(const bfloat16* row, const bfloat16* next, bfloat16* to) {
    h16 low, high = {};
    std::memcpy(&low, row, 32);
    if (next) std::memcpy(&high, next, 32);
    const u16 both = __builtin_convertvector(low, u16) | __builtin_convertvector(high, u16) << 16;
    std::memcpy(to, &both, 64);
}

// A panel of so many columns of some rows, which are its terms.
template <class T>
WARPLOOM_INLINE void pack_over(const T* from, int64_t stride, int rows, int width, T* to) {
    for (int row = 0; row < rows; row += kTogether<T>, from += kTogether<T> * stride)
        for (int c = 0; c < width; c += 16, to += 16 * kTogether<T>)
            pack_words(from + c, row + 1 < rows ? from + stride + c : nullptr, to);
}

template <class T>
WARPLOOM_INLINE void pack_panel(const T* w, int terms, int columns, bool over, int first, int width, T* to) {
    constexpr int together = kTogether<T>;
    if (over) return pack_over(w + first, columns, terms, width, to);
    for (int c = 0; c < width; c += 16)  // a row's words are whole: they turn over as floats do
        for (int term = 0; term < terms; term += 16 * together)
            transpose_16x16(reinterpret_cast<const float*>(w + int64_t(first + c) * terms + term), terms / together,
                            reinterpret_cast<float*>(to + term * width + c * together), width);
}

// Some rows of a block, from row `within` on, into the block's panels. A row is read from end to end: down a column, lines
// fall into few sets of the cache.
template <class T>
WARPLOOM_INLINE void pack_rows(const T* from, int64_t stride, int within, int rows, int columns, bool left, T* to) {
    constexpr int together = kTogether<T>;
    for (int row = 0; row < rows; row += together, from += together * stride) {
        const T* next = row + 1 < rows ? from + stride : nullptr;
        for (int c = 0, width; c < columns; c += width) {
            width = left ? kSide : width_of(columns - c);
            T* at = to + int64_t(c) * kBlock + (within + row) * width;
            for (int i = 0; i < width; i += 16, at += 16 * together)
                pack_words(from + c + i, next ? next + c + i : nullptr, at);
        }
    }
}

// y (outputs, inputs) of a block's panels of `left` and `right`.
template <class T>
WARPLOOM_INLINE void multiply_block(const T* left, const T* right, int words, int outputs, int inputs, float* y, int64_t y_row,
                                    bool add) {
    for (int column = 0, width; column < inputs; column += width) {
        width = width_of(inputs - column);
        const T* panel = right + int64_t(column) * kBlock;
        for (int row = 0; row < outputs; row += kRows) {
            const int place = row % kSide;
            const TileRows<T> side{left + int64_t(row - place) * kBlock + place * kTogether<T>, kTogether<T>, kSide * kTogether<T>};
            float* to = y + row * y_row + column;
            if (width == 48)
                micro_kernel<kRows, 48>(side, panel, words, to, y_row, add);
            else if (width == 32)
                micro_kernel<kRows, 32>(side, panel, words, to, y_row, add);
            else
                micro_kernel<kRows, 16>(side, panel, words, to, y_row, add);
        }
    }
}

void multiply_block_of(const float* left, const float* right, int words, int outputs, int inputs, float* y,
                                       int64_t y_row, bool add) {
    multiply_block(left, right, words, outputs, inputs, y, y_row, add);
}
void multiply_block_of(const bfloat16* left, const bfloat16* right, int words, int outputs, int inputs, float* y, int64_t y_row,
                       bool add) {
    multiply_block(left, right, words, outputs, inputs, y, y_row, add);
}

void narrow_row(const float* from, int n, bfloat16* to) {
    for (int c = 0; c < n; c += 16) store(to + c, load(from + c));
}

#define WARPLOOM_FORMAT(T)                                                                                                  \
    void pack_panel_of(const T* w, int terms, int columns, bool over, int first, int width, T* to) {        \
        pack_panel(w, terms, columns, over, first, width, to);                                                              \
    }                                                                                                                       \
    void pack_rows_of(const T* from, int64_t stride, int within, int rows, int columns, bool left, T* to) { \
        pack_rows(from, stride, within, rows, columns, left, to);                                                           \
    }
WARPLOOM_FORMAT(float)
WARPLOOM_FORMAT(bfloat16)

thread_local Floats of_sums;

}  // namespace

template <class T>
Panels<T> pack(const T* w, int terms, int columns, bool over, T* to) {
    parallel_for((columns + 47) / 48, [&](int panel) {
        int first = 0;
        while (panel-- > 0) first += width_of(columns - first);
        pack_panel_of(w, terms, columns, over, first, width_of(columns - first), to + int64_t(first) * terms);
    });
    return {terms, columns, to};
}

void multiply(Rows<const float> x, const Panels<float>& w, Rows<float> y, int first, int last) {
    multiply_rows(TileRows<float>{x[first], x.stride, 1}, w, last - first, y[first], y.stride);
}
void multiply(Rows<const bfloat16> x, const Panels<bfloat16>& w, Rows<bfloat16> y, int first, int last) {
    multiply_rows(TileRows<bfloat16>{x[first], x.stride, 2}, w, last - first, y[first], y.stride);
}

// Tasks are tiles of rows by panels of some 768 columns, so that even few rows of many classes employ all threads.
template <class T>
void multiply(Rows<const T> x, const Panels<T>& w, Rows<T> y, int rows) {
    constexpr int height = 64, width = 16 * 48;
    const int down = (rows + height - 1) / height, across = std::max(1, (w.columns - 2 * 48) / width);
    parallel_for(down * across, [&](int task) {
        const int row = task / across * height, column = task % across * width;
        const int last = task % across == across - 1 ? w.columns : column + width;
        const Panels<T> some{w.terms, last - column, w.at + int64_t(column) * w.terms};
        multiply(x, some, Rows<T>{y.at + column, y.stride}, row, std::min(rows, row + height));
    });
}

template <class T>
void pack_tokens(Rows<const T> x, int first, int last, int columns, bool left, T* to) {
    for (int row = first, next; row < last; row = next) {
        const int block = row / kBlock;
        next = std::min(last, (block + 1) * kBlock);
        pack_rows_of(x[row], x.stride, row % kBlock, next - row, columns, left, to + int64_t(block) * kBlock * columns);
    }
}

template <class T, class Y>
void multiply_tokens(const T* left, const T* right, int tokens, int outputs, int inputs, Y* y, bool add, int threads) {
    constexpr bool direct = sizeof(Y) == 4;  // sums lie where they are to
    const int across = (inputs + kInputs - 1) / kInputs;
    int height = kOutputs;
    const auto blocks = [&] { return (outputs + height - 1) / height; };
    while (height > kLeast && blocks() * across < kTasks * threads) height /= 2;
    const int down = blocks();
    height = ((outputs + down - 1) / down + kSide - 1) / kSide * kSide;  // even ones: a short last task leaves its thread waiting
    parallel_for(down * across, [&](int task) {
        const int output = task / across * height, input = task % across * kInputs;
        const int some = std::min(height, outputs - output), more = std::min(kInputs, inputs - input);
        Y* to = y + int64_t(output) * inputs + input;
        float* sums = reinterpret_cast<float*>(to);
        if (!direct) of_sums.resize(height * kInputs), sums = of_sums.data();
        const int64_t row = direct ? inputs : kInputs;
        for (int token = 0; token < tokens; token += kBlock) {
            const int words = (std::min(kBlock, tokens - token) + kTogether<T> - 1) / kTogether<T>;
            multiply_block_of(left + int64_t(token) * outputs + output * kBlock, right + int64_t(token) * inputs + input * kBlock,
                              words, some, more, sums, row, add || token > 0);
        }
        if constexpr (!direct)
            for (int r = 0; r < some; ++r) narrow_row(sums + r * row, more, to + int64_t(r) * inputs);
    });
}

template Panels<float> pack(const float*, int, int, bool, float*);
template Panels<bfloat16> pack(const bfloat16*, int, int, bool, bfloat16*);
template void multiply(Rows<const float>, const Panels<float>&, Rows<float>, int);
template void multiply(Rows<const bfloat16>, const Panels<bfloat16>&, Rows<bfloat16>, int);
template void pack_tokens(Rows<const float>, int, int, int, bool, float*);
template void pack_tokens(Rows<const bfloat16>, int, int, int, bool, bfloat16*);
template void multiply_tokens(const float*, const float*, int, int, int, float*, bool, int);
template void multiply_tokens(const bfloat16*, const bfloat16*, int, int, int, float*, bool, int);
template void multiply_tokens(const bfloat16*, const bfloat16*, int, int, int, bfloat16*, bool, int);

bool has_panels() { return has_avx512; }
#ifdef __AVX512F__
bool has_fast_pairs() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd"); }
bool outruns_library() { return __builtin_cpu_is("amd"); }
#else
bool has_fast_pairs() { return false; }
bool outruns_library() { return false; }
#endif

}  // namespace warploom
