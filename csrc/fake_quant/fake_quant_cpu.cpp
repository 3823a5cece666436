#include "fake_quant/fake_quant.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>
#include <vector>

#include "common/parallel.h"
#include "common/weights_cpu.h"
#include "scale_search/scale_search.h"

namespace clado {
namespace {

// One block of a row in one format.
struct Block {
  const void* weight;   // first element of the block
  int64_t column;       // of that element
  int count;            // elements
  int64_t group_size;
  const float* scales;  // of the row
  const int8_t* zeros;  // of the row, or null
  int bits;             // or a float element
};

// What follows needs more of a level than plain vectors give. Whether a lane of a or b has none of the bits of `mask`:
template <int W>
inline bool any_without(Lanes<uint32_t, W> a, Lanes<uint32_t, W> b, uint32_t mask) {
  uint32_t x[2 * kLanes];
  store(x, a), store(x + kLanes, b);
  bool any = false;
  for (const uint32_t lane : x) any |= (lane & mask) == 0;
  return any;
}
// The lanes of a and b, all of which fit, as bytes.
template <int W>
inline void store_bytes(int8_t* out, Lanes<int32_t, W> a, Lanes<int32_t, W> b) {
  int32_t x[2 * kLanes];
  store(x, a), store(x + kLanes, b);
  for (int l = 0; l < 2 * kLanes; ++l) out[l] = static_cast<int8_t>(x[l]);
}
#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("arch=x86-64-v4"))) inline bool any_without(Lanes<uint32_t, 64> a, Lanes<uint32_t, 64> b, uint32_t mask) {
  const __m512i bits = _mm512_set1_epi32(static_cast<int>(mask)), x = (__m512i)a.part[0], y = (__m512i)b.part[0];
  return !_kortestz_mask16_u8(_mm512_testn_epi32_mask(x, bits), _mm512_testn_epi32_mask(y, bits));
}
__attribute__((target("arch=x86-64-v4"))) inline void store_bytes(int8_t* out, Lanes<int32_t, 64> a, Lanes<int32_t, 64> b) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)a.part[0]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out + kLanes), _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)b.part[0]));
}
__attribute__((target("arch=x86-64-v3"))) inline bool any_without(Lanes<uint32_t, 32> a, Lanes<uint32_t, 32> b, uint32_t mask) {
  const __m256i bits = _mm256_set1_epi32(static_cast<int>(mask)), zero = _mm256_setzero_si256();
  const auto without = [&](auto part) __attribute__((target("arch=x86-64-v3"))) {
    return _mm256_cmpeq_epi32(_mm256_and_si256((__m256i)part, bits), zero);
  };
  const __m256i x = _mm256_or_si256(without(a.part[0]), without(a.part[1]));
  return _mm256_movemask_epi8(_mm256_or_si256(x, _mm256_or_si256(without(b.part[0]), without(b.part[1])))) != 0;
}
__attribute__((target("arch=x86-64-v3"))) inline void store_bytes(int8_t* out, Lanes<int32_t, 32> a, Lanes<int32_t, 32> b) {
  const __m256i x = _mm256_packs_epi32((__m256i)a.part[0], (__m256i)a.part[1]);
  const __m256i y = _mm256_packs_epi32((__m256i)b.part[0], (__m256i)b.part[1]);  // half by half: put in order below
  const __m256i mixed = _mm256_packs_epi16(x, y), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permutevar8x32_epi32(mixed, order));
}
#endif

// Scale, zero and limits of 32 lanes.
template <class F>
struct Steps {
  F scale[2], inverse[2], zero[2], low[2], high[2];
  F table;      // see table_of
  bool normal;  // scale and inverse are, and the same in all lanes: multiply may be tried
};

// out = round_half_even(clamp(w / scale)), truly divided.
template <class F>
CLADO_INLINE void divide(const F* w, const Steps<F>& steps, F* out) {
  for (int half = 0; half < 2; ++half)
    out[half] = round_even(clamp(w[half] / steps.scale[half], steps.low[half], steps.high[half]));
}

