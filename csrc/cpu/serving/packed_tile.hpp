// Micro-kernel for packed weights, written once for all instruction sets. A file that includes it has defined TILE_TARGET,
// the attribute of its functions, and in its own namespace:
//
//   Ints, Floats          sixteen lanes
//   Bytes                 a line: sixteen outputs, four columns each
//   kShift<kind>          what `dot` takes from each byte
//   kTogether             vectors of outputs that fit the registers with four rows
//
// Sums of whole numbers are exact whichever way they are taken, and floats are added group by group, so all give the same bits.

enum class Kind { bytes, nibbles, table };

// The small loops are unrolled by name: else GCC 12 keeps the sums in memory, and stores and loads each at every line.
// ROWS × VECTORS sums in registers, from vector `v` on: each line loaded serves all rows, each activation all vectors. After each
// group they join float sums, which may lie in memory. WIDE: activations of two bytes, 128 · high + low.
template <int ROWS, int VECTORS, Kind KIND, bool WIDE>
TILE_TARGET inline void tile(const Tile& t, int v, const Activations& x, int row, float* y, int width) {
    const Layout& l = *t.layout;
    const int vectors = VECTORS == kBlock ? kBlock : t.vectors, count = lines(l);
    const size_t line = size_t(vectors) * 64, size = group_bytes(l, vectors), halves = scales_at(l, vectors) - v * 32;
    const int32_t offset = kShift<KIND> - l.zero();
    const int8_t *values = x.int8.data() + size_t(row) * x.columns, *low = WIDE ? x.low.data() + size_t(row) * x.columns : values;
    const float* scales = x.scales.data() + size_t(row) * x.groups;
    const int32_t* totals = x.sums.data() + size_t(row) * x.groups;
    const uint8_t* w = t.data + size_t(v) * 64;
    const Bytes table = KIND == Kind::table ? spread_table(l.table) : Bytes{};
    Floats total[ROWS][VECTORS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) clear(total[r][i]);
    constexpr int step = KIND == Kind::bytes ? 4 : 8;  // columns of a line
    for (int g = 0; g < t.groups; ++g, w += size, values += l.group, low += l.group) {
        Ints sums[ROWS][VECTORS], high[ROWS][VECTORS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; ++i) {
                spread(sums[r][i], offset * totals[size_t(r) * x.groups + g]);
                if (WIDE) spread(high[r][i], 0);
            }
#pragma GCC unroll 2
        for (int k = 0; k < count; ++k) {
            Bytes first[VECTORS], second[VECTORS];
#pragma GCC unroll 4
            for (int i = 0; i < VECTORS; ++i) {
                const uint8_t* at = w + k * line + i * 64;
                first[i] = load_line(at);
                if ((k & t.mask) == t.phase) __builtin_prefetch(at + t.ahead);
                if (KIND == Kind::bytes) continue;
                second[i] = high_halves(first[i]), first[i] = low_halves(first[i]);
                if (KIND == Kind::table) first[i] = look_up(table, first[i]), second[i] = look_up(table, second[i]);
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const size_t at = size_t(r) * x.columns + k * step;
#pragma GCC unroll 4
                for (int half = 0; half < step; half += 4) {
                    const Bytes* weight = half ? second : first;
                    const Bytes four = four_bytes((WIDE ? low : values) + at + half);
#pragma GCC unroll 4
                    for (int i = 0; i < VECTORS; ++i) dot<KIND>(sums[r][i], weight[i], four);
                    if (!WIDE) continue;
                    const Bytes upper = four_bytes(values + at + half);
#pragma GCC unroll 4
                    for (int i = 0; i < VECTORS; ++i) dot<KIND>(high[r][i], weight[i], upper);
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < VECTORS; ++i) {
            const uint8_t* at = w + halves + i * 32;
            if (t.phase == 0) __builtin_prefetch(at + t.ahead);
            const Floats weight = from_halves(at);
            Floats minimum;
            if (l.minimum) minimum = from_halves(at + vectors * 32);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                if (WIDE) add_shifted(sums[r][i], high[r][i]);
                const float scale = scales[size_t(r) * x.groups + g];
                add_scaled(total[r][i], sums[r][i], weight, scale);
                if (l.minimum) add_times(total[r][i], minimum, float(totals[size_t(r) * x.groups + g]) * scale);
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) {
        const int n = (v + i) * kLanes;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) finish(y + size_t(r) * width + n, total[r][i], t.units + n, t.bias + n);
    }
}

template <int ROWS, Kind KIND, bool WIDE>
TILE_TARGET inline void row_of_tiles(const Tile& t, const Activations& x, int row, float* y, int width) {
    int v = 0;
    if (t.vectors == kBlock)
        for (; v + kTogether <= t.vectors; v += kTogether) tile<ROWS, kTogether, KIND, WIDE>(t, v, x, row, y, width);
    for (; v < t.vectors; ++v) tile<ROWS, 1, KIND, WIDE>(t, v, x, row, y, width);
}

template <Kind KIND>
TILE_TARGET void multiply_kind(const Tile& t, const Activations& x, int row, int rows, float* y, int width) {
    if (x.format.wide) {  // twice the sums: two rows fill the registers
        for (; rows >= 2; rows -= 2, row += 2, y += 2 * width) row_of_tiles<2, KIND, true>(t, x, row, y, width);
        if (rows) row_of_tiles<1, KIND, true>(t, x, row, y, width);
        return;
    }
    switch (rows) {
        case 1: return row_of_tiles<1, KIND, false>(t, x, row, y, width);
        case 2: return row_of_tiles<2, KIND, false>(t, x, row, y, width);
        case 3: return row_of_tiles<3, KIND, false>(t, x, row, y, width);
        default: return row_of_tiles<4, KIND, false>(t, x, row, y, width);
    }
}

TILE_TARGET void multiply(const Tile& t, const Activations& x, int row, int rows, float* y, int width) {
    if (t.layout->has_table) return multiply_kind<Kind::table>(t, x, row, rows, y, width);
    if (t.layout->bits == 4) return multiply_kind<Kind::nibbles>(t, x, row, rows, y, width);
    return multiply_kind<Kind::bytes>(t, x, row, rows, y, width);
}
