#include "cpu/serving/paged_attention.hpp"

#include <algorithm>
#include <vector>

#include "cpu/index.hpp"
#include "cpu/serving/float_pages.hpp"
#include "cpu/serving/int8_pages.hpp"
#include "cpu/serving/spin_pool.hpp"

namespace warploom {

namespace {

// Queries of a key head in one block share the pages that it reads. Of few tokens, blocks are smaller, so that threads have some each.
constexpr int kQueries = 288, kLeastQueries = 96, kBlocksPerThread = 6;

void round_to(const float* from, int n, bfloat16* to) {
    for (int i = 0; i < n; ++i) narrow(from[i], to[i]);
}
void round_to(const float* from, int n, float* to) { std::copy(from, from + n, to); }

// All that neighbors of one sequence will look up is there.
void check_pages(const Pages& pages, const Step& step, const AttentionOptions& options, int first, int last) {
    const int64_t sequence = within(step.sequences[first], step.rows, "sequence");
    within(step.positions[first], int64_t(step.width) * pages.page_size, "position");
    const int64_t end = within(step.positions[last], int64_t(step.width) * pages.page_size, "position");
    const int64_t begin = options.window > 0 ? std::max<int64_t>(0, step.positions[first] + 1 - options.window) : 0;
    const int32_t* table = step.table + sequence * step.width;
    for (int64_t at = begin / pages.page_size; at <= end / pages.page_size; ++at) within(table[at], pages.count, "page");
}

}  // namespace

void write_page(const Pages& pages, int64_t slot, const float* k, const float* v) {
    if (slot < 0) return;
    within(slot, pages.count * pages.page_size, "slot");
    if (pages.format == Format::int8) return write_int8(pages, slot, k, v);
    const int width = pages.kv_heads * pages.head_dim;
    if (pages.format == Format::halves) {
        round_to(k, width, static_cast<bfloat16*>(pages.keys) + slot * width);
        round_to(v, width, static_cast<bfloat16*>(pages.values) + slot * width);
    } else {
        round_to(k, width, static_cast<float*>(pages.keys) + slot * width);
        round_to(v, width, static_cast<float*>(pages.values) + slot * width);
    }
}

void attend_pages(const Pages& pages, const Step& step, const AttentionOptions& options, const float* q, int64_t q_stride,
                  float* out) {
    const int K = pages.kv_heads, share = step.tokens * options.heads / (kBlocksPerThread * SpinPool::shared().size());
    const int most = std::max(1, std::min(std::max(share, kLeastQueries), kQueries) / (options.heads / K));
    thread_local std::vector<int> starts;  // of runs: neighbors of one sequence
    auto& runs = starts;                   // the caller's, whichever thread works on it
    runs.clear();
    int tokens = 0;
    for (; tokens < step.tokens && step.slots[tokens] >= 0; ++tokens) {
        const bool on = tokens > 0 && step.sequences[tokens] == step.sequences[tokens - 1] &&
                        step.positions[tokens] == step.positions[tokens - 1] + 1;
        if (!on || tokens - runs.back() == most) runs.push_back(tokens);
    }
    const int count = int(runs.size());
    runs.push_back(tokens);  // what follows is padding
    for (int run = 0; run < count; ++run) check_pages(pages, step, options, runs[run], runs[run + 1] - 1);
    // A page is one run of memory with all heads' keys, so a block takes them all, but where its queries share a page's rows
    // (their caches hold one head's), or where blocks are few.
    const bool apart = most * (options.heads / K) > kDirect && tokens > kDirect * count;
    const int parts = !apart && count >= 4 * SpinPool::shared().size() ? 1 : K;
    const auto attend = pages.format == Format::int8 ? attend_int8 : attend_float_pages;
    SpinPool::shared().run(count * parts, [&](int number) {
        const int run = number / parts, first = runs[run];
        attend(pages, step, options, q, q_stride, QueryBlock{first, runs[run + 1] - first, number % parts, K / parts}, out);
    });
}

}  // namespace warploom
