// A vocabulary by its bytes, for tokenizers that look a piece up as a whole before they merge it (Llama 3).
#pragma once

#include <string>
#include <vector>

#include "tokenizer/merges.hpp"
#include "tokenizer/word_key.hpp"

namespace warploom {

class Vocabulary {
public:
    void add(const std::string& token, TokenId id) {
        if (tokens_.size() * 2 >= slots_.size()) grow();
        tokens_.push_back({bytes_.size(), static_cast<uint32_t>(token.size()), id});
        bytes_ += token;
        put(static_cast<uint32_t>(tokens_.size()));
    }

    // The id of a word; nullptr if it is not one token.
    const TokenId* find(const uint8_t* word, size_t length) const {
        uint64_t hash = hash_word(word, length);
        for (size_t slot = hash >> shift_; slots_[slot].token; slot = (slot + 1) & (slots_.size() - 1)) {
            if (slots_[slot].tag != static_cast<uint32_t>(hash)) continue;
            const Token& token = tokens_[slots_[slot].token - 1];
            if (token.length == length && std::memcmp(bytes_.data() + token.begin, word, length) == 0) return &token.id;
        }
        return nullptr;
    }

private:
    struct Slot {
        uint32_t tag, token;  // one more than a place in `tokens_`; 0 for none
    };
    struct Token {
        uint64_t begin;
        uint32_t length;
        TokenId id;
    };

    void grow() {
        slots_.assign(slots_.size() * 2, {});
        --shift_;
        for (uint32_t token = 1; token <= tokens_.size(); ++token) put(token);
    }

    void put(uint32_t token) {
        const Token& added = tokens_[token - 1];
        uint64_t hash = hash_word(reinterpret_cast<const uint8_t*>(bytes_.data()) + added.begin, added.length);
        size_t slot = hash >> shift_;
        while (slots_[slot].token) slot = (slot + 1) & (slots_.size() - 1);
        slots_[slot] = {static_cast<uint32_t>(hash), token};
    }

    std::vector<Slot> slots_ = std::vector<Slot>(256);
    std::vector<Token> tokens_;
    std::string bytes_;
    int shift_ = 56;
};

}  // namespace warploom
