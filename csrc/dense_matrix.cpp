#include "dense_matrix.hpp"

#include <algorithm>

#include "workers.hpp"

#if defined(__x86_64__) && defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own headers
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#define WARPLOOM_X86 1
#endif

namespace warploom {

namespace {

constexpr int kLanes = 16;  // outputs of one vector
constexpr int kBlock = 4;   // vectors of outputs of one task
constexpr int kRows = 6;    // rows of activations of one tile

// A block of outputs for some rows: `stride` weights from one vector of outputs to the next; y is (rows, vectors, 16).
template <class T>
struct Task {
    const T* weights;
    size_t stride;
    int vectors, columns;
    const T* x;
    int64_t x_stride;
    int rows;
    float* y;
};

// The weights of two columns side by side: the lower halves of the words, and the upper.
WARPLOOM_INLINE void widen_pair(const bfloat16* weights, f16& first, f16& second) {
    u16 bits;
    std::memcpy(&bits, weights, 64);
    const u16 low = bits << 16, high = bits & 0xffff0000u;
    std::memcpy(&first, &low, 64), std::memcpy(&second, &high, 64);
}

// ROWS × VECTORS sums in registers: each weight vector loaded serves all rows, each activation all vectors.
template <int ROWS, int VECTORS>
WARPLOOM_INLINE void tile(const Task<float>& t, const float* weights, const float* x, float* y) {
    f16 total[ROWS][VECTORS] = {};
    for (int c = 0; c < t.columns; ++c) {
        f16 weight[VECTORS];
        for (int v = 0; v < VECTORS; ++v) weight[v] = load(weights + v * t.stride + size_t(c) * kLanes);
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) total[r][v] += weight[v] * x[r * t.x_stride + c];
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(y + (r * t.vectors + v) * kLanes, total[r][v]);
}

template <int ROWS, int VECTORS>
WARPLOOM_INLINE void tile(const Task<bfloat16>& t, const bfloat16* weights, const bfloat16* x, float* y) {
    f16 total[ROWS][VECTORS] = {};
    for (int c = 0; c < t.columns; c += 2) {
        f16 first[VECTORS], second[VECTORS];
        for (int v = 0; v < VECTORS; ++v) widen_pair(weights + v * t.stride + size_t(c) * kLanes, first[v], second[v]);
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) {
                total[r][v] += first[v] * widen(x[r * t.x_stride + c]);
                total[r][v] += second[v] * widen(x[r * t.x_stride + c + 1]);
            }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(y + (r * t.vectors + v) * kLanes, total[r][v]);
}

#ifdef WARPLOOM_X86
#define WARPLOOM_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

template <int ROWS, int VECTORS>
WARPLOOM_BF16 inline void tile_bf16(const Task<bfloat16>& t, const bfloat16* weights, const bfloat16* x, float* y) {
    __m512 total[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) total[r][v] = _mm512_setzero_ps();
    for (int c = 0; c < t.columns; c += 2) {
        __m512bh weight[VECTORS];
        for (int v = 0; v < VECTORS; ++v)
            weight[v] = (__m512bh)_mm512_loadu_si512(weights + v * t.stride + size_t(c) * kLanes);
        for (int r = 0; r < ROWS; ++r) {
            int32_t pair;
            std::memcpy(&pair, x + r * t.x_stride + c, 4);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
            for (int v = 0; v < VECTORS; ++v) total[r][v] = _mm512_dpbf16_ps(total[r][v], weight[v], both);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(y + (r * t.vectors + v) * kLanes, total[r][v]);
}
#endif

// Which tiles cover a block: whole blocks for a single row, pairs of vectors for several.
#define WARPLOOM_TILES(TILE)                                                                              \
    if (t.rows == 1 && t.vectors == kBlock) return TILE<1, kBlock>(t, t.weights, t.x, t.y);               \
    int v = 0;                                                                                            \
    for (; v + 2 <= t.vectors && t.rows == kRows; v += 2)                                                 \
        TILE<kRows, 2>(t, t.weights + v * t.stride, t.x, t.y + v * kLanes);                               \
    for (; v + 2 <= t.vectors && t.rows == 4; v += 2)                                                     \
        TILE<4, 2>(t, t.weights + v * t.stride, t.x, t.y + v * kLanes);                                   \
    for (; v < t.vectors; ++v)                                                                            \
        for (int r = 0; r < t.rows; ++r)                                                                  \
            TILE<1, 1>(t, t.weights + v * t.stride, t.x + r * t.x_stride, t.y + (r * t.vectors + v) * kLanes);

WARPLOOM_CLONES void run_plain(const Task<float>& t) { WARPLOOM_TILES(tile) }
WARPLOOM_CLONES void run_plain(const Task<bfloat16>& t) { WARPLOOM_TILES(tile) }
void run(const Task<float>& t) { run_plain(t); }

#ifdef WARPLOOM_X86
WARPLOOM_BF16 void run_bf16(const Task<bfloat16>& t) { WARPLOOM_TILES(tile_bf16) }
const bool has_bf16 = __builtin_cpu_supports("avx512bf16");
void run(const Task<bfloat16>& t) { (has_bf16 ? run_bf16 : static_cast<void (*)(const Task<bfloat16>&)>(run_plain))(t); }
#else
void run(const Task<bfloat16>& t) { run_plain(t); }
#endif

const float* prepared(const Rows& x, const float*) { return x.values; }
const bfloat16* prepared(const Rows& x, const bfloat16*) { return x.halves.data(); }

WARPLOOM_CLONES void finish(const float* part, const float* bias, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = part[i] + bias[i];
}

}  // namespace

template <class T>
DenseMatrix<T>::DenseMatrix(const float* weight, int outputs, int columns, const float* bias)
    : outputs_(outputs), columns_(columns), padded_(sizeof(T) == 2 ? (columns + 1) / 2 * 2 : columns) {
    constexpr int together = sizeof(T) == 2 ? 2 : 1;  // columns that lie side by side
    const int vectors = (outputs + kLanes - 1) / kLanes;
    const size_t bytes = size_t(vectors) * kLanes * padded_ * sizeof(T);
    memory_.reset(new uint8_t[bytes + 64]());
    weights_ = reinterpret_cast<T*>(memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64);
    bias_.assign(size_t(vectors) * kLanes, 0.0f);
    if (bias) std::copy(bias, bias + outputs, bias_.begin());
    Workers::shared().run(vectors, [&](int vector) {
        T* to = weights_ + size_t(vector) * kLanes * padded_;
        for (int lane = 0; lane < kLanes && vector * kLanes + lane < outputs; ++lane)
            for (int c = 0; c < columns; ++c)
                narrow(weight[size_t(vector * kLanes + lane) * columns + c],
                       to[c / together * kLanes * together + lane * together + c % together]);
    });
}

template <class T>
void DenseMatrix<T>::multiply(const Rows& x, float* y) const {
    const int vectors = (outputs_ + kLanes - 1) / kLanes;
    const size_t stride = size_t(padded_) * kLanes;
    const int64_t x_stride = sizeof(T) == 2 ? padded_ : x.stride;
    const T* rows = prepared(x, static_cast<const T*>(nullptr));
    Workers::shared().run((vectors + kBlock - 1) / kBlock, [&](int task) {
        const int first = task * kBlock, count = std::min(kBlock, vectors - first);
        const int from = first * kLanes, to = std::min(outputs_, (first + count) * kLanes);
        float part[kRows * kBlock * kLanes];
        for (int row = 0, taken; row < x.count; row += taken) {
            const int left = x.count - row;
            taken = left >= kRows ? kRows : left >= 4 ? 4 : 1;
            run(Task<T>{weights_ + first * stride, stride, count, padded_, rows + row * x_stride, x_stride, taken, part});
            for (int r = 0; r < taken; ++r)
                finish(part + r * count * kLanes, &bias_[from], to - from, y + size_t(row + r) * outputs_ + from);
        }
    });
}

template class DenseMatrix<float>;
template class DenseMatrix<bfloat16>;

}  // namespace warploom
