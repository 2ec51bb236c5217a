// The decoder: ids to bytes. Most tokens are short, so each is copied as 16 bytes whatever its length; the next token
// overwrites what was too much. Lengths are a table of bytes, which stays in the nearest cache, and so are the starts of
// all tokens, side by side: nothing that is loaded for a token waits for something else to be loaded.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace warploom {

class Decoder {
public:
    // The bytes of each id; `known` is false where no token has that id.
    Decoder(const std::vector<std::string>& tokens, const std::vector<bool>& known) {
        for (size_t id = 0; id < tokens.size(); ++id) {
            const std::string& token = tokens[id];
            lengths_.push_back(!known[id] ? kUnknown : token.size() > kStep ? kLong : static_cast<uint8_t>(token.size()));
            std::array<char, kStep> start{};
            if (known[id]) std::memcpy(start.data(), token.data(), token.size() < kStep ? token.size() : kStep);
            starts_.push_back(start);
            if (lengths_.back() == kLong) long_.emplace(id, token);
        }
    }

    // The number of bytes that `ids` stand for; throws for one that is not in the vocabulary.
    template <class Id>
    uint64_t size_of(const Id* ids, size_t count) const {
        uint64_t size = 0;
        for (size_t i = 0; i < count; ++i) {
            uint64_t id = static_cast<uint64_t>(ids[i]);
            if (id >= lengths_.size() || lengths_[id] == kUnknown)
                throw std::invalid_argument("token id " + std::to_string(ids[i]) + " is not in this vocabulary, whose ids are 0 to " +
                                            std::to_string(lengths_.size() - 1));
            size += lengths_[id] == kLong ? long_.at(id).size() : lengths_[id];
        }
        return size;
    }

    // Writes the bytes of ids that `size_of` has checked.
    template <class Id>
    void write(const Id* ids, size_t count, char* out, uint64_t size) const {
        const char* end = out + size;
        for (size_t i = 0; i < count; ++i) {
            size_t id = static_cast<size_t>(ids[i]), length = lengths_[id];
            if (length <= kStep && end - out >= static_cast<ptrdiff_t>(kStep)) {
                std::memcpy(out, starts_[id].data(), kStep);
            } else if (length <= kStep) {
                std::memcpy(out, starts_[id].data(), length);
            } else {
                const std::string& token = long_.at(id);
                length = token.size();
                std::memcpy(out, token.data(), length);
            }
            out += length;
        }
    }

private:
    static constexpr uint8_t kUnknown = 255, kLong = 254;
    static constexpr size_t kStep = 16;
    std::vector<uint8_t> lengths_;
    std::vector<std::array<char, kStep>> starts_;
    std::unordered_map<size_t, std::string> long_;
};

}  // namespace warploom
