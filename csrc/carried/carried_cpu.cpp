#include "carried/carried.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "common/lanes.h"
#include "common/parallel.h"
#include "common/weights_cpu.h"

namespace clado {
namespace {

constexpr int64_t kSpan = 1024;  // elements of one work item of the elementwise op; of a row whose exponentials are kept

template <DType D>
CLADO_INLINE Float16x load_some(const void* x, int64_t i, int64_t rest) {
  if (rest >= kLanes) return load_weights<D>(x, i);
  alignas(64) char part[kLanes * 4] = {};
  std::memcpy(part, static_cast<const char*>(x) + i * kWeightBytes<D>, static_cast<size_t>(rest) * kWeightBytes<D>);
  return load_weights<D>(part, 0);
}

template <DType D>
CLADO_INLINE void store_some(void* x, int64_t i, int64_t rest, Float16x v) {
  if (rest >= kLanes) {
    store_weights<D>(x, i, v);
    return;
  }
  alignas(64) char part[kLanes * 4];
  store_weights<D>(part, 0, v);
  std::memcpy(static_cast<char*>(x) + i * kWeightBytes<D>, part, static_cast<size_t>(rest) * kWeightBytes<D>);
}

template <DType D>
CLADO_INLINE float value_at(const void* x, int64_t i) {
  if constexpr (D == DType::float32) return static_cast<const float*>(x)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(x)[i]) << 16;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

CLADO_INLINE Float16x first_lanes(Float16x v, int64_t count) {  // zero beyond
  const Int16x lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lane < static_cast<int32_t>(std::min<int64_t>(count, kLanes)) ? v : Float16x{};
}

CLADO_INLINE float max_lanes(Float16x v) {
  float x[kLanes];
  store(x, v);
  float top = x[0];
  for (int l = 1; l < kLanes; ++l) top = x[l] > top ? x[l] : top;
  return top;
}

// e^x for -80 <= x <= 0 to 2e-7: six terms of the series are enough here.
CLADO_INLINE Float16x short_exp(Float16x x) {
  const Float16x k = log2_multiple(x), r = log2_rest(x, k);
  Float16x p = splat(1.0f / 720);
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  return power_of_two(k) * (p * r + 1.0f);
}

// Phi, the normal distribution function.
CLADO_INLINE Float16x normal_lanes(Float16x x) {
  const Float16x a = abs(x) * 0.707106781f, t = 1.0f / (1.0f + 0.3275911f * a);
  Float16x p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const Float16x tail = (0.5f * t) * p * short_exp(clamp(-a * a, -80.0f, 0.0f));
  return x < 0.0f ? tail : 1.0f - tail;
}

template <DType D, DType O>
CLADO_INLINE void gelu_span(const float* clean, const void* delta, void* out, int64_t streams, int64_t stride, int64_t size) {
  float before[kSpan];
  for (int64_t i = 0; i < size; i += kLanes) store(before + i, normal_lanes(load_some<DType::float32>(clean, i, size - i)));
  for (int64_t s = 0; s < streams; ++s) {
    const void* d = weights_at<D>(delta, s * stride);
    void* o = weights_at<O>(out, s * stride);
    for (int64_t i = 0; i < size; i += kLanes) {
      const Float16x x = load_some<DType::float32>(clean, i, size - i), e = load_some<D>(d, i, size - i);
      const Float16x after = normal_lanes(x + e);
      store_some<O>(o, i, size - i, e * after + x * (after - load(before + i)));
    }
  }
}

template <DType D, DType O>
CLADO_INLINE void layer_norm_row(const float* x, const void* delta, const float* weight, void* out, int64_t streams, int64_t stride,
                                 int64_t columns, float eps) {
  Float16x sum{}, squares{};
  for (int64_t c = 0; c < columns; c += kLanes) sum += load_some<DType::float32>(x, c, columns - c);
  const float count = static_cast<float>(columns), mean = sum_halves(sum) / count;
  for (int64_t c = 0; c < columns; c += kLanes) {
    const Float16x y = first_lanes(load_some<DType::float32>(x, c, columns - c) - mean, columns - c);
    squares += y * y;
  }
  const float variance = sum_halves(squares) / count + eps, deviation = std::sqrt(variance);
  for (int64_t s = 0; s < streams; ++s) {
    const void* d = weights_at<D>(delta, s * stride);
    void* o = weights_at<O>(out, s * stride);
    Float16x total{};
    for (int64_t c = 0; c < columns; c += kLanes) total += load_some<D>(d, c, columns - c);
    const float shift = sum_halves(total) / count;
    Float16x change{};
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Float16x y = load_some<DType::float32>(x, c, columns - c) - mean;
      const Float16x e = load_some<D>(d, c, columns - c) - shift;
      change += first_lanes(e * (2.0f * y + e), columns - c);
    }
    const float more = sum_halves(change) / count;  // of the variance
    const float moved = std::sqrt(std::max(variance + more, 0.0f) + 0.0f * more);  // NaN stays NaN
    const float after = 1.0f / moved, gain = -more / (deviation * moved * (deviation + moved));
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Float16x y = load_some<DType::float32>(x, c, columns - c) - mean;
      const Float16x e = load_some<D>(d, c, columns - c) - shift;
      Float16x v = e * after + y * gain;
      if (weight) v = v * load_some<DType::float32>(weight, c, columns - c);
      store_some<O>(o, c, columns - c, v);
    }
  }
}

