// Kernels with the mistakes that cuda_on_cpu.h must catch, and one without. Usage: broken <kernel> <order 0..2>; prints the sum.
#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

constexpr int kSize = 96;

__global__ void reverse(const float* from, float* to) {
  __shared__ float all[kSize];
  all[threadIdx.x] = from[threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = all[kSize - 1 - threadIdx.x];
}
__global__ void missing_barrier(const float* from, float* to) {
  __shared__ float all[kSize];
  all[threadIdx.x] = from[threadIdx.x];
  to[threadIdx.x] = all[kSize - 1 - threadIdx.x];
}
__global__ void early_end(const float* from, float* to) {
  if (threadIdx.x == 70) return;
  __syncthreads();
  to[threadIdx.x] = from[threadIdx.x];
}
__global__ void two_barriers(const float* from, float* to) {
  if (threadIdx.x < 64)
    __syncthreads();
  else
    __syncthreads();
  to[threadIdx.x] = from[threadIdx.x];
}
__global__ void part_of_a_warp(const float* from, float* to) {
  to[threadIdx.x] = from[threadIdx.x];
  if (threadIdx.x % 32 < 31) to[threadIdx.x] += __shfl_xor_sync(0xffffffffu, from[threadIdx.x], 1);
}
__global__ void beyond_the_end(const float* from, float* to) { to[threadIdx.x] = from[threadIdx.x + 1]; }
__global__ void beyond_shared(const float* from, float* to) {
  __shared__ float all[kSize];
  volatile int one = 1;
  all[threadIdx.x + one] = from[threadIdx.x];
  __syncthreads();
  to[threadIdx.x] = all[threadIdx.x];
}
__global__ void misaligned(const float* from, float* to) {
  to[threadIdx.x] = threadIdx.x < 8 ? reinterpret_cast<const float4*>(from + 1)[threadIdx.x].x : 0.0f;
}

#define NAMED(kernel) {#kernel, [](const float* from, float* to) { kernel<<<1, kSize>>>(from, to); }}
const struct {
  std::string name;
  void (*launch)(const float*, float*);
} kKernels[] = {NAMED(reverse),        NAMED(missing_barrier), NAMED(early_end),     NAMED(two_barriers),
                NAMED(part_of_a_warp), NAMED(beyond_the_end),  NAMED(beyond_shared), NAMED(misaligned)};

}  // namespace

int main(int, char** arguments) {
  cuda_on_cpu::set_order(static_cast<cuda_on_cpu::Order>(atoi(arguments[2])), 1);
  auto *from = new float[kSize], *to = new float[kSize];
  for (int i = 0; i < kSize; ++i) from[i] = static_cast<float>(i), to[i] = 0.0f;
  try {
    for (const auto& kernel : kKernels)
      if (kernel.name == arguments[1]) kernel.launch(from, to);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  for (int i = 0; i < kSize; ++i) std::printf("%g ", to[i]);
}
