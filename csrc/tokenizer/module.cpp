// warploom._tokenizer: scanners, BPE and its training. An extension of its own, so no other part can take it down.
#include <pybind11/pybind11.h>

namespace warploom {
void bind_tokenizer(pybind11::module_& module);
void bind_bpe_trainer(pybind11::module_& module);
}

PYBIND11_MODULE(WARPLOOM_MODULE, module) {
    module.doc() = "warploom's tokenizer in C++; every function has a pure-Python twin";
    warploom::bind_tokenizer(module);
    warploom::bind_bpe_trainer(module);
}