// The same by a product with the reciprocal, which costs half as much; false where the outcome is not sure.
//
// With r = RN(1 / s) and |e| <= 2^-24 for each rounding, t = RN(w r) is w/s (1 + e1)(1 + e2) and RN(w / s) is w/s (1 + e3): within
// 3.01 * 2^-24 |w/s| of each other (what underflows is far from any tie), so after the clamp, to limits of at most 255, within
// 0.76 * 2^-14. They round alike unless a tie n + 1/2 is between them. The sum u = t + 1/2 + 2^-14 + 768 is a multiple of 2^-14
// by rounding, so the last 14 bits of its float are those of t + 1/2 + 2^-14: 0, 1 or 2 where t is within 1.5 * 2^-14 of a tie,
// which is not sure. Else the bits above are floor(t + 1/2), the nearest integer. One weight in 4,000 is not sure.
constexpr int kFraction = 14;
constexpr float kMiddle = 768.0f, kShift = kMiddle + 0.5f + 0x1p-14f;
constexpr int32_t kMiddleBits = (0x44000000 >> kFraction) + 256;

template <class F>
CLADO_INLINE bool multiply(const F* w, const Steps<F>& steps, typename F::UInt* u) {
  for (int half = 0; half < 2; ++half)
    u[half] = as<uint32_t>(clamp(w[half] * steps.inverse[half], steps.low[half], steps.high[half]) + kShift);
  return !any_without(u[0], u[1], (1u << kFraction) - 4);
}
// The integer in what multiply gave.
template <class F>
CLADO_INLINE F whole(typename F::UInt u) {
  return as<float>(u & ~((1u << kFraction) - 1)) - kMiddle;
}

// A register of values serves a width whose codes it can hold, rounded once per group instead of once per weight.
template <class F>
constexpr int kTableBits = F::kWidth == 64 ? 4 : F::kWidth == 32 ? 3 : 0;  // 0: the level cannot look up
template <class F>
CLADO_INLINE F look_up(F table, typename F::UInt u) {
  F out;
  const auto index = as<int32_t>(u >> kFraction);
  for (int i = 0; i < F::kParts; ++i) out.part[i] = __builtin_shuffle(table.part[0], index.part[i]);  // modulo the lanes
  return out;
}
// Lane k of the table holds the value of the integer n of [low, low + lanes) that is k modulo the lanes.
template <class F, DType D>
CLADO_INLINE F table_of(float scale, float low) {
  alignas(64) float value[kLanes];
  const int first = static_cast<int>(low);
  for (int k = 0; k < kLanes; ++k) value[k] = static_cast<float>(first + ((k - first) & (F::kPartLanes - 1)));
  return round_to<D>(F::load(value) * scale);
}

// `scale` and `zero` as they stand for all lanes of a group.
template <class F>
CLADO_INLINE void fill_alike(float scale, float zero, Steps<F>& steps) {
  const float inverse = 1.0f / scale;
  for (int half = 0; half < 2; ++half) steps.scale[half] = scale, steps.inverse[half] = inverse, steps.zero[half] = zero;
  steps.normal = std::fabs(scale) >= FLT_MIN && std::fabs(inverse) >= FLT_MIN && std::fabs(inverse) <= FLT_MAX;
}

// The lanes from element i of the block on, whose groups differ.
template <class F>
CLADO_INLINE void fill_lanes(const Block& block, int i, Steps<F>& steps) {
  float scale[kBlockLanes], zero[kBlockLanes];
  int64_t group = (block.column + i) / block.group_size, rest = (group + 1) * block.group_size - (block.column + i);
  for (int l = 0; l < kBlockLanes; ++l, --rest) {
    const bool inside = i + l < block.count;
    if (rest == 0) ++group, rest = block.group_size;
    scale[l] = inside ? block.scales[group] : 1.0f;
    zero[l] = inside && block.zeros ? static_cast<float>(block.zeros[group]) : 0.0f;
  }
  for (int half = 0; half < 2; ++half) {
    steps.scale[half] = F::load(scale + kLanes * half);
    steps.zero[half] = F::load(zero + kLanes * half);
  }
  steps.normal = false;
}

