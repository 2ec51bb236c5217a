#include "cpu/serving/matrix.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "cpu/serving/hadamard.hpp"
#include "cpu/serving/spin_pool.hpp"

namespace warploom {

namespace {

constexpr float kMost = 127 * 128;  // of a number of two bytes: high within ±127, low within −64 … 63

typedef int8_t b16 __attribute__((vector_size(16)));

WARPLOOM_INLINE int32_t sum(i16 x) {
    i8 a[2];
    std::memcpy(a, &x, 64);
    a[0] += a[1];
    i4 b[2];
    std::memcpy(b, a, 32);
    b[0] += b[1];
    return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

// A span of 64 columns in groups of 16 · `VECTORS`: bytes, the scales, and the sums.
template <int VECTORS, bool WIDE>
WARPLOOM_INLINE void quantize_span(const f16* part, float share, int8_t* bytes, int8_t* low, float* scales, int32_t* sums) {
    constexpr float most = WIDE ? kMost : 127;
    for (int g = 0; g < kTurned / 16 / VECTORS; ++g, part += VECTORS) {
        f16 peaks = {};
        for (int i = 0; i < VECTORS; ++i) peaks = larger(larger(part[i], -part[i]), peaks);
        const float peak = largest(peaks), inverse = peak > 0 ? most / peak : 0;
        i16 total = {};
        for (int i = 0; i < VECTORS; ++i, bytes += 16, low += WIDE ? 16 : 0) {
            const f16 shift = f16{} + 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer
            const i16 value = __builtin_convertvector((part[i] * inverse + shift) - shift, i16);
            const i16 high = WIDE ? (value + 64) >> 7 : value;
            const b16 narrow = __builtin_convertvector(high, b16);
            std::memcpy(bytes, &narrow, 16);
            if (WIDE) {
                const b16 rest = __builtin_convertvector(value - (high << 7), b16);
                std::memcpy(low, &rest, 16);
            }
            total += value;
        }
        sums[g] = sum(total);
        scales[g] = peak / most * share;
    }
}

// A row of n columns, span by span.
template <int VECTORS, bool WIDE>
WARPLOOM_INLINE void quantize_spans(const float* x, int n, bool rotate, int8_t* bytes, int8_t* low, float* scales, int32_t* sums) {
    constexpr int vectors = kTurned / 16, groups = vectors / VECTORS;
    for (; n > 0; n -= kTurned, x += kTurned, bytes += kTurned, low += WIDE ? kTurned : 0, scales += groups, sums += groups) {
        f16 part[vectors];
        for (int i = 0; i < vectors; ++i) part[i] = load(x + 16 * i, std::clamp(n - 16 * i, 0, 16));
        if (rotate) hadamard(part, vectors);
        quantize_span<VECTORS, WIDE>(part, rotate ? kRotated : 1, bytes, low, scales, sums);
    }
}

void quantize_columns(const float* x, int n, const RowFormat& f, int8_t* bytes, int8_t* low, float* scales,
                                      int32_t* sums) {
    const auto with = [&](auto vectors) __attribute__((always_inline)) {
        if (f.wide) return quantize_spans<vectors.value, true>(x, n, f.rotate, bytes, low, scales, sums);
        quantize_spans<vectors.value, false>(x, n, f.rotate, bytes, low, scales, sums);
    };
    if (f.group == 64) return with(std::integral_constant<int, 4>());
    if (f.group == 32) return with(std::integral_constant<int, 2>());
    with(std::integral_constant<int, 1>());
}

void round_row(const float* x, int n, bfloat16* to) {
    for (int i = 0; i < n; ++i) narrow(x[i], to[i]);
}

}  // namespace

void Activations::point(const float* v, int64_t s, int c, int n, RowFormat f) {
    values = v, stride = s, count = c, format = f;
    if (format.number == Format::halves) {
        columns = (n + 1) / 2 * 2;
        halves.resize(size_t(count) * columns);
    } else if (format.number == Format::int8) {
        columns = (n + kTurned - 1) / kTurned * kTurned, groups = columns / format.group;
        int8.resize(size_t(count) * columns), low.resize(format.wide ? int8.size() : 0);
        scales.resize(size_t(count) * groups), sums.resize(scales.size());
    }
}

void Activations::prepare(int row, int n) {
    const float* x = values + row * stride;
    const size_t at = size_t(row) * columns;
    if (format.number == Format::halves) {
        bfloat16* to = halves.data() + at;
        round_row(x, n, to);
        if (columns > n) to[n].bits = 0;
    } else if (format.number == Format::int8) {
        const size_t group = size_t(row) * groups;
        quantize_columns(x, n, format, &int8[at], format.wide ? &low[at] : nullptr, &scales[group], &sums[group]);
    }
}

void Matrix::multiply(const float* x, int rows, float* y) const {
    thread_local Activations own;
    auto& prepared = own;  // the caller's, whichever thread works on it
    prepared.point(x, columns(), rows, columns(), format());
    each_row(rows, [&](int row) { prepared.prepare(row, columns()); });
    multiply(prepared, y);
}

}  // namespace warploom
