// The vector headers and register tiles against plain loops, on whatever CPU this is compiled for. `make native-test` builds and
// runs it; without Python, so that an emulator can.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "cpu/serving/dense_matrix.hpp"
#include "cpu/serving/packed_matrix.hpp"
#include "cpu/serving/spin_pool.hpp"
#include "cpu/sixteen.hpp"

using namespace warploom;

namespace {

std::mt19937 generator(0);
float normal() { return std::normal_distribution<float>()(generator); }

void check(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(1);
}

std::vector<float> numbers(size_t n) {
    std::vector<float> x(n);
    for (float& each : x) each = normal();
    return x;
}

// exp is right to about one unit in the last place, by any register, and where it ends in 0 or infinity.
template <class V>
void exponentials() {
    for (int i = 0; i < 20000; ++i) {
        float x[16], y[16], z[16], w[16];
        for (float& each : x) each = normal() * 30;
        V all;
        load_as(x, all);
        V copy = all;
        exponentiate(copy);
        store_as(y, copy), store_as(z, exp2_negative(all)), store_as(w, exp_negative(all));
        for (int lane = 0; lane < lanes_of<V>; ++lane) {
            const double right = std::exp(double(x[lane]));
            if (std::fabs(x[lane]) < 87) check(std::fabs(y[lane] - right) <= 2.5e-7 * right, "exponentiate");
            if (x[lane] <= 0 && x[lane] > -86) check(std::fabs(w[lane] - right) <= (2.5e-7 - 8e-8 * x[lane]) * right, "exp_negative");
            const double power = std::exp2(double(x[lane]));
            if (x[lane] <= 0) check(std::fabs(z[lane] - power) <= 2.5e-7 * power + 1e-36, "exp2_negative");
        }
    }
    V low = V{} - 200.0f, unknown = V{} + NAN;
    const V nothing = exp2_negative(V{} - INFINITY), unknown_power = exp2_negative(unknown);
    const V none = exp_negative(V{} - INFINITY), unknown_weight = exp_negative(unknown);
    exponentiate(low), exponentiate(unknown);
    check(nothing[0] < 1e-36f && std::isnan(unknown_power[0]) && low[0] == 0 && std::isnan(unknown[0]), "the ends of exp");
    check(none[0] == 0 && std::isnan(unknown_weight[0]), "the ends of exp_negative");
}

// Sixteen vectors are each reduced to one number, by the same tree in any register.
template <class R>
void folds(float (&to)[16], const std::vector<float>& x) {
    using V = SixteenIn<R>;
    V four[4];
    for (int i = 0; i < 4; ++i) {
        V part[4];
        for (int n = 0; n < 4; ++n) load_as(&x[(4 * i + n) * 16], part[n]);
        four[i] = fold_four(part, Add());
    }
    fold_sixteen(four, Add(), to);
}

template <class V>
void squares() {
    const std::vector<float> x = numbers(256);
    std::vector<float> y(256);
    transpose_16x16<V>(x.data(), 16, y.data(), 16);
    for (int i = 0; i < 256; ++i) check(y[i % 16 * 16 + i / 16] == x[i], "transpose_16x16");
}

// Products of a few shapes against double, a row the same whatever rows are beside it.
void products(const Matrix& matrix, const std::vector<float>& weight, int outputs, int columns, float tolerance) {
    const std::vector<float> x = numbers(size_t(13) * columns);
    std::vector<float> y(size_t(13) * outputs), alone(outputs);
    matrix.multiply(x.data(), 13, y.data());
    for (int row = 0; row < 13; ++row) {
        matrix.multiply(&x[size_t(row) * columns], 1, alone.data());
        for (int n = 0; n < outputs; ++n) {
            check(alone[n] == y[size_t(row) * outputs + n], "a row does not depend on its neighbors");
            double right = 0, size = 0;
            for (int c = 0; c < columns; ++c) {
                const double term = double(x[size_t(row) * columns + c]) * weight[size_t(n) * columns + c];
                right += term, size += term * term;
            }
            check(std::fabs(alone[n] - right) <= tolerance * std::sqrt(size) + 1e-6, "a product");
        }
    }
}

void packed_loops(int bits, bool minimum, bool table, bool wide) {
    Layout layout{bits, 32, minimum, false, table, {}};
    for (int i = 0; i < 16; ++i) layout.table[i] = int8_t(i * i - 100);
    const int outputs = 90, columns = 100;
    const PackedMatrix matrix(numbers(size_t(outputs) * columns).data(), outputs, columns, nullptr, layout, wide);
    const std::vector<float> x = numbers(size_t(7) * columns);
    std::vector<float> plain(size_t(7) * outputs), y(plain.size());
    use_packed_loops("plain");
    matrix.multiply(x.data(), 7, plain.data());
    for (const char* name : {"avx512", "avxvnni", "avx2", "neon"}) {
        if (!use_packed_loops(name)) continue;
        matrix.multiply(x.data(), 7, y.data());
        check(y == plain, name);
        std::printf("%s ", name);
    }
    use_packed_loops("best");
}

}  // namespace

int main() {
    exponentials<f4>(), exponentials<Register>();
    squares<f4>(), squares<Register>();
    const std::vector<float> x = numbers(256);
    float few[16], some[16];
    folds<f4>(few, x), folds<Register>(some, x);
    for (int i = 0; i < 16; ++i) check(few[i] == some[i], "folds of any register");
#ifdef __AVX512F__
    exponentials<f16>(), squares<f16>();
    float many[16];
    folds<f16>(many, x);
    for (int i = 0; i < 16; ++i) check(few[i] == many[i], "folds of sixteen lanes");
#endif
    SpinPool::shared().resize(2);
    for (int outputs : {1, 16, 50, 200})
        for (int columns : {1, 24, 129}) {
            const std::vector<float> weight = numbers(size_t(outputs) * columns);
            products(DenseMatrix<float>(weight.data(), outputs, columns, nullptr), weight, outputs, columns, 1e-5f);
            products(DenseMatrix<bfloat16>(weight.data(), outputs, columns, nullptr), weight, outputs, columns, 0.02f);
        }
    for (bool wide : {false, true}) packed_loops(8, false, false, wide), packed_loops(8, true, false, wide), packed_loops(4, true, false, wide), packed_loops(4, false, true, wide);
    std::puts("the tiles are right");
}
