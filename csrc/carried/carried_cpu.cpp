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

// A part of sixteen elements, by masks where the level has them.
template <DType D, int W>
CLADO_INLINE void load_first(const void* x, int64_t rest, Lanes<float, W>* v) {
  alignas(64) char part[kLanes * 4] = {};
  std::memcpy(part, x, static_cast<size_t>(rest) * kWeightBytes<D>);
  *v = load_weights<Lanes<float, W>, D>(part, 0);
}
template <DType D, int W>
CLADO_INLINE void store_first(void* x, int64_t rest, Lanes<float, W> v) {
  alignas(64) char part[kLanes * 4];
  store_weights<D>(part, 0, v);
  std::memcpy(x, part, static_cast<size_t>(rest) * kWeightBytes<D>);
}
#if defined(__x86_64__) && defined(__GNUC__)
template <DType D>
__attribute__((target("arch=x86-64-v4"))) inline void load_first(const void* x, int64_t rest, Lanes<float, 64>* v) {
  const auto mask = static_cast<__mmask16>((1u << rest) - 1);
  if constexpr (D == DType::float32) {
    v->part[0] = _mm512_maskz_loadu_ps(mask, x);
  } else {
    const __m512i wide = _mm512_maskz_cvtepu16_epi32(mask, _mm256_maskz_loadu_epi16(mask, x));
    v->part[0] = _mm512_castsi512_ps(_mm512_maskz_slli_epi32(mask, wide, 16));
  }
}
template <DType D>
__attribute__((target("arch=x86-64-v4"))) inline void store_first(void* x, int64_t rest, Lanes<float, 64> v) {
  const auto mask = static_cast<__mmask16>((1u << rest) - 1);
  if constexpr (D == DType::float32) {
    _mm512_mask_storeu_ps(x, mask, v.part[0]);
  } else {
    _mm512_mask_cvtepi32_storeu_epi16(x, mask, _mm512_maskz_srli_epi32(mask, _mm512_castps_si512(v.part[0]), 16));
  }
}
#endif

// The first `rest` of sixteen elements from i on, zeros behind them.
template <class F, DType D>
CLADO_INLINE F load_some(const void* x, int64_t i, int64_t rest) {
  if (rest >= kLanes) return load_weights<F, D>(x, i);
  F v;
  load_first<D>(weights_at<D>(x, i), rest, &v);
  return v;
}

template <DType D, class F>
CLADO_INLINE void store_some(void* x, int64_t i, int64_t rest, F v) {
  v = round_to<D>(v);
  if (rest >= kLanes) return store_weights<D>(x, i, v);
  store_first<D>(weights_at<D>(x, i), rest, v);
}

template <DType D>
CLADO_INLINE float value_at(const void* x, int64_t i) {
  if constexpr (D == DType::float32) return static_cast<const float*>(x)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(x)[i]) << 16;
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// Phi, the normal distribution function: 1/2 + x times a polynomial of x^2, interpolated at Chebyshev's points for |x| <= 4.75 and
// constant beyond. Its error is smooth, so that it does not grow where two values are subtracted.
template <class F>
CLADO_INLINE F normal_lanes(F x) {
  constexpr float kReach = 4.75f;
  constexpr float kTerms[] = {0.14874804f,      -0.0736657754f, 0.0532513224f,  -0.0406203382f, 0.0302551929f,
                              -0.0212529153f,   0.0138123697f,  -0.00831964333f, 0.00476514455f, -0.00243269815f,
                              0.000938150333f,  -0.000423324585f, 0.00033238958f, -0.000124969418f};
  const F y = clamp(x, -kReach, kReach);
  return multiply_add(y, polynomial(kTerms, multiply_add(y * (2.0f / (kReach * kReach)), y, F(-1.0f))), F(0.5f));
}

// e^x - 1 for |x| < 88 to 4e-7: six terms of the series are enough here.
template <class F>
CLADO_INLINE F short_expm1(F x) {
  constexpr float kTerms[] = {1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720};
  const F k = log2_multiple(x), r = multiply_add(k, F(-0.693147181f), x), scale = power_of_two(k);
  return multiply_add(scale, r * polynomial(kTerms, r), scale - 1.0f);
}

template <class F, DType D, DType O>
CLADO_INLINE void gelu_span(const float* clean, const void* delta, void* out, int64_t streams, int64_t stride, int64_t size) {
  float before[kSpan];
  for (int64_t i = 0; i < size; i += kLanes) store(before + i, normal_lanes(load_some<F, DType::float32>(clean, i, size - i)));
  for (int64_t s = 0; s < streams; ++s) {
    const void* d = weights_at<D>(delta, s * stride);
    void* o = weights_at<O>(out, s * stride);
    for (int64_t i = 0; i < size; i += kLanes) {
      const F x = load_some<F, DType::float32>(clean, i, size - i), e = load_some<F, D>(d, i, size - i);
      const F after = normal_lanes(x + e);
      store_some<O>(o, i, size - i, multiply_add(e, after, x * (after - F::load(before + i))));
    }
  }
}

