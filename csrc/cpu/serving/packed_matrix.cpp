#include "cpu/serving/packed_matrix.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <string>

#include "cpu/serving/hadamard.hpp"
#include "cpu/serving/half.hpp"
#include "cpu/serving/spin_pool.hpp"
#include "cpu/serving/weight_memory.hpp"
#include "simd.hpp"

namespace warploom {

namespace packed {

// The weight of a code, without its scale.
static int weight_of(const Layout& l, int code) { return l.has_table ? l.table[code] : code - l.zero(); }

// The plain meaning of the loops: sums of integers group by group, then of floats; rows of `y` lie `width` apart.
void multiply_plain(const Tile& t, const Activations& x, int row, int rows, float* y, int width) {
    const Layout& l = *t.layout;
    const int step = 32 / l.bits;
    for (int r = row; r < row + rows; ++r, y += width)
        for (int v = 0; v < t.vectors; ++v) {
            float total[kLanes] = {};
            for (int g = 0; g < t.groups; ++g) {
                const uint8_t* group = t.data + g * group_bytes(l, t.vectors);
                const size_t at = size_t(r) * x.groups + g, from = size_t(r) * x.columns + size_t(g) * l.group;
                int32_t sums[kLanes] = {};
                for (int k = 0; k < l.group; ++k) {
                    const uint8_t* line = group + (k / step * t.vectors + v) * 64 + k % 4;
                    const int value = x.int8[from + k] * (x.format.wide ? 128 : 1) + (x.format.wide ? x.low[from + k] : 0);
                    const int shift = k % step / 4 * 4, mask = l.bits == 8 ? 255 : 15;
                    for (int lane = 0; lane < kLanes; ++lane)
                        sums[lane] += weight_of(l, line[lane * 4] >> shift & mask) * value;
                }
                const uint16_t* halves = reinterpret_cast<const uint16_t*>(group + scales_at(l, t.vectors)) + v * kLanes;
                const float scale = x.scales[at], sum = float(x.sums[at]) * scale;
                for (int lane = 0; lane < kLanes; ++lane) {
                    total[lane] = std::fma(float(sums[lane]) * from_half(halves[lane]), scale, total[lane]);
                    if (l.minimum)
                        total[lane] = std::fma(from_half(halves[t.vectors * kLanes + lane]), sum, total[lane]);
                }
            }
            for (int lane = 0, n = v * kLanes; lane < kLanes; ++lane, ++n)
                y[n] = std::fma(total[lane], t.units[n], t.bias[n]);
        }
}

}  // namespace packed

namespace {

using namespace packed;

Multiply loops_named(const std::string& name) {
    if (name == "avx512") return multiply_avx512();
    if (name == "avxvnni") return multiply_avxvnni();
    if (name == "avx2") return multiply_avx2();
    if (name == "neon") return multiply_neon();
    if (name == "plain") return multiply_plain;
    for (const Multiply loops : {multiply_avx512(), multiply_avxvnni(), multiply_avx2(), multiply_neon()})
        if (loops) return loops;
    return multiply_plain;
}

std::atomic<Multiply> multiply_rows{loops_named("best")};

// n numbers around `shift` + `scale` · code, codes from 0 to `most`; the square of what is lost is returned.
float round_codes(const float* x, int n, float scale, float shift, float most, float* codes) {
    const float inverse = scale > 0 ? 1 / scale : 0;
    f16 lost = {};
    for (int i = 0; i < n; i += 16) {
        const f16 magic = f16{} + 12582912.0f, top = f16{} + most;  // 1.5 · 2²³: adding it rounds to an integer
        f16 code = (((load(x + i) - shift) * inverse) + magic) - magic;
        code = select(code < f16{}, f16{}, select(code > top, top, code));
        const f16 error = code * scale + shift - load(x + i);
        lost += error * error;
        store(codes + i, code);
    }
    return sum(lost);
}

// Scale and minimum of a group: of its range and of narrower ones, each fitted to its codes, the pair that loses least.
void fit_range(const float* x, int n, float most, float unit, uint16_t& scale, uint16_t& minimum,
                               float* codes) {
    const auto [low, high] = std::minmax_element(x, x + n);
    const float middle = (*high + *low) / 2, reach = (*high - *low) / 2;
    constexpr int kTries = 10;
    float best = INFINITY, trial[64];
    for (int i = 0; i < (most < 255 ? kTries : 1); ++i) {
        const float part = reach * (1 - 0.035f * float(i));
        float d = 2 * part / most, m = middle - part;
        for (int fit = 0; fit < 2; ++fit) {
            const uint16_t half_d = to_half(d / unit), half_m = to_half(m / unit);
            const float lost = round_codes(x, n, from_half(half_d) * unit, from_half(half_m) * unit, most, trial);
            if (lost < best) best = lost, scale = half_d, minimum = half_m, std::copy(trial, trial + n, codes);
            float q = 0, qq = 0, qx = 0, all = 0;
            for (int j = 0; j < n; ++j) q += trial[j], qq += trial[j] * trial[j], qx += trial[j] * x[j], all += x[j];
            const float spread = qq - q * q / float(n);
            if (!(spread > 0)) break;
            d = (qx - q * all / float(n)) / spread, m = (all - d * q) / float(n);
        }
    }
}

// Codes of a group of n one after the other: what each loses is taken from the columns after it, `left` in all.
void feed_back(float* x, int n, int left, float scale, float shift, float most, const float* feedback,
                               int stride, float* codes) {
    const float inverse = scale > 0 ? 1 / scale : 0;
    for (int i = 0; i < n; ++i, feedback += stride + 1) {
        const float code = std::min(std::max(std::nearbyint((x[i] - shift) * inverse), 0.0f), most);
        const float error = x[i] - (code * scale + shift);
        codes[i] = code;
        for (int j = 1; j < left - i; ++j) x[i + j] -= error * feedback[j];
    }
}

}  // namespace

int groups_of(const Layout& l, int columns) {
    return l.rotate ? (columns + kTurned - 1) / kTurned * (kTurned / l.group) : (columns + l.group - 1) / l.group;
}

float quantize_row(const float* row, int columns, const Layout& l, uint8_t* codes, uint16_t* scales, uint16_t* minima,
                   const float* feedback) {
    thread_local Floats rotated;
    const int groups = groups_of(l, columns), n = groups * l.group, half = 1 << (l.bits - 1);
    rotated.assign(size_t(n), 0.0f);
    std::copy(row, row + columns, rotated.begin());
    float* x = rotated.data();
    for (int c = 0; l.rotate && c < n; c += kTurned) hadamard_head(x + c, kTurned, false);
    float peak = 0;
    for (int c = 0; c < n; ++c) peak = std::max(peak, std::fabs(x[c]));
    const float most = float(l.minimum ? 2 * half - 1 : half - 1);
    const float unit = peak > 0 ? std::ldexp(1.0f, std::max(-120, std::ilogb(peak / most))) : 1;
    for (int g = 0; g < groups; ++g, x += l.group, codes += l.group) {
        float numbers[64] = {};
        if (l.minimum) {
            fit_range(x, l.group, most, unit, scales[g], minima[g], numbers);
        } else {
            float size = 0;
            for (int i = 0; i < l.group; ++i) size = std::max(size, std::fabs(x[i]));
            scales[g] = to_half(size / most / unit);
            const float scale = from_half(scales[g]) * unit;
            round_codes(x, l.group, scale, -float(half) * scale, float(2 * half - 1), numbers);
        }
        if (feedback) {
            const float scale = from_half(scales[g]) * unit, shift = l.minimum ? from_half(minima[g]) * unit : -float(half) * scale;
            const int at = g * l.group;
            feed_back(x, l.group, n - at, scale, shift, float(2 * half - 1), feedback + size_t(at) * n + at, n, numbers);
        }
        for (int i = 0; i < l.group; ++i) codes[i] = uint8_t(numbers[i]);
    }
    return unit;
}

void PackedMatrix::Segment::write(int output, const uint8_t* codes, const uint16_t* scales, const uint16_t* minima) {
    const int vectors = (outputs + kLanes - 1) / kLanes, number = output / (kBlock * kLanes);
    const int count = std::min(kBlock, vectors - number * kBlock), lane = output % (kBlock * kLanes);
    const size_t size = group_bytes(layout, count);
    uint8_t* to = data.get() + size_t(number) * groups * group_bytes(layout, kBlock);
    for (int g = 0; g < groups; ++g, to += size, codes += layout.group) {
        uint8_t* line = to + lane / kLanes * 64 + lane % kLanes * 4;
        for (int k = 0; k < lines(layout); ++k, line += count * 64) {
            if (layout.bits == 8) {
                std::memcpy(line, codes + 4 * k, 4);
            } else {
                for (int c = 0; c < 4; ++c) line[c] = uint8_t(codes[8 * k + c] | codes[8 * k + 4 + c] << 4);
            }
        }
        uint8_t* halves = to + scales_at(layout, count) + lane * 2;
        std::memcpy(halves, scales + g, 2);
        if (layout.minimum) std::memcpy(halves + count * 32, minima + g, 2);
    }
}

// A segment whose rows are what `make(row, codes, scales, minima)` gives, unit returned; `bias` is the matrix's.
template <class Make>
void PackedMatrix::add(const Layout& layout, int outputs, const float* bias, const Make& make) {
    const int vectors = (outputs + kLanes - 1) / kLanes, groups = groups_of(layout, columns_);
    const size_t rest = vectors % kBlock ? group_bytes(layout, vectors % kBlock) : 0;
    const size_t bytes = (vectors / kBlock * group_bytes(layout, kBlock) + rest) * groups;
    segments_.push_back({layout, outputs_, outputs, groups, bytes, weight_memory(bytes), {}, {}});
    Segment& s = segments_.back();
    s.units.assign(size_t(vectors) * kLanes, 0.0f), s.bias.assign(s.units.size(), 0.0f);
    if (bias) std::copy_n(bias + outputs_, outputs, s.bias.begin());
    outputs_ += outputs;
    SpinPool::shared().run((vectors + kBlock - 1) / kBlock, [&](int task) {
        thread_local std::vector<uint8_t> codes;
        thread_local std::vector<uint16_t> scales, minima;
        codes.resize(size_t(groups) * layout.group), scales.resize(groups), minima.resize(groups);
        const int end = std::min(outputs, (task + 1) * kBlock * kLanes);
        for (int row = task * kBlock * kLanes; row < end; ++row) {
            s.units[row] = make(row, codes.data(), scales.data(), minima.data());
            s.write(row, codes.data(), scales.data(), minima.data());
        }
    });
}

PackedMatrix::PackedMatrix(const float* weight, int outputs, int columns, const float* bias, const Layout& layout,
                           bool wide)
    : columns_(columns), format_{Format::int8, layout.group, layout.rotate, wide} {
    add(layout, outputs, bias, [&](int row, uint8_t* codes, uint16_t* scales, uint16_t* minima) {
        return quantize_row(weight + size_t(row) * columns, columns, layout, codes, scales, minima);
    });
}

PackedMatrix::PackedMatrix(const std::vector<Codes>& segments, int columns, const float* bias, bool wide)
    : columns_(columns), format_{Format::int8, segments[0].layout.group, segments[0].layout.rotate, wide} {
    segments_.reserve(segments.size());
    for (const Codes& s : segments) {
        const size_t groups = groups_of(s.layout, columns), row_bytes = groups * s.layout.group * s.layout.bits / 8;
        add(s.layout, s.rows, bias, [&](int row, uint8_t* codes, uint16_t* scales, uint16_t* minima) {
            const uint8_t* from = s.codes + row * row_bytes;
            if (s.layout.bits == 8) {
                std::copy_n(from, row_bytes, codes);
            } else {
                for (size_t i = 0; i < row_bytes; ++i) codes[2 * i] = from[i] & 15, codes[2 * i + 1] = from[i] >> 4;
            }
            std::copy_n(s.scales + row * groups, groups, scales);
            if (s.layout.minimum) std::copy_n(s.minima + row * groups, groups, minima);
            return s.units[row];
        });
    }
}

size_t PackedMatrix::bytes() const {
    size_t total = 0;
    for (const Segment& s : segments_) total += s.bytes;
    return total;
}

void PackedMatrix::multiply(const Activations& x, float* y) const {
    int tasks = 0;
    for (const Segment& s : segments_) tasks += (s.outputs + kBlock * kLanes - 1) / (kBlock * kLanes);
    SpinPool::shared().run(tasks, [&](int task) {
        for (const Segment& s : segments_) {
            const int blocks = (s.outputs + kBlock * kLanes - 1) / (kBlock * kLanes);
            if (task < blocks) return block(s, x, task, y);
            task -= blocks;
        }
    });
}

void PackedMatrix::block(const Segment& s, const Activations& x, int number, float* y) const {
    const int from = number * kBlock * kLanes, left = s.outputs - from, here = std::min(left, kBlock * kLanes);
    const int vectors = (here + kLanes - 1) / kLanes, wide = vectors * kLanes;
    const uint8_t* data = s.data.get() + size_t(number) * s.groups * group_bytes(s.layout, kBlock);
    const Multiply multiply = multiply_rows.load(std::memory_order_relaxed);
    // Memory brings what two or three tiles multiply: the first of them requests what it needs itself soon. More tiles share
    // the requests for the block that this thread will probably have next, and memory works all the while.
    const int all = (x.count + kRows - 1) / kRows;
    const bool share = all >= 4;
    const size_t next = s.groups * group_bytes(s.layout, kBlock);
    Tile tile{&s.layout, data, &s.units[from], &s.bias[from], vectors, s.groups, share ? next : 8192, 0, 0};
    tile.mask = !share ? 0 : all < 8 ? 3 : 7;
    float part[kRows * kBlock * kLanes];  // for outputs that fill no whole vector
    for (int row = 0, rows, tiles = all; tiles > 0; row += rows, --tiles, ++tile.phase) {
        rows = (x.count - row + tiles - 1) / tiles;  // as equal as can be
        float* to = y + size_t(row) * outputs_ + s.first + from;
        multiply(tile, x, row, rows, here == wide ? to : part, here == wide ? outputs_ : wide);
        for (int r = 0; r < rows && here < wide; ++r) std::copy_n(part + r * wide, here, to + size_t(r) * outputs_);
    }
}

bool use_packed_loops(const char* name) {
    const Multiply loops = loops_named(name);
    if (loops) multiply_rows = loops;
    return loops;
}

}  // namespace warploom
