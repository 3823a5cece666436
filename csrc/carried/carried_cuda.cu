#include "carried/carried.h"
#include "common/cuda.cuh"
#include "common/weights.cuh"

namespace clado {
namespace {

constexpr int kWarps = 8, kBlockSize = 256;

__device__ float sum_warp(float x) {
  for (int half = 16; half > 0; half /= 2) x += __shfl_xor_sync(0xffffffffu, x, half);
  return x;
}
__device__ float max_warp(float x) {
  for (int half = 16; half > 0; half /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, half));
  return x;
}

DType dtype_of(bool half) { return half ? DType::bfloat16 : DType::float32; }

// Phi(x + d) - Phi(x); for small d by its series around x, where the plain difference would keep only the rounding of Phi.
__device__ float normcdf_change(float x, float d, float after) {
  if (fabsf(d) > 0.0625f || fabsf(x) > 12.0f) return after - normcdff(x);
  const float xx = x * x, density = 0.39894228f * expf(-0.5f * xx);
  return density * d * (1.0f - d * (x / 2.0f - d * ((xx - 1.0f) / 6.0f - d * x * (xx - 3.0f) / 24.0f)));
}

__global__ void gelu_kernel(const float* clean, const void* delta, void* out, int64_t count, int64_t size, DType from, DType to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlockSize + threadIdx.x;
  if (i >= count) return;
  const float x = clean[i % size], d = read_weight(delta, from, i);
  const float after = normcdff(x + d);
  write_weight(out, to, i, d * after + x * normcdf_change(x, d, after));
}

// One warp per stream and row.
__global__ void layer_norm_kernel(const float* clean, const void* delta, const float* weight, void* out, int64_t count, int64_t rows,
                                  int64_t columns, float eps, DType from, DType to) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= count) return;
  const float* x = clean + row % rows * columns;
  const int64_t first = row * columns;
  float sum = 0.0f, shift = 0.0f;
  for (int64_t c = threadIdx.x; c < columns; c += 32) {
    sum += x[c];
    shift += read_weight(delta, from, first + c);
  }
  const float n = static_cast<float>(columns), mean = sum_warp(sum) / n;
  shift = sum_warp(shift) / n;
  float squares = 0.0f, change = 0.0f;
  for (int64_t c = threadIdx.x; c < columns; c += 32) {
    const float y = x[c] - mean, e = read_weight(delta, from, first + c) - shift;
    squares += y * y;
    change += e * (2.0f * y + e);
  }
  const float variance = sum_warp(squares) / n + eps, more = sum_warp(change) / n;
  const float deviation = sqrtf(variance), moved = sqrtf(variance + more < 0.0f ? 0.0f : variance + more);
  const float after = 1.0f / moved, gain = -more / (deviation * moved * (deviation + moved));
  for (int64_t c = threadIdx.x; c < columns; c += 32) {
    const float y = x[c] - mean, e = read_weight(delta, from, first + c) - shift;
    write_weight(out, to, first + c, (e * after + y * gain) * (weight ? weight[c] : 1.0f));
  }
}

__global__ void softmax_kernel(const float* scores, const float* clean, const void* delta, void* out, int64_t count, int64_t rows,
                               int64_t columns, float scale, DType from, DType to) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= count) return;
  const int64_t first = row * columns;
  const float *s = scores + row % rows * columns, *p = clean + row % rows * columns;
  float sum = 0.0f, reach = 0.0f, top = -INFINITY;
  for (int64_t c = threadIdx.x; c < columns; c += 32) {
    const float d = scale * read_weight(delta, from, first + c);
    sum += p[c] * expm1f(d);
    reach = fmaxf(reach, fabsf(d));
    top = fmaxf(top, s[c] + d);
  }
  sum = sum_warp(sum);
  const bool far = max_warp(reach) > 30.0f;  // nothing cancels: the plain softmax
  top = max_warp(top);
  float norm = 1.0f / (1.0f + sum);
  if (far) {
    float total = 0.0f;
    for (int64_t c = threadIdx.x; c < columns; c += 32) total += expf(s[c] + scale * read_weight(delta, from, first + c) - top);
    norm = 1.0f / sum_warp(total);
  }
  for (int64_t c = threadIdx.x; c < columns; c += 32) {
    const float d = scale * read_weight(delta, from, first + c), w = p[c] * expm1f(d);
    const float after = (far ? expf(s[c] + d - top) : p[c] + w) * norm;
    write_weight(out, to, 2 * first + c, far ? after - p[c] : (w - p[c] * sum) * norm);
    write_weight(out, to, 2 * first + columns + c, after);
  }
}

unsigned blocks(int64_t rows) { return static_cast<unsigned>(ceil_div(rows, kWarps)); }

}  // namespace

void carried_gelu_cuda(const float* clean, const void* delta, void* out, int64_t streams, int64_t size, bool delta_half, bool out_half,
                       int device, void* stream) {
  const int64_t count = streams * size;
  if (count == 0) return;
  const DeviceGuard guard(device);
  gelu_kernel<<<static_cast<unsigned>(ceil_div(count, kBlockSize)), kBlockSize, 0, static_cast<cudaStream_t>(stream)>>>(
      clean, delta, out, count, size, dtype_of(delta_half), dtype_of(out_half));
  check_launch("carried_gelu");
}

void carried_layer_norm_cuda(const float* clean, const void* delta, const float* weight, void* out, int64_t streams, int64_t rows,
                             int64_t columns, float eps, bool delta_half, bool out_half, int device, void* stream) {
  const int64_t count = streams * rows;
  if (count == 0 || columns == 0) return;
  const DeviceGuard guard(device);
  layer_norm_kernel<<<blocks(count), dim3(32, kWarps), 0, static_cast<cudaStream_t>(stream)>>>(
      clean, delta, weight, out, count, rows, columns, eps, dtype_of(delta_half), dtype_of(out_half));
  check_launch("carried_layer_norm");
}

void carried_softmax_cuda(const float* scores, const float* clean, const void* delta, void* out, int64_t streams, int64_t rows,
                          int64_t columns, float scale, bool delta_half, bool out_half, int device, void* stream) {
  const int64_t count = streams * rows;
  if (count == 0 || columns == 0) return;
  const DeviceGuard guard(device);
  softmax_kernel<<<blocks(count), dim3(32, kWarps), 0, static_cast<cudaStream_t>(stream)>>>(
      scores, clean, delta, out, count, rows, columns, scale, dtype_of(delta_half), dtype_of(out_half));
  check_launch("carried_softmax");
}

}  // namespace clado
