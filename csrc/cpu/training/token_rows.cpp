#include "cpu/training/token_rows.hpp"

#include <algorithm>

#include "simd.hpp"
#include "cpu/training/gemm.hpp"
#include "cpu/training/omp_threads.hpp"

namespace warploom {

namespace {

constexpr int kTile = NormBackward<float>::kChunk;  // of either format

// work(first, last, tile) for tiles of rows.
template <class Work>
void parallel_for_tiles(int rows, const Work& work) {
    parallel_for((rows + kTile - 1) / kTile, [&](int tile) { work(tile * kTile, std::min(rows, (tile + 1) * kTile), tile); });
}

// Room that a thread keeps. `rows_at` makes it look like rows of a whole tensor of which it holds those from `first`.
struct Room {
    Floats floats;
    template <class T>
    T* of(size_t count) {
        const size_t words = (count * sizeof(T) + 3) / 4;
        if (floats.size() < words) floats.resize(words);
        return reinterpret_cast<T*>(floats.data());
    }
    template <class T>
    Rows<T> rows_at(int first, int columns) { return {of<T>(kTile * columns) - int64_t(first) * columns, columns}; }
};
thread_local Room panels[3], of_hidden, of_stream, of_both, of_middle, of_normed;

template <class T>
Rows<const T> read(const T* at, int columns) { return {at, columns}; }
template <class T>
Rows<const T> read(Rows<T> x) { return {x.at, x.stride}; }
template <class T>
Rows<T> write(T* at, int columns) { return {at, columns}; }

template <class T>
Panels<T> pack(Room& room, const T* w, int terms, int columns, bool over) {
    return warploom::pack(w, terms, columns, over, room.of<T>(size_t(terms) * columns));
}

}  // namespace

// Calls work(rope, offset) for queries, keys and values, with the columns of J before them: values turn by nothing.
template <class T>
template <class Work>
void NormQkvRope<T>::rope(float sign, const Work& work) const {
    Rope<T> t{batch, time, heads, head_width, half, sign, nullptr, 0, 0, head_width,
                  cos,   sin,  table_stride, table_rows, positions, {}};
    work(t, 0, 0);
    t.heads = key_heads;
    work(t, heads * head_width, 1);
    t.half = 0, t.table_rows = INT64_MAX;
    work(t, (heads + key_heads) * head_width, 2);
}

template <class T>
void NormQkvRope<T>::forward(const T* delta, const T* stream, T* q, T* k, T* v) const {
    const int C = channels, J = (heads + 2 * key_heads) * head_width;
    T* const to[] = {q, k, v};
    const Panels<T> w = pack(panels[0], qkv, C, J, false);
    parallel_for_tiles(batch * time, [&](int first, int last, int) {
        const Rows<T> normed = of_stream.rows_at<T>(first, C), all = of_hidden.rows_at<T>(first, J);
        NormForward<T>{batch * time, C, eps, read(delta, C), read(stream, C), norm, normed, write(sum, C), inverse}
            .run_range(first, last);
        multiply(read(normed), w, all, first, last);
        rope(1, [&](Rope<T>& t, int offset, int which) {
            t.x = all.at + offset, t.time_stride = J, t.batch_stride = int64_t(time) * J;
            t.y = write(to[which], t.heads * head_width);
            t.run_range(first, last);
        });
    });
}

template <class T>
void NormQkvRope<T>::backward(const Gradients& d) const {
    const int C = channels, J = (heads + 2 * key_heads) * head_width;
    const T* const from[] = {d.q, d.k, d.v};
    const Panels<T> w = pack(panels[0], qkv, J, C, true);
    const auto back = [&](Rows<T> d_normed, Rows<T> normed) {
        return NormBackward<T>{batch * time, C,       read(sum, C),       read(d_normed),     read(d.sum, C), norm,
                               inverse,      write(d.stream, C), normed, d.partial, d.norm};
    };
    parallel_for_tiles(batch * time, [&](int first, int last, int tile) {
        const Rows<T> d_heads = d.packed ? of_hidden.rows_at<T>(first, J) : write(d.heads, J);
        const Rows<T> normed = d.packed ? of_normed.rows_at<T>(first, C) : write(d.normed, C);
        const Rows<T> d_normed = of_stream.rows_at<T>(first, C);
        rope(-1, [&](Rope<T>& t, int offset, int which) {
            t.x = from[which], t.time_stride = t.heads * head_width, t.batch_stride = time * t.time_stride;
            t.y = {d_heads.at + offset, J};
            t.run_range(first, last);
        });
        multiply(read(d_heads), w, d_normed, first, last);
        back(d_normed, normed).run_chunk(tile);
        if (!d.packed) return;
        pack_tokens(read(d_heads), first, last, J, true, d.heads);
        pack_tokens(read(normed), first, last, C, false, d.normed);
    });
    back({}, {}).reduce();
}

template <class T>
void OutProjMlp<T>::forward(const T* heads, const T* stream, T* delta) const {
    const int C = channels, F = hidden;
    const Panels<T> w_output = pack(panels[0], output, gathered, C, false),
                 w_both = pack(panels[1], gate_up, C, 2 * F, false), w_down = pack(panels[2], down, F, C, false);
    parallel_for_tiles(rows, [&](int first, int last, int) {
        const Rows<T> x = of_stream.rows_at<T>(first, C), middle = of_hidden.rows_at<T>(first, F), all = write(both, 2 * F);
        multiply(read(heads, gathered), w_output, x, first, last);
        NormForward<T>{rows, C, eps, read(x), read(stream, C), norm, x, write(sum, C), inverse}.run_range(first, last);
        multiply(read(x), w_both, all, first, last);
        Gating<T>{Gate::silu, rows, F, read(all), {all.at + F, all.stride}, {}, middle, {}, {}}.run_range(first, last);
        multiply(read(middle), w_down, write(delta, C), first, last);
    });
}

template <class T>
void OutProjMlp<T>::backward(const Gradients& d) const {
    const int C = channels, F = hidden;
    const Panels<T> w_output = pack(panels[0], output, C, gathered, true),
                 w_both = pack(panels[1], gate_up, 2 * F, C, true), w_down = pack(panels[2], down, C, F, true);
    const auto back = [&](Rows<T> d_normed, Rows<T> normed) {
        return NormBackward<T>{rows,    C,       read(sum, C),       read(d_normed),     read(d.sum, C), norm,
                               inverse, write(d.stream, C), normed, d.partial, d.norm};
    };
    const bool packed = d.of_delta;
    parallel_for_tiles(rows, [&](int first, int last, int tile) {
        const Rows<T> d_middle = of_hidden.rows_at<T>(first, F), d_normed = of_stream.rows_at<T>(first, C);
        const Rows<T> all = write(both, 2 * F), d_all = packed ? of_both.rows_at<T>(first, 2 * F) : write(d.both, 2 * F);
        const Rows<T> middle = packed ? of_middle.rows_at<T>(first, F) : write(d.middle, F);
        const Rows<T> normed = packed ? of_normed.rows_at<T>(first, C) : write(d.normed, C);
        multiply(read(d.delta, C), w_down, d_middle, first, last);
        Gating<T>{Gate::silu, rows,  F, read(all), {all.at + F, all.stride}, read(d_middle), middle, d_all,
                  {d_all.at + F, d_all.stride}}
            .run_range(first, last);
        multiply(read(d_all), w_both, d_normed, first, last);
        back(d_normed, normed).run_chunk(tile);
        multiply(read<T>(d.stream, C), w_output, write(d.heads, gathered), first, last);
        if (!packed) return;
        pack_tokens(read(d.delta, C), first, last, C, true, d.of_delta);
        pack_tokens(read(middle), first, last, F, false, d.middle);
        pack_tokens(read(d_all), first, last, 2 * F, true, d.both);
        pack_tokens(read(normed), first, last, C, false, d.normed);
        pack_tokens(read<T>(d.stream, C), first, last, C, true, d.of_stream);
        pack_tokens(read(d.gathered, gathered), first, last, gathered, false, d.of_gathered);
    });
    back({}, {}).reduce();
}

template <class T>
void HeadLoss<T>::run() const {
    const int C = forth.terms, V = losses.classes;
    parallel_for_tiles(losses.rows, [&](int first, int last, int) {
        const Rows<T> logits = of_hidden.rows_at<T>(first, V);
        multiply(hidden, forth, logits, first, last);
        CrossEntropy<T> of_tile = losses;
        of_tile.logits = logits.at;
        of_tile.run_range(first, last);
        if (back.at) multiply(read(logits), back, d_hidden, first, last);
        if (!left) return;
        pack_tokens(read(logits), first, last, V, true, left);
        pack_tokens(hidden, first, last, C, false, right);
    });
}

template struct NormQkvRope<float>;
template struct NormQkvRope<bfloat16>;
template struct OutProjMlp<float>;
template struct OutProjMlp<bfloat16>;
template struct HeadLoss<float>;
template struct HeadLoss<bfloat16>;

}  // namespace warploom
