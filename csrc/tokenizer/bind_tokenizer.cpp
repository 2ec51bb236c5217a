// Python's door to the tokenizer: strings in, lists and NumPy arrays out, the interpreter lock released in between.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "tokenizer/decoder.hpp"
#include "tokenizer/encoder.hpp"
#include "tokenizer/text.hpp"

namespace py = pybind11;

namespace warploom {

namespace {

template <class T>
py::array_t<T> to_array(T* data, size_t size) {
    py::capsule owner(data, [](void* memory) { std::free(memory); });
    return py::array_t<T>(static_cast<py::ssize_t>(size), data, owner);
}

template <class Id>
py::array to_array(IdBuffer<Id>& ids) {
    size_t size = ids.size;
    ids.reserve(1);
    return to_array(ids.release(), size);
}

const std::vector<TokenId>& checked(const std::vector<TokenId>& byte_ids, const std::vector<TokenId>& left,
                                    const std::vector<TokenId>& right, const std::vector<TokenId>& merged) {
    if (byte_ids.size() != 256 || left.size() != right.size() || left.size() != merged.size())
        throw py::value_error("a vocabulary is the ids of 256 bytes and as many left halves, right halves and results of merges, got " +
                              std::to_string(byte_ids.size()) + ", " + std::to_string(left.size()) + ", " +
                              std::to_string(right.size()) + " and " + std::to_string(merged.size()));
    return byte_ids;
}

template <class Id>
class Bpe {
public:
    Bpe(std::vector<TokenId> byte_ids, std::vector<TokenId> left, std::vector<TokenId> right, std::vector<TokenId> merged,
        const std::string& pattern, std::vector<std::pair<std::string, TokenId>> whole_words, TokenId first_fragment,
        Metaspace metaspace)
        : encoder_(Merges(checked(byte_ids, left, right, merged), left, right, merged, first_fragment), pattern_of(pattern),
                   std::move(whole_words), metaspace) {}

    ~Bpe() {
        for (PyObject* number : numbers_) Py_XDECREF(number);
    }

    // `specials` is a Specials or None in everything below.

    py::list encode(py::handle text, const Specials* specials) {
        Text view(text, !specials);
        IdBuffer<Id> ids;
        run(text, view.view, specials, Follows::kStart, 1, ids, nullptr);
        return to_list(ids.data(), ids.size);
    }

    // The same without special tokens, as a bare C function: for a short text, the usual door costs more than encoding.
    py::object bare_encode(const py::object& self) {
        static PyMethodDef method = {"encode", &Bpe::bare_call, METH_O, "Token ids of a text."};
        py::capsule holder(this, kHolder, [](PyObject* capsule) {
            Py_DECREF(static_cast<PyObject*>(PyCapsule_GetContext(capsule)));
        });
        PyCapsule_SetContext(holder.ptr(), py::object(self).release().ptr());
        return py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, holder.ptr(), nullptr));
    }

    py::array encode_array(py::handle text, const Specials* specials, unsigned threads, Follows follows) const {
        Text view(text, !specials);
        IdBuffer<Id> ids;
        run(text, view.view, specials, follows, threads, ids, nullptr);
        return to_array(ids);
    }

    size_t count(py::handle text, const Specials* specials, unsigned threads) const {
        Text view(text, !specials);
        IdBuffer<Id> ids;
        run(text, view.view, specials, Follows::kStart, threads, ids, nullptr);
        return ids.size;
    }

    py::list encode_batch(const py::sequence& texts, const Specials* specials, unsigned threads) {
        IdBuffer<Id> ids;
        std::vector<uint64_t> ends = run_many(texts, specials, threads, ids);
        py::list lists(ends.size());
        for (size_t i = 0; i < ends.size(); ++i) {
            uint64_t begin = i ? ends[i - 1] : 0;
            lists[i] = to_list(ids.data() + begin, ends[i] - begin);
        }
        return lists;
    }

    py::tuple encode_batch_array(const py::sequence& texts, const Specials* specials, unsigned threads) const {
        IdBuffer<Id> ids;
        std::vector<uint64_t> ends = run_many(texts, specials, threads, ids);
        py::array_t<int64_t> offsets(static_cast<py::ssize_t>(ends.size() + 1));
        int64_t* offset = offsets.mutable_data();
        offset[0] = 0;
        for (size_t i = 0; i < ends.size(); ++i) offset[i + 1] = static_cast<int64_t>(ends[i]);
        return py::make_tuple(to_array(ids), offsets);
    }

