#include "carried/carried.h"
#include "common/cuda.cuh"
#include "common/weights.cuh"

namespace clado {
namespace {

constexpr int kWarps = 8, kThreads = 256;

// N neighbouring elements as float32.
template <int N, class T>
__device__ Pack<float, N> read(const T* from) {
  const Pack<T, N> stored = load_pack<T, N>(from);
  Pack<float, N> x;
#pragma unroll
  for (int k = 0; k < N; ++k) x.at[k] = to_float(stored.at[k]);
  return x;
}
template <int N, class T>
__device__ void write(T* to, const Pack<float, N>& x) {
  store_pack(to, rounded<T, N>(x.at));
}

// Phi(x + d) - Phi(x); for small d by its series around x, where the plain difference would keep only the rounding of Phi.
__device__ float normcdf_change(float x, float d, float after) {
  if (fabsf(d) > 0.0625f || fabsf(x) > 12.0f) return after - normcdff(x);
  const float xx = x * x, density = 0.39894228f * expf(-0.5f * xx);
  return density * d * (1.0f - d * (x / 2.0f - d * ((xx - 1.0f) / 6.0f - d * x * (xx - 3.0f) / 24.0f)));
}

// One thread per N elements; `size` and `count` are those of a stream and of all, in N elements.
template <int N, class D, class O>
__global__ void gelu_kernel(const float* __restrict__ clean, const D* __restrict__ delta, O* __restrict__ out, int64_t count,
                            int64_t size) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const Pack<float, N> x = read<N>(clean + i % size * N), d = read<N>(delta + i * N);
  Pack<float, N> change;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const float after = normcdff(x.at[k] + d.at[k]);
    change.at[k] = d.at[k] * after + x.at[k] * normcdf_change(x.at[k], d.at[k], after);
  }
  write<N>(out + i * N, change);
}

// A warp's row.
template <int N, class D, class O>
__device__ void layer_norm_row(const float* x, const D* d, const float* weight, O* out, int64_t columns, float eps) {
  const int64_t start = threadIdx.x * N;
  float sum = 0.0f, shift = 0.0f;
  for (int64_t c = start; c < columns; c += 32 * N) {
    const Pack<float, N> y = read<N>(x + c), e = read<N>(d + c);
#pragma unroll
    for (int k = 0; k < N; ++k) sum += y.at[k], shift += e.at[k];
  }
  const float n = static_cast<float>(columns), mean = warp_sum(sum) / n;
  shift = warp_sum(shift) / n;
  float squares = 0.0f, change = 0.0f;
  for (int64_t c = start; c < columns; c += 32 * N) {
    const Pack<float, N> a = read<N>(x + c), b = read<N>(d + c);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float y = a.at[k] - mean, e = b.at[k] - shift;
      squares += y * y;
      change += e * (2.0f * y + e);
    }
  }
  const float variance = warp_sum(squares) / n + eps, more = warp_sum(change) / n;
  const float deviation = sqrtf(variance), moved = sqrtf(variance + more < 0.0f ? 0.0f : variance + more);
  const float after = 1.0f / moved, gain = -more / (deviation * moved * (deviation + moved));
  for (int64_t c = start; c < columns; c += 32 * N) {
    const Pack<float, N> a = read<N>(x + c), b = read<N>(d + c);
    Pack<float, N> w;
    if (weight) w = read<N>(weight + c);
#pragma unroll
    for (int k = 0; k < N; ++k) w.at[k] = ((b.at[k] - shift) * after + (a.at[k] - mean) * gain) * (weight ? w.at[k] : 1.0f);
    write<N>(out + c, w);
  }
}

// One warp per stream and row.
template <int N, class D, class O>
__global__ void layer_norm_kernel(const float* __restrict__ clean, const D* __restrict__ delta, const float* __restrict__ weight,
                                  O* __restrict__ out, int64_t count, int64_t rows, int64_t columns, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= count) return;
  layer_norm_row<N>(clean + row % rows * columns, delta + row * columns, weight, out + row * columns, columns, eps);
}

// The same of residual + branch, which is written to `sum` and read again by the threads that wrote it.
template <int N, class D, class O>
__global__ void add_layer_norm_kernel(const float* __restrict__ clean, const float* __restrict__ residual, const D* __restrict__ branch,
                                      const float* __restrict__ weight, float* sum, O* __restrict__ out, int64_t count, int64_t rows,
                                      int64_t columns, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= count) return;
  const int64_t first = row * columns;
  for (int64_t c = threadIdx.x * N; c < columns; c += 32 * N) {
    const Pack<float, N> r = read<N>(residual + first + c), b = read<N>(branch + first + c);
    Pack<float, N> d;
#pragma unroll
    for (int k = 0; k < N; ++k) d.at[k] = r.at[k] + b.at[k];
    write<N>(sum + first + c, d);
  }
  layer_norm_row<N, float>(clean + row % rows * columns, sum + first, weight, out + first, columns, eps);
}

