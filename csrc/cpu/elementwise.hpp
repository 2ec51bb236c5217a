// Norms, gated activations and RoPE of a row, shared by training and serving. float or bfloat16 in memory, float32 in
// registers.
#pragma once
#include <cmath>
#include <type_traits>

#include "cpu/sixteen.hpp"

namespace warploom {

// Calls body(column, lanes) for sixteen columns at a time; the last call may have fewer.
template <class Body>
WARPLOOM_INLINE void across(int columns, const Body& body) {
    int c = 0;
    for (; c + 16 <= columns; c += 16) body(c, 16);
    if (c < columns) body(c, columns - c);
}

// 1 / the standard deviation of a row around a mean; with a mean of 0 around its root mean square.
template <class T>
WARPLOOM_INLINE float inverse_deviation(const T* x, int columns, float eps, float mean = 0) {
    using V = SixteenIn<Register>;
    V squares = {};
    int c = 0;
    for (; c + 16 <= columns; c += 16) {
        const V apart = load_as<V>(x + c) - mean;
        squares += apart * apart;
    }
    float square = sum(as_f16(squares));
    for (; c < columns; ++c) square += (widen(x[c]) - mean) * (widen(x[c]) - mean);
    return 1.0f / std::sqrt(square / float(columns) + eps);
}

enum class Gate { silu, gelu, relu, relu2, gelu_erf, clamped };  // the last: gpt-oss's, of bounded halves
constexpr float kClamp = 7, kClampedSlope = 1.702f;

WARPLOOM_INLINE f16 sigmoid(f16 x) { return 1.0f / (1.0f + exp(-x)); }

// erf(x) to 1.5e-7: Abramowitz and Stegun, 7.1.26.
WARPLOOM_INLINE f16 erf(f16 x) {
    const f16 size = select(x > f16{}, x, -x), t = 1.0f / (1.0f + 0.3275911f * size);
    const f16 tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const f16 value = 1.0f - tail * exp(-size * size);
    return select(x > f16{}, value, -value);
}

// The activation and its derivative. The tanh form of GELU is x · sigmoid(2u): no tanh is needed.
template <Gate kind>
WARPLOOM_INLINE void activate(f16 x, f16& value, f16& slope) {
    if (kind == Gate::silu) {
        const f16 s = sigmoid(x);
        value = x * s;
        slope = s * (1.0f + x * (1.0f - s));
    } else if (kind == Gate::gelu) {
        const f16 s = sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
        value = x * s;
        slope = s + value * (1.0f - s) * 1.5957691216f * (1.0f + 0.134145f * x * x);
    } else if (kind == Gate::gelu_erf) {
        const f16 s = 0.5f + 0.5f * erf(x * 0.70710678f);
        value = x * s;
        slope = f16{};  // only serving has it, and asks for none
    } else if (kind == Gate::clamped) {
        const f16 bounded = select(x > f16{} + kClamp, f16{} + kClamp, x), s = sigmoid(kClampedSlope * bounded);
        value = bounded * s;
        slope = select(x > f16{} + kClamp, f16{}, s + kClampedSlope * value * (1.0f - s));
    } else {
        const f16 positive = select(x > f16{}, x, f16{});
        value = kind == Gate::relu ? positive : positive * positive;
        slope = kind == Gate::relu ? select(x > f16{}, f16{} + 1.0f, f16{}) : 2.0f * positive;
    }
}

// The factor `up` of a gated unit; for clamped_swiglu clamped, plus one.
template <Gate kind>
WARPLOOM_INLINE f16 other_half(f16 up) {
    if (kind != Gate::clamped) return up;
    const f16 most = f16{} + kClamp, below = select(up > most, most, up);
    return select(below > -most, below, -most) + 1.0f;
}

// Gradient of that factor: zero where it was clamped.
template <Gate kind>
WARPLOOM_INLINE f16 where_free(f16 up, f16 gradient) {
    if (kind != Gate::clamped) return gradient;
    const f16 size = select(up > f16{}, up, -up);
    return select(size > f16{} + kClamp, f16{}, gradient);
}

// Calls body(kind) with the gate as a compile-time constant.
template <class Body>
WARPLOOM_INLINE void with_gate(Gate kind, const Body& body) {
    switch (kind) {
        case Gate::silu: return body(std::integral_constant<Gate, Gate::silu>());
        case Gate::gelu: return body(std::integral_constant<Gate, Gate::gelu>());
        case Gate::relu: return body(std::integral_constant<Gate, Gate::relu>());
        case Gate::relu2: return body(std::integral_constant<Gate, Gate::relu2>());
        case Gate::gelu_erf: return body(std::integral_constant<Gate, Gate::gelu_erf>());
        case Gate::clamped: return body(std::integral_constant<Gate, Gate::clamped>());
    }
}

// RoPE of a head: columns i and i + half, rotated by the angle of i; `sign` -1 rotates back. x and y may be the same.
template <class T>
WARPLOOM_INLINE void rotate_head(const T* x, T* y, int half, const float* cos, const float* sin, float sign = 1) {
    across(half, [&](int c, int n) __attribute__((always_inline)) {
        const f16 a = load(x + c, n), b = load(x + c + half, n);
        const f16 u = load(cos + c, n), v = load(sin + c, n) * sign;
        store(y + c, a * u - b * v, n);
        store(y + c + half, b * u + a * v, n);
    });
}

}  // namespace warploom
