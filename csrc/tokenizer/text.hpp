// What the doors to Python share: texts as bytes, names as patterns, and the check whether Ctrl-C was pressed.
#pragma once

#include <pybind11/pybind11.h>

#include "tokenizer/encoder.hpp"

namespace warploom {

// The UTF-8 bytes of a str, or of any object that lends bytes. Those of a long str that is not ASCII are made for this
// object only: CPython would keep them as long as the string. `wide`: its characters will do instead.
struct Text {
    pybind11::object owner;
    TextView view;
    Py_buffer buffer{};

    explicit Text(pybind11::handle text, bool wide = false) {
        constexpr Py_ssize_t kLong = 1 << 12;
        if (!PyUnicode_Check(text.ptr())) {
            if (!PyObject_CheckBuffer(text.ptr()))
                throw pybind11::type_error("text must be a str, not " + std::string(Py_TYPE(text.ptr())->tp_name));
            if (PyObject_GetBuffer(text.ptr(), &buffer, PyBUF_SIMPLE) != 0) throw pybind11::error_already_set();
            view = {static_cast<const uint8_t*>(buffer.buf), static_cast<size_t>(buffer.len)};
            return;
        }
        if (PyUnicode_IS_ASCII(text.ptr()) || PyUnicode_GET_LENGTH(text.ptr()) < kLong) {
            Py_ssize_t size;
            const char* data = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
            if (!data) throw pybind11::error_already_set();
            owner = pybind11::reinterpret_borrow<pybind11::object>(text);
            view = {reinterpret_cast<const uint8_t*>(data), static_cast<size_t>(size)};
            return;
        }
        const auto* object = reinterpret_cast<const PyCompactUnicodeObject*>(text.ptr());
        if (PyUnicode_IS_COMPACT(text.ptr()) && object->utf8) {  // made already, for somebody else
            owner = pybind11::reinterpret_borrow<pybind11::object>(text);
            view = {reinterpret_cast<const uint8_t*>(object->utf8), static_cast<size_t>(object->utf8_length)};
            return;
        }
        if (wide) {
            owner = pybind11::reinterpret_borrow<pybind11::object>(text);
            view = {static_cast<const uint8_t*>(PyUnicode_DATA(text.ptr())),
                    static_cast<size_t>(PyUnicode_GET_LENGTH(text.ptr())), static_cast<int>(PyUnicode_KIND(text.ptr()))};
            return;
        }
        owner = pybind11::reinterpret_steal<pybind11::object>(PyUnicode_AsUTF8String(text.ptr()));
        if (!owner) throw pybind11::error_already_set();
        view = {reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(owner.ptr())),
                static_cast<size_t>(PyBytes_GET_SIZE(owner.ptr()))};
    }
    Text(Text&& other) noexcept : owner(std::move(other.owner)), view(other.view), buffer(other.buffer) {
        other.buffer = Py_buffer{};
    }
    Text(const Text&) = delete;
    ~Text() {
        if (buffer.obj) PyBuffer_Release(&buffer);
    }
};

inline void check_signals() {
    pybind11::gil_scoped_acquire lock;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
}

inline Pattern pattern_of(const std::string& name) {
    for (size_t i = 0; i < kPatterns; ++i)
        if (name == kPatternNames[i]) return static_cast<Pattern>(i);
    std::string known;
    for (const char* each : kPatternNames) known += std::string(known.empty() ? "" : ", ") + each;
    throw pybind11::value_error("pattern is '" + name + "'; native scanners exist for " + known);
}

}  // namespace warploom
