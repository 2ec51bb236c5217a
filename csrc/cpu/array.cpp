#include "cpu/array.hpp"

namespace py = pybind11;

namespace warploom {

bool Array::load(py::handle x) {
    *this = {};
    if (x.is_none()) return true;
    given_ = PyObject_CheckBuffer(x.ptr()) ? load_buffer(x) : load_tensor(x);
    count_ = 1;
    for (int i = 0; i < dims_; ++i) count_ *= shape_[i];
    return given_;
}

bool Array::load_buffer(py::handle x) {
    Py_buffer view;
    if (PyObject_GetBuffer(x.ptr(), &view, PyBUF_STRIDES | PyBUF_FORMAT) != 0) throw py::error_already_set();
    const std::string format = view.format ? view.format : "";
    static const std::pair<const char*, const char*> kinds[] = {
        {"f", "float32"}, {sizeof(long) == 8 ? "l" : "q", "int64"}, {"q", "int64"}, {"i", "int32"}, {"B", "uint8"}};
    kind_ = "numbers of the format '" + format + "'";
    for (const auto& [letter, kind] : kinds)
        if (format == letter) kind_ = kind;
    const bool fits = view.ndim <= kMostDims;
    data_ = view.buf, fixed_ = view.readonly, dims_ = fits ? view.ndim : 0;
    for (int i = 0; i < dims_; ++i) shape_[i] = view.shape[i], strides_[i] = view.strides[i] / view.itemsize;
    PyBuffer_Release(&view);
    return fits;
}

bool Array::load_tensor(py::handle x) {
    if (!py::hasattr(x, "data_ptr")) return false;
    if (!x.attr("is_cpu").cast<bool>()) throw py::type_error("a tensor must be in the CPU's memory");
    const py::tuple shape = x.attr("shape"), strides = x.attr("stride")();
    if (shape.size() > kMostDims) return false;
    dims_ = int(shape.size());
    for (int i = 0; i < dims_; ++i) shape_[i] = shape[i].cast<int64_t>(), strides_[i] = strides[i].cast<int64_t>();
    kind_ = py::str(x.attr("dtype"));
    if (kind_.rfind("torch.", 0) == 0) kind_.erase(0, 6);
    data_ = reinterpret_cast<void*>(x.attr("data_ptr")().cast<uintptr_t>());
    return true;
}

}  // namespace warploom