template <DType D, DType O>
CLADO_INLINE void softmax_row(const float* scores, const float* p, const void* delta, void* out, int64_t streams, int64_t stride,
                              int64_t columns, float scale) {
  float kept[kSpan];
  const bool keep = columns <= kSpan;
  for (int64_t s = 0; s < streams; ++s) {
    const void* d = weights_at<D>(delta, s * stride);
    void* change = weights_at<O>(out, 2 * s * stride);
    void* whole = weights_at<O>(change, columns);
    Float16x sum{}, reach{};
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Float16x x = load_some<D>(d, c, columns - c) * scale, size = abs(x);
      reach = size > reach ? size : reach;
      const Float16x w = load_some<DType::float32>(p, c, columns - c) * expm1_lanes(clamp(x, -80.0f, 80.0f));
      if (keep) store(kept + c, w);
      sum += w;
    }
    if (!(max_lanes(reach) > 30.0f)) {
      const float total = sum_halves(sum), norm = 1.0f / (1.0f + total);
      for (int64_t c = 0; c < columns; c += kLanes) {
        const Float16x q = load_some<DType::float32>(p, c, columns - c);
        const Float16x w = keep ? load(kept + c) : q * expm1_lanes(clamp(load_some<D>(d, c, columns - c) * scale, -80.0f, 80.0f));
        store_some<O>(change, c, columns - c, (w - q * total) * norm);
        store_some<O>(whole, c, columns - c, (q + w) * norm);
      }
      continue;
    }
    // Far from the clean scores nothing cancels: the plain softmax.
    float highest = -INFINITY;
    for (int64_t c = 0; c < columns; ++c) {
      const float x = scores[c] + scale * value_at<D>(d, c);
      highest = x > highest ? x : highest;
    }
    sum = Float16x{};
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Float16x x = load_some<DType::float32>(scores, c, columns - c) + load_some<D>(d, c, columns - c) * scale - highest;
      sum += first_lanes(expm1_lanes(clamp(x, -80.0f, 0.0f)) + 1.0f, columns - c);
    }
    const float norm = 1.0f / sum_halves(sum);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Float16x x = load_some<DType::float32>(scores, c, columns - c) + load_some<D>(d, c, columns - c) * scale - highest;
      const Float16x after = (expm1_lanes(clamp(x, -80.0f, 0.0f)) + 1.0f) * norm;
      store_some<O>(change, c, columns - c, after - load_some<DType::float32>(p, c, columns - c));
      store_some<O>(whole, c, columns - c, after);
    }
  }
}

