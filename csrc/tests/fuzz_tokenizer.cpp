// A fuzz target (libFuzzer, `make fuzz`): merges and a text out of the input.
//
// Ids must spell the text again; be the same from a warm cache and from the loops of every instruction set; and for a piece, be
// what merging the first of the lowest-ranked pairs over and over makes of it.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tokenizer/decoder.hpp"
#include "tokenizer/encoder.hpp"
#include "tokenizer/simd_dispatch.hpp"

using namespace warploom;
using Ids = std::vector<TokenId>;

namespace {

void require(bool holds, const char* claim) {
    if (holds) return;
    std::fprintf(stderr, "does not hold: %s\n", claim);
    std::abort();
}

// A vocabulary of bytes and what `pairs` of input bytes merge.
struct Merging {
    Ids bytes, left, right, merged;
    std::vector<std::string> tokens;
    std::map<std::pair<TokenId, TokenId>, size_t> ranks;

    Merging(const uint8_t* pairs, size_t count) {
        std::map<std::string, TokenId> ids;
        for (int byte = 0; byte < 256; ++byte) {
            bytes.push_back(TokenId(byte));
            tokens.push_back(std::string(1, char(byte)));
            ids[tokens.back()] = TokenId(byte);
        }
        for (size_t i = 0; i < count; ++i) {
            const TokenId a = TokenId(pairs[2 * i] % tokens.size()), b = TokenId(pairs[2 * i + 1] % tokens.size());
            const std::string both = tokens[a] + tokens[b];
            if (both.size() > 200 || ids.count(both)) continue;
            const TokenId id = TokenId(tokens.size());
            ids[both] = id, tokens.push_back(both);
            ranks[{a, b}] = left.size();
            left.push_back(a), right.push_back(b), merged.push_back(id);
        }
    }

    Ids apply(const uint8_t* word, size_t size) const {
        Ids ids(word, word + size);
        while (true) {
            size_t best = merged.size(), where = 0;
            for (size_t i = 0; i + 1 < ids.size(); ++i) {
                const auto found = ranks.find({ids[i], ids[i + 1]});
                if (found != ranks.end() && found->second < best) best = found->second, where = i;
            }
            if (best == merged.size()) return ids;
            ids[where] = merged[best];
            ids.erase(ids.begin() + std::ptrdiff_t(where) + 1);
        }
    }
};

Ids encode(const Encoder<uint16_t>& encoder, TextView text) {
    IdBuffer<uint16_t> ids;
    encoder.encode(text, nullptr, Follows::kStart, 1, ids, nullptr, [] {});
    return Ids(ids.data(), ids.data() + ids.size);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    if (size < 2) return 0;
    const Pattern pattern = Pattern(data[0] % 4);
    const size_t count = data[1] % 40;
    data += 2, size -= 2;
    if (size < 2 * count) return 0;
    const Merging merging(data, count);
    const std::vector<uint8_t> copy(data + 2 * count, data + size);  // ends where its memory ends
    const TextView text{copy.data(), copy.size()};

    Ids first;
    for (const char* name : {"best", "portable"}) {
        use_instruction_set(name);
        const Encoder<uint16_t> encoder(Merges(merging.bytes, merging.left, merging.right, merging.merged), pattern, {});
        const Ids ids = encode(encoder, text);
        require(ids == encode(encoder, text), "a warm cache gives the same ids");
        if (name[0] == 'b') first = ids;
        require(ids == first, "instruction sets give the same ids");
        const size_t piece = std::min<size_t>(copy.size(), 300);
        const uint64_t end = piece;
        IdBuffer<uint16_t> merged;
        encoder.encode_pieces({copy.data(), piece}, &end, piece > 0, merged);
        require(Ids(merged.data(), merged.data() + merged.size) == merging.apply(copy.data(), piece), "a piece is merged by rank");
    }
    std::vector<std::pair<uint64_t, std::string>> tokens;
    for (const std::string& token : merging.tokens) tokens.push_back({tokens.size(), token});
    const Decoder decoder(tokens);
    std::string back(decoder.size_of(first.data(), first.size()), '\0');
    decoder.write(first.data(), first.size(), &back[0], back.size());
    require(back == std::string(copy.begin(), copy.end()), "ids spell the text");
    stream_cut(text, nullptr, pattern);
    return 0;
}
