// warploom._native: the CPU engine, training and serving; on x86 also as _native_avx2 and _native_avx512 (setup.py). Nothing here
// includes torch.
#include <pybind11/pybind11.h>

#include "simd.hpp"

namespace warploom {
void bind_passes(pybind11::module_& module);
void bind_rows(pybind11::module_& module);
void bind_serving(pybind11::module_& module);

const char* instruction_set() {
#if defined(__AVX512F__)
    return has_vnni ? "avx512 with vnni" : "avx512";
#elif defined(__AVX2__)
    return "avx2";
#elif defined(__x86_64__)
    return "sse2";
#elif defined(__aarch64__)
    return "neon";
#else
    return "portable";
#endif
}
}  // namespace warploom

PYBIND11_MODULE(WARPLOOM_MODULE, module) {
    module.doc() = "warploom's CPU engine in C++: what runs without it is PyTorch";
    module.def("instruction_set", &warploom::instruction_set);
    warploom::bind_passes(module);
    warploom::bind_rows(module);
    warploom::bind_serving(module);
}