// fill(steps, group) where the scales change, fn(element, steps, elements) for every 32 elements of the block, fewer at its end.
template <class F, class Fill, class Fn>
CLADO_INLINE void for_each_lanes(const Block& block, Fill fill, Fn fn) {
  Steps<F> steps;
  const float lowest = static_cast<float>(lowest_code(block.bits)), highest = static_cast<float>(highest_code(block.bits));
  // A group that covers whole runs of 32 elements needs one scale for all lanes.
  const bool alike = block.group_size % kBlockLanes == 0 ||
                     block.column / block.group_size == (block.column + block.count - 1) / block.group_size;
  int64_t stop = 0;  // where the lanes no longer hold
  for (int i = 0; i < block.count; i += kBlockLanes) {
    if (i >= stop) {
      const int64_t group = (block.column + i) / block.group_size;
      if (alike) {
        stop = (group + 1) * block.group_size - block.column;
        fill_alike(block.scales[group], block.zeros ? static_cast<float>(block.zeros[group]) : 0.0f, steps);
      } else {
        fill_lanes(block, i, steps);
      }
      for (int half = 0; half < 2; ++half) {
        steps.low[half] = lowest - steps.zero[half];
        steps.high[half] = highest - steps.zero[half];
      }
      fill(steps, group);
    }
    fn(i, steps, std::min(kBlockLanes, block.count - i));
  }
}

// 32 weights from element i of the block on, zeros behind its end.
template <class F, DType D>
CLADO_INLINE void load_lanes(const Block& block, int i, int count, F* w) {
  alignas(64) char part[kBlockLanes * 4];
  const void* from = weights_at<D>(block.weight, i);
  if (count < kBlockLanes) {
    std::memset(part, 0, sizeof part);
    std::memcpy(part, from, static_cast<size_t>(count * kWeightBytes<D>));
    from = part;
  }
  for (int half = 0; half < 2; ++half) w[half] = load_weights<F, D>(from, kLanes * half);
}

// How values come about: by true division only; by products where they are sure; by a table of values too.
enum class Way { divide, multiply, look_up };

template <class F, DType D, Way W>
CLADO_INLINE void fake_quant_way(const Block& block, void* values, float* error) {
  F sum[2];
  const auto fill = [&](Steps<F>& steps, int64_t group) __attribute__((always_inline)) {
    if (W == Way::look_up && steps.normal) {
      const float zero = block.zeros ? static_cast<float>(block.zeros[group]) : 0.0f;
      steps.table = table_of<F, D>(block.scales[group], static_cast<float>(lowest_code(block.bits)) - zero);
    }
  };
  for_each_lanes<F>(block, fill, [&](int i, const Steps<F>& steps, int count) __attribute__((always_inline)) {
    const bool whole_lanes = count == kBlockLanes;
    alignas(64) char part[kBlockLanes * 4];
    void* to = whole_lanes ? weights_at<D>(values, i) : part;
    F w[2], q[2];
    typename F::UInt u[2];
    load_lanes<F, D>(block, i, count, w);
    if (W != Way::divide && steps.normal && multiply(w, steps, u)) {
      for (int half = 0; half < 2; ++half)
        q[half] = W == Way::look_up ? look_up(steps.table, u[half]) : round_to<D, true>(whole<F>(u[half]) * steps.scale[half]);
    } else {
      divide(w, steps, q);
      for (int half = 0; half < 2; ++half) q[half] = round_to<D, false>(q[half] * steps.scale[half]);
    }
    store_pair<D>(to, q);
    if (!whole_lanes) {
      const auto bytes = static_cast<size_t>(count * kWeightBytes<D>);
      std::memcpy(weights_at<D>(values, i), part, bytes);
      std::memset(part + bytes, 0, sizeof part - bytes);  // behind the end nothing was wrong, whatever a zero becomes
      for (int half = 0; half < 2; ++half) q[half] = load_weights<F, D>(part, kLanes * half);
    }
    for (int half = 0; half < 2; ++half) sum[half] += (q[half] - w[half]) * (q[half] - w[half]);
  });
  *error = sum_block_lanes(sum[0], sum[1]);
}

