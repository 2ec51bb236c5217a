#include "dense_matrix.hpp"

#include <algorithm>

#include "int8_matrix.hpp"
#include "workers.hpp"

namespace warploom {

namespace {

constexpr int kLanes = 16;  // outputs of one vector
constexpr int kBlock = 4;   // vectors of outputs of one task
constexpr int kRows = 6;    // rows of activations of one tile

// ROWS × VECTORS sums in registers: each weight vector loaded serves all rows, each activation all vectors.
template <class T, int ROWS, int VECTORS>
WARPLOOM_INLINE void tile(const T* weights, size_t stride, int columns, const float* x, int64_t x_stride, float* y,
                          int width) {
    f16 total[ROWS][VECTORS] = {};
    for (int c = 0; c < columns; ++c) {
        f16 weight[VECTORS];
        for (int v = 0; v < VECTORS; ++v) weight[v] = load(weights + v * stride + size_t(c) * kLanes);
        for (int r = 0; r < ROWS; ++r)
            for (int v = 0; v < VECTORS; ++v) total[r][v] += weight[v] * x[r * x_stride + c];
    }
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) store(y + (r * width + v) * kLanes, total[r][v]);
}

template <class T>
WARPLOOM_INLINE void tiles(const T* weights, size_t stride, int vectors, int columns, const float* x, int64_t x_stride,
                           int rows, float* y) {
    if (rows == 1 && vectors == kBlock) return tile<T, 1, kBlock>(weights, stride, columns, x, x_stride, y, vectors);
    int v = 0;
    for (; v + 2 <= vectors && rows == kRows; v += 2)
        tile<T, kRows, 2>(weights + v * stride, stride, columns, x, x_stride, y + v * kLanes, vectors);
    for (; v + 2 <= vectors && rows == 4; v += 2)
        tile<T, 4, 2>(weights + v * stride, stride, columns, x, x_stride, y + v * kLanes, vectors);
    for (; v < vectors; ++v)
        for (int r = 0; r < rows; ++r)
            tile<T, 1, 1>(weights + v * stride, stride, columns, x + r * x_stride, x_stride,
                          y + (r * vectors + v) * kLanes, vectors);
}

WARPLOOM_CLONES void multiply_block(const float* weights, size_t stride, int vectors, int columns, const float* x,
                                    int64_t x_stride, int rows, float* y) {
    tiles(weights, stride, vectors, columns, x, x_stride, rows, y);
}

WARPLOOM_CLONES void multiply_block(const bfloat16* weights, size_t stride, int vectors, int columns, const float* x,
                                    int64_t x_stride, int rows, float* y) {
    tiles(weights, stride, vectors, columns, x, x_stride, rows, y);
}

WARPLOOM_CLONES void finish(const float* part, const float* bias, int n, float* y) {
    for (int i = 0; i < n; ++i) y[i] = part[i] + bias[i];
}

}  // namespace

template <class T>
DenseMatrix<T>::DenseMatrix(const float* weight, int outputs, int columns, const float* bias)
    : outputs_(outputs), columns_(columns) {
    const int vectors = (outputs + kLanes - 1) / kLanes;
    const size_t bytes = size_t(vectors) * kLanes * columns * sizeof(T);
    memory_.reset(new uint8_t[bytes + 64]());
    weights_ = reinterpret_cast<T*>(memory_.get() + (64 - reinterpret_cast<uintptr_t>(memory_.get()) % 64) % 64);
    bias_.assign(size_t(vectors) * kLanes, 0.0f);
    if (bias) std::copy(bias, bias + outputs, bias_.begin());
    Workers::shared().run(vectors, [&](int vector) {
        for (int lane = 0; lane < kLanes && vector * kLanes + lane < outputs; ++lane)
            for (int c = 0; c < columns; ++c)
                narrow(weight[size_t(vector * kLanes + lane) * columns + c],
                       weights_[(size_t(vector) * columns + c) * kLanes + lane]);
    });
}

template <class T>
void DenseMatrix<T>::multiply(const Rows& x, float* y) const {
    const int vectors = (outputs_ + kLanes - 1) / kLanes;
    const size_t stride = size_t(columns_) * kLanes;
    Workers::shared().run((vectors + kBlock - 1) / kBlock, [&](int task) {
        const int first = task * kBlock, count = std::min(kBlock, vectors - first);
        const int from = first * kLanes, to = std::min(outputs_, (first + count) * kLanes);
        float part[kRows * kBlock * kLanes];
        for (int row = 0, rows; row < x.count; row += rows) {
            const int left = x.count - row;
            rows = left >= kRows ? kRows : left >= 4 ? 4 : 1;
            multiply_block(weights_ + first * stride, stride, count, columns_, x.values + row * x.stride, x.stride,
                           rows, part);
            for (int r = 0; r < rows; ++r)
                finish(part + r * count * kLanes, &bias_[from], to - from, y + size_t(row + r) * outputs_ + from);
        }
    });
}

template class DenseMatrix<float>;
template class DenseMatrix<bfloat16>;

void Matrix::multiply(const float* x, int rows, float* y) const {
    thread_local Int8Rows quantized;
    if (wants_int8()) {
        quantized.resize(rows, columns());
        for (int row = 0; row < rows; ++row) quantized.quantize(row, x + size_t(row) * columns(), columns());
    }
    multiply(Rows{x, columns(), rows, &quantized}, y);
}

}  // namespace warploom
