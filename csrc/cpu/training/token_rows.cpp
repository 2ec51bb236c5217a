#include "cpu/training/token_rows.hpp"

#include <algorithm>

#include "simd.hpp"
#include "cpu/training/gemm.hpp"
#include "cpu/training/omp_threads.hpp"

namespace warploom {

namespace {

constexpr int kTile = NormBackward<float>::kChunk;

// work(first, last, tile) for tiles of rows.
template <class Work>
void parallel_for_tiles(int rows, const Work& work) {
    parallel_for((rows + kTile - 1) / kTile, [&](int tile) { work(tile * kTile, std::min(rows, (tile + 1) * kTile), tile); });
}

// Room that a thread keeps. `rows_at` makes it look like rows of a whole tensor of which it holds those from `first`.
struct Room {
    Floats floats;
    float* of(size_t count) {
        if (floats.size() < count) floats.resize(count);
        return floats.data();
    }
    Rows<float> rows_at(int first, int columns) { return {of(kTile * columns) - int64_t(first) * columns, columns}; }
};
thread_local Room panels[3], of_hidden, of_stream;

Rows<const float> read(const float* at, int columns) { return {at, columns}; }
Rows<const float> read(Rows<float> x) { return {x.at, x.stride}; }
Rows<float> write(float* at, int columns) { return {at, columns}; }

Panels pack(Room& room, const float* w, int terms, int columns, bool over) {
    return warploom::pack(w, terms, columns, over, room.of(size_t(terms) * columns));
}

}  // namespace

// Calls work(rope, offset) for queries, keys and values, with the columns of J before them: values turn by nothing.
template <class Work>
void NormQkvRope::rope(float sign, const Work& work) const {
    Rope<float> t{batch, time, heads, head_width, half, sign, nullptr, 0, 0, head_width,
                  cos,   sin,  table_stride, table_rows, positions, {}};
    work(t, 0, 0);
    t.heads = key_heads;
    work(t, heads * head_width, 1);
    t.half = 0, t.table_rows = INT64_MAX;
    work(t, (heads + key_heads) * head_width, 2);
}

void NormQkvRope::forward(const float* delta, const float* stream, float* q, float* k, float* v) const {
    const int C = channels, J = (heads + 2 * key_heads) * head_width;
    float* const to[] = {q, k, v};
    const Panels w = pack(panels[0], qkv, C, J, false);
    parallel_for_tiles(batch * time, [&](int first, int last, int) {
        const Rows<float> normed = of_stream.rows_at(first, C), all = of_hidden.rows_at(first, J);
        NormForward<float>{batch * time, C, eps, read(delta, C), read(stream, C), norm, normed, write(sum, C), inverse}
            .run_range(first, last);
        multiply(read(normed), w, all, first, last);
        rope(1, [&](Rope<float>& t, int offset, int which) {
            t.x = all.at + offset, t.time_stride = J, t.batch_stride = int64_t(time) * J;
            t.y = write(to[which], t.heads * head_width);
            t.run_range(first, last);
        });
    });
}

void NormQkvRope::backward(const Gradients& d) const {
    const int C = channels, J = (heads + 2 * key_heads) * head_width;
    const float* const from[] = {d.q, d.k, d.v};
    const Panels w = pack(panels[0], qkv, J, C, true);
    const auto back = [&](Rows<float> d_normed) {
        return NormBackward<float>{batch * time, C,       read(sum, C),       read(d_normed),     read(d.sum, C), norm,
                                   inverse,      write(d.stream, C), write(d.normed, C), d.partial, d.norm};
    };
    parallel_for_tiles(batch * time, [&](int first, int last, int tile) {
        rope(-1, [&](Rope<float>& t, int offset, int which) {
            t.x = from[which], t.time_stride = t.heads * head_width, t.batch_stride = time * t.time_stride;
            t.y = {d.heads + offset, J};
            t.run_range(first, last);
        });
        const Rows<float> d_normed = of_stream.rows_at(first, C);
        multiply(read(d.heads, J), w, d_normed, first, last);
        back(d_normed).run_chunk(tile);
    });
    back({}).reduce();
}

void OutProjMlp::forward(const float* heads, const float* stream, float* delta) const {
    const int C = channels, F = hidden;
    const Panels w_output = pack(panels[0], output, gathered, C, false),
                 w_both = pack(panels[1], gate_up, C, 2 * F, false), w_down = pack(panels[2], down, F, C, false);
    parallel_for_tiles(rows, [&](int first, int last, int) {
        const Rows<float> x = of_stream.rows_at(first, C), middle = of_hidden.rows_at(first, F), all = write(both, 2 * F);
        multiply(read(heads, gathered), w_output, x, first, last);
        NormForward<float>{rows, C, eps, read(x), read(stream, C), norm, x, write(sum, C), inverse}.run_range(first, last);
        multiply(read(x), w_both, all, first, last);
        Gating<float>{Gate::silu, rows, F, read(all), {all.at + F, all.stride}, {}, middle, {}, {}}.run_range(first, last);
        multiply(read(middle), w_down, write(delta, C), first, last);
    });
}

void OutProjMlp::backward(const Gradients& d) const {
    const int C = channels, F = hidden;
    const Panels w_output = pack(panels[0], output, C, gathered, true),
                 w_both = pack(panels[1], gate_up, 2 * F, C, true), w_down = pack(panels[2], down, C, F, true);
    const auto back = [&](Rows<float> d_normed) {
        return NormBackward<float>{rows,    C,       read(sum, C),       read(d_normed),     read(d.sum, C), norm,
                                   inverse, write(d.stream, C), write(d.normed, C), d.partial, d.norm};
    };
    parallel_for_tiles(rows, [&](int first, int last, int tile) {
        const Rows<float> d_middle = of_hidden.rows_at(first, F), d_normed = of_stream.rows_at(first, C);
        const Rows<float> all = write(both, 2 * F), d_all = write(d.both, 2 * F);
        multiply(read(d.delta, C), w_down, d_middle, first, last);
        Gating<float>{Gate::silu,     rows,  F,  read(all), {all.at + F, all.stride}, read(d_middle), write(d.middle, F), d_all,
                      {d_all.at + F, d_all.stride}}
            .run_range(first, last);
        multiply(read(d_all), w_both, d_normed, first, last);
        back(d_normed).run_chunk(tile);
        multiply(read(d.stream, C), w_output, write(d.heads, gathered), first, last);
    });
    back({}).reduce();
}

}  // namespace warploom
