// Tensor arguments from Python: address, number format, shape and strides, checked before use.
//
// Python hands over the tensor itself (PyTorch's or NumPy's), never an address. What C++ takes from it is checked against
// what it is about to read or write, so no mistake of a caller's reaches memory that is not the tensor's. Whoever keeps
// an address beyond the call keeps the tensor alive: by py::keep_alive, and for a parameter, whose memory `Module.to`
// replaces, of what its `detach()` gives.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <string>
#include <type_traits>

#include "cpu/training/pointwise.hpp"

namespace warploom {

class Array {
public:
    static constexpr int kMostDims = 6;

    bool given() const { return given_; }
    int dims() const { return dims_; }
    int64_t count() const { return count_; }
    int64_t size(int dim) const {
        if (dim >= dims_) throw pybind11::value_error("a tensor has " + std::to_string(dims_) + " dimensions: too few");
        return shape_[dim];
    }
    int64_t stride(int dim) const { return strides_[dim]; }
    template <class T>
    bool holds() const {
        return kind_ == kind_of<T>();
    }

    // Data of a contiguous tensor of `count` elements.
    template <class T>
    T* numbers(const char* name, int64_t count) const {
        require<T>(name);
        if (count_ != count || !dense())
            refuse(name, std::to_string(count) + " numbers without gaps");
        return static_cast<T*>(data_);
    }

    // Rows with unit stride inside: a matrix, or any contiguous tensor of so many elements.
    template <class T>
    Rows<T> rows(const char* name, int64_t rows, int64_t columns) const {
        const bool matrix = dims_ == 2 && shape_[0] == rows && shape_[1] == columns && (strides_[1] == 1 || columns <= 1);
        if (!matrix) return {numbers<T>(name, rows * columns), columns};
        require<T>(name);
        return {static_cast<T*>(data_), strides_[0]};
    }
    template <class T>
    Rows<T> rows_or_none(const char* name, int64_t count, int64_t columns) const {
        return given_ ? rows<T>(name, count, columns) : Rows<T>{nullptr, 0};
    }
    template <class T>
    T* numbers_or_none(const char* name, int64_t count) const {
        return given_ ? numbers<T>(name, count) : nullptr;
    }

    // (batch, time, heads, width) with unit stride inside heads; other strides are free.
    template <class T>
    T* heads(const char* name, std::array<int64_t, 4> shape) const {
        require<T>(name);
        if (dims_ != 4 || !std::equal(shape.begin(), shape.end(), shape_) || (strides_[3] != 1 && shape[3] > 1))
            refuse(name, "shape (" + std::to_string(shape[0]) + ", " + std::to_string(shape[1]) + ", " +
                             std::to_string(shape[2]) + ", " + std::to_string(shape[3]) + ") with heads without gaps");
        return static_cast<T*>(data_);
    }

    // From a tensor, a NumPy array or None; false where it is none of these.
    bool load(pybind11::handle x);

private:
    template <class T>
    static const char* kind_of();
    template <class T>
    void require(const char* name) const {
        if (!given_) throw pybind11::type_error(std::string(name) + " is None: a tensor is needed");
        if (!holds<T>())
            throw pybind11::type_error(std::string(name) + " must hold " + kind_of<T>() + ", got " + kind_);
        if (!std::is_const_v<T> && fixed_) throw pybind11::value_error(std::string(name) + " is read-only");
    }
    [[noreturn]] void refuse(const char* name, const std::string& wanted) const {
        std::string got;
        for (int i = 0; i < dims_; ++i) got += (i ? ", " : "") + std::to_string(shape_[i]);
        throw pybind11::value_error(std::string(name) + " must have " + wanted + ", got shape (" + got + ")" +
                                    (dense() ? "" : " with gaps"));
    }
    bool dense() const {
        int64_t step = 1;
        for (int i = dims_ - 1; i >= 0; step *= shape_[i], --i)
            if (shape_[i] != 1 && strides_[i] != step) return count_ == 0;
        return true;
    }
    bool load_buffer(pybind11::handle x);
    bool load_tensor(pybind11::handle x);

    void* data_ = nullptr;
    std::string kind_;  // as PyTorch and NumPy name it
    int dims_ = 0;
    int64_t count_ = 0, shape_[kMostDims], strides_[kMostDims];
    bool given_ = false, fixed_ = false;
};

template <class T>
const char* Array::kind_of() {
    using U = std::remove_const_t<T>;
    if (std::is_same_v<U, float>) return "float32";
    if (std::is_same_v<U, bfloat16>) return "bfloat16";
    if (std::is_same_v<U, int64_t>) return "int64";
    if (std::is_same_v<U, int32_t>) return "int32";
    if (std::is_same_v<U, uint16_t>) return "float16";  // as the bits it is in C++
    static_assert(std::is_same_v<U, float> || std::is_same_v<U, uint16_t> || std::is_same_v<U, bfloat16> || std::is_same_v<U, int64_t> ||
                  std::is_same_v<U, int32_t> || std::is_same_v<U, uint8_t>);
    return "uint8";
}

// Dispatch on dtype: calls body(x) with x a float or a bfloat16.
template <class Body>
auto in_format(const Array& x, const Body& body) {
    if (x.holds<bfloat16>()) return body(bfloat16{});
    return body(float{});  // whose taking says what is wrong with any other
}

}  // namespace warploom

namespace pybind11::detail {
template <>
struct type_caster<warploom::Array> {
    PYBIND11_TYPE_CASTER(warploom::Array, const_name("Tensor"));
    bool load(handle source, bool) { return value.load(source); }
};
}  // namespace pybind11::detail
