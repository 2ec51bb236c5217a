// warploom._native: the one extension module. Each room of csrc/ binds its own functions; nothing here includes torch.
#include <pybind11/pybind11.h>

namespace warploom {
void bind_passes(pybind11::module_& module);
void bind_rows(pybind11::module_& module);
void bind_serving(pybind11::module_& module);
void bind_tokenizer(pybind11::module_& module);
}

PYBIND11_MODULE(_native, module) {
    module.doc() = "warploom's native code; every function has a pure-Python twin";
    warploom::bind_passes(module);
    warploom::bind_rows(module);
    warploom::bind_serving(module);
    warploom::bind_tokenizer(module);
}
