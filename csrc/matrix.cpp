#include "matrix.hpp"

#include <algorithm>
#include <cmath>

namespace warploom {

namespace {

WARPLOOM_CLONES float quantize_group(const float* x, int n, int8_t* to, int32_t& total) {
    float peak = 0;
    for (int i = 0; i < n; ++i) peak = std::max(peak, std::fabs(x[i]));
    const float scale = peak / 127, inverse = peak > 0 ? 127 / peak : 0;
    int32_t sum = 0;
    for (int i = 0; i < n; ++i) {
        const int value = int(std::nearbyint(x[i] * inverse));
        to[i] = int8_t(value);
        sum += value;
    }
    for (int i = n; i < kGroup; ++i) to[i] = 0;
    total = sum;
    return scale;
}

WARPLOOM_CLONES void round_row(const float* x, int n, bfloat16* to) {
    for (int i = 0; i < n; ++i) narrow(x[i], to[i]);
}

}  // namespace

void Rows::point(const float* v, int64_t s, int c, int n, Format f) {
    values = v, stride = s, count = c, format = f;
    if (format == Format::halves) {
        columns = (n + 1) / 2 * 2;
        halves.resize(size_t(count) * columns);
    } else if (format == Format::int8) {
        columns = (n + kGroup - 1) / kGroup * kGroup;
        int8.resize(size_t(count) * columns);
        scales.resize(size_t(count) * (columns / kGroup));
        starts.resize(scales.size());
    }
}

void Rows::prepare(int row, int n) {
    const float* x = values + row * stride;
    if (format == Format::halves) {
        bfloat16* to = halves.data() + size_t(row) * columns;
        round_row(x, n, to);
        if (columns > n) to[n].bits = 0;
    } else if (format == Format::int8) {
        const int groups = columns / kGroup;
        for (int g = 0; g < groups; ++g) {
            const size_t at = size_t(row) * groups + g;
            int32_t total;
            int8_t* to = int8.data() + size_t(row) * columns + g * kGroup;
            scales[at] = quantize_group(x + g * kGroup, std::min(kGroup, n - g * kGroup), to, total);
            starts[at] = -128 * total;
        }
    }
}

void Matrix::multiply(const float* x, int rows, float* y) const {
    thread_local Rows prepared;
    prepared.point(x, columns(), rows, columns(), format());
    for (int row = 0; row < rows; ++row) prepared.prepare(row, columns());
    multiply(prepared, y);
}

}  // namespace warploom
