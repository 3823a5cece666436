// What kernels and launchers share: checked calls, the device guard, reductions, wide loads and stores. Launchers throw std::runtime_error and
// never exit.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace clado {

inline void cuda_check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Makes `device` current for its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda_check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) cuda_check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

// Call right after a launch.
inline void check_launch(const char* kernel) { cuda_check(cudaGetLastError(), kernel); }

inline bool is_aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sum and maximum of a value over the warp, on every lane.
template <class T>
__device__ T warp_sum(T x) {
  for (int half = 16; half > 0; half /= 2) x += __shfl_xor_sync(0xffffffffu, x, half);
  return x;
}
template <class T>
__device__ T warp_max(T x) {
  for (int half = 16; half > 0; half /= 2) x = fmax(x, __shfl_xor_sync(0xffffffffu, x, half));
  return x;
}

// N elements, together 1 to 16 bytes, that are read and written by one instruction; their address is a multiple of those bytes.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};
template <class T, int N>
__device__ Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <class T, int N>
__device__ void store_pack(T* to, const Pack<T, N>& pack) {
  if constexpr (sizeof pack < 4) {
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
  } else {  // __stcs: written once, and not cut into words by the compiler
    uint32_t word[sizeof pack / 4];
    memcpy(word, pack.at, sizeof pack);
    if constexpr (sizeof pack == 4) __stcs(reinterpret_cast<uint32_t*>(to), word[0]);
    if constexpr (sizeof pack == 8) __stcs(reinterpret_cast<uint2*>(to), make_uint2(word[0], word[1]));
    if constexpr (sizeof pack == 16) __stcs(reinterpret_cast<uint4*>(to), make_uint4(word[0], word[1], word[2], word[3]));
  }
}

}  // namespace clado
