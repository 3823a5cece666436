// The part of CUDA that csrc/*.cu use, on one CPU thread: every thread of a block is a fiber, blocks run one after the other.
//
// build.py puts this header before a .cu file and turns `kernel<<<…>>>(…)` into configure(…).run(…) and `__shared__` into
// statics that share() fills with NaN at the start of every block. The order of threads and blocks is set_order()'s: a result that
// depends on it lacks a barrier. Barriers and shuffles are real rendezvous: threads that wait in different lines, or for one that
// has ended, are an error, thrown out of the launch. What it shows is the logic of a kernel, not its speed or memory model.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define CUDA_ON_CPU_LEAVE(keep, stack, size) __sanitizer_start_switch_fiber(keep, stack, size)
#define CUDA_ON_CPU_ENTER(kept, stack, size) __sanitizer_finish_switch_fiber(kept, stack, size)
#else
#define CUDA_ON_CPU_LEAVE(keep, stack, size)
#define CUDA_ON_CPU_ENTER(kept, stack, size)
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// ---- the runtime ----

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

namespace cuda_on_cpu {

enum class Order : int { forward = 0, backward = 1, shuffled = 2 };
inline Order order = Order::forward;
inline std::mt19937 draw;
inline void set_order(Order kind, unsigned seed) { order = kind, draw.seed(seed); }

inline cudaError_t last_error = cudaSuccess;
constexpr int kWarp = 32, kMaxThreads = 1024;
constexpr size_t kStack = 64 << 10, kStaticShared = 48 << 10;

// One rendezvous: what is waited for, where, and for which lanes of the warp (0: for the whole block).
struct Place {
  const char* what = "";
  int line = 0;
  uint32_t mask = 0;
  bool operator==(const Place& o) const { return line == o.line && mask == o.mask && std::strcmp(what, o.what) == 0; }
};

enum class State { ready, waiting, ended };

struct Thread {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf here;
  bool begun = false;
  dim3 index;
  State state = State::ended;
  Place place;
  int from = 0;             // the lane whose value a shuffle asks for
  uint64_t value = 0, got = 0;
};

inline std::vector<Thread> threads;  // those of the largest block so far; a block uses the first `count`
inline int count = 0, current = 0, favourite = 0;
inline uint32_t ready[kMaxThreads / kWarp];
inline std::function<void()> body;
inline jmp_buf scheduler;
inline ucontext_t origin;
inline std::string fault;
inline const void* home_stack = nullptr;
inline size_t home_size = 0;

inline void to_scheduler() {
  Thread& me = threads[current];
  void* kept = nullptr;
  (void)kept;
  if (_setjmp(me.here) == 0) {
    CUDA_ON_CPU_LEAVE(&kept, home_stack, home_size);
    _longjmp(scheduler, 1);
  }
  CUDA_ON_CPU_ENTER(kept, &home_stack, &home_size);
  threadIdx = threads[current].index;
}

inline void fiber() {
  CUDA_ON_CPU_ENTER(nullptr, &home_stack, &home_size);
  for (;;) {
    threadIdx = threads[current].index;
    body();
    threads[current].state = State::ended;
    to_scheduler();
  }
}

inline void resume(int i) {
  Thread& next = threads[i];
  current = i;
  void* kept = nullptr;
  (void)kept;
  if (_setjmp(scheduler) == 0) {
    CUDA_ON_CPU_LEAVE(&kept, next.stack.get(), kStack);
    if (next.begun) _longjmp(next.here, 1);
    next.begun = true;
    getcontext(&next.start);
    next.start.uc_stack.ss_sp = next.stack.get();
    next.start.uc_stack.ss_size = kStack;
    next.start.uc_link = nullptr;
    makecontext(&next.start, fiber, 0);
    swapcontext(&origin, &next.start);  // comes back by the longjmp above
  }
  CUDA_ON_CPU_ENTER(kept, nullptr, nullptr);
}

inline void set_ready(int i) {
  threads[i].state = State::ready;
  ready[i / kWarp] |= 1u << (i % kWarp);
}

// The thread to run next by the order in force, or -1. A warp that may go on runs ahead of all others as far as it can; shuffled,
// now and then another one is drawn.
inline int next_ready() {
  const int warps = (count + kWarp - 1) / kWarp;
  const unsigned turn = order == Order::shuffled ? draw() : 0;
  if (turn % 64 == 0) favourite = static_cast<int>(turn / 64 % static_cast<unsigned>(warps));
  for (int k = 0; k < warps; ++k) {
    const int warp = order == Order::forward ? k : order == Order::backward ? warps - 1 - k : (favourite + k) % warps;
    uint32_t lanes = ready[warp];
    if (!lanes) continue;
    int lane = order == Order::backward ? 31 - __builtin_clz(lanes) : __builtin_ctz(lanes);
    if (order == Order::shuffled) {
      const unsigned by = turn >> 27;
      lanes = by ? lanes >> by | lanes << (32 - by) : lanes;
      lane = (__builtin_ctz(lanes) + by) % kWarp;
    }
    ready[warp] &= ~(1u << lane);
    return warp * kWarp + lane;
  }
  return -1;
}

inline std::string text_of(dim3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}
inline std::string describe(int i) {
  const Thread& t = threads[i];
  if (t.state == State::ended) return "thread " + text_of(t.index) + " has ended";
  return "thread " + text_of(t.index) + " waits at " + t.place.what + " in line " + std::to_string(t.place.line);
}

// Nobody is ready: opens the barrier when all threads wait at the same one; otherwise says who keeps whom waiting.
inline bool open_barrier() {
  for (int i = 0; i < count; ++i)
    if (threads[i].state == State::ended || threads[i].place.mask != 0 || !(threads[i].place == threads[0].place)) {
      int waiting = 0;
      while (threads[waiting].state == State::ended) ++waiting;
      int other = 0;
      while (other < count && threads[other].state == State::waiting && threads[other].place == threads[waiting].place) ++other;
      fault = describe(waiting) + " while " + (other < count ? describe(other) : "a lane of its mask does not exist");
      return false;
    }
  for (int i = 0; i < count; ++i) set_ready(i);
  return true;
}

inline void wait(const char* what, int line, uint32_t mask) {
  threads[current].place = {what, line, mask};
  threads[current].state = State::waiting;
}

// The last lane of the mask to arrive hands the values out.
inline void meet_warp(const char* what, int line, uint32_t mask) {
  wait(what, line, mask);
  const int first = current / kWarp * kWarp;
  if (!(mask >> (current - first) & 1u)) fault = describe(current) + " and is not in its mask";
  bool all = true;
  for (int lane = 0; lane < kWarp; ++lane)
    if (mask >> lane & 1u) {
      const int i = first + lane;
      all = all && i < count && threads[i].state == State::waiting && threads[i].place == threads[current].place;
    }
  if (all)
    for (int lane = 0; lane < kWarp; ++lane)
      if (mask >> lane & 1u) {
        Thread& t = threads[first + lane];
        if (!(mask >> t.from & 1u)) fault = describe(first + lane) + " for a lane that is not in the mask";
        t.got = threads[first + t.from].value;
        set_ready(first + lane);
      }
  to_scheduler();
}

template <class T>
T shuffle(const char* what, int line, uint32_t mask, T value, int from, int own) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  Thread& me = threads[current];
  me.from = from >= 0 && from < kWarp ? from : own;
  std::memcpy(&me.value, &value, sizeof value);
  meet_warp(what, line, mask);
  std::memcpy(&value, &threads[current].got, sizeof value);
  return value;
}
inline int lane() { return current % kWarp; }

