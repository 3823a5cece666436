#include "fake_quant/fake_quant.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/weights_cpu.h"

namespace clado {
namespace {

// Where one block of a row lies, and its scales.
struct Span {
  int64_t first;       // element index in the weight
  int64_t column;      // first column
  int count;           // elements
  int64_t group_size;
  const float* scales;  // of the row
};

// Scale of every element of the span, 1 in the padding.
CLADO_INLINE void spread_scales(const Span& span, float* out) {
  int i = 0;
  while (i < span.count) {
    const int64_t group = (span.column + i) / span.group_size;
    const int stop = static_cast<int>(std::min<int64_t>(span.count, (group + 1) * span.group_size - span.column));
    const float scale = span.scales[group];
    for (; i < stop; ++i) out[i] = scale;
  }
  for (; i % kBlockLanes != 0; ++i) out[i] = 1.0f;
}

CLADO_INLINE Float16x codes_of(Float16x w, Float16x scale, int bits) {
  return round_even(clamp(w / scale, static_cast<float>(lowest_code(bits)), static_cast<float>(highest_code(bits))));
}

CLADO_INLINE void fake_quant_block_body(const float* w, const float* scale, int bits, const Span& span, void* values, DType dtype,
                                        int64_t target, float* error) {
  Float16x sum[2] = {};
  if (dtype == DType::float32 && span.count == kBlock) {  // straight to memory
    float* out = static_cast<float*>(values) + target;
    for (int i = 0; i < kBlock; i += kBlockLanes)
      for (int half = 0; half < 2; ++half) {
        const int at = i + kLanes * half;
        const Float16x v = load(w + at), s = load(scale + at), q = codes_of(v, s, bits) * s;
        store(out + at, q);
        sum[half] += (q - v) * (q - v);
      }
  } else {
    alignas(64) float q[kBlock];
    for (int i = 0; i < span.count; i += kLanes) {
      const Float16x s = load(scale + i);
      store(q + i, codes_of(load(w + i), s, bits) * s);
    }
    write_block(values, dtype, target, span.count, q);
    for (int i = span.count; i % kBlockLanes != 0; ++i) q[i] = 0.0f;
    for (int i = 0; i < span.count; i += kBlockLanes)
      for (int half = 0; half < 2; ++half) {
        const Float16x e = load(q + i + kLanes * half) - load(w + i + kLanes * half);
        sum[half] += e * e;
      }
  }
  *error = sum_block_lanes(sum[0], sum[1]);
}

CLADO_INLINE void quantize_block_body(const float* w, const float* scale, int bits, int count, int8_t* codes) {
  for (int i = 0; i < count; i += kLanes) {
    const Float16x q = codes_of(load(w + i), load(scale + i), bits);
    const Int16x code = __builtin_convertvector(q == q ? q : Float16x{}, Int16x);
    for (int l = 0; l < kLanes && i + l < count; ++l) codes[i + l] = static_cast<int8_t>(code[l]);
  }
}

CLADO_SIMD_KERNEL(fake_quant_block,
                  (const float* w, const float* scale, int bits, const Span& span, void* values, DType dtype, int64_t target,
                   float* error),
                  (w, scale, bits, span, values, dtype, target, error))
CLADO_SIMD_KERNEL(quantize_block, (const float* w, const float* scale, int bits, int count, int8_t* codes),
                  (w, scale, bits, count, codes))

// fn(weights, scales, width index, span, row, block) for every block of every row, the weights read once for all widths.
template <class Fn>
void for_each_block(const void* weight, DType dtype, const float* scales, int64_t rows, int64_t columns, int64_t group_size,
                    int num_bits, int threads, Fn fn) {
  const int64_t blocks = blocks_of(columns), groups = (columns + group_size - 1) / group_size;
  parallel_for(rows * blocks, threads, [&](int64_t index) {
    const int64_t row = index / blocks, block = index % blocks, column = block * kBlock;
    Span span{row * columns + column, column, static_cast<int>(std::min<int64_t>(kBlock, columns - column)), group_size, nullptr};
    alignas(64) float w[kBlock], s[kBlock];
    read_block(weight, dtype, span.first, span.count, w);
    for (int b = 0; b < num_bits; ++b) {
      span.scales = scales + (b * rows + row) * groups;
      spread_scales(span, s);
      fn(w, s, b, span, row, block);
    }
  });
}

}  // namespace

void fake_quant_cpu(const void* weight, int dtype, const float* scales, void* values, double* sqerr, float* block_errors,
                    int64_t rows, int64_t columns, int64_t group_size, const int32_t* bits, int num_bits, int threads) {
  const int64_t blocks = blocks_of(columns);
  const DType type = static_cast<DType>(dtype);
  for_each_block(weight, type, scales, rows, columns, group_size, num_bits, threads,
                 [&](const float* w, const float* s, int b, const Span& span, int64_t row, int64_t block) {
                   fake_quant_block(w, s, bits[b], span, values, type, b * rows * columns + span.first,
                                    &block_errors[(b * rows + row) * blocks + block]);
                 });
  for (int64_t i = 0; i < num_bits * rows; ++i) {
    double sum = 0.0;
    for (int64_t block = 0; block < blocks; ++block) sum += static_cast<double>(block_errors[i * blocks + block]);
    sqerr[i] = sum;
  }
}

void quantize_cpu(const void* weight, int dtype, const float* scales, int8_t* codes, int64_t rows, int64_t columns,
                  int64_t group_size, const int32_t* bits, int num_bits, int threads) {
  for_each_block(weight, static_cast<DType>(dtype), scales, rows, columns, group_size, num_bits, threads,
                 [&](const float* w, const float* s, int b, const Span& span, int64_t, int64_t) {
                   quantize_block(w, s, bits[b], span.count, codes + b * rows * columns + span.first);
                 });
}

}  // namespace clado