template <class F, DType D, DType O>
CLADO_INLINE void layer_norm_row(const float* x, const void* delta, const float* weight, void* out, int64_t streams, int64_t stride,
                                 int64_t columns, float eps) {
  F sum, squares;
  for (int64_t c = 0; c < columns; c += kLanes) sum += load_some<F, DType::float32>(x, c, columns - c);
  const float count = static_cast<float>(columns), mean = sum_halves(sum) / count;
  for (int64_t c = 0; c < columns; c += kLanes) {
    const F y = first_lanes(load_some<F, DType::float32>(x, c, columns - c) - mean, columns - c);
    squares += y * y;
  }
  const float variance = sum_halves(squares) / count + eps, deviation = std::sqrt(variance);
  for (int64_t s = 0; s < streams; ++s) {
    const void* d = weights_at<D>(delta, s * stride);
    void* o = weights_at<O>(out, s * stride);
    F total;
    for (int64_t c = 0; c < columns; c += kLanes) total += load_some<F, D>(d, c, columns - c);
    const float shift = sum_halves(total) / count;
    F change;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const F y = load_some<F, DType::float32>(x, c, columns - c) - mean;
      const F e = load_some<F, D>(d, c, columns - c) - shift;
      change += first_lanes(e * (2.0f * y + e), columns - c);
    }
    const float more = sum_halves(change) / count;  // of the variance
    const float moved = std::sqrt(std::max(variance + more, 0.0f) + 0.0f * more);  // NaN stays NaN
    const float after = 1.0f / moved, gain = -more / (deviation * moved * (deviation + moved));
    for (int64_t c = 0; c < columns; c += kLanes) {
      const F y = load_some<F, DType::float32>(x, c, columns - c) - mean;
      const F e = load_some<F, D>(d, c, columns - c) - shift;
      F v = e * after + y * gain;
      if (weight) v = v * load_some<F, DType::float32>(weight, c, columns - c);
      store_some<O>(o, c, columns - c, v);
    }
  }
}

template <class F, DType D, DType O>
CLADO_INLINE void add_layer_norm_row(const float* x, const float* residual, const void* branch, const float* weight, float* sum,
                                     void* out, int64_t streams, int64_t stride, int64_t columns, float eps) {
  for (int64_t s = 0; s < streams; ++s) {
    const float* r = residual + s * stride;
    const void* b = weights_at<D>(branch, s * stride);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const F d = load_some<F, DType::float32>(r, c, columns - c) + load_some<F, D>(b, c, columns - c);
      store_some<DType::float32>(sum + s * stride, c, columns - c, d);
    }
  }
  layer_norm_row<F, DType::float32, O>(x, sum, weight, out, streams, stride, columns, eps);
}