template <class F, DType D>
CLADO_INLINE void fake_quant_typed(const Block& block, void* values, float* error) {
  constexpr int64_t kLong = 128;  // a table for fewer weights costs more than it saves
  if (block.bits <= kTableBits<F> && std::min<int64_t>(block.group_size, block.count) >= kLong)
    fake_quant_way<F, D, Way::look_up>(block, values, error);
  else
    fake_quant_way<F, D, Way::multiply>(block, values, error);
  // Products do not look for NaN: once more where there may be one.
  if (*error != *error) fake_quant_way<F, D, Way::divide>(block, values, error);
}

template <class F, DType D>
CLADO_INLINE void quantize_typed(const Block& block, int8_t* codes) {
  using Int = typename F::Int;
  const auto fill = [](Steps<F>&, int64_t) {};
  for_each_lanes<F>(block, fill, [&](int i, const Steps<F>& steps, int count) __attribute__((always_inline)) {
    F w[2], step[2];
    typename F::UInt u[2];
    Int code[2];
    load_lanes<F, D>(block, i, count, w);
    const bool sure = steps.normal && multiply(w, steps, u);
    if (!sure) divide(w, steps, step);
    for (int half = 0; half < 2; ++half) {
      const Int zero = convert<int32_t>(steps.zero[half]);
      code[half] = sure ? select(w[half] == w[half], as<int32_t>(u[half] >> kFraction) - kMiddleBits + zero, Int{})
                        : convert<int32_t>(select(step[half] == step[half], step[half] + steps.zero[half], F{}));
    }
    if (count == kBlockLanes) return store_bytes(codes + i, code[0], code[1]);
    int8_t part[kBlockLanes];
    store_bytes(part, code[0], code[1]);
    std::memcpy(codes + i, part, static_cast<size_t>(count));
  });
}

// ---- float elements ----

// fn(element, weights, scales, elements) for every 32 elements of the block, fewer at its end, where zeros at scale 1 follow.
template <class F, DType D, class Fn>
CLADO_INLINE void for_each_scaled(const Block& block, Fn fn) {
  // Groups of whole vectors, or one for all of the block, have one scale for sixteen lanes.
  const int64_t first = block.column / block.group_size;
  const bool alike = block.group_size % kLanes == 0 || first == (block.column + block.count - 1) / block.group_size;
  int64_t group = first, stop = (first + 1) * block.group_size - block.column;  // where the group ends, in the block
  F w[2], scale[2] = {block.scales[first], block.scales[first]};
  for (int i = 0; i < block.count; i += kBlockLanes) {
    const int count = std::min(kBlockLanes, block.count - i);
    load_lanes<F, D>(block, i, count, w);
    if (alike) {
      for (int half = 0; half < 2; ++half) {
        const int at = i + kLanes * half;
        if (at >= stop && at < block.count) ++group, stop += block.group_size;
        scale[half] = block.scales[group];
      }
    } else {
      float lanes[kBlockLanes];
      for (int l = 0; l < kBlockLanes; ++l) {
        if (i + l >= stop && l < count) ++group, stop += block.group_size;
        lanes[l] = l < count ? block.scales[group] : 1.0f;
      }
      for (int half = 0; half < 2; ++half) scale[half] = F::load(lanes + kLanes * half);
    }
    fn(i, w, scale, count);
  }
}

template <class F, DType D, int E>
CLADO_INLINE void fake_quant_element(const Block& block, void* values, float* error) {
  F sum[2];
  for_each_scaled<F, D>(block, [&](int i, const F* w, const F* scale, int count) __attribute__((always_inline)) {
    F q[2];
    for (int half = 0; half < 2; ++half) q[half] = round_to<D>(round_element<E>(w[half] / scale[half]) * scale[half]);
    if (count == kBlockLanes) {
      store_pair<D>(weights_at<D>(values, i), q);
    } else {
      alignas(64) char part[kBlockLanes * 4];
      store_pair<D>(part, q);
      std::memcpy(weights_at<D>(values, i), part, static_cast<size_t>(count * kWeightBytes<D>));
      for (int half = 0; half < 2; ++half) q[half] = first_lanes(q[half], count - kLanes * half);
    }
    for (int half = 0; half < 2; ++half) sum[half] += (q[half] - w[half]) * (q[half] - w[half]);
  });
  *error = sum_block_lanes(sum[0], sum[1]);
}

