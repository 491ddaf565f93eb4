#pragma once
#include <cstdint>

#include <torch/headeronly/macros/Macros.h>

namespace tokenexit {

// Whether an active token of that word stays active. Pieces of a word leave with it; special
// tokens (word -1) stay while their sentence is open: while one of its words stays.
C10_HOST_DEVICE inline bool stays(int64_t word, const int64_t* exit_layer, bool open) {
  return word < 0 ? open : exit_layer[word] == 0;
}

}  // namespace tokenexit