    // Ids of a text cut elsewhere: `ends` are byte offsets.
    py::array encode_pieces(py::handle text, const std::vector<uint64_t>& ends) const {
        Text utf8(text);
        uint64_t last = 0;
        for (uint64_t end : ends) {
            if (end <= last || end > utf8.view.size) throw py::value_error("ends must rise and stay inside the text");
            last = end;
        }
        IdBuffer<Id> ids;
        {
            py::gil_scoped_release unlocked;
            encoder_.encode_pieces(utf8.view, ends.data(), ends.size(), ids);
        }
        return to_array(ids);
    }

private:
    static constexpr const char* kHolder = "warploom.BPE";

    static PyObject* bare_call(PyObject* holder, PyObject* text) {
        try {
            return static_cast<Bpe*>(PyCapsule_GetPointer(holder, kHolder))->encode(text, nullptr).release().ptr();
        } catch (py::error_already_set& error) {
            error.restore();
        } catch (const std::bad_alloc&) {
            PyErr_NoMemory();
        } catch (const std::exception& error) {
            PyErr_SetString(PyExc_ValueError, error.what());
        }
        return nullptr;
    }

    // `source`: a text, or a sequence of texts, that `texts` are views of.
    void run(py::handle source, Texts texts, const Specials* specials, Follows follows, unsigned threads,
             IdBuffer<Id>& ids, std::vector<uint64_t>* ends) const {
        size_t total = 0;
        for (const TextView& text : texts) total += text.size;
        constexpr size_t kSmall = 1 << 12;  // letting the lock go costs more than encoding so little
        if (total < kSmall) return encoder_.encode(texts, specials, follows, 1, ids, ends, [] {});
        try {
            py::gil_scoped_release unlocked;
            encoder_.encode(texts, specials, follows, threads, ids, ends, check_signals);
        } catch (const NoUtf8&) {
            explain(source);
        }
    }

    // Lets Python say where a text has a lone surrogate.
    static void explain(py::handle source) {
        if (PyUnicode_Check(source.ptr())) {
            auto utf8 = py::reinterpret_steal<py::object>(PyUnicode_AsUTF8String(source.ptr()));
            if (!utf8) throw py::error_already_set();
            return;
        }
        for (py::handle text : py::reinterpret_borrow<py::sequence>(source)) explain(text);
    }

    std::vector<uint64_t> run_many(const py::sequence& texts, const Specials* specials, unsigned threads,
                                   IdBuffer<Id>& ids) const {
        std::vector<Text> owners;
        std::vector<TextView> views;
        owners.reserve(texts.size());
        views.reserve(texts.size());
        for (py::handle text : texts) {
            owners.emplace_back(text, !specials);
            views.push_back(owners.back().view);
        }
        std::vector<uint64_t> ends;
        run(texts, views, specials, Follows::kStart, threads, ids, &ends);
        return ends;
    }

    // Each id becomes a Python int once; lists share them, which is several times faster than making new ones.
    py::list to_list(const Id* ids, size_t count) {
        py::object list = py::reinterpret_steal<py::object>(PyList_New(static_cast<Py_ssize_t>(count)));
        if (!list) throw py::error_already_set();
        for (size_t i = 0; i < count; ++i) {
            if (ids[i] >= numbers_.size()) numbers_.resize(ids[i] + 1 + numbers_.size() / 2, nullptr);
            PyObject*& number = numbers_[ids[i]];
            if (!number && !(number = PyLong_FromUnsignedLong(ids[i]))) throw py::error_already_set();
            Py_INCREF(number);
            PyList_SET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i), number);
        }
        return py::reinterpret_steal<py::list>(list.release());
    }

    Encoder<Id> encoder_;
    std::vector<PyObject*> numbers_;  // guarded by the interpreter lock
};

template <class Id>
void bind_bpe(py::module_& module, const char* name) {
    py::class_<Bpe<Id>>(module, name)
        .def(py::init<std::vector<TokenId>, std::vector<TokenId>, std::vector<TokenId>, std::vector<TokenId>,
                      const std::string&, std::vector<std::pair<std::string, TokenId>>, TokenId, Metaspace>(),
             py::arg("byte_ids"), py::arg("left"), py::arg("right"), py::arg("merged"), py::arg("pattern"),
             py::arg("whole_words"), py::arg("first_fragment") = kNoToken, py::arg("metaspace") = Metaspace{})
        .def("encode", &Bpe<Id>::encode)
        .def("bare_encode", [](const py::object& self) { return self.cast<Bpe<Id>&>().bare_encode(self); })
        .def("encode_array", &Bpe<Id>::encode_array, py::arg("text"), py::arg("specials"), py::arg("threads"),
             py::arg("follows") = Follows::kStart)
        .def("count", &Bpe<Id>::count)
        .def("encode_batch", &Bpe<Id>::encode_batch)
        .def("encode_batch_array", &Bpe<Id>::encode_batch_array)
        .def("encode_pieces", &Bpe<Id>::encode_pieces);
}