template <class F, DType D, DType O>
CLADO_INLINE void softmax_row(const float* scores, const float* p, const void* delta, void* out, int64_t streams, int64_t stride,
                              int64_t columns, float scale) {
  float kept[kSpan];
  const bool keep = columns <= kSpan;
  for (int64_t s = 0; s < streams; ++s) {
    const void* d = weights_at<D>(delta, s * stride);
    void* change = weights_at<O>(out, 2 * s * stride);
    void* whole = weights_at<O>(change, columns);
    F sum, reach;
    for (int64_t c = 0; c < columns; c += kLanes) {
      const F x = load_some<F, D>(d, c, columns - c) * scale, size = abs(x);
      reach = select(size > reach, size, reach);
      const F w = load_some<F, DType::float32>(p, c, columns - c) * short_expm1(x);
      if (keep) store(kept + c, w);
      sum += w;
    }
    if (!(max_lanes(reach) > 30.0f)) {
      const float total = sum_halves(sum), norm = 1.0f / (1.0f + total);
      for (int64_t c = 0; c < columns; c += kLanes) {
        const F q = load_some<F, DType::float32>(p, c, columns - c);
        const F w = keep ? F::load(kept + c) : q * short_expm1(load_some<F, D>(d, c, columns - c) * scale);
        store_some<O>(change, c, columns - c, multiply_add(q, F(-total), w) * norm);
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
    sum = F{};
    for (int64_t c = 0; c < columns; c += kLanes) {
      const F x = load_some<F, DType::float32>(scores, c, columns - c) + load_some<F, D>(d, c, columns - c) * scale - highest;
      sum += first_lanes(expm1_lanes(clamp(x, -80.0f, 0.0f)) + 1.0f, columns - c);
    }
    const float norm = 1.0f / sum_halves(sum);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const F x = load_some<F, DType::float32>(scores, c, columns - c) + load_some<F, D>(d, c, columns - c) * scale - highest;
      const F after = (expm1_lanes(clamp(x, -80.0f, 0.0f)) + 1.0f) * norm;
      store_some<O>(change, c, columns - c, after - load_some<F, DType::float32>(p, c, columns - c));
      store_some<O>(whole, c, columns - c, after);
    }
  }
}

// One instance per pair of dtypes, chosen at run time.
#define CLADO_BY_DTYPE(function, ...)                              \
  do {                                                             \
    if (streams.delta_half && streams.out_half)                    \
      function<F, DType::bfloat16, DType::bfloat16>(__VA_ARGS__); \
    else if (streams.delta_half)                                   \
      function<F, DType::bfloat16, DType::float32>(__VA_ARGS__);  \
    else if (streams.out_half)                                     \
      function<F, DType::float32, DType::bfloat16>(__VA_ARGS__);  \
    else                                                           \
      function<F, DType::float32, DType::float32>(__VA_ARGS__);   \
  } while (0)

template <class F>
CLADO_INLINE void gelu_body(const float* clean, const void* delta, void* out, const Streams& streams, int64_t size) {
  CLADO_BY_DTYPE(gelu_span, clean, delta, out, streams.streams, streams.stride(), size);
}
CLADO_LANES_KERNEL(gelu, (const float* clean, const void* delta, void* out, const Streams& streams, int64_t size),
                   (clean, delta, out, streams, size))

template <class F>
CLADO_INLINE void layer_norm_body(const float* x, const void* delta, const float* weight, void* out, const Streams& streams, float eps) {
  CLADO_BY_DTYPE(layer_norm_row, x, delta, weight, out, streams.streams, streams.stride(), streams.columns, eps);
}
CLADO_LANES_KERNEL(layer_norm,
                   (const float* x, const void* delta, const float* weight, void* out, const Streams& streams, float eps),
                   (x, delta, weight, out, streams, eps))

template <class F>
CLADO_INLINE void add_layer_norm_body(const float* x, const float* residual, const void* branch, const float* weight, float* sum,
                                      void* out, const Streams& streams, float eps) {
  CLADO_BY_DTYPE(add_layer_norm_row, x, residual, branch, weight, sum, out, streams.streams, streams.stride(), streams.columns, eps);
}
CLADO_LANES_KERNEL(add_layer_norm,
                   (const float* x, const float* residual, const void* branch, const float* weight, float* sum, void* out,
                    const Streams& streams, float eps),
                   (x, residual, branch, weight, sum, out, streams, eps))

template <class F>
CLADO_INLINE void softmax_body(const float* scores, const float* p, const void* delta, void* out, const Streams& streams, float scale) {
  CLADO_BY_DTYPE(softmax_row, scores, p, delta, out, streams.streams, streams.stride(), streams.columns, scale);
}
CLADO_LANES_KERNEL(softmax,
                   (const float* scores, const float* p, const void* delta, void* out, const Streams& streams, float scale),
                   (scores, p, delta, out, streams, scale))

template <class T>
T* at(T* base, int64_t element, bool half) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(base) + element * (half ? 2 : 4);
}

// fn(first element) for every row.
template <class Fn>
void for_each_row(const Streams& streams, int threads, Fn fn) {
  parallel_for(streams.rows, threads, [&](int64_t row) { fn(row * streams.columns); });
}

}  // namespace

void carried_gelu_cpu(const float* clean, const void* delta, void* out, const Streams& streams, int threads) {
  const int64_t size = streams.stride(), spans = (size + kSpan - 1) / kSpan;
  parallel_for(spans, threads, [&](int64_t index) {
    const int64_t first = index * kSpan;
    gelu(clean + first, at(delta, first, streams.delta_half), at(out, first, streams.out_half), streams, std::min(kSpan, size - first));
  });
}

void carried_layer_norm_cpu(const float* clean, const void* delta, const float* weight, void* out, const Streams& streams, float eps,
                            int threads) {
  for_each_row(streams, threads, [&](int64_t first) {
    layer_norm(clean + first, at(delta, first, streams.delta_half), weight, at(out, first, streams.out_half), streams, eps);
  });
}

void carried_add_layer_norm_cpu(const float* clean, const float* residual, const void* branch, const float* weight, float* sum, void* out,
                                const Streams& streams, float eps, int threads) {
  for_each_row(streams, threads, [&](int64_t first) {
    add_layer_norm(clean + first, residual + first, at(branch, first, streams.delta_half), weight, sum + first,
                   at(out, first, streams.out_half), streams, eps);
  });
}

void carried_softmax_cpu(const float* scores, const float* clean, const void* delta, void* out, const Streams& streams, float scale,
                         int threads) {
  for_each_row(streams, threads, [&](int64_t first) {
    softmax(scores + first, clean + first, at(delta, first, streams.delta_half), at(out, 2 * first, streams.out_half), streams, scale);
  });
}

}  // namespace clado