template <class F, DType D, int E>
CLADO_INLINE void quantize_element(const Block& block, int8_t* codes) {
  for_each_scaled<F, D>(block, [&](int i, const F* w, const F* scale, int count) __attribute__((always_inline)) {
    const auto low = element_code<E>(w[0] / scale[0]), high = element_code<E>(w[1] / scale[1]);
    if (count == kBlockLanes) return store_bytes(codes + i, low, high);
    int8_t part[kBlockLanes];
    store_bytes(part, low, high);
    std::memcpy(codes + i, part, static_cast<size_t>(count));
  });
}

// fn(E) with the block's float element as a constant.
template <class Fn>
CLADO_INLINE void with_element(const Block& block, Fn fn) {
  if (block.bits == kE2M1) return fn(std::integral_constant<int, kE2M1>());
  if (block.bits == kE4M3) return fn(std::integral_constant<int, kE4M3>());
  fn(std::integral_constant<int, kE5M2>());
}
// fn(D) with the dtype as a constant.
template <class Fn>
CLADO_INLINE void with_dtype(DType dtype, Fn fn) {
  if (dtype == DType::float32) return fn(std::integral_constant<DType, DType::float32>());
  if (dtype == DType::float16) return fn(std::integral_constant<DType, DType::float16>());
  fn(std::integral_constant<DType, DType::bfloat16>());
}
template <class F>
CLADO_INLINE void fake_quant_floats_body(const Block& block, DType dtype, void* values, float* error) {
  with_element(block, [&](auto element) __attribute__((always_inline)) {
    with_dtype(dtype, [&](auto d) __attribute__((always_inline)) {
      fake_quant_element<F, decltype(d)::value, decltype(element)::value>(block, values, error);
    });
  });
}
template <class F>
CLADO_INLINE void quantize_floats_body(const Block& block, DType dtype, int8_t* codes) {
  with_element(block, [&](auto element) __attribute__((always_inline)) {
    with_dtype(dtype, [&](auto d) __attribute__((always_inline)) {
      quantize_element<F, decltype(d)::value, decltype(element)::value>(block, codes);
    });
  });
}
CLADO_LANES_KERNEL(fake_quant_floats, (const Block& block, DType dtype, void* values, float* error), (block, dtype, values, error))
CLADO_LANES_KERNEL(quantize_floats, (const Block& block, DType dtype, int8_t* codes), (block, dtype, codes))

// ---- all formats ----

template <class F>
CLADO_INLINE void fake_quant_block_body(const Block& block, DType dtype, void* values, float* error) {
  if (dtype == DType::float32) return fake_quant_typed<F, DType::float32>(block, values, error);
  if (dtype == DType::float16) return fake_quant_typed<F, DType::float16>(block, values, error);
  return fake_quant_typed<F, DType::bfloat16>(block, values, error);
}
template <class F>
CLADO_INLINE void quantize_block_body(const Block& block, DType dtype, int8_t* codes) {
  if (dtype == DType::float32) return quantize_typed<F, DType::float32>(block, codes);
  if (dtype == DType::float16) return quantize_typed<F, DType::float16>(block, codes);
  return quantize_typed<F, DType::bfloat16>(block, codes);
}
CLADO_LANES_KERNEL(fake_quant_block, (const Block& block, DType dtype, void* values, float* error), (block, dtype, values, error))
CLADO_LANES_KERNEL(quantize_block, (const Block& block, DType dtype, int8_t* codes), (block, dtype, codes))

// A weight with its formats, cut into blocks.
struct Quantizer {
  const WeightView& weight;
  const FormatList& formats;

