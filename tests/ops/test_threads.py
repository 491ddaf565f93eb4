"""Threads go through phases together: each item once, a phase only after the one before."""

import ctypes

import pytest
from cpp import built, needs_compiler

SOURCE = """
#include <exception>
#include <stdexcept>
#include <vector>

#include "cpu/threads.h"
using namespace tokenexit;

namespace {

// At once, or one after the other as by a pool that is busy.
template <class F>
void spawn(int64_t count, const F& f, bool at_once) {
  std::exception_ptr error;
  const auto work = [&] {
    try {
      f();
    } catch (...) {
      error = std::current_exception();
    }
  };
  if (at_once) {
    std::vector<std::thread> threads;
    for (int64_t i = 0; i < count; ++i) threads.emplace_back(work);
    for (auto& thread : threads) thread.join();
  } else {
    for (int64_t i = 0; i < count; ++i) work();
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace

// What went wrong, of four phases of so many items; the second of each pair is the first's again.
// If an item is to fail, whether that was told.
extern "C" int wrong(int64_t threads, int64_t items, int64_t least, bool at_once, int64_t fails) {
  std::atomic<int> bad = 0;
  std::vector<std::atomic<int>> done(4 * items);
  std::vector<std::thread::id> who(items);
  const auto phase = [&](int number) {
    return [&, number](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (number == 2 && i == fails) throw std::runtime_error("as asked");
        for (int64_t j = 0; number && j < items; ++j) bad += done[(number - 1) * items + j] != 1;
        if (number % 2 == 0) who[i] = std::this_thread::get_id();
        bad += who[i] != std::this_thread::get_id();
        ++done[number * items + i];
      }
    };
  };
  try {
    Team(threads).run(
        [&](Team::Member team) {
          for (int number = 0; number < 4; number += 2) {
            team.share(items, least, phase(number));
            team.again(phase(number + 1));
          }
        },
        [&](int64_t count, const auto& f) { spawn(count, f, at_once); });
  } catch (const std::runtime_error&) {
    return fails < 0;
  }
  for (const auto& times : done) bad += times != 1;
  return bad + (fails >= 0);
}
"""


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    folder = tmp_path_factory.mktemp("threads")
    (folder / "phases.cpp").write_text(SOURCE)
    flags = ("-std=c++20", "-O1", "-pthread")
    function = built([folder / "phases.cpp"], folder / "phases.so", *flags).wrong
    number = ctypes.c_int64
    function.argtypes = [number, number, number, ctypes.c_bool, number]
    return function


@needs_compiler
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_each_item_once_and_phase_after_phase(threads, at_once, wrong):
    for items in (1, 2, 7, 100):
        for least in (1, 3, 200):
            for _ in range(5):
                assert wrong(threads, items, least, at_once, -1) == 0


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_nobody_waits_for_what_failed(threads, wrong):
    for item in (0, 50, 99):
        assert wrong(threads, 100, 1, True, item) == 0
