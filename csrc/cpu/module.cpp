// warploom._native: the CPU engine, training and serving. Nothing here includes torch.
#include <pybind11/pybind11.h>

#include "simd.hpp"

namespace warploom {
void bind_passes(pybind11::module_& module);
void bind_rows(pybind11::module_& module);
void bind_serving(pybind11::module_& module);

// What this build makes of this CPU.
const char* instruction_set() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (has_avx512) return has_vnni ? "avx512 with vnni" : "avx512";
    if (__builtin_cpu_supports("fma")) return "avx2";
    return "sse2";
#elif defined(__aarch64__)
    return "neon";
#else
    return "portable";
#endif
}

// A build for one machine (simd.hpp) says so on another, where it would end in an illegal instruction.
void require_cpu() {
#if defined(WARPLOOM_ONE_CPU) && defined(__AVX512F__)
    const bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
#elif defined(WARPLOOM_ONE_CPU) && defined(__AVX2__)
    const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
    const bool here = true;
#endif
    if (!here) throw pybind11::import_error("warploom._native was compiled on another CPU, for instructions that this one lacks");
}
}  // namespace warploom

PYBIND11_MODULE(_native, module) {
    warploom::require_cpu();
    module.doc() = "warploom's CPU engine in C++: what runs without it is PyTorch";
    module.def("instruction_set", &warploom::instruction_set);
    warploom::bind_passes(module);
    warploom::bind_rows(module);
    warploom::bind_serving(module);
}
