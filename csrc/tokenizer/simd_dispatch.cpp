#include "tokenizer/simd_dispatch.hpp"

#include <atomic>
#include <stdexcept>
#include <string>

namespace warploom {

namespace {

const Kernels* best() {
    for (const Kernels* kernels : {kernels_for_avx512(), kernels_for_avx2()})
        if (kernels) return kernels;
    return kernels_for_any();
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> kernels{best()};
    return kernels;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_acquire); }

size_t split_next(Pattern pattern, Split& split, uint32_t* ends, size_t capacity) {
    const uint64_t before = split.position;
    const size_t count = kernels().split[static_cast<int>(pattern)](split, ends, capacity);
    if (split.position - before > 0xFFFFFFFF) throw std::length_error("a piece of text without a break has 4 GiB or more");
    return count;
}

template <>
LookUp<uint16_t> look_up_function<uint16_t>() {
    return kernels().look_up16;
}

template <>
LookUp<uint32_t> look_up_function<uint32_t>() {
    return kernels().look_up32;
}

const char* instruction_set() { return kernels().name; }

void use_instruction_set(const char* name) {
    std::string wanted = name;
    if (wanted != "avx512" && wanted != "avx2" && wanted != "portable" && wanted != "best")
        throw std::invalid_argument("instruction set is '" + wanted + "'; it must be avx512, avx2, portable or best");
    const Kernels* kernels = wanted == "avx512" ? kernels_for_avx512() : wanted == "avx2" ? kernels_for_avx2()
                           : wanted == "best" ? best() : kernels_for_any();
    if (!kernels) throw std::invalid_argument("this machine or build has no " + wanted);
    chosen() = kernels;
}

}  // namespace warploom
