// Batched word-cache look-up, 128 words at a time: the inner loop of encoding. Included by simd_loops.hpp, once per
// instruction set.
//
// First the keys of all are made, then their hashes, many at once where the machine can, and their places requested; then
// the answers are collected, when they have arrived. A long word that falls apart (Merges::gaps) is looked up by its
// parts: they are few and come again, where long words rarely do.

constexpr size_t kGroup = 128, kWindow = 64;
constexpr size_t kAhead = 1024;  // bytes of ids for which room is requested before they are written

// The three inner loops are functions of their own, so that each has all registers for itself.

// Makes the keys of consecutive words, the first of which begins at `at`; returns how many, up to a long one or to one so
// near the end of the text that 16 bytes cannot be loaded.
__attribute__((noinline)) static size_t make_keys(const uint8_t* text, size_t roomy, const uint32_t* ends, size_t count,
                                                  uint32_t at, WordKey* keys, uint32_t* starts) {
    size_t n = 0;
    for (; n < count && at < roomy; ++n) {
        size_t length = ends[n] - at;
        if (__builtin_expect(length > kKeyBytes, 0)) break;
        starts[n] = at;
        keys[n] = load_key(text + at, length);
        at = ends[n];
    }
    return n;
}

// Byte offsets, in a table of entries of 32 bytes, of the homes of words.
__attribute__((noinline)) static void locate(const WordKey* keys, uint64_t* places, size_t count, unsigned shift) {
    for (size_t i = 0; i < count; ++i) places[i] = hash_key(keys[i]) >> shift << 5;
}

// Appends the ids of words up to the first that is not at home; returns how many were.
template <class Id>
__attribute__((noinline)) static size_t collect(const WordCache<Id>& cache, const WordKey* keys, const uint64_t* places,
                                                size_t count, Id*& ids) {
    using Entry = typename WordCache<Id>::Entry;
    const char* table = reinterpret_cast<const char*>(cache.table());
    Id* out = ids;
    size_t i = 0;
    for (; i < count; ++i) {
        const Entry* home = reinterpret_cast<const Entry*>(table + places[i]);
        if (__builtin_expect(!(home->key == keys[i]), 0)) break;
        out = cache.put(*home, out);
    }
    ids = out;
    return i;
}

// Appends the ids of consecutive pieces; `readable` bytes of text may be loaded.
template <class Id>
static void look_up(const Encoder<Id>& encoder, const uint8_t* text, size_t readable, const uint32_t* ends, size_t count,
                    WordCache<Id>& cache, IdBuffer<Id>& ids) {
    static_assert(sizeof(typename WordCache<Id>::Entry) == 32, "places are counted in entries of 32 bytes");
    const Merges* merges = encoder.divides();
    WordKey keys[kGroup + kWindow];
    uint64_t places[kGroup + kWindow];
    uint32_t starts[kGroup + kWindow + 1];
    const size_t roomy = readable < 16 ? 0 : readable - 15;
    uint32_t at = 0;
    bool divided = false;  // whether `at` is inside a piece
    for (size_t piece = 0; piece < count;) {
        size_t n = 0;
        while (n < kGroup && piece < count) {
            if (!divided) {
                size_t room = kGroup - n < count - piece ? kGroup - n : count - piece;
                size_t made = make_keys(text, roomy, ends + piece, room, at, keys + n, starts + n);
                if (made) {
                    n += made;
                    piece += made;
                    at = ends[piece - 1];
                    continue;
                }
            }
            // A long piece, of which those parts that fall into a window are added, or one near the end of the text.
            auto add = [&](size_t length) {
                starts[n] = at;
                keys[n++] = length <= kKeyBytes ? key_of(text + at, length, text + readable) : WordKey{~0ull, ~0ull};  // no word's
                at += static_cast<uint32_t>(length);
            };
            size_t length = ends[piece] - at, window = length < kWindow ? length : kWindow;
            uint64_t gaps = merges && (divided || length > kKeyBytes) ? gaps_in(*merges, text + at, window) : 0;
            if (length == window) gaps |= 1ull << (length - 1);
            uint32_t base = at;
            if (!gaps) add(merges ? merges->first_part(text + at, length) : length);
            for (; gaps; gaps &= gaps - 1) add(base + static_cast<size_t>(__builtin_ctzll(gaps)) + 1 - at);
            divided = at < ends[piece];
            piece += !divided;
        }
        starts[n] = at;
        locate(keys, places, n, cache.shift());
        const char* table = reinterpret_cast<const char*>(cache.table());
        for (size_t i = 0; i < n; ++i) __builtin_prefetch(table + places[i]);

        Id* out = ids.reserve(at - starts[0] + WordCache<Id>::kMargin);
        for (size_t line = 0; line < 4 * sizeof(Id); ++line)  // about what the group will fill
            __builtin_prefetch(reinterpret_cast<const char*>(out) + kAhead + 64 * line, 1);
        for (size_t i = 0; (i += collect(cache, keys + i, places + i, n - i, out)) < n; ++i) {
            const auto* before = cache.table();
            out = encoder.encode_aside(text + starts[i], starts[i + 1] - starts[i], text + readable, cache, ids.data(), out);
            if (cache.table() != before) locate(keys + i, places + i, n - i, cache.shift());  // it has grown and moved
        }
        ids.size = static_cast<size_t>(out - ids.data());
        if (divided) cache.checkpoint();
    }
}