// ---- shared memory ----

struct Shared {
  void* data;
  size_t bytes;
  int64_t block;  // the last one that saw it
};
inline std::vector<Shared> shared;
inline int64_t block_serial = 0;

inline void share_one(void* data, size_t bytes) {
  auto found = std::find_if(shared.begin(), shared.end(), [&](const Shared& s) { return s.data == data; });
  if (found == shared.end()) found = shared.insert(found, {data, bytes, -1});
  if (found->block == block_serial) return;
  found->block = block_serial;
  std::memset(data, 0xff, bytes);  // NaN as a float or double
  size_t total = 0;
  for (const Shared& s : shared) total += s.block == block_serial ? s.bytes : 0;
  if (total > kStaticShared) fault = "more than 48 KiB of static shared memory";
}
template <class... T>
void share(T&... variables) {
  (share_one(&variables, sizeof variables), ...);
}

// ---- launches ----

inline void run_block() {
  ++block_serial;
  std::fill(std::begin(ready), std::end(ready), 0u);
  for (int i = 0; i < count; ++i) {
    const unsigned k = static_cast<unsigned>(i);
    threads[i].index = dim3(k % blockDim.x, k / blockDim.x % blockDim.y, k / blockDim.x / blockDim.y);
    set_ready(i);
  }
  while (fault.empty()) {
    const int i = next_ready();
    if (i >= 0) {
      resume(i);
    } else if (std::all_of(threads.begin(), threads.begin() + count, [](const Thread& t) { return t.state == State::ended; })) {
      return;
    } else if (!open_barrier()) {
      return;
    }
  }
}

