#pragma once
#include "../../simt.h"

namespace cub {

template <class T>
struct WarpScan {
  struct TempStorage {};
  explicit WarpScan(TempStorage&) {}
  void InclusiveSum(T value, T& sum, T& total) {
    const auto up_to = [](int end) {
      return [end](const int64_t* values) {
        T sum = 0;
        for (int lane = 0; lane <= end; ++lane) sum += values[lane];
        return sum;
      };
    };
    sum = simt::together(value, up_to(simt::my_lane()));
    total = simt::together(value, up_to(simt::kLanes - 1));
  }
};

}  // namespace cub
