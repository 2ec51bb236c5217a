#include "cpu/serving/dense_matrix.hpp"

#include <algorithm>

#include "cpu/register_tile.hpp"
#include "cpu/serving/spin_pool.hpp"
#include "cpu/serving/weight_memory.hpp"
#include "simd.hpp"

namespace warploom {

namespace {

constexpr int kLanes = 16;  // outputs of one vector
constexpr int kBlock = 4;   // vectors of outputs of a panel
constexpr int kRows = 6;    // rows of activations of one tile, at most
constexpr int kMany = 24;   // rows from which on a block's weights are widened once, not tile by tile

// Some rows of activations times a panel of weights: `stride` weights from one vector of outputs to the next; y is (rows, vectors, 16).
template <class T, class X>
struct PanelProduct {
    const T* weights;
    size_t stride;
    int vectors, columns;
    const X* x;
    int64_t x_stride;
    int rows;
    float* y;
};

// ROWS × VECTORS · 16 sums, in registers of V's size.
template <class V, int ROWS, int VECTORS>
WARPLOOM_INLINE void tile(const PanelProduct<float, float>& t, const float* weights, float* y) {
    V sums[ROWS][VECTORS * kLanes / lanes_of<V>];
    clear_tile(sums);
    multiply_tile(sums, {t.x, t.x_stride, 1}, {weights, ptrdiff_t(t.stride), kLanes}, t.columns);
    store_tile(sums, y, t.vectors * kLanes);
}

template <class V, int ROWS, int VECTORS>
WARPLOOM_INLINE void tile(const PanelProduct<bfloat16, float>& t, const bfloat16* weights, float* y) {
    constexpr int lanes = lanes_of<V>, parts = VECTORS * kLanes / lanes;
    V total[ROWS][parts] = {};
    for (int c = 0; c < t.columns; c += 2) {
        V first[parts], second[parts];
        for (int p = 0; p < parts; ++p)
            widen_pairs(weights + p * lanes / kLanes * t.stride + size_t(c) * kLanes + p * lanes % kLanes * 2, first[p], second[p]);
        const bool pair = c + 1 < t.columns;  // else an odd last column
        for (int r = 0; r < ROWS; ++r)
            for (int p = 0; p < parts; ++p) {
                total[r][p] += first[p] * t.x[r * t.x_stride + c];
                if (pair) total[r][p] += second[p] * t.x[r * t.x_stride + c + 1];
            }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int p = 0; p < parts; ++p) store_as(y + r * t.vectors * kLanes + p * lanes, total[r][p]);
}

#ifdef __AVX512F__
template <class V, int ROWS, int VECTORS>
WARPLOOM_BF16 inline void tile(const PanelProduct<bfloat16, bfloat16>& t, const bfloat16* weights, float* y) {
    __m512 sums[ROWS][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[r][v] = _mm512_setzero_ps();
    multiply_tile(sums, {t.x, t.x_stride, 2}, {weights, ptrdiff_t(t.stride), 2 * kLanes}, (t.columns + 1) / 2);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(y + (r * t.vectors + v) * kLanes, sums[r][v]);
}
#endif

// Vectors of a tile. Six rows by four are 24 sums of the 32 registers of AVX-512; weights that are widened take twice the
// registers. Of smaller ones, 16 of eight floats or 32 of four, twelve or 24 are sums; SSE has 16 of four, and 16 sums of a row
// lay in memory (12 for 39 GFLOP/s).
template <class V, class T, class X>
constexpr int vectors_of(int rows) {
    if (lanes_of<V> == kLanes) return rows > 4 && sizeof(T) != sizeof(X) ? 2 : 4;
#ifdef WARPLOOM_X86
    if (lanes_of<V> == 4 && sizeof(T) == sizeof(X)) return rows == 1 ? 2 : 1;
#endif
    return rows == 1 ? 4 : rows < 4 ? 2 : 1;
}

template <class V, int ROWS, class T, class X>
WARPLOOM_INLINE void row_of_tiles(const PanelProduct<T, X>& t) {
    constexpr int some = vectors_of<V, T, X>(ROWS);
    int v = 0;
    for (; v + some <= t.vectors; v += some) tile<V, ROWS, some>(t, t.weights + v * t.stride, t.y + v * kLanes);
    for (; v < t.vectors; ++v) tile<V, ROWS, 1>(t, t.weights + v * t.stride, t.y + v * kLanes);
}

template <class V, class T, class X>
WARPLOOM_INLINE void multiply_rows(const PanelProduct<T, X>& t) {
    switch (t.rows) {
        case 1: return row_of_tiles<V, 1>(t);
        case 2: return row_of_tiles<V, 2>(t);
        case 3: return row_of_tiles<V, 3>(t);
        case 4: return row_of_tiles<V, 4>(t);
        case 5: return row_of_tiles<V, 5>(t);
        default: return row_of_tiles<V, 6>(t);
    }
}

void multiply_panel(const PanelProduct<float, float>& t) { multiply_rows<Register>(t); }
void multiply_panel(const PanelProduct<bfloat16, float>& t) { multiply_rows<Register>(t); }

#ifdef __AVX512F__
WARPLOOM_BF16 void multiply_panel(const PanelProduct<bfloat16, bfloat16>& t) { multiply_rows<f16>(t); }
const bool pairs_are_fast = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
#else
void multiply_panel(const PanelProduct<bfloat16, bfloat16>&) { __builtin_unreachable(); }
const bool pairs_are_fast = false;
#endif

void finish(const float* part, const float* bias, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = part[i] + bias[i];
}

void widen_block(const bfloat16* from, size_t count, float* to) {
    for (size_t i = 0; i < count; i += 2 * kLanes) {
        f16 first, second;
        widen_pairs(from + i, first, second);
        store(to + i, first), store(to + i + kLanes, second);
    }
}

// All rows with one panel, a tile at a time, in tiles as equal as can be.
template <class T, class X>
void multiply_all_rows(PanelProduct<T, X> product, int rows, const float* bias, int width, float* y, int64_t y_stride, const int* places) {
    float part[kRows * kBlock * kLanes];
    product.y = part;
    int row = 0;
    for (int tiles = (rows + kRows - 1) / kRows; tiles > 0; --tiles) {
        product.rows = (rows + tiles - 1) / tiles;
        multiply_panel(product);
        for (int r = 0; r < product.rows; ++r, ++row) {
            float* to = y + (places ? places[row] : row) * y_stride;
            finish(part + r * product.vectors * kLanes, places ? to : bias, width, to);
        }
        rows -= product.rows;
        product.x += product.rows * product.x_stride;
    }
}

}  // namespace

template <class T>
DenseMatrix<T>::DenseMatrix(const float* weight, int outputs, int columns, const float* bias)
    : outputs_(outputs), columns_(columns), padded_(sizeof(T) == 2 ? (columns + 1) / 2 * 2 : columns) {
    constexpr int together = sizeof(T) == 2 ? 2 : 1;  // columns that lie side by side
    const int vectors = (outputs + kLanes - 1) / kLanes;
    const size_t bytes = size_t(vectors) * kLanes * padded_ * sizeof(T);
    memory_ = weight_memory(bytes);
    weights_ = reinterpret_cast<T*>(memory_.get());
    bias_.assign(size_t(vectors) * kLanes, 0.0f);
    if (bias) std::copy(bias, bias + outputs, bias_.begin());
    SpinPool::shared().run(vectors, [&](int vector) {
        T* to = weights_ + size_t(vector) * kLanes * padded_;
        for (int lane = 0; lane < kLanes && vector * kLanes + lane < outputs; ++lane)
            for (int c = 0; c < columns; ++c)
                narrow(weight[size_t(vector * kLanes + lane) * columns + c],
                       to[c / together * kLanes * together + lane * together + c % together]);
    });
}

template <class T>
RowFormat DenseMatrix<T>::format() const {
    return {sizeof(T) == 2 && pairs_are_fast ? Format::halves : Format::floats};
}

template <class T>
int DenseMatrix<T>::parts() const {
    return (outputs_ + kBlock * kLanes - 1) / (kBlock * kLanes);
}

template <class T>
void DenseMatrix<T>::multiply_part(int part, const Activations& x, float* y, int64_t y_stride, const int* places) const {
    const int vectors = (outputs_ + kLanes - 1) / kLanes;
    const size_t stride = size_t(padded_) * kLanes;
    const int first = part * kBlock, count = std::min(kBlock, vectors - first), from = first * kLanes;
    const int width = std::min(outputs_ - from, count * kLanes);
    const T* weights = weights_ + first * stride;
    const auto go = [&](const auto* w, const auto* rows, int columns, int64_t x_stride) {
        using Kind = PanelProduct<std::decay_t<decltype(*w)>, std::decay_t<decltype(*rows)>>;
        multiply_all_rows(Kind{w, stride, count, columns, rows, x_stride, 0, nullptr}, x.count, &bias_[from], width, y + from, y_stride, places);
    };
    if constexpr (sizeof(T) == 2) {
        if (x.format.number == Format::halves) return go(weights, x.halves.data(), padded_, x.columns);
        if (x.count >= kMany) {
            thread_local Floats wide;
            wide.resize(stride * kBlock);
            widen_block(weights, stride * count, wide.data());
            return go(wide.data(), x.values, columns_, x.stride);
        }
    }
    go(weights, x.values, columns_, x.stride);
}

template <class T>
void DenseMatrix<T>::multiply(const Activations& x, float* y) const {
    SpinPool::shared().run(parts(), [&](int part) { multiply_part(part, x, y, outputs_); });
}

template class DenseMatrix<float>;
template class DenseMatrix<bfloat16>;

}  // namespace warploom
