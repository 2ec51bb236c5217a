// The decoder: ids to bytes. Most tokens are short, so each is copied as 16 bytes whatever its length; the next token
// overwrites what was too much.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace warploom {

class Decoder {
public:
    // The bytes of each id; `known` is false where no token has that id.
    Decoder(const std::vector<std::string>& tokens, std::vector<bool> known) {
        for (size_t id = 0; id < tokens.size(); ++id) {
            places_.push_back({static_cast<uint32_t>(bytes_.size()), static_cast<uint32_t>(known[id] ? tokens[id].size() : kUnknown)});
            if (known[id]) bytes_ += tokens[id];
        }
        bytes_.append(kStep, '\0');
    }

    // The number of bytes that `ids` stand for; throws for one that is not in the vocabulary.
    template <class Id>
    uint64_t size_of(const Id* ids, size_t count) const {
        uint64_t size = 0;
        for (size_t i = 0; i < count; ++i) {
            uint64_t id = static_cast<uint64_t>(ids[i]);
            if (id >= places_.size() || places_[id].length == kUnknown)
                throw std::invalid_argument("token id " + std::to_string(ids[i]) + " is not in this vocabulary, whose ids are 0 to " +
                                            std::to_string(places_.size() - 1));
            size += places_[id].length;
        }
        return size;
    }

    // Writes the bytes of ids that `size_of` has checked.
    template <class Id>
    void write(const Id* ids, size_t count, char* out, uint64_t size) const {
        const char* end = out + size;
        for (size_t i = 0; i < count; ++i) {
            Place place = places_[static_cast<size_t>(ids[i])];
            if (place.length <= kStep && end - out >= static_cast<ptrdiff_t>(kStep))
                std::memcpy(out, bytes_.data() + place.begin, kStep);
            else
                std::memcpy(out, bytes_.data() + place.begin, place.length);
            out += place.length;
        }
    }

private:
    static constexpr uint32_t kUnknown = 0xFFFFFFFF, kStep = 16;
    struct Place {
        uint32_t begin, length;
    };
    std::vector<Place> places_;
    std::string bytes_;
};

}  // namespace warploom