template <class Id>
py::bytes decode_ids(const Decoder& decoder, const Id* ids, size_t count) {
    py::object bytes;
    char* out;
    uint64_t size = decoder.size_of(ids, count);
    bytes = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(size)));
    if (!bytes) throw py::error_already_set();
    out = PyBytes_AS_STRING(bytes.ptr());
    {
        py::gil_scoped_release unlocked;
        decoder.write(ids, count, out, size);
    }
    return py::reinterpret_steal<py::bytes>(bytes.release());
}

py::bytes decode_array(const Decoder& decoder, const py::array& ids) {
    auto decode_as = [&](auto zero) {
        using Id = decltype(zero);
        py::array_t<Id, py::array::c_style> typed = py::reinterpret_borrow<py::array>(ids);
        return decode_ids(decoder, typed.data(), static_cast<size_t>(typed.size()));
    };
    if (ids.dtype().kind() == 'u' && ids.itemsize() == 2) return decode_as(uint16_t{});
    if (ids.dtype().kind() == 'u' && ids.itemsize() == 4) return decode_as(uint32_t{});
    if (ids.dtype().kind() != 'u' && ids.dtype().kind() != 'i' && ids.size() > 0)
        throw std::invalid_argument("ids must be whole numbers, not " + std::string(py::str(ids.dtype())));
    return decode_as(int64_t{});
}

py::array_t<uint64_t> split(py::handle text, const std::string& pattern) {
    Text utf8(text);
    std::vector<uint64_t> all;
    std::vector<uint32_t> ends(256 + kSplitMargin);
    Split state{utf8.view.data, 0, utf8.view.size, utf8.view.size};
    const Pattern by = pattern_of(pattern);
    while (true) {
        uint64_t base = state.position;
        size_t count = split_next(by, state, ends.data(), 256);
        if (count == 0) break;
        for (size_t i = 0; i < count; ++i) all.push_back(base + ends[i]);
    }
    return py::array_t<uint64_t>(static_cast<py::ssize_t>(all.size()), all.data());
}

// What a text, a vocabulary or a list of ids is refused for, as the rest of the tokenizer says it.
void as_input_error(std::exception_ptr error) {
    const auto raise = [](const char* what) {
        PyErr_SetString(py::module_::import("warploom.tokenizer.errors").attr("InputError").ptr(), what);
    };
    try {
        std::rethrow_exception(error);
    } catch (const std::invalid_argument& refusal) {
        raise(refusal.what());
    } catch (const std::length_error& refusal) {
        raise(refusal.what());
    }
}

}  // namespace

void bind_tokenizer(py::module_& module) {
    py::register_local_exception_translator(&as_input_error);
    py::enum_<Follows>(module, "Follows")
        .value("start", Follows::kStart)
        .value("added", Follows::kAdded)
        .value("text", Follows::kText);

    py::class_<Metaspace>(module, "Metaspace").def(py::init<>()).def(py::init([](const std::string& prefix, bool if_missing) {
        if (prefix != "never" && prefix != "first" && prefix != "always")
            throw py::value_error("prefix is '" + prefix + "'; it must be never, first or always");
        return Metaspace{true, prefix == "never" ? Metaspace::kNever : prefix == "first" ? Metaspace::kFirst : Metaspace::kAlways,
                         if_missing};
    }));

    py::class_<Specials>(module, "Specials")
        .def(py::init([](const std::vector<std::tuple<std::string, TokenId, bool, bool>>& tokens) {
            std::vector<AddedToken> added;
            for (const auto& [text, id, lstrip, rstrip] : tokens) added.push_back({text, id, lstrip, rstrip});
            return Specials(std::move(added));
        }));

    bind_bpe<uint16_t>(module, "BPE16");
    bind_bpe<uint32_t>(module, "BPE32");

    py::class_<Decoder>(module, "Decoder")
        .def(py::init<const std::vector<std::pair<uint64_t, std::string>>&>())
        .def("decode", &decode_array);

    module.def("split", &split, "Byte offsets of the ends of a text's pieces.");
    module.def("stream_cut", [](py::handle text, const Specials* specials, const std::string& pattern) {
        StreamCut cut = stream_cut(Text(text).view, specials, pattern_of(pattern));
        return py::make_tuple(cut.at, cut.follows);
    }, "Up to where a text that goes on may be treated as if it ended there, and what the rest follows.");
    module.def("first_invalid_utf8", [](py::handle text) {
        Text utf8(text);
        return first_invalid_utf8(utf8.view.data, utf8.view.size);
    });
    module.def("instruction_set", &instruction_set);
    module.def("use_instruction_set", &use_instruction_set);
}

}  // namespace warploom
