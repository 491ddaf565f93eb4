#pragma once
#include "../../simt.h"

namespace cub {

template <class T>
struct WarpReduce {
  struct TempStorage {};
  explicit WarpReduce(TempStorage&) {}
  T Sum(T value) {
    const T sum = simt::together(value, [](const int64_t* values) {
      T sum = 0;
      for (int lane = 0; lane < simt::kLanes; ++lane) sum += values[lane];
      return sum;
    });
    return simt::my_lane() == 0 ? sum : -1;  // only lane 0 may look
  }
};

}  // namespace cub