struct Launch {
  dim3 grid, block;

  template <class Kernel, class... Args>
  void run(const char* name, Kernel kernel, Args... args) const {
    const int64_t size = static_cast<int64_t>(block.x) * block.y * block.z;
    const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
    const bool large = grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535;
    if (size < 1 || size > kMaxThreads || block.z > 64 || blocks < 1 || large) {
      last_error = cudaErrorInvalidConfiguration;
      return;
    }
    while (static_cast<int64_t>(threads.size()) < size) {
      threads.emplace_back();
      threads.back().stack.reset(new char[kStack]);
    }
    count = static_cast<int>(size), blockDim = block, gridDim = grid;
    body = [&] { kernel(args...); };
    std::vector<int64_t> turns(static_cast<size_t>(blocks));
    std::iota(turns.begin(), turns.end(), int64_t{0});
    if (order == Order::backward) std::reverse(turns.begin(), turns.end());
    if (order == Order::shuffled) std::shuffle(turns.begin(), turns.end(), draw);
    for (const int64_t turn : turns) {
      const int64_t row = turn / grid.x;
      blockIdx.x = static_cast<unsigned>(turn % grid.x);
      blockIdx.y = static_cast<unsigned>(row % grid.y), blockIdx.z = static_cast<unsigned>(row / grid.y);
      run_block();
      if (fault.empty()) continue;
      const std::string text = name + (", block " + text_of(blockIdx)) + ": " + fault;
      fault.clear(), threads.clear();
      throw std::logic_error(text);
    }
  }
};
inline Launch configure(dim3 grid, dim3 block, int dynamic_shared = 0, cudaStream_t = nullptr) {
  if (dynamic_shared != 0) throw std::logic_error("dynamic shared memory is not supported");
  return {grid, block};
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaErrorInvalidConfiguration ? "invalid configuration argument" : "invalid value";
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidValue; }
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  return std::memset(data, value, bytes), cudaSuccess;
}

// ---- what a thread may call ----

#define __syncthreads() (cuda_on_cpu::wait("__syncthreads", __LINE__, 0), cuda_on_cpu::to_scheduler())
#define __syncwarp() cuda_on_cpu::meet_warp("__syncwarp", __LINE__, 0xffffffffu)
#define __shfl_sync(mask, x, from) cuda_on_cpu::shuffle("__shfl_sync", __LINE__, mask, x, (from) % 32, 0)
#define CUDA_ON_CPU_LANE cuda_on_cpu::lane()
#define __shfl_xor_sync(mask, x, by) \
  cuda_on_cpu::shuffle("__shfl_xor_sync", __LINE__, mask, x, CUDA_ON_CPU_LANE ^ (by), CUDA_ON_CPU_LANE)
#define __shfl_down_sync(mask, x, by) \
  cuda_on_cpu::shuffle("__shfl_down_sync", __LINE__, mask, x, CUDA_ON_CPU_LANE + int(by), CUDA_ON_CPU_LANE)
#define __shfl_up_sync(mask, x, by) \
  cuda_on_cpu::shuffle("__shfl_up_sync", __LINE__, mask, x, CUDA_ON_CPU_LANE - int(by), CUDA_ON_CPU_LANE)

inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float normcdff(float x) { return static_cast<float>(0.5 * erfc(-0.70710678118654752 * static_cast<double>(x))); }

// ---- vectors: as aligned as on the device, so that the sanitizer build sees an access that is not ----

struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
template <class T>
void __stcs(T* to, T x) { *to = x; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// ---- half and bfloat16: rounded half to even, NaN to 0x7fff as the hardware has it ----

struct __half { uint16_t bits; };
struct __half2 { __half x, y; };
struct __nv_bfloat16 { uint16_t bits; };
struct __nv_bfloat162 { __nv_bfloat16 x, y; };

inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float size = ldexpf(static_cast<float>(exponent ? 1024 + fraction : fraction), std::max(exponent, 1) - 25);
  if (exponent == 31) size = fraction ? NAN : INFINITY;
  return h.bits >> 15 ? -size : size;
}
inline __half __float2half_rn(float f) {
  if (f != f) return {0x7fff};
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  const float size = fabsf(f);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  const int exponent = size == 0.0f ? -14 : std::max(ilogbf(size), -14);
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + static_cast<int>(rintf(ldexpf(size, 10 - exponent)))))};
}
inline float __bfloat162float(__nv_bfloat16 b) {
  const uint32_t bits = static_cast<uint32_t>(b.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  if (f != f) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)}; }
