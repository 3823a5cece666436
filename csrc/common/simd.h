// Run-time choice of the instruction set. A kernel body is written once as an always-inline function of plain loops; the
// macro below stamps out one copy per level with its own target attribute, so no other code is ever compiled for a machine
// that may not have it. Every level gives the same bits: lanes are explicit in the bodies and contraction is off.
#pragma once

namespace clado {

enum class Simd : int { base = 0, avx2 = 1, avx512 = 2 };

// The level in use: the best the CPU has, lowered by the environment variable CLADO_SIMD=base|avx2|avx512 or set_simd().
Simd simd_level();
// Lowers (never raises above the CPU's) the level for this process; returns the level now in use.
Simd set_simd(Simd level);

}  // namespace clado

#define CLADO_INLINE inline __attribute__((always_inline))

// CLADO_SIMD_KERNEL(name, (int* x, long n), (x, n)) defines name(...) that runs name_body(...) at simd_level().
// It is for the compute part of one row or tile: call it inside an OpenMP region, not around one.
#define CLADO_SIMD_KERNEL(name, params, args) CLADO_STAMP(name, params, args, , , )

// The same with a body that is a template; its arguments at the three levels come last.
#if defined(__x86_64__) && defined(__GNUC__)
#define CLADO_STAMP(name, params, args, at_avx512, at_avx2, at_base)                                                           \
  __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))) static void name##_avx512 params {                         \
    name##_body at_avx512 args;                                                                                                \
  }                                                                                                                            \
  __attribute__((target("arch=x86-64-v3"))) static void name##_avx2 params { name##_body at_avx2 args; }                       \
  static void name##_base params { name##_body at_base args; }                                                                 \
  static inline void name params {                                                                                             \
    switch (::clado::simd_level()) {                                                                                           \
      case ::clado::Simd::avx512: name##_avx512 args; break;                                                                   \
      case ::clado::Simd::avx2: name##_avx2 args; break;                                                                       \
      default: name##_base args;                                                                                               \
    }                                                                                                                          \
  }
#else
#define CLADO_STAMP(name, params, args, at_avx512, at_avx2, at_base) \
  static inline void name params { name##_body at_base args; }
#endif
