#include "common/simd.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace clado {
namespace {

Simd best_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Simd::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return Simd::avx2;
#endif
  return Simd::base;
}

Simd lowered(Simd wanted) {
  const Simd best = best_level();
  return static_cast<int>(wanted) < static_cast<int>(best) ? wanted : best;
}

Simd initial_level() {
  const char* name = std::getenv("CLADO_SIMD");
  if (name && !std::strcmp(name, "base")) return Simd::base;
  if (name && !std::strcmp(name, "avx2")) return lowered(Simd::avx2);
  return best_level();
}

std::atomic<int>& level() {
  static std::atomic<int> value{static_cast<int>(initial_level())};
  return value;
}

}  // namespace

Simd simd_level() { return static_cast<Simd>(level().load(std::memory_order_relaxed)); }

Simd set_simd(Simd wanted) {
  level().store(static_cast<int>(lowered(wanted)), std::memory_order_relaxed);
  return simd_level();
}

}  // namespace clado
