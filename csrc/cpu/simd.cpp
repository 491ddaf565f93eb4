// Which instruction sets this machine has.
#include "simd.h"

#include <cstdlib>
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tokenexit {
namespace {

// Linux gives a process the tiles' registers when it asks. It refuses where a thread's stack for
// signals is too small to keep them.
bool may_use_tiles() {
#if defined(__x86_64__) && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace

bool has(Cpu cpu) {
#ifdef __x86_64__
  switch (cpu) {
    case Cpu::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Cpu::avx_vnni: return has(Cpu::avx2) && __builtin_cpu_supports("avxvnni");
    case Cpu::avx512: return has(Cpu::avx2) && __builtin_cpu_supports("avx512f");
    case Cpu::avx512_vnni:
      return has(Cpu::avx512) && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512vnni");
    case Cpu::avx512_bf16:
      return has(Cpu::avx512_vnni) && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512bf16");
    case Cpu::amx:
      return has(Cpu::avx512_bf16) && __builtin_cpu_supports("amx-int8") &&
          __builtin_cpu_supports("amx-bf16") && may_use_tiles();
    default: break;
  }
#endif
  return cpu == Cpu::portable;
}

Cpu cpu() {
  static const Cpu found = [] {
    int most = NUM_CPUS - 1;
    const char* name = std::getenv("TOKENEXIT_CPU");
    for (int i = 0; name && i < NUM_CPUS; ++i) {
      if (!std::strcmp(name, CPU_NAMES[i])) most = i;
    }
    while (!has(static_cast<Cpu>(most))) --most;
    return static_cast<Cpu>(most);
  }();
  return found;
}

const bool ROUNDS_TO_BF16 = cpu() >= Cpu::avx512_bf16;

}  // namespace tokenexit
