#pragma once
// Enough of CUDA to run a kernel on a CPU: a block is a process, whose statics are its shared
// memory; its threads are threads, which meet at barriers; memory that blocks share is mapped.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <barrier>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

namespace simt {

constexpr int kLanes = 32;

struct Index {
  unsigned x;
};

struct Warp {
  std::barrier<> meet{kLanes};
  int64_t values[kLanes];
};

inline std::vector<Warp>* warps;
inline std::barrier<>* block;

}  // namespace simt

inline thread_local simt::Index threadIdx;
inline simt::Index gridDim;

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline void __syncthreads() { simt::block->arrive_and_wait(); }

namespace simt {

inline Warp& my_warp() { return (*warps)[threadIdx.x / kLanes]; }
inline int my_lane() { return threadIdx.x % kLanes; }

// What `take` makes of the values of all lanes.
template <class Take>
auto together(int64_t value, Take take) {
  Warp& warp = my_warp();
  warp.values[my_lane()] = value;
  warp.meet.arrive_and_wait();
  const auto result = take(warp.values);
  warp.meet.arrive_and_wait();
  return result;
}

// Run `kernel` in that many blocks of that many threads; false if one of them failed.
inline bool launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  std::vector<pid_t> children;
  for (unsigned i = 0; i < blocks; ++i) {
    const pid_t child = fork();
    if (child != 0) {
      children.push_back(child);
      continue;
    }
    gridDim.x = blocks;
    warps = new std::vector<Warp>(threads / kLanes);
    block = new std::barrier<>(threads);
    std::vector<std::thread> running;
    for (unsigned x = 0; x < threads; ++x) {
      running.emplace_back([&kernel, x] {
        threadIdx.x = x;
        kernel();
      });
    }
    for (auto& thread : running) thread.join();
    _exit(0);
  }
  bool well = true;
  for (const pid_t child : children) {
    int status = 0;
    well &= waitpid(child, &status, 0) == child && status == 0;
  }
  return well;
}

// Memory, zeros at first, that all blocks see; `give_back` copies it.
template <class T>
struct Shared {
  T* data;
  size_t size;
  explicit Shared(size_t size_) : size(size_) {
    void* at = mmap(
        nullptr, (size + 1) * sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    data = static_cast<T*>(at);
  }
  ~Shared() { munmap(data, (size + 1) * sizeof(T)); }
  void give_back(T* to) const { std::memcpy(to, data, size * sizeof(T)); }
};

}  // namespace simt

inline unsigned __ballot_sync(unsigned, bool predicate) {
  return simt::together(predicate, [](const int64_t* values) {
    unsigned bits = 0;
    for (int lane = 0; lane < simt::kLanes; ++lane) bits |= unsigned(values[lane]) << lane;
    return bits;
  });
}
inline bool __any_sync(unsigned all, bool predicate) { return __ballot_sync(all, predicate) != 0; }
inline int64_t __shfl_sync(unsigned, int64_t value, int from) {
  return simt::together(value, [from](const int64_t* values) { return values[from]; });
}
inline void __syncwarp() { simt::my_warp().meet.arrive_and_wait(); }
