// Decoder: ids to bytes. Most tokens are short, so each is copied as 16 bytes whatever its length; the next token
// overwrites what was too much. Lengths are a table of bytes, which stays in the nearest cache, and so are the starts of
// all tokens, side by side: nothing that is loaded for a token waits for something else to be loaded.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace warploom {

class Decoder {
public:
    // Tables reach as far as twice the number of tokens: one id of a hostile file must not take memory by its size.
    explicit Decoder(const std::vector<std::pair<uint64_t, std::string>>& tokens) {
        for (const auto& [id, token] : tokens) last_ = id > last_ ? id : last_;
        near_ = std::min<uint64_t>(last_ + 1, 2 * tokens.size() + 256);
        lengths_.assign(near_, kUnknown), starts_.resize(near_);
        for (const auto& [id, token] : tokens) {
            const size_t at = id < near_ ? size_t(id) : lengths_.size();
            if (id >= near_) lengths_.push_back(kUnknown), starts_.emplace_back(), far_.emplace(id, at);
            lengths_[at] = token.size() > kStep ? kLong : static_cast<uint8_t>(token.size());
            std::memcpy(starts_[at].data(), token.data(), token.size() < kStep ? token.size() : kStep);
            if (lengths_[at] == kLong) long_.emplace(at, token);
        }
    }

    // The number of bytes that `ids` stand for; throws for one that is not in the vocabulary.
    template <class Id>
    uint64_t size_of(const Id* ids, size_t count) const {
        const uint8_t* lengths = lengths_.data();
        const uint64_t near = near_;
        uint64_t size = 0;
        for (size_t i = 0; i < count; ++i) {
            const uint64_t id = static_cast<uint64_t>(ids[i]);
            size += id < near && lengths[id] <= kStep ? lengths[id] : bytes_of(id).size();
        }
        return size;
    }

    // Writes the bytes of ids of which `size_of` gave the number; throws where somebody has changed them since.
    template <class Id>
    void write(const Id* ids, size_t count, char* out, uint64_t size) const {
        const uint8_t* lengths = lengths_.data();
        const std::array<char, kStep>* starts = starts_.data();
        const uint64_t near = near_;
        const char* end = out + size;
        for (size_t i = 0; i < count; ++i) {
            const uint64_t id = static_cast<uint64_t>(ids[i]);
            if (id < near && lengths[id] <= kStep && end - out >= static_cast<ptrdiff_t>(kStep)) {
                std::memcpy(out, starts[id].data(), kStep);
                out += lengths[id];
            } else {
                const std::string_view bytes = bytes_of(id);
                if (bytes.size() > static_cast<size_t>(end - out)) refuse_change();
                std::memcpy(out, bytes.data(), bytes.size());
                out += bytes.size();
            }
        }
        if (out != end) refuse_change();
    }

private:
    static constexpr uint8_t kUnknown = 255, kLong = 254;
    static constexpr size_t kStep = 16;

    // Of any id.
    __attribute__((noinline)) std::string_view bytes_of(uint64_t id) const {
        const auto far = far_.find(id);
        const size_t at = id < near_ ? static_cast<size_t>(id) : far == far_.end() ? lengths_.size() : far->second;
        if (at >= lengths_.size() || lengths_[at] == kUnknown)
            throw std::invalid_argument("token id " + std::to_string(static_cast<int64_t>(id)) +
                                        " is not in this vocabulary, whose ids are 0 to " + std::to_string(last_));
        if (lengths_[at] == kLong) return long_.at(at);
        return {starts_[at].data(), lengths_[at]};
    }
    [[noreturn]] static void refuse_change() { throw std::invalid_argument("the ids changed while they were decoded"); }

    uint64_t last_ = 0, near_ = 0;                // the largest id; those from here on are in `far_`
    std::unordered_map<uint64_t, size_t> far_;    // places in the tables
    std::vector<uint8_t> lengths_;
    std::vector<std::array<char, kStep>> starts_;
    std::unordered_map<size_t, std::string> long_;
};

}  // namespace warploom