template <int N, class D, class O>
__global__ void softmax_kernel(const float* __restrict__ scores, const float* __restrict__ clean, const D* __restrict__ delta,
                               O* __restrict__ out, int64_t count, int64_t rows, int64_t columns, float scale) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
  if (row >= count) return;
  const float *s = scores + row % rows * columns, *p = clean + row % rows * columns;
  const D* delta_row = delta + row * columns;
  const int64_t start = threadIdx.x * N;
  float sum = 0.0f, reach = 0.0f;
  for (int64_t c = start; c < columns; c += 32 * N) {
    const Pack<float, N> q = read<N>(p + c), e = read<N>(delta_row + c);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float d = scale * e.at[k];
      sum += q.at[k] * expm1f(d);
      reach = fmaxf(reach, fabsf(d));
    }
  }
  sum = warp_sum(sum);
  const bool far = warp_max(reach) > 30.0f;  // nothing cancels: the plain softmax
  float norm = 1.0f / (1.0f + sum), top = -INFINITY;
  if (far) {
    float total = 0.0f;
    for (int64_t c = threadIdx.x; c < columns; c += 32) top = fmaxf(top, s[c] + scale * to_float(delta_row[c]));
    top = warp_max(top);
    for (int64_t c = threadIdx.x; c < columns; c += 32) total += expf(s[c] + scale * to_float(delta_row[c]) - top);
    norm = 1.0f / warp_sum(total);
  }
  O* to = out + 2 * row * columns;
  for (int64_t c = start; c < columns; c += 32 * N) {
    const Pack<float, N> q = read<N>(p + c), e = read<N>(delta_row + c);
    Pack<float, N> change, whole;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const float d = scale * e.at[k], w = q.at[k] * expm1f(d);
      whole.at[k] = (far ? expf(s[c + k] + d - top) : q.at[k] + w) * norm;
      change.at[k] = far ? whole.at[k] - q.at[k] : (w - q.at[k] * sum) * norm;
    }
    write<N>(to + c, change);
    write<N>(to + columns + c, whole);
  }
}

// launch(N, delta as its type, out as its type): four elements at a time where rows of `columns` and all addresses allow it.
template <class Launch>
void with_types(const void* delta, void* out, const Streams& streams, int64_t columns, bool even, Launch launch) {
  const auto at = [&](auto* d, auto* o) {
    even && columns % 4 == 0 && is_aligned(d, 4 * sizeof *d) && is_aligned(o, 4 * sizeof *o)
        ? launch(std::integral_constant<int, 4>(), d, o)
        : launch(std::integral_constant<int, 1>(), d, o);
  };
  const auto with_out = [&](auto* d) {
    streams.out_half ? at(d, static_cast<__nv_bfloat16*>(out)) : at(d, static_cast<float*>(out));
  };
  streams.delta_half ? with_out(static_cast<const __nv_bfloat16*>(delta)) : with_out(static_cast<const float*>(delta));
}

// The same for kernels that give a warp to each row of every stream: launch(N, delta, out, blocks, rows, queue).
template <class Launch>
void with_rows(const void* delta, void* out, const Streams& streams, bool even, int device, void* stream, Launch launch) {
  const int64_t count = streams.streams * streams.rows;
  if (count == 0 || streams.columns == 0) return;
  const DeviceGuard guard(device);
  with_types(delta, out, streams, streams.columns, even, [&](auto n, auto* d, auto* o) {
    launch(n, d, o, static_cast<unsigned>(ceil_div(count, kWarps)), count, static_cast<cudaStream_t>(stream));
  });
}

}  // namespace

void carried_gelu_cuda(const float* clean, const void* delta, void* out, const Streams& streams, int device, void* stream) {
  const int64_t size = streams.stride(), count = streams.streams * size;
  if (count == 0) return;
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  with_types(delta, out, streams, size, is_aligned(clean, 16), [&](auto n, auto* d, auto* o) {
    constexpr int kWidth = decltype(n)::value;
    const auto blocks = static_cast<unsigned>(ceil_div(count / kWidth, kThreads));
    gelu_kernel<kWidth><<<blocks, kThreads, 0, queue>>>(clean, d, o, count / kWidth, size / kWidth);
  });
  check_launch("carried_gelu");
}

void carried_layer_norm_cuda(const float* clean, const void* delta, const float* weight, void* out, const Streams& streams, float eps,
                             int device, void* stream) {
  const bool even = is_aligned(clean, 16) && is_aligned(weight, 16);
  with_rows(delta, out, streams, even, device, stream, [&](auto n, auto* d, auto* o, unsigned blocks, int64_t count, cudaStream_t queue) {
    constexpr int kWidth = decltype(n)::value;
    layer_norm_kernel<kWidth>
        <<<blocks, dim3(32, kWarps), 0, queue>>>(clean, d, weight, o, count, streams.rows, streams.columns, eps);
    check_launch("carried_layer_norm");
  });
}

void carried_add_layer_norm_cuda(const float* clean, const float* residual, const void* branch, const float* weight, float* sum, void* out,
                                 const Streams& streams, float eps, int device, void* stream) {
  const bool even = is_aligned(clean, 16) && is_aligned(weight, 16) && is_aligned(residual, 16) && is_aligned(sum, 16);
  with_rows(branch, out, streams, even, device, stream, [&](auto n, auto* b, auto* o, unsigned blocks, int64_t count, cudaStream_t queue) {
    constexpr int kWidth = decltype(n)::value;
    add_layer_norm_kernel<kWidth><<<blocks, dim3(32, kWarps), 0, queue>>>(clean, residual, b, weight, sum, o, count, streams.rows,
                                                                         streams.columns, eps);
    check_launch("carried_add_layer_norm");
  });
}

void carried_softmax_cuda(const float* scores, const float* clean, const void* delta, void* out, const Streams& streams, float scale,
                          int device, void* stream) {
  with_rows(delta, out, streams, is_aligned(clean, 16), device, stream,
            [&](auto n, auto* d, auto* o, unsigned blocks, int64_t count, cudaStream_t queue) {
    constexpr int kWidth = decltype(n)::value;
    softmax_kernel<kWidth><<<blocks, dim3(32, kWarps), 0, queue>>>(scores, clean, d, o, count, streams.rows, streams.columns, scale);
    check_launch("carried_softmax");
  });
}

}  // namespace clado
