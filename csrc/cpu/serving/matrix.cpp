#include "cpu/serving/matrix.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/serving/hadamard.hpp"

namespace warploom {

namespace {

typedef int8_t b16 __attribute__((vector_size(16), aligned(1)));

// `n` ≤ 64 numbers, rotated, to 8 bits with a scale of their own, which is returned; `total` becomes their sum.
WARPLOOM_CLONES float quantize_group(const float* x, int n, int8_t* to, int32_t& total) {
    float group[kGroup] = {};
    std::copy(x, x + n, group);
    f16 part[kGroup / 16], most = {};
    for (int i = 0; i < kGroup / 16; ++i) part[i] = load(group + 16 * i);
    hadamard(part, kGroup / 16);
    for (int i = 0; i < kGroup / 16; ++i) {
        const f16 size = part[i] < 0.0f ? -part[i] : part[i];
        most = select(size > most, size, most);
    }
    const float peak = largest(most), inverse = peak > 0 ? 127 / peak : 0;
    i16 sums = {};
    for (int i = 0; i < kGroup / 16; ++i) {
        const f16 shift = f16{} + 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer
        const i16 value = __builtin_convertvector((part[i] * inverse + shift) - shift, i16);
        const b16 narrow = __builtin_convertvector(value, b16);
        std::memcpy(to + 16 * i, &narrow, 16);
        sums += value;
    }
    total = 0;
    for (int i = 0; i < 16; ++i) total += sums[i];
    return peak / 127 * kRotated;
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
