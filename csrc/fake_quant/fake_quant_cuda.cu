#include "common/cuda.cuh"
#include "common/weights.cuh"
#include "fake_quant/fake_quant.h"

namespace clado {
namespace {

constexpr int kWarps = 8;

// The nearest step of a weight, zero point aside: see fake_quant.h.
__device__ float step_of(float w, float scale, float zero, int bits) {
  const float low = static_cast<float>(lowest_code(bits)) - zero, high = static_cast<float>(highest_code(bits)) - zero;
  return nearest(clamp_code(w / scale, low, high));
}

__device__ float zero_at(const int8_t* zeros, int64_t i) { return zeros ? static_cast<float>(zeros[i]) : 0.0f; }

// One warp per block of a row; the weight is read once and written at every width.
__global__ void fake_quant_kernel(const void* weight, DType dtype, const float* scales, const int8_t* zeros, void* values,
                                  float* block_errors, int64_t rows, int64_t columns, int64_t group_size, int64_t blocks,
                                  BitList bits) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (index >= rows * blocks) return;
  const int64_t row = index / blocks, start = index % blocks * kBlock, groups = (columns + group_size - 1) / group_size;
  float sum[kMaxBits] = {};
  for (int64_t c = start + threadIdx.x; c < columns && c < start + kBlock; c += kBlockLanes) {
    const float w = read_weight(weight, dtype, row * columns + c);
    const int64_t group = c / group_size;
#pragma unroll
    for (int b = 0; b < kMaxBits; ++b) {
      if (b >= bits.count) break;
      const int64_t line = b * rows + row, at = line * groups + group;
      const float value = step_of(w, scales[at], zero_at(zeros, at), bits.width[b]) * scales[at];
      const float e = write_weight(values, dtype, line * columns + c, value) - w;
      sum[b] += e * e;
    }
  }
#pragma unroll
  for (int b = 0; b < kMaxBits; ++b) {
    if (b >= bits.count) break;
    const float total = sum_block_lanes(sum[b]);
    if (threadIdx.x == 0) block_errors[(b * rows + row) * blocks + index % blocks] = total;
  }
}

// One thread per row and width adds its blocks in order.
__global__ void sum_blocks_kernel(const float* block_errors, double* sqerr, int64_t count, int64_t blocks) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  double sum = 0.0;
  for (int64_t block = 0; block < blocks; ++block) sum += static_cast<double>(block_errors[i * blocks + block]);
  sqerr[i] = sum;
}

__global__ void quantize_kernel(const void* weight, DType dtype, const float* scales, const int8_t* zeros, int8_t* codes,
                                int64_t rows, int64_t columns, int64_t group_size, BitList bits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * columns) return;
  const int64_t row = i / columns, groups = (columns + group_size - 1) / group_size, group = i % columns / group_size;
  const float w = read_weight(weight, dtype, i);
  for (int b = 0; b < bits.count; ++b) {
    const int64_t at = (b * rows + row) * groups + group;
    const float zero = zero_at(zeros, at), step = step_of(w, scales[at], zero, bits.width[b]);
    codes[b * rows * columns + i] = step == step ? static_cast<int8_t>(step + zero) : int8_t{0};
  }
}

}  // namespace

void fake_quant_cuda(const void* weight, int dtype, const float* scales, const int8_t* zeros, void* values, double* sqerr,
                     int64_t rows, int64_t columns, int64_t group_size, const int32_t* bits, int num_bits, float* block_errors,
                     int device, void* stream) {
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t blocks = blocks_of(columns), items = rows * blocks, sums = rows * num_bits;
  if (items > 0) {
    fake_quant_kernel<<<static_cast<unsigned>(ceil_div(items, kWarps)), dim3(kBlockLanes, kWarps), 0, queue>>>(
        weight, static_cast<DType>(dtype), scales, zeros, values, block_errors, rows, columns, group_size, blocks,
        BitList(bits, num_bits));
    check_launch("fake_quant");
  }
  if (sums > 0) {
    sum_blocks_kernel<<<static_cast<unsigned>(ceil_div(sums, 128)), 128, 0, queue>>>(block_errors, sqerr, sums, blocks);
    check_launch("fake_quant");
  }
}

void quantize_cuda(const void* weight, int dtype, const float* scales, const int8_t* zeros, int8_t* codes, int64_t rows,
                   int64_t columns, int64_t group_size, const int32_t* bits, int num_bits, int device, void* stream) {
  if (rows * columns == 0) return;
  const DeviceGuard guard(device);
  quantize_kernel<<<static_cast<unsigned>(ceil_div(rows * columns, 256)), 256, 0, static_cast<cudaStream_t>(stream)>>>(
      weight, static_cast<DType>(dtype), scales, zeros, codes, rows, columns, group_size, BitList(bits, num_bits));
  check_launch("quantize");
}

}  // namespace clado
