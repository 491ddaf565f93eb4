#pragma once
// The arithmetic of compact_active, for the CPU, the GPU and g++'s tests of it.
#include <cstdint>

#include <torch/headeronly/macros/Macros.h>

namespace tokenexit {

// Whether an active token of that word stays active. Pieces of a word leave with it; special
// tokens (word -1) stay while their sentence is open: while one of its words stays.
C10_HOST_DEVICE inline bool stays(int64_t word, const int64_t* exit_layer, bool open) {
  return word < 0 ? open : exit_layer[word] == 0;
}

// How many tokens a sentence keeps, of its staying words' and its special ones.
C10_HOST_DEVICE inline int64_t num_kept(int64_t of_words, int64_t specials) {
  return of_words > 0 ? of_words + specials : 0;
}

// How many tokens of two lists, each fewer than 2^31, in one number: sums of these are sums of both.
constexpr int kBits = 31;
C10_HOST_DEVICE inline int64_t both(int64_t kept, int64_t seen) { return seen << kBits | kept; }
C10_HOST_DEVICE inline int64_t kept_of(int64_t both) { return both & ((int64_t{1} << kBits) - 1); }
C10_HOST_DEVICE inline int64_t seen_of(int64_t both) { return both >> kBits; }

// A prefix sum over tiles by decoupled look-back (Merrill and Garland 2016). What a tile tells its
// successors is one word, so it needs no fence: 0, nothing yet; its own count; or the sum up to it.
constexpr uint64_t kCounted = uint64_t{1} << 62;
constexpr uint64_t kSummed = uint64_t{1} << 63;

C10_HOST_DEVICE inline bool is_summed(uint64_t state) { return state >= kSummed; }

// What a look-back adds for the tile `distance` (0: the nearest) before those it has added, given
// which of the tiles by distance are summed up (bit mask): nothing beyond the nearest that is.
C10_HOST_DEVICE inline int64_t looked_back(uint64_t state, int distance, uint32_t summed) {
  const bool beyond = summed & ((uint32_t{1} << distance) - 1);
  return beyond ? 0 : static_cast<int64_t>(state & (kCounted - 1));
}

}  // namespace tokenexit
