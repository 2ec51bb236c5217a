#include "cpu/serving/matrix.hpp"

#include <algorithm>
#include <cmath>

#include "cpu/serving/hadamard.hpp"

namespace warploom {

namespace {

constexpr float kMost = 127 * 128;  // of a number of two bytes: high within ±127, low within −64 … 63

typedef int8_t b16 __attribute__((vector_size(16), aligned(1)));

// The groups of up to 64 columns: bytes, the scales, which are returned in place, and the sums.
WARPLOOM_CLONES void quantize_span(const float* x, int n, const RowFormat& f, int8_t* bytes, int8_t* low, float* scales,
                                   int32_t* sums) {
    float span[kTurned] = {};
    std::copy(x, x + n, span);
    f16 part[kTurned / 16];
    for (int i = 0; i < kTurned / 16; ++i) part[i] = load(span + 16 * i);
    if (f.rotate) hadamard(part, kTurned / 16);
    const float most = f.wide ? kMost : 127;
    for (int i = 0, end, g = 0; i < kTurned / 16; ++g) {
        end = i + f.group / 16;
        f16 peaks = {};
        for (int j = i; j < end; ++j) {
            peaks = larger(larger(part[j], -part[j]), peaks);
        }
        const float peak = largest(peaks), inverse = peak > 0 ? most / peak : 0;
        i16 total = {};
        for (; i < end; ++i) {
            const f16 shift = f16{} + 12582912.0f;  // 1.5 · 2²³: adding it rounds to an integer
            const i16 value = __builtin_convertvector((part[i] * inverse + shift) - shift, i16);
            const i16 high = f.wide ? (value + 64) >> 7 : value;
            const b16 narrow = __builtin_convertvector(high, b16);
            std::memcpy(bytes + 16 * i, &narrow, 16);
            if (f.wide) {
                const b16 rest = __builtin_convertvector(value - (high << 7), b16);
                std::memcpy(low + 16 * i, &rest, 16);
            }
            total += value;
        }
        sums[g] = 0;
        for (int lane = 0; lane < 16; ++lane) sums[g] += total[lane];
        scales[g] = peak / most * (f.rotate ? kRotated : 1);
    }
}

WARPLOOM_CLONES void round_row(const float* x, int n, bfloat16* to) {
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
        for (int c = 0; c < columns; c += kTurned) {
            const size_t group = size_t(row) * groups + c / format.group;
            quantize_span(x + c, std::min(kTurned, n - c), format, &int8[at + c], format.wide ? &low[at + c] : nullptr,
                          &scales[group], &sums[group]);
        }
    }
}

void Matrix::multiply(const float* x, int rows, float* y) const {
    thread_local Activations prepared;
    prepared.point(x, columns(), rows, columns(), format());
    for (int row = 0; row < rows; ++row) prepared.prepare(row, columns());
    multiply(prepared, y);
}

}  // namespace warploom
