// Sixteen floats in registers of any size, and what many vectors are reduced to at once.
//
// f16 is one register of AVX-512. Where registers are smaller, GCC takes comparisons and shuffles of f16 apart lane by lane and
// keeps the rest in memory, so loops that matter are templates of a register R, or of V = SixteenIn<R>: f16, or Sixteen<Register>,
// which has the same sixteen lanes and adds them in the same order.
#pragma once
#include "simd.hpp"

namespace warploom {

template <class R>
struct Sixteen {
    static constexpr int kParts = 16 / lanes_of<R>;
    R part[kParts];
};

f16 sixteen_like(const f16&);
template <class R>
Sixteen<R> sixteen_like(const R&);
template <class R>
using SixteenIn = decltype(sixteen_like(R()));

#define WARPLOOM_EACH_PART(value)                                        \
    Sixteen<R> z;                                                        \
    for (int i = 0; i < Sixteen<R>::kParts; ++i) z.part[i] = value;      \
    return z
#define WARPLOOM_BY_PARTS(op)                                                                                        \
    template <class R>                                                                                               \
    WARPLOOM_INLINE Sixteen<R> operator op(Sixteen<R> x, Sixteen<R> y) {                                             \
        WARPLOOM_EACH_PART(x.part[i] op y.part[i]);                                                                  \
    }                                                                                                                \
    template <class R>                                                                                               \
    WARPLOOM_INLINE Sixteen<R> operator op(Sixteen<R> x, float y) {                                                  \
        WARPLOOM_EACH_PART(x.part[i] op y);                                                                          \
    }
WARPLOOM_BY_PARTS(+)
WARPLOOM_BY_PARTS(-)
WARPLOOM_BY_PARTS(*)
template <class R>
WARPLOOM_INLINE void operator+=(Sixteen<R>& x, const Sixteen<R>& y) {  // part by part: GCC copies x = x + y through memory
    for (int i = 0; i < Sixteen<R>::kParts; ++i) x.part[i] += y.part[i];
}
template <class R>
WARPLOOM_INLINE Sixteen<R> exp(Sixteen<R> x) {
    WARPLOOM_EACH_PART(exp<R>(x.part[i]));
}
template <class R>
WARPLOOM_INLINE Sixteen<R> exp2_negative(Sixteen<R> x) {
    WARPLOOM_EACH_PART(exp2_negative(x.part[i]));
}
template <class R>
WARPLOOM_INLINE Sixteen<R> exp_negative(Sixteen<R> x) {
    WARPLOOM_EACH_PART(exp_negative(x.part[i]));
}
template <class R>
WARPLOOM_INLINE Sixteen<R> tanh(Sixteen<R> x) {
    WARPLOOM_EACH_PART(tanh(x.part[i]));
}

#define WARPLOOM_MEMORY(T)                                                                             \
    template <class R>                                                                                 \
    WARPLOOM_INLINE void load_as(const T* p, Sixteen<R>& x) {                                          \
        for (int i = 0; i < Sixteen<R>::kParts; ++i) load_as(p + i * lanes_of<R>, x.part[i]);          \
    }                                                                                                  \
    template <class R>                                                                                 \
    WARPLOOM_INLINE void store_as(T* p, Sixteen<R> x) {                                                \
        for (int i = 0; i < Sixteen<R>::kParts; ++i) store_as(p + i * lanes_of<R>, x.part[i]);         \
    }
WARPLOOM_MEMORY(float)
WARPLOOM_MEMORY(bfloat16)
template <class V, class T>
WARPLOOM_INLINE V load_as(const T* p) {
    V x;
    load_as(p, x);
    return x;
}
WARPLOOM_INLINE f16 as_f16(f16 x) { return x; }
template <class R>
WARPLOOM_INLINE f16 as_f16(Sixteen<R> x) {
    f16 y;
    std::memcpy(&y, &x, 64);
    return y;
}
template <class R>
WARPLOOM_INLINE void widen_pairs(const bfloat16* p, Sixteen<R>& even, Sixteen<R>& odd) {
    for (int i = 0; i < Sixteen<R>::kParts; ++i) widen_pairs(p + 2 * i * lanes_of<R>, even.part[i], odd.part[i]);
}

struct Add {
    template <class V>
    WARPLOOM_INLINE V operator()(V x, V y) const {
        return x + y;
    }
};
struct Larger {
    template <class V>
    WARPLOOM_INLINE V operator()(V x, V y) const {
        return x > y ? x : y;
    }
    template <class R>
    WARPLOOM_INLINE Sixteen<R> operator()(Sixteen<R> x, Sixteen<R> y) const {
        WARPLOOM_EACH_PART((*this)(x.part[i], y.part[i]));
    }
};

// Two vectors become one of half as many lanes each, in fours of lanes: what `op` makes of lanes 0 and 2, and of 1 and 3; then of
// these two.
#define WARPLOOM_FOURS_4(a, b, c, d) a, b, c, d
#define WARPLOOM_FOURS_8(a, b, c, d) WARPLOOM_FOURS_4(a, b, c, d), a + 4, b + 4, c + 4, d + 4
#define WARPLOOM_FOURS_16(a, b, c, d) WARPLOOM_FOURS_8(a, b, c, d), WARPLOOM_FOURS_8(a + 8, b + 8, c + 8, d + 8)
#define WARPLOOM_FOLD(V, n)                                                                                                  \
    template <class Op>                                                                                                      \
    WARPLOOM_INLINE V fold_halves(V x, V y, Op op) {                                                                         \
        return op(WARPLOOM_SHUFFLE(x, y, WARPLOOM_FOURS_##n(0, n, 1, n + 1)),                                                \
                  WARPLOOM_SHUFFLE(x, y, WARPLOOM_FOURS_##n(2, n + 2, 3, n + 3)));                                           \
    }                                                                                                                        \
    template <class Op>                                                                                                      \
    WARPLOOM_INLINE V fold_quarters(V x, V y, Op op) {                                                                       \
        return op(WARPLOOM_SHUFFLE(x, y, WARPLOOM_FOURS_##n(0, 1, n, n + 1)),                                                \
                  WARPLOOM_SHUFFLE(x, y, WARPLOOM_FOURS_##n(2, 3, n + 2, n + 3)));                                           \
    }
WARPLOOM_FOLD(f4, 4)
WARPLOOM_FOLD(f8, 8)
WARPLOOM_FOLD(f16, 16)

// Four vectors become one: in each of its fours of lanes, one lane for each of theirs.
template <class V, class Op>
WARPLOOM_INLINE V fold_four(const V (&x)[4], Op op) {
    return fold_quarters(fold_halves(x[0], x[1], op), fold_halves(x[2], x[3], op), op);
}
template <class R, class Op>
WARPLOOM_INLINE Sixteen<R> fold_four(const Sixteen<R> (&x)[4], Op op) {
    WARPLOOM_EACH_PART(fold_four({x[0].part[i], x[1].part[i], x[2].part[i], x[3].part[i]}, op));
}

// Of sixteen vectors, each reduced to one number: of their fours, by `fold_four`, the rest.
template <class Op>
WARPLOOM_INLINE f16 fold_lanes(f16 x, f16 y, Op op) {
    return op(WARPLOOM_SHUFFLE(x, y, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
              WARPLOOM_SHUFFLE(x, y, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
}
template <class Op>
WARPLOOM_INLINE void fold_sixteen(const f16 (&four)[4], Op op, float* to) {
    store(to, fold_lanes(fold_lanes(four[0], four[1], op), fold_lanes(four[2], four[3], op), op));
}
template <class R, class Op>
WARPLOOM_INLINE void fold_sixteen(const Sixteen<R> (&four)[4], Op op, float* to) {
    for (int i = 0; i < 4; ++i, to += 4) {
        f4 lanes[4];
        std::memcpy(lanes, &four[i], sizeof(lanes));
        store_as(to, op(op(lanes[0], lanes[1]), op(lanes[2], lanes[3])));
    }
}

}  // namespace warploom
