#include <algorithm>

#include "common/cuda.cuh"
#include "common/weights.cuh"
#include "scale_search/scale_search.h"

namespace clado {
namespace {

constexpr int kWarps = 8;
constexpr int kPerLane = kBlock / kBlockLanes;

struct Shape {
  int64_t rows, columns, group_size, groups, blocks;  // blocks of 1024 in a whole group
  __host__ __device__ int64_t all() const { return rows * groups; }
  __device__ int64_t first(int64_t group) const { return group / groups * columns + group % groups * group_size; }
  __device__ int64_t length(int64_t group) const {
    const int64_t rest = columns - group % groups * group_size;
    return rest < group_size ? rest : group_size;
  }
};

__device__ float step_scale(float largest, int bits, int k) {
  const float first = largest / static_cast<float>(highest_code(bits));
  return fmaxf(first * (static_cast<float>(100 - k) / 100.0f), FLT_MIN);
}

// One warp per block: the largest magnitude, NaN when something in it is not finite.
__global__ void largest_kernel(const void* weight, DType dtype, Shape shape, float* largest) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (index >= shape.all() * shape.blocks) return;
  const int64_t group = index / shape.blocks, start = index % shape.blocks * kBlock, length = shape.length(group);
  float top = 0.0f, spoiled = 0.0f;
  for (int64_t i = start + threadIdx.x; i < length && i < start + kBlock; i += kBlockLanes) {
    const float w = read_weight(weight, dtype, shape.first(group) + i);
    top = fmaxf(top, fabsf(w));
    spoiled += w * 0.0f;
  }
  for (int half = 16; half > 0; half /= 2) {
    top = fmaxf(top, __shfl_down_sync(0xffffffffu, top, half));
    spoiled += __shfl_down_sync(0xffffffffu, spoiled, half);
  }
  if (threadIdx.x == 0) largest[index] = spoiled != 0.0f ? nanf("") : top;
}

// One block of threads per group: the largest of its blocks.
__global__ void group_largest_kernel(const float* largest, Shape shape, float* out) {
  __shared__ float tops[256];
  const int64_t group = blockIdx.x;
  float top = 0.0f;
  for (int64_t i = threadIdx.x; i < shape.blocks; i += blockDim.x) {
    const float x = largest[group * shape.blocks + i];
    top = x > top || x != x ? x : top;
  }
  tops[threadIdx.x] = top;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      const float x = tops[threadIdx.x + half];
      if (x > tops[threadIdx.x] || x != x) tops[threadIdx.x] = x;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) out[group] = tops[0];
}

// One warp per block: its weights stay in registers while all steps of all widths are rated.
__global__ void errors_kernel(const void* weight, DType dtype, Shape shape, BitList bits, int steps,
                              const float* group_largest, float* errors) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (index >= shape.all() * shape.blocks) return;
  const int64_t group = index / shape.blocks, start = index % shape.blocks * kBlock, length = shape.length(group);
  float w[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int64_t i = start + j * kBlockLanes + threadIdx.x;
    w[j] = i < length ? read_weight(weight, dtype, shape.first(group) + i) : 0.0f;
  }
  for (int b = 0; b < bits.count; ++b) {
    const float low = static_cast<float>(lowest_code(bits.width[b])), high = static_cast<float>(highest_code(bits.width[b]));
    for (int k = 0; k < steps; ++k) {
      const float inverse = 1.0f / step_scale(group_largest[group], bits.width[b], k);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const float x = w[j] * inverse, e = rintf(clamp_code(x, low, high)) - x;
        sum += e * e;
      }
      sum = sum_block_lanes(sum);
      if (threadIdx.x == 0) errors[(index * bits.count + b) * steps + k] = sum;
    }
  }
}

// One block of threads per group and width; thread k adds the errors of step k in order.
__global__ void choose_kernel(Shape shape, BitList bits, int steps, const float* group_largest,
                              const float* errors, float* scales) {
  __shared__ double total[128];
  const int64_t group = blockIdx.x;
  const int b = blockIdx.y, k = threadIdx.x;
  if (k < steps) {
    double sum = 0.0;
    for (int64_t i = 0; i < shape.blocks; ++i)
      sum += static_cast<double>(errors[((group * shape.blocks + i) * bits.count + b) * steps + k]);
    const double scale = step_scale(group_largest[group], bits.width[b], k);
    total[k] = sum * (scale * scale);
  }
  __syncthreads();
  if (k != 0) return;
  int best = 0;
  for (int j = 1; j < steps; ++j)
    if (total[j] < total[best]) best = j;
  const float top = group_largest[group];
  scales[b * shape.all() + group] = top == 0.0f ? 1.0f : top != top ? top : step_scale(top, bits.width[b], best);
}

Shape shape_of(int64_t rows, int64_t columns, int64_t group_size) {
  return {rows, columns, group_size, ceil_div(columns, group_size), blocks_of(std::min(columns, group_size))};
}

}  // namespace

int64_t scale_search_workspace(int64_t rows, int64_t columns, int64_t group_size, int num_bits, int steps) {
  const Shape shape = shape_of(rows, columns, group_size);
  const int64_t items = shape.all() * shape.blocks;
  return 4 * (items + shape.all() + items * num_bits * steps);
}

void scale_search_cuda(const void* weight, int dtype, float* scales, int64_t rows, int64_t columns, int64_t group_size,
                       const int32_t* bits, int num_bits, int steps, void* workspace, int device, void* stream) {
  const Shape shape = shape_of(rows, columns, group_size);
  const int64_t items = shape.all() * shape.blocks;
  if (items == 0) return;
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const auto type = static_cast<DType>(dtype);
  const BitList list(bits, num_bits);
  auto* largest = static_cast<float*>(workspace);
  float* group_largest = largest + items;
  float* errors = group_largest + shape.all();
  const dim3 warps(kBlockLanes, kWarps);
  const auto grid = static_cast<unsigned>(ceil_div(items, kWarps));
  largest_kernel<<<grid, warps, 0, queue>>>(weight, type, shape, largest);
  group_largest_kernel<<<static_cast<unsigned>(shape.all()), 256, 0, queue>>>(largest, shape, group_largest);
  errors_kernel<<<grid, warps, 0, queue>>>(weight, type, shape, list, steps, group_largest, errors);
  choose_kernel<<<dim3(static_cast<unsigned>(shape.all()), num_bits), 128, 0, queue>>>(shape, list, steps,
                                                                                        group_largest, errors, scales);
  check_launch("scale_search");
}

}  // namespace clado
