#pragma once
// Threads that work on the same rows.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <utility>
#include <vector>

namespace tokenexit {

// The phases of a group of rows, gone through by some threads together: to come and go for each phase
// would take as long as a short one does. Threads take part after part of a phase, ever smaller ones,
// until none is left, as equal shares would leave all waiting for the one that is held up; then they
// wait for the parts that others have taken. So nobody waits for a thread that has not come yet.
class Team {
  static constexpr int MOST_PHASES = 16, SPINS = 400;  // these take some ten microseconds

  struct alignas(64) Phase {
    std::atomic<int64_t> next = 0, done = 0;
  };

 public:
  explicit Team(int64_t threads) : threads_(threads) {}

  // phases(member) by each thread; spawn(count, f) is what has f() called by so many at most.
  template <class F, class Spawn>
  void run(const F& phases, const Spawn& spawn) {
    if (threads_ <= 1) return phases(Member(*this));
    spawn(threads_, [&] {
      try {
        phases(Member(*this));
      } catch (...) {
        failed_ = true;  // nobody waits for it
        throw;
      }
    });
  }

  class Member {
   public:
    explicit Member(Team& team) : team_(team) {}

    // f(begin, end) of all items, `least` of them at least.
    template <class F>
    void share(int64_t items, int64_t least, const F& f) {
      mine_.clear();
      Phase& phase = team_.phases_[at_++];
      int64_t begin = phase.next;
      while (begin < items) {
        const int64_t part = team_.threads_ > 1 ? (items - begin) / (2 * team_.threads_) : items;
        const int64_t end = std::min(items, begin + std::max(least, part));
        if (!phase.next.compare_exchange_weak(begin, end)) continue;
        f(begin, end);
        mine_.push_back({begin, end});
        phase.done += end - begin;
        begin = phase.next;
      }
      wait(phase, items);
    }

    // f of the same parts by the same threads, once more.
    template <class F>
    void again(const F& f) {
      const int64_t items = team_.phases_[at_ - 1].done;
      Phase& phase = team_.phases_[at_++];
      for (const auto& [begin, end] : mine_) {
        f(begin, end);
        phase.done += end - begin;
      }
      wait(phase, items);
    }

   private:
    void wait(const Phase& phase, int64_t items) {
      for (int i = 0; phase.done < items && !team_.failed_; ++i) {
        i < SPINS ? relax() : std::this_thread::yield();
      }
    }

    Team& team_;
    int at_ = 0;
    std::vector<std::pair<int64_t, int64_t>> mine_;
  };

 private:
  static void relax() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#endif
  }

  const int64_t threads_;
  std::atomic<bool> failed_ = false;
  Phase phases_[MOST_PHASES];
};

}  // namespace tokenexit
