// Paged attention: KV-cache writes, and attention that reads keys and values in place.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/serving/matrix.hpp"
#include "cpu/serving/spin_pool.hpp"

namespace warploom {

// Attention metadata of a step: position, sequence and KV-cache slot of each token, and page tables.
struct Step {
    int tokens;
    const int64_t* positions;  // (tokens)
    const int32_t* sequences;  // (tokens): rows of the page table
    const int64_t* slots;      // (tokens): page · page size + offset; negative writes nothing
    const int32_t* table;      // (rows, width): pages
    int rows, width;
};

// KV-cache pages of one layer: (pages, page size, kv heads, head dim) of float32 or bfloat16, or tiles of int8_pages.hpp.
struct Pages {
    void* keys;
    void* values;
    Format format;
    int page_size, kv_heads, head_dim;
    int64_t count;
};

struct AttentionOptions {
    int heads;
    int window;     // how many keys a query sees, itself included; 0: all before it
    float softcap;  // 0: none
    float scale;
    const float* sinks;  // (heads): scores without a value that take part in each softmax; null: none
};

// `tokens` neighbors of one sequence from token `first` on, all heads of `groups` groups.
struct QueryBlock {
    int first, tokens, group, groups;
};

// Calls work(token) for every token. Tokens in adjacent slots stay in one thread: in 8 bits they share cache lines (false
// sharing).
template <class Work>
void each_token(const Step& step, const Work& work) {
    constexpr int run = 16;
    thread_local std::vector<int> starts;
    auto& runs = starts;  // the caller's, whichever thread works on it
    runs.clear();
    for (int t = 0; t < step.tokens; ++t)
        if (t == 0 || step.slots[t] / run != step.slots[t - 1] / run) runs.push_back(t);
    const int count = int(runs.size());
    runs.push_back(step.tokens);
    SpinPool::shared().run(count, [&](int task) {
        for (int t = runs[task]; t < runs[task + 1]; ++t) work(t);
    });
}

// Writes one token's k and v, kv_heads · head_dim floats, into the pages; negative slots are skipped. An invalid slot
// throws out_of_range, and so do, below, an invalid sequence, position or page.
void write_page(const Pages&, int64_t slot, const float* k, const float* v);

// Every token's queries (rows `q_stride` apart) over all keys up to their own position; `out` is (tokens, heads, D).
// Padding (negative slots) comes last and is left alone. Neighbors of one sequence share the reading of its pages, but
// each query is computed by itself, page by page from the first and in one order of additions, so its bits depend
// on nothing but its own sequence.
void attend_pages(const Pages&, const Step&, const AttentionOptions&, const float* q, int64_t q_stride, float* out);

}  // namespace warploom
