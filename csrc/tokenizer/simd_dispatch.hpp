// SIMD dispatch: loops that are compiled once per instruction set, and the run-time choice among them.
//
// simd_avx512.cpp, simd_avx2.cpp and simd_any.cpp compile the same loops (simd_loops.hpp), each with its own means. Which one
// runs is decided at run time, when the first text is encoded, so the build knows nothing about the machine it is made on.
#pragma once

#include "tokenizer/encoder.hpp"
#include "tokenizer/splitter.hpp"

namespace warploom {

constexpr size_t kNoUtf8 = ~size_t{0};

struct Kernels {
    const char* name;
    size_t (*split[kPatterns])(Split& split, uint32_t* ends, size_t capacity);
    LookUp<uint16_t> look_up16;
    LookUp<uint32_t> look_up32;
    void (*merge)(const Merges& merges, NewWords& words);
    size_t (*utf8_of_1)(const uint8_t* text, size_t count, uint8_t* out);  // characters of so many bytes
    size_t (*utf8_of_2)(const uint16_t* text, size_t count, uint8_t* out);
    size_t (*utf8_of_4)(const uint32_t* text, size_t count, uint8_t* out);
};

// The chosen ones.
const Kernels& kernels();

// Those of each instruction set; nullptr where the build or this machine has it not.
const Kernels* kernels_for_avx512();
const Kernels* kernels_for_avx2();
const Kernels* kernels_for_any();

}  // namespace warploom
