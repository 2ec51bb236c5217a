#include "tokenizer/encoder.hpp"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <shared_mutex>
#include <stdexcept>

#include "tokenizer/simd_dispatch.hpp"

namespace warploom {

namespace {

constexpr size_t kPiecesAtOnce = 2048, kSegment = 1 << 20, kSmallSegment = 1 << 16;

}  // namespace

template <class Id>
Encoder<Id>::Encoder(Merges merges, Pattern pattern, const std::vector<std::pair<std::string, TokenId>>& whole_words,
                     Metaspace metaspace)
    : merges_(std::move(merges)), pattern_(pattern), metaspace_(metaspace), divides_(whole_words.empty()) {
    for (const auto& [token, id] : whole_words) whole_words_.add(token, id);
}

// A word that is not at home in the cache; `end` is where the text ends.
template <class Id>
Id* Encoder<Id>::encode_aside(const uint8_t* word, size_t length, const uint8_t* end, Cache& cache, Id* ids, Id* out) const {
    if (length > kKeyBytes) {
        const typename Cache::LongWord* known = cache.find_long(word, length);
        if (!known) return encode_new(word, length, cache, out);
        std::memcpy(out, known->ids(), known->count * sizeof(Id));
        return out + known->count;
    }
    WordKey key = key_of(word, length, end);
    if (const typename Cache::Entry* entry = cache.find(key)) return cache.put(*entry, out);
    if (!divides_ && whole_words_.find(word, length)) return encode_new(word, length, cache, out);
    if (merges_.lacks(word, length)) return encode_new(word, length, cache, out);
    if (uint64_t gaps = divides_ ? merges_.gaps(word, length) : 0) {
        Id* const from = out;
        size_t begin = 0;
        for (gaps |= 1ull << (length - 1); gaps; gaps &= gaps - 1) {
            size_t next = static_cast<size_t>(__builtin_ctzll(gaps)) + 1, part = next - begin;
            const typename Cache::Entry* entry = cache.find(key_of(word + begin, part, end));
            out = entry ? cache.put(*entry, out) : encode_new(word + begin, part, cache, out);
            begin = next;
        }
        cache.insert(word, length, from, static_cast<size_t>(out - from));
        return out;
    }
    NewWords& waiting = cache.waiting;
    waiting.places[waiting.count] = static_cast<size_t>(out - ids);
    waiting.keys[waiting.count++] = key;
    out += length;  // there are no more ids than bytes
    return waiting.count == NewWords::kMost ? encode_waiting(cache, ids, out) : out;
}

// Merges the words that wait and remembers them, and closes the gaps that their ids leave in what was written since.
template <class Id>
Id* Encoder<Id>::encode_waiting(Cache& cache, Id* ids, Id* out) const {
    constexpr size_t kFew = 3;  // are merged sooner one by one
    NewWords& waiting = cache.waiting;
    if (waiting.count < kFew) merges_.encode_each(waiting);
    else kernels().merge(merges_, waiting);
    Id* end = ids + waiting.places[0];
    for (size_t i = 0; i < waiting.count; ++i) {
        const WordKey& key = waiting.keys[i];
        Id* const from = ids + waiting.places[i] + key.length();
        Id* const until = i + 1 < waiting.count ? ids + waiting.places[i + 1] : out;
        Id* const word = end;
        for (size_t k = 0; k < waiting.sizes[i]; ++k) end = merges_.put(waiting.symbols[k][i], end);
        if (!cache.find(key)) cache.insert(key.bytes(), key.length(), word, static_cast<size_t>(end - word));
        std::memmove(end, from, static_cast<size_t>(until - from) * sizeof(Id));
        end += until - from;
    }
    waiting.count = 0;
    std::fill(waiting.keys, waiting.keys + NewWords::kMost, WordKey{});
    return end;
}

// Merges a word and remembers it.
template <class Id>
Id* Encoder<Id>::encode_new(const uint8_t* word, size_t length, Cache& cache, Id* out) const {
    size_t count = 1;
    const TokenId* whole = divides_ ? nullptr : whole_words_.find(word, length);
    if (whole) {
        *out = static_cast<Id>(*whole);
    } else {
        if (cache.ids.size() < length) cache.ids.resize(length);
        count = merges_.encode(word, length, cache.ids.data(), cache.scratch);
        for (size_t i = 0; i < count; ++i) out[i] = static_cast<Id>(cache.ids[i]);
    }
    cache.insert(word, length, out, count);
    return out + count;
}

// Characters become UTF-8 a segment at a time, in a buffer that stays in the cache.
template <class Id>
void Encoder<Id>::encode_wide(const Segment& segment, Cache& cache, IdBuffer<Id>& ids) const {
    size_t count = segment.limit - segment.begin, size;
    const uint8_t* text = segment.text + segment.begin * static_cast<size_t>(segment.width);
    std::vector<uint8_t>& utf8 = cache.utf8;
    size_t most = count * static_cast<size_t>(segment.width == 4 ? 4 : segment.width + 1) + 64;
    if (utf8.size() < most) utf8.resize(most);
    if (segment.width == 1) size = kernels().utf8_of_1(text, count, utf8.data());
    else if (segment.width == 2) size = kernels().utf8_of_2(reinterpret_cast<const uint16_t*>(text), count, utf8.data());
    else size = kernels().utf8_of_4(reinterpret_cast<const uint32_t*>(text), count, utf8.data());
    if (size == kNoUtf8) throw NoUtf8();
    encode_segment({utf8.data(), 0, size, size, 0, false, 0, segment.follows}, cache, ids);
    if (utf8.size() > 8 * kWideSegment) std::vector<uint8_t>().swap(utf8);
}

namespace {

constexpr uint8_t kMark[] = {0xE2, 0x96, 0x81};  // ▁, U+2581: a space to SentencePiece

// The first ▁ from p on; `end` if there is none.
const uint8_t* find_mark(const uint8_t* p, const uint8_t* end) {
    while (end - p >= 3) {
        p = static_cast<const uint8_t*>(std::memchr(p, kMark[0], static_cast<size_t>(end - p - 2)));
        if (!p) return end;
        if (p[1] == kMark[1] && p[2] == kMark[2]) return p;
        ++p;
    }
    return end;
}

}  // namespace

// Whether a segment gets a space in front.
template <class Id>
bool Encoder<Id>::is_spaced(const Segment& segment) const {
    if (segment.follows == Follows::kText || metaspace_.prefix == Metaspace::kNever) return false;
    if (segment.follows == Follows::kAdded && metaspace_.prefix == Metaspace::kFirst) return false;
    const uint8_t *p = segment.text + segment.begin, *end = segment.text + segment.limit;
    return !metaspace_.if_missing || (*p != ' ' && find_mark(p, std::min(p + 3, end)) != p);
}

// Encodes a copy of a segment, with a space in front if it gets one, and with spaces for ▁.
template <class Id>
void Encoder<Id>::encode_marked(const Segment& segment, Cache& cache, IdBuffer<Id>& ids) const {
    const uint8_t *p = segment.text + segment.begin, *end = segment.text + segment.limit;
    std::vector<uint8_t>& copy = cache.marked;
    copy.clear();
    copy.reserve(segment.limit - segment.begin + 1);
    if (is_spaced(segment)) copy.push_back(' ');
    while (p < end) {
        const uint8_t* mark = find_mark(p, end);
        copy.insert(copy.end(), p, mark);
        if (mark == end) break;
        copy.push_back(' ');
        p = mark + 3;
    }
    encode_text({copy.data(), 0, copy.size(), copy.size(), 0, false}, cache, ids);
    if (copy.capacity() > 8 * kSegment) std::vector<uint8_t>().swap(copy);
}

template <class Id>
void Encoder<Id>::encode_segment(const Segment& segment, Cache& cache, IdBuffer<Id>& ids) const {
    if (segment.width) return encode_wide(segment, cache, ids);
    if (segment.begin == segment.limit) {
        ids.push(static_cast<Id>(segment.special));
        return;
    }
    const uint8_t *begin = segment.text + segment.begin, *end = segment.text + segment.limit;
    if (metaspace_.marks && (is_spaced(segment) || find_mark(begin, end) != end)) encode_marked(segment, cache, ids);
    else encode_text(segment, cache, ids);
}

// Splits a segment of UTF-8 and looks its pieces up.
template <class Id>
void Encoder<Id>::encode_text(const Segment& segment, Cache& cache, IdBuffer<Id>& ids) const {
    LookUp<Id> look_up = look_up_function<Id>();
    if (cache.ends.empty()) cache.ends.resize(kPiecesAtOnce + kSplitMargin);
    Split split{segment.text, segment.begin, segment.limit, segment.size};
    while (true) {
        const uint8_t* text = segment.text + split.position;
        size_t readable = segment.size - split.position;
        size_t count = split_next(pattern_, split, cache.ends.data(), kPiecesAtOnce);
        if (count == 0) break;
        look_up(*this, text, readable, cache.ends.data(), count, cache, ids);
    }
}

// Nothing waits any longer.
template <class Id>
void Encoder<Id>::settle(Cache& cache, IdBuffer<Id>& ids) const {
    if (cache.waiting.count)
        ids.size = static_cast<size_t>(encode_waiting(cache, ids.data(), ids.data() + ids.size) - ids.data());
}

template <class Id>
void Encoder<Id>::encode(Texts texts, const Specials* specials, Follows follows, unsigned threads, IdBuffer<Id>& ids,
                         std::vector<uint64_t>* ends, const Checkpoint& checkpoint) const {
    if (texts.count == 1 && !specials && texts.first->size < kSmallSegment) {
        std::unique_ptr<Cache> cache = caches_.take();
        const TextView& text = *texts.first;
        if (text.size) encode_segment({text.data, 0, text.size, text.size, 0, true, text.width, follows}, *cache, ids);
        settle(*cache, ids);
        if (ends) ends->push_back(ids.size);
        caches_.give_back(std::move(cache));
        return;
    }
    uint64_t total = 0;
    for (const TextView& text : texts) total += text.size;
    threads = static_cast<unsigned>(std::min<uint64_t>(threads, total / kSmallSegment + 1));
    size_t segment_size = std::min<uint64_t>(kSegment, std::max<uint64_t>(kSmallSegment, total / threads / 64));

    ids.reserve(total / 3);  // about what it takes: growing copies what is there
    std::vector<Segment> segments;
    for (const TextView& text : texts) {
        size_t before = segments.size();
        if (text.size) cut_segments(text, specials, pattern_, follows, segment_size, segments);
        if (segments.size() == before) segments.push_back({nullptr, 0, 0, 0, 0, true});  // an empty text
        else segments.back().ends_text = true;
    }

    struct EncodedSegments {
        size_t first, last;
        IdBuffer<Id> ids = {};
        std::vector<uint64_t> ends = {};
        uint64_t place = 0;  // of its ids in the result
        bool done = false;
    };
    std::vector<EncodedSegments> tasks;
    uint64_t bytes = segment_size;
    for (size_t i = 0; i < segments.size(); ++i) {
        if (bytes >= segment_size) {
            tasks.push_back({i, i});
            bytes = 0;
        }
        tasks.back().last = i + 1;
        bytes += segments[i].limit - segments[i].begin + 16;
    }

    // Threads finish tasks in any order. The place of a task in the result is known when all before it are done; then the
    // thread that did it copies its ids there, mostly at once, while they lie in its core's own memory.
    std::atomic<size_t> next{0};
    size_t placed = 0;         // tasks that have places
    std::shared_mutex result;  // shared by those who copy into `ids`, held alone by whoever gives places: `ids` may move
    auto give_places = [&] {
        for (; placed < tasks.size() && tasks[placed].done; ++placed) {
            tasks[placed].place = ids.size;
            ids.size += tasks[placed].ids.size;
            ids.reserve(0);
        }
    };
    auto copy = [&](EncodedSegments& task) {
        if (task.ids.size) std::memcpy(ids.data() + task.place, task.ids.data(), task.ids.size * sizeof(Id));
        task.ids.size = 0;
    };
    in_parallel(threads, checkpoint, [&](const Checkpoint& pause) {
        std::unique_ptr<Cache> cache = caches_.take();
        cache->scratch.checkpoint = &pause;
        cache->expect(total / threads);
        std::vector<size_t> waiting;  // tasks of this thread that are not copied, in order
        IdBuffer<Id> spare;
        for (size_t i; (i = next++) < tasks.size(); pause()) {
            EncodedSegments task{tasks[i].first, tasks[i].last};  // of this thread's own: threads that write side by side hinder each other
            task.ids = std::move(spare);
            IdBuffer<Id>& out = threads == 1 ? ids : task.ids;
            for (size_t at = task.first; at < task.last; ++at) {
                if (segments[at].text) encode_segment(segments[at], *cache, out);
                if (!segments[at].ends_text || !ends) continue;
                settle(*cache, out);
                task.ends.push_back(out.size);
            }
            settle(*cache, out);
            task.done = true;
            if (threads == 1) {
                tasks[i] = std::move(task);
                continue;
            }
            waiting.push_back(i);
            {
                std::unique_lock alone(result);
                tasks[i] = std::move(task);
                give_places();
            }
            std::shared_lock shared(result);
            while (!waiting.empty() && waiting[0] < placed) {
                copy(tasks[waiting[0]]);
                spare = std::move(tasks[waiting[0]].ids);
                waiting.erase(waiting.begin());
            }
        }
        cache->scratch.checkpoint = nullptr;
        caches_.give_back(std::move(cache));
    });
    for (EncodedSegments& task : tasks) {
        copy(task);
        if (ends)
            for (uint64_t end : task.ends) ends->push_back(task.place + end);
    }
}

template <class Id>
void Encoder<Id>::encode_pieces(TextView text, const uint64_t* ends, size_t count, IdBuffer<Id>& ids) const {
    std::unique_ptr<Cache> cache = caches_.take();
    LookUp<Id> look_up = look_up_function<Id>();
    std::vector<uint32_t> relative(kPiecesAtOnce);
    uint64_t base = 0;
    for (size_t first = 0; first < count;) {
        size_t n = 0;
        while (n < kPiecesAtOnce && first + n < count && ends[first + n] - base < 0xFFFFFFFF) {
            relative[n] = static_cast<uint32_t>(ends[first + n] - base);
            ++n;
        }
        if (n == 0) throw std::length_error("a piece of text without a break has 4 GiB or more");
        look_up(*this, text.data + base, text.size - base, relative.data(), n, *cache, ids);
        first += n;
        base = ends[first - 1];
    }
    settle(*cache, ids);
    caches_.give_back(std::move(cache));
}

template class IdBuffer<uint16_t>;
template class IdBuffer<uint32_t>;
template class Encoder<uint16_t>;
template class Encoder<uint32_t>;

}  // namespace warploom
