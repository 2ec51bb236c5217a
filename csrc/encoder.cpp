#include "encoder.hpp"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

namespace warploom {

namespace {

constexpr size_t kPiecesAtOnce = 1024, kGroup = 64, kSegment = 1 << 20, kSmallSegment = 1 << 17;

const WordCache::Bucket kNowhere = [] {  // where words that are too long for a key are looked up, in vain
    WordCache::Bucket bucket{};
    for (auto& entry : bucket.entry) entry.key = {~0ull, ~0ull};
    return bucket;
}();

inline void copy_four(const uint32_t* ids, uint32_t* out) {
    uint64_t low, high;
    std::memcpy(&low, ids, 8);
    std::memcpy(&high, ids + 2, 8);
    high &= static_cast<uint64_t>(WordCache::kIdMask) << 32 | 0xFFFFFFFF;
    std::memcpy(out, &low, 8);
    std::memcpy(out + 2, &high, 8);
}

inline void copy_four(const uint32_t* ids, uint16_t* out) {
    uint64_t low, high;
    std::memcpy(&low, ids, 8);
    std::memcpy(&high, ids + 2, 8);
    uint64_t packed = (low & 0xFFFF) | (low >> 16 & 0xFFFF0000) | (high & 0xFFFF) << 32 | (high >> 32 & 0xFFFF) << 48;
    std::memcpy(out, &packed, 8);
}

}  // namespace

Specials::Specials(std::vector<std::pair<std::string, TokenId>> tokens) : tokens_(std::move(tokens)) {
    std::stable_sort(tokens_.begin(), tokens_.end(),
                     [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
    for (const auto& token : tokens_) {
        uint8_t first = static_cast<uint8_t>(token.first[0]);
        only_start_ = !starts_[first] && only_start_ == -1 ? first : only_start_ == first ? first : -2;
        starts_[first] = true;
    }
}

Specials::Found Specials::next(TextView text, size_t begin) const {
    for (size_t at = begin; at < text.size; ++at) {
        if (only_start_ >= 0) {
            const void* found = std::memchr(text.data + at, only_start_, text.size - at);
            if (!found) break;
            at = static_cast<size_t>(static_cast<const uint8_t*>(found) - text.data);
        } else if (!starts_[text.data[at]]) {
            continue;
        }
        for (const auto& [token, id] : tokens_)
            if (token.size() <= text.size - at && std::memcmp(token.data(), text.data + at, token.size()) == 0)
                return {at, at + token.size(), id};
    }
    return {text.size, text.size, 0};
}

void cut_segments(TextView text, const Specials* specials, size_t segment_size, std::vector<Segment>& segments) {
    size_t begin = 0;
    do {
        Specials::Found special = specials ? specials->next(text, begin) : Specials::Found{text.size, text.size, 0};
        for (size_t limit; begin < special.begin; begin = limit) {
            limit = special.begin;
            if (limit - begin > segment_size + segment_size / 2) {
                limit = safe_cut(text.data, begin, begin + segment_size, special.begin);
                if (limit == begin) limit = special.begin;
            }
            segments.push_back({text.data, begin, limit, special.begin, 0, false});
        }
        if (special.begin < special.end) segments.push_back({text.data, 0, 0, 0, special.id, false});
        begin = special.end;
    } while (begin < text.size);
}

uint64_t stream_cut(TextView text, const Specials* specials) {
    size_t longest = specials ? specials->longest() : 1;
    if (text.size <= longest) return 0;
    size_t limit = text.size - longest, begin = 0;
    while (begin < limit) {
        Specials::Found special = specials ? specials->next(text, begin) : Specials::Found{text.size, text.size, 0};
        if (special.begin >= limit) return safe_cut(text.data, begin, limit, special.begin);
        begin = special.end;
    }
    return begin;
}

Encoder::Encoder(Merges merges, Pattern pattern, std::vector<std::pair<std::string, TokenId>> whole_words)
    : merges_(std::move(merges)), pattern_(pattern), whole_words_(std::move(whole_words)) {
    std::sort(whole_words_.begin(), whole_words_.end());
}

// A word the first cache does not know: ask the second one, or merge, and remember.
template <class Id>
Id* Encoder::encode_new(const uint8_t* word, size_t length, WordCache& cache, Id* out) const {
    size_t count = 0;
    const TokenId* ids = length > 4 ? cache.find_long(word, length, count) : nullptr;
    if (!ids) {
        if (cache.ids.size() < length) cache.ids.resize(length);
        auto same = [&](const auto& known) { return known.first.compare(0, std::string::npos, reinterpret_cast<const char*>(word), length); };
        auto found = std::partition_point(whole_words_.begin(), whole_words_.end(), [&](const auto& known) { return same(known) < 0; });
        if (found != whole_words_.end() && same(*found) == 0) {
            cache.ids[0] = found->second;
            count = 1;
        } else {
            count = merges_.encode(word, length, cache.ids.data(), cache.scratch);
        }
        ids = cache.ids.data();
        if (length <= kKeyBytes && count <= 4) cache.insert(copy_key(word, length), ids, count);
        else cache.insert_long(word, length, ids, count);
    }
    for (size_t i = 0; i < count; ++i) out[i] = static_cast<Id>(ids[i]);
    return out + count;
}

// Appends the ids of consecutive pieces; `readable` bytes of text may be loaded.
template <class Id>
void Encoder::look_up(const uint8_t* text, size_t readable, const uint32_t* ends, size_t count, WordCache& cache,
                      IdBuffer<Id>& ids) const {
    WordKey keys[kGroup];
    const WordCache::Bucket* buckets[kGroup];
    uint32_t begin = 0;
    for (size_t first = 0; first < count; first += kGroup) {
        const uint32_t* group = ends + first;
        size_t n = std::min(kGroup, count - first);
        uint32_t start = begin;
        if (group[n - 1] + size_t{16} <= readable) {
            for (size_t i = 0; i < n; ++i) {
                uint32_t length = group[i] - start;
                keys[i] = load_key(text + start, length <= kKeyBytes ? length : 0);
                const WordCache::Bucket* bucket = cache.bucket_of(keys[i]);
                buckets[i] = length <= kKeyBytes ? bucket : &kNowhere;
                __builtin_prefetch(buckets[i]);
                start = group[i];
            }
        } else {
            for (size_t i = 0; i < n; ++i) {
                uint32_t length = group[i] - start;
                keys[i] = copy_key(text + start, length <= kKeyBytes ? length : 0);
                buckets[i] = length <= kKeyBytes ? cache.bucket_of(keys[i]) : &kNowhere;
                start = group[i];
            }
        }
        Id* out = ids.reserve(group[n - 1] - begin + 4);
        Id* const from = out;
        for (size_t i = 0; i < n; ++i) {
            const WordCache::Entry* entry = &buckets[i]->entry[!(buckets[i]->entry[0].key == keys[i])];
            if (__builtin_expect(entry->key == keys[i], 1)) {
                copy_four(entry->ids, out);
                out += entry->count();
            } else {
                const WordCache::Bucket* table = cache.table();
                out = encode_new(text + begin, group[i] - begin, cache, out);
                if (cache.table() != table)  // the table has grown and moved
                    for (size_t j = i + 1; j < n; ++j)
                        if (buckets[j] != &kNowhere) buckets[j] = cache.bucket_of(keys[j]);
            }
            begin = group[i];
        }
        ids.size += static_cast<size_t>(out - from);
    }
}

template <class Id>
void Encoder::encode_segment(const Segment& segment, WordCache& cache, IdBuffer<Id>& ids) const {
    if (segment.begin == segment.limit) {
        ids.push(static_cast<Id>(segment.special));
        return;
    }
    SplitFunction split_next = split_function(pattern_);
    if (cache.ends.empty()) cache.ends.resize(kPiecesAtOnce + kSplitMargin);
    Split split{segment.text, segment.begin, segment.limit, segment.size};
    while (true) {
        const uint8_t* text = segment.text + split.position;
        size_t readable = segment.size - split.position;
        size_t count = split_next(split, cache.ends.data(), kPiecesAtOnce);
        if (count == 0) return;
        look_up(text, readable, cache.ends.data(), count, cache, ids);
    }
}

template <class Id>
void Encoder::encode(const std::vector<TextView>& texts, const Specials* specials, unsigned threads, IdBuffer<Id>& ids,
                     std::vector<uint64_t>* ends, const Checkpoint& checkpoint) const {
    uint64_t total = 0;
    for (const TextView& text : texts) total += text.size;
    threads = static_cast<unsigned>(std::min<uint64_t>(threads, total / kSmallSegment + 1));
    size_t segment_size = std::min<uint64_t>(kSegment, std::max<uint64_t>(kSmallSegment, total / threads / 8));

    std::vector<Segment> segments;
    for (const TextView& text : texts) {
        size_t before = segments.size();
        if (text.size) cut_segments(text, specials, segment_size, segments);
        if (segments.size() == before) segments.push_back({nullptr, 0, 0, 0, 0, true});  // an empty text
        else segments.back().ends_text = true;
    }

    struct Task {
        size_t first, last;  // segments
        IdBuffer<Id> ids;
        std::vector<uint64_t> ends;
    };
    auto run = [&](Task& task, WordCache& cache) {
        for (size_t i = task.first; i < task.last; ++i) {
            const Segment& segment = segments[i];
            if (segment.text) encode_segment(segment, cache, task.ids);
            if (segment.ends_text && ends) task.ends.push_back(task.ids.size);
        }
    };
    std::vector<Task> tasks;
    uint64_t bytes = segment_size;
    for (size_t i = 0; i < segments.size(); ++i) {
        if (bytes >= segment_size) {
            tasks.push_back({i, i, {}, {}});
            bytes = 0;
        }
        tasks.back().last = i + 1;
        bytes += segments[i].limit - segments[i].begin + 16;
    }

    if (threads == 1) {
        std::unique_ptr<WordCache> cache = caches_.take();
        Task whole{0, 0, std::move(ids), {}};
        for (const Task& task : tasks) {
            whole.first = task.first;
            whole.last = task.last;
            run(whole, *cache);
            if (tasks.size() > 1) checkpoint();
        }
        ids = std::move(whole.ids);
        if (ends) ends->insert(ends->end(), whole.ends.begin(), whole.ends.end());
        caches_.give_back(std::move(cache));
        return;
    }

    std::atomic<size_t> next{0}, finished{0};
    std::exception_ptr failure;
    std::mutex mutex;
    std::condition_variable changed;
    auto work = [&] {
        try {
            std::unique_ptr<WordCache> cache = caches_.take();
            for (size_t i; (i = next++) < tasks.size();) run(tasks[i], *cache);
            caches_.give_back(std::move(cache));
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex);
            failure = std::current_exception();
            next = tasks.size();
        }
        std::lock_guard<std::mutex> lock(mutex);
        ++finished;
        changed.notify_one();
    };
    std::vector<std::thread> workers;
    auto join = [&] {
        for (std::thread& worker : workers) worker.join();
        workers.clear();
    };
    try {
        for (unsigned i = 0; i < threads; ++i) workers.emplace_back(work);
        std::unique_lock<std::mutex> lock(mutex);
        while (finished < threads) {
            if (changed.wait_for(lock, std::chrono::milliseconds(50), [&] { return finished == threads; })) break;
            lock.unlock();
            checkpoint();
            lock.lock();
        }
    } catch (...) {
        next = tasks.size();
        join();
        throw;
    }
    join();
    if (failure) std::rethrow_exception(failure);

    uint64_t count = ids.size;
    for (Task& task : tasks) count += task.ids.size;
    ids.reserve(count - ids.size);
    for (Task& task : tasks) {
        if (ends)
            for (uint64_t end : task.ends) ends->push_back(ids.size + end);
        if (task.ids.size) std::memcpy(ids.data() + ids.size, task.ids.data(), task.ids.size * sizeof(Id));
        ids.size += task.ids.size;
        task.ids = IdBuffer<Id>();
    }
}

template <class Id>
void Encoder::encode_pieces(TextView text, const uint64_t* ends, size_t count, IdBuffer<Id>& ids) const {
    std::unique_ptr<WordCache> cache = caches_.take();
    std::vector<uint32_t> relative(kPiecesAtOnce);
    uint64_t base = 0;
    for (size_t first = 0; first < count;) {
        size_t n = 0;
        while (n < kPiecesAtOnce && first + n < count && ends[first + n] - base < 0xFFFFFFFF) {
            relative[n] = static_cast<uint32_t>(ends[first + n] - base);
            ++n;
        }
        if (n == 0) throw std::length_error("a piece of text without a break has 4 GiB or more");
        look_up(text.data + base, text.size - base, relative.data(), n, *cache, ids);
        first += n;
        base = ends[first - 1];
    }
    caches_.give_back(std::move(cache));
}

template void Encoder::encode(const std::vector<TextView>&, const Specials*, unsigned, IdBuffer<uint16_t>&,
                              std::vector<uint64_t>*, const Checkpoint&) const;
template void Encoder::encode(const std::vector<TextView>&, const Specials*, unsigned, IdBuffer<uint32_t>&,
                              std::vector<uint64_t>*, const Checkpoint&) const;
template void Encoder::encode_pieces(TextView, const uint64_t*, size_t, IdBuffer<uint16_t>&) const;
template void Encoder::encode_pieces(TextView, const uint64_t*, size_t, IdBuffer<uint32_t>&) const;

}  // namespace warploom
