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

// Where words that are too long for a key are looked up, in vain.
template <class Id>
const typename WordCache<Id>::Bucket kNowhere = [] {
    typename WordCache<Id>::Bucket bucket{};
    for (auto& entry : bucket.entry) entry.key = {~0ull, ~0ull};
    return bucket;
}();

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

template <class Id>
Encoder<Id>::Encoder(Merges merges, Pattern pattern, std::vector<std::pair<std::string, TokenId>> whole_words)
    : merges_(std::move(merges)), pattern_(pattern), whole_words_(std::move(whole_words)) {
    std::sort(whole_words_.begin(), whole_words_.end());
}

template <class Id>
Id* Encoder<Id>::encode_long(const uint8_t* word, size_t length, uint64_t hash, Cache& cache, Id* out) const {
    const typename Cache::LongWord* known = cache.find_long(word, length, hash);
    if (!known) return encode_unknown(word, length, cache, out);
    std::memcpy(out, known->ids(), known->count * sizeof(Id));
    return out + known->count;
}

// Merges a word and remembers it.
template <class Id>
Id* Encoder<Id>::encode_unknown(const uint8_t* word, size_t length, Cache& cache, Id* out) const {
    if (cache.ids.size() < length) cache.ids.resize(length);
    size_t count = 0;
    if (!whole_words_.empty()) {
        std::string piece(reinterpret_cast<const char*>(word), length);
        auto found = std::lower_bound(whole_words_.begin(), whole_words_.end(), std::make_pair(piece, TokenId{0}));
        if (found != whole_words_.end() && found->first == piece) cache.ids[count++] = found->second;
    }
    if (count == 0) count = merges_.encode(word, length, cache.ids.data(), cache.scratch);
    cache.insert(word, length, cache.ids.data(), count);
    for (size_t i = 0; i < count; ++i) out[i] = static_cast<Id>(cache.ids[i]);
    return out + count;
}

// Appends the ids of consecutive pieces; `readable` bytes of text may be loaded.
template <class Id>
void Encoder<Id>::look_up(const uint8_t* text, size_t readable, const uint32_t* ends, size_t count, Cache& cache,
                          IdBuffer<Id>& ids) const {
    WordKey keys[kGroup];
    const typename Cache::Bucket* buckets[kGroup];
    uint64_t hashes[kGroup];   // of long words
    uint8_t long_ones[kGroup];
    // Keys are loaded 16 bytes at a time; words in the last 16 bytes of the text are loaded from a copy with room behind.
    uint8_t tail[32] = {};
    const size_t tail_begin = readable < 16 ? 0 : readable - 15;
    std::memcpy(tail, text + tail_begin, readable - tail_begin);
    uint32_t begin = 0;
    for (size_t first = 0; first < count; first += kGroup) {
        const uint32_t* group = ends + first;
        const size_t n = std::min(kGroup, count - first);
        size_t longs = 0;
        uint32_t start = begin;
        for (size_t i = 0; i < n; ++i) {
            const uint8_t* word = text + start;
            size_t length = group[i] - start;
            start = group[i];
            if (__builtin_expect(length > kKeyBytes, 0)) {
                hashes[i] = hash_word(word, length);
                __builtin_prefetch(cache.slot_of(hashes[i]));
                long_ones[longs++] = static_cast<uint8_t>(i);
                buckets[i] = &kNowhere<Id>;
                keys[i] = {0, 0};
                continue;
            }
            if (__builtin_expect(start - length >= tail_begin, 0)) word = tail + (start - length - tail_begin);
            keys[i] = load_key(word, length);
            buckets[i] = cache.bucket_of(keys[i]);
            __builtin_prefetch(buckets[i]);
        }
        for (size_t k = 0; k < longs; ++k) __builtin_prefetch(cache.record_at(cache.slot_of(hashes[long_ones[k]])));

        Id* out = ids.reserve(group[n - 1] - begin + 16 / sizeof(Id));
        Id* const from = out;
        for (size_t i = 0; i < n; ++i) {
            const typename Cache::Entry* entry = &buckets[i]->entry[!(buckets[i]->entry[0].key == keys[i])];
            const uint8_t* word = text + begin;
            size_t length = group[i] - begin;
            begin = group[i];
            if (__builtin_expect(!(entry->key == keys[i]), 0)) {
                if (length > kKeyBytes) {
                    out = encode_long(word, length, hashes[i], cache, out);
                    continue;
                }
                entry = cache.find_beside(keys[i]);
                if (!entry) {
                    const auto* table = cache.table();
                    out = encode_long(word, length, hash_key(keys[i]), cache, out);
                    if (cache.table() != table)  // it has grown and moved
                        for (size_t j = i + 1; j < n; ++j)
                            if (buckets[j] != &kNowhere<Id>) buckets[j] = cache.bucket_of(keys[j]);
                    continue;
                }
            }
            std::memcpy(out, entry->ids, 16);
            out += entry->count();
        }
        ids.size += static_cast<size_t>(out - from);
    }
}

template <class Id>
void Encoder<Id>::encode_segment(const Segment& segment, Cache& cache, IdBuffer<Id>& ids) const {
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
void Encoder<Id>::encode(const std::vector<TextView>& texts, const Specials* specials, unsigned threads, IdBuffer<Id>& ids,
                     std::vector<uint64_t>* ends, const Checkpoint& checkpoint) const {
    if (texts.size() == 1 && !specials && texts[0].size < kSmallSegment) {
        std::unique_ptr<Cache> cache = caches_.take();
        if (texts[0].size) encode_segment({texts[0].data, 0, texts[0].size, texts[0].size, 0, true}, *cache, ids);
        if (ends) ends->push_back(ids.size);
        caches_.give_back(std::move(cache));
        return;
    }
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
    auto run = [&](Task& task, Cache& cache) {
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
        std::unique_ptr<Cache> cache = caches_.take();
        cache->scratch.checkpoint = &checkpoint;
        Task whole{0, 0, std::move(ids), {}};
        for (const Task& task : tasks) {
            whole.first = task.first;
            whole.last = task.last;
            run(whole, *cache);
            if (tasks.size() > 1) checkpoint();
        }
        cache->scratch.checkpoint = nullptr;
        ids = std::move(whole.ids);
        if (ends) ends->insert(ends->end(), whole.ends.begin(), whole.ends.end());
        caches_.give_back(std::move(cache));
        return;
    }

    struct Stopped {};
    std::atomic<size_t> next{0}, finished{0};
    std::atomic<bool> stopped{false};
    const Checkpoint stop_if_asked = [&] {
        if (stopped) throw Stopped();
    };
    std::exception_ptr failure;
    std::mutex mutex;
    std::condition_variable changed;
    auto work = [&] {
        try {
            std::unique_ptr<Cache> cache = caches_.take();
            cache->scratch.checkpoint = &stop_if_asked;
            for (size_t i; (i = next++) < tasks.size();) run(tasks[i], *cache);
            cache->scratch.checkpoint = nullptr;
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
        stopped = true;
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
void Encoder<Id>::encode_pieces(TextView text, const uint64_t* ends, size_t count, IdBuffer<Id>& ids) const {
    std::unique_ptr<Cache> cache = caches_.take();
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

template class Encoder<uint16_t>;
template class Encoder<uint32_t>;

}  // namespace warploom