  int64_t blocks() const { return blocks_of(weight.columns); }
  Block block(int64_t row, int64_t part, int b) const {
    const Format& to = formats.at[b];
    const int64_t column = part * kBlock, at = row * to.groups(weight.columns);
    const int count = static_cast<int>(std::min<int64_t>(kBlock, weight.columns - column));
    return {weight.at(row, column), column, count, to.group_size, to.scales + at, to.zeros ? to.zeros + at : nullptr, to.element};
  }
  // Of the block's first output.
  int64_t output(int64_t row, int64_t part, int b) const { return (b * weight.rows + row) * weight.columns + part * kBlock; }
  // Writes the values of a block, returns its squared error.
  float fake_quant(int64_t row, int64_t part, int b, void* values) const {
    float error = 0.0f;
    void* to = static_cast<char*>(values) + output(row, part, b) * weight_bytes(weight.dtype);
    const auto run = is_float(formats.at[b].element) ? fake_quant_floats : fake_quant_block;
    run(block(row, part, b), weight.dtype, to, &error);
    return error;
  }
  void quantize(int64_t row, int64_t part, int b, int8_t* codes) const {
    const auto run = is_float(formats.at[b].element) ? quantize_floats : quantize_block;
    run(block(row, part, b), weight.dtype, codes + output(row, part, b));
  }
};

// fn(row, block of the row, format) for all blocks: the formats of a block follow each other, so that the weight comes from memory once.
template <class Fn>
void for_each_block(const Quantizer& quantizer, int threads, Fn fn) {
  const int64_t blocks = quantizer.blocks(), rows = quantizer.weight.rows;
  const int count = quantizer.formats.count;
  parallel_for(rows * blocks, threads_for(rows * quantizer.weight.columns * count, threads), [&](int64_t i) {
    for (int b = 0; b < count; ++b) fn(i / blocks, i % blocks, b);
  });
}

}  // namespace

void fake_quant_cpu(const WeightView& weight, const FormatList& formats, void* values, double* sqerr, int threads) {
  const Quantizer quantizer{weight, formats};
  const int64_t blocks = quantizer.blocks(), sums = formats.count * weight.rows;
  std::vector<float> errors(static_cast<size_t>(sums * blocks));
  for_each_block(quantizer, threads, [&](int64_t row, int64_t part, int b) {
    errors[static_cast<size_t>((b * weight.rows + row) * blocks + part)] = quantizer.fake_quant(row, part, b, values);
  });
  for (int64_t i = 0; i < sums; ++i) {
    double sum = 0.0;
    for (int64_t part = 0; part < blocks; ++part) sum += static_cast<double>(errors[static_cast<size_t>(i * blocks + part)]);
    sqerr[i] = settled(sum);
  }
}

void quantize_weight_cpu(const WeightView& weight, const BitList& bits, int steps, float* scales, int8_t* zeros, void* values,
                         double* sqerr, int threads) {
  const FormatList formats = formats_of(weight, bits, scales, zeros);
  const TargetList targets = targets_of(weight, bits, scales, zeros);
  const int workers = threads_for(weight.rows * weight.columns * bits.count * steps, threads);
  if (weight.rows < 4 * workers && workers > 1) {  // too few rows to share: the threads share their blocks
    scale_search_cpu(weight, {}, targets, steps, threads);
    return fake_quant_cpu(weight, formats, values, sqerr, threads);
  }
  const Quantizer quantizer{weight, formats};
  parallel_for(weight.rows, workers, [&](int64_t row) {
    scale_search_row_cpu(weight, row, targets, steps);
    double sum[kMostWidths] = {};
    for (int64_t part = 0; part < quantizer.blocks(); ++part)
      for (int b = 0; b < bits.count; ++b) sum[b] += static_cast<double>(quantizer.fake_quant(row, part, b, values));
    for (int b = 0; b < bits.count; ++b) sqerr[b * weight.rows + row] = settled(sum[b]);
  });
}

void quantize_cpu(const WeightView& weight, const FormatList& formats, int8_t* codes, int threads) {
  const Quantizer quantizer{weight, formats};
  for_each_block(quantizer, threads, [&](int64_t row, int64_t part, int b) { quantizer.quantize(row, part, b, codes); });
}

}  // namespace clado