// One instance per pair of dtypes, chosen at run time.
#define CLADO_BY_DTYPE(function, ...)                                            \
  do {                                                                           \
    if (delta_half && out_half)                                                  \
      function<DType::bfloat16, DType::bfloat16>(__VA_ARGS__);                   \
    else if (delta_half)                                                         \
      function<DType::bfloat16, DType::float32>(__VA_ARGS__);                    \
    else if (out_half)                                                           \
      function<DType::float32, DType::bfloat16>(__VA_ARGS__);                    \
    else                                                                         \
      function<DType::float32, DType::float32>(__VA_ARGS__);                     \
  } while (0)

CLADO_INLINE void gelu_body(const float* clean, const void* delta, void* out, int64_t streams, int64_t stride, int64_t size,
                            bool delta_half, bool out_half) {
  CLADO_BY_DTYPE(gelu_span, clean, delta, out, streams, stride, size);
}
CLADO_SIMD_KERNEL(gelu,
                  (const float* clean, const void* delta, void* out, int64_t streams, int64_t stride, int64_t size,
                   bool delta_half, bool out_half),
                  (clean, delta, out, streams, stride, size, delta_half, out_half))

CLADO_INLINE void layer_norm_body(const float* x, const void* delta, const float* weight, void* out, int64_t streams, int64_t stride,
                                  int64_t columns, float eps, bool delta_half, bool out_half) {
  CLADO_BY_DTYPE(layer_norm_row, x, delta, weight, out, streams, stride, columns, eps);
}
CLADO_SIMD_KERNEL(layer_norm,
                  (const float* x, const void* delta, const float* weight, void* out, int64_t streams, int64_t stride,
                   int64_t columns, float eps, bool delta_half, bool out_half),
                  (x, delta, weight, out, streams, stride, columns, eps, delta_half, out_half))

CLADO_INLINE void softmax_body(const float* scores, const float* p, const void* delta, void* out, int64_t streams, int64_t stride,
                               int64_t columns, float scale, bool delta_half, bool out_half) {
  CLADO_BY_DTYPE(softmax_row, scores, p, delta, out, streams, stride, columns, scale);
}
CLADO_SIMD_KERNEL(softmax,
                  (const float* scores, const float* p, const void* delta, void* out, int64_t streams, int64_t stride,
                   int64_t columns, float scale, bool delta_half, bool out_half),
                  (scores, p, delta, out, streams, stride, columns, scale, delta_half, out_half))

int64_t width(bool half) { return half ? 2 : 4; }

template <class T>
T* at(T* base, int64_t element, bool half) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(base) + element * width(half);
}

}  // namespace

void carried_gelu_cpu(const float* clean, const void* delta, void* out, int64_t streams, int64_t size, bool delta_half, bool out_half,
                      int threads) {
  const int64_t spans = (size + kSpan - 1) / kSpan;
  parallel_for(spans, threads, [&](int64_t index) {
    const int64_t first = index * kSpan;
    gelu(clean + first, at(delta, first, delta_half), at(out, first, out_half), streams, size, std::min(kSpan, size - first),
         delta_half, out_half);
  });
}

void carried_layer_norm_cpu(const float* clean, const void* delta, const float* weight, void* out, int64_t streams, int64_t rows,
                            int64_t columns, float eps, bool delta_half, bool out_half, int threads) {
  parallel_for(rows, threads, [&](int64_t row) {
    const int64_t first = row * columns;
    layer_norm(clean + first, at(delta, first, delta_half), weight, at(out, first, out_half), streams, rows * columns, columns, eps,
               delta_half, out_half);
  });
}

void carried_softmax_cpu(const float* scores, const float* clean, const void* delta, void* out, int64_t streams, int64_t rows,
                         int64_t columns, float scale, bool delta_half, bool out_half, int threads) {
  parallel_for(rows, threads, [&](int64_t row) {
    const int64_t first = row * columns;
    softmax(scores + first, clean + first, at(delta, first, delta_half), at(out, 2 * first, out_half), streams, rows * columns,
            columns, scale, delta_half, out_half);
  });
}

}  // namespace clado
