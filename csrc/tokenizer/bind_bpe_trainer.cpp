// Python's door to training.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "tokenizer/text.hpp"
#include "tokenizer/bpe_trainer.hpp"

namespace py = pybind11;

namespace warploom {

namespace {

Ties ties_of(const std::string& name) {
    return name == "bytes" ? Ties::kBytes : name == "hf" ? Ties::kHuggingFace : Ties::kIds;
}

// The merges as an array, left halves and right ones in turn: a list of tuples would take ten times the memory.
py::array_t<Symbol> learn(WordCounter& counter, uint64_t num_merges, const std::string& ties, uint64_t min_frequency,
                          uint64_t max_token_length, std::vector<uint32_t> byte_order, const py::object& progress) {
    TrainingRules rules{num_merges, ties_of(ties), min_frequency, max_token_length, std::move(byte_order)};
    std::vector<std::pair<Symbol, Symbol>> merges;
    {
        py::gil_scoped_release unlocked;
        merges = train(counter.take(), rules, [&](uint64_t done) {
            check_signals();
            if (progress.is_none()) return;
            py::gil_scoped_acquire lock;
            progress(done, num_merges);
        });
    }
    py::array_t<Symbol> halves(static_cast<py::ssize_t>(2 * merges.size()));
    Symbol* half = halves.mutable_data();
    for (auto [left, right] : merges) *half++ = left, *half++ = right;
    return halves;
}

}  // namespace

void bind_bpe_trainer(py::module_& module) {
    py::class_<WordCounter>(module, "WordCounter")
        .def(py::init([](const std::string& pattern, unsigned threads) { return WordCounter(pattern_of(pattern), std::max(1u, threads)); }))
        .def("add",
             [](WordCounter& counter, py::handle text, const Specials* specials) {
                 Text utf8(text);
                 py::gil_scoped_release unlocked;
                 counter.add(utf8.view, specials, check_signals);
             })
        .def("add_words",
             [](WordCounter& counter, const std::vector<std::pair<py::bytes, uint64_t>>& words) {
                 for (const auto& [word, count] : words) {
                     std::string_view view = word;
                     counter.add_word(reinterpret_cast<const uint8_t*>(view.data()), view.size(), count);
                 }
             })
        .def("train", &learn);
}

}  // namespace warploom
