#include "fake_quant/fake_quant.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/weights_cpu.h"

namespace clado {
namespace {

// One block of a row at one width.
struct Block {
  const void* weight;   // first element of the block
  int64_t column;       // of that element
  int count;            // elements
  int64_t group_size;
  const float* scales;  // of the row
  const int8_t* zeros;  // of the row, or null
  int bits;
};

// Scale, zero and limits of the 32 lanes from element i of the block on.
struct Lanes {
  Float16x scale[2], zero[2], low[2], high[2];
};

CLADO_INLINE void fill_lanes(const Block& block, int i, Lanes& lanes) {
  alignas(64) float scale[kBlockLanes], zero[kBlockLanes];
  for (int l = 0; l < kBlockLanes; ++l) {
    const bool inside = i + l < block.count;
    const int64_t group = inside ? (block.column + i + l) / block.group_size : 0;
    scale[l] = inside ? block.scales[group] : 1.0f;
    zero[l] = inside && block.zeros ? static_cast<float>(block.zeros[group]) : 0.0f;
  }
  for (int half = 0; half < 2; ++half) {
    lanes.scale[half] = load(scale + kLanes * half);
    lanes.zero[half] = load(zero + kLanes * half);
  }
}

// fn(element, lanes, elements) for every 32 elements of the block, fewer at its end.
template <class Fn>
CLADO_INLINE void for_each_lanes(const Block& block, Fn fn) {
  Lanes lanes;
  const float lowest = static_cast<float>(lowest_code(block.bits)), highest = static_cast<float>(highest_code(block.bits));
  // A group that covers whole runs of 32 elements needs one scale for all lanes.
  const bool aligned = block.group_size % kBlockLanes == 0 ||
                       block.column / block.group_size == (block.column + block.count - 1) / block.group_size;
  int64_t stop = 0;  // where the lanes no longer hold
  for (int i = 0; i < block.count; i += kBlockLanes) {
    if (i >= stop) {
      if (aligned) {
        const int64_t group = (block.column + i) / block.group_size;
        stop = (group + 1) * block.group_size - block.column;
        const float zero = block.zeros ? static_cast<float>(block.zeros[group]) : 0.0f;
        for (int half = 0; half < 2; ++half) {
          lanes.scale[half] = splat(block.scales[group]);
          lanes.zero[half] = splat(zero);
        }
      } else {
        fill_lanes(block, i, lanes);
      }
      for (int half = 0; half < 2; ++half) {
        lanes.low[half] = lowest - lanes.zero[half];
        lanes.high[half] = highest - lanes.zero[half];
      }
    }
    fn(i, lanes, std::min(kBlockLanes, block.count - i));
  }
}

CLADO_INLINE Float16x steps_of(Float16x w, const Lanes& lanes, int half) {
  Float16x t = w / lanes.scale[half];
  t = t < lanes.low[half] ? lanes.low[half] : t;  // NaN stays NaN
  t = t > lanes.high[half] ? lanes.high[half] : t;
  return round_even(t);
}

template <DType D>
CLADO_INLINE void fake_quant_typed(const Block& block, void* values, float* error) {
  Float16x sum[2] = {};
  for_each_lanes(block, [&](int i, const Lanes& lanes, int count) __attribute__((always_inline)) {
    const bool whole = count == kBlockLanes;
    alignas(64) char source[kBlockLanes * 4] = {}, target[kBlockLanes * 4];
    const void* from = weights_at<D>(block.weight, i);
    void* to = weights_at<D>(values, i);
    if (!whole) std::memcpy(source, from, static_cast<size_t>(count * kWeightBytes<D>));
    for (int half = 0; half < 2; ++half) {
      const Float16x w = load_weights<D>(whole ? from : source, kLanes * half);
      const Float16x q = store_weights<D>(whole ? to : target, kLanes * half, steps_of(w, lanes, half) * lanes.scale[half]);
      sum[half] += (q - w) * (q - w);
    }
    if (!whole) std::memcpy(to, target, static_cast<size_t>(count * kWeightBytes<D>));
  });
  *error = sum_block_lanes(sum[0], sum[1]);
}

template <DType D>
CLADO_INLINE void quantize_typed(const Block& block, int8_t* codes) {
  using Char16x = int8_t __attribute__((vector_size(16)));
  for_each_lanes(block, [&](int i, const Lanes& lanes, int count) __attribute__((always_inline)) {
    alignas(64) char source[kBlockLanes * 4] = {};
    const void* from = weights_at<D>(block.weight, i);
    if (count < kBlockLanes) std::memcpy(source, from, static_cast<size_t>(count * kWeightBytes<D>)), from = source;
    int8_t out[kBlockLanes];
    for (int half = 0; half < 2; ++half) {
      Float16x t = steps_of(load_weights<D>(from, kLanes * half), lanes, half);
      t = t == t ? t + lanes.zero[half] : Float16x{};
      const Char16x code = __builtin_convertvector(__builtin_convertvector(t, Int16x), Char16x);
      std::memcpy(out + kLanes * half, &code, sizeof code);
    }
    std::memcpy(codes + i, out, static_cast<size_t>(count));
  });
}

CLADO_INLINE void fake_quant_block_body(const Block& block, DType dtype, void* values, float* error) {
  if (dtype == DType::bfloat16) return fake_quant_typed<DType::bfloat16>(block, values, error);
  return fake_quant_typed<DType::float32>(block, values, error);
}
CLADO_INLINE void quantize_block_body(const Block& block, DType dtype, int8_t* codes) {
  if (dtype == DType::bfloat16) return quantize_typed<DType::bfloat16>(block, codes);
  return quantize_typed<DType::float32>(block, codes);
}

// Sum of (q - w)^2 over a block padded with equal values.
CLADO_INLINE void block_error_body(const float* q, const float* w, int padded, float* error) {
  Float16x sum[2] = {};
  for (int i = 0; i < padded; i += kBlockLanes)
    for (int half = 0; half < 2; ++half) {
      const Float16x e = load(q + i + kLanes * half) - load(w + i + kLanes * half);
      sum[half] += e * e;
    }
  *error = sum_block_lanes(sum[0], sum[1]);
}

CLADO_SIMD_KERNEL(fake_quant_block, (const Block& block, DType dtype, void* values, float* error), (block, dtype, values, error))
CLADO_SIMD_KERNEL(quantize_block, (const Block& block, DType dtype, int8_t* codes), (block, dtype, codes))
CLADO_SIMD_KERNEL(block_error, (const float* q, const float* w, int padded, float* error), (q, w, padded, error))

// The block with its float16 weights as floats in `w`.
Block widened(const Block& block, float* w) {
  halves_to_floats(block.weight, w, block.count);
  Block out = block;
  out.weight = w;
  return out;
}

void fake_quant_halves(const Block& block, void* values, float* error) {
  alignas(64) float w[kBlock], q[kBlock];
  const int padded = (block.count + kBlockLanes - 1) / kBlockLanes * kBlockLanes;
  float unrounded = 0.0f;
  fake_quant_block(widened(block, w), DType::float32, q, &unrounded);
  floats_to_halves(q, values, block.count);
  halves_to_floats(values, q, block.count);
  for (int i = block.count; i < padded; ++i) q[i] = w[i] = 0.0f;
  block_error(q, w, padded, error);
}

// fn(block, first element at this width, index of the block's error) for every block at every width: the widths of a block
// follow each other, so the weight comes from memory once.
template <class Fn>
void for_each_block(const void* weight, DType dtype, const float* scales, const int8_t* zeros, int64_t rows, int64_t columns,
                    int64_t group_size, const int32_t* bits, int num_bits, int threads, Fn fn) {
  const int64_t blocks = blocks_of(columns), groups = (columns + group_size - 1) / group_size;
  const int64_t bytes = dtype == DType::float32 ? 4 : 2;
  parallel_for(rows * blocks, threads_for(rows * columns * num_bits, threads), [&](int64_t index) {
    const int64_t row = index / blocks, part = index % blocks, column = part * kBlock, first = row * columns + column;
    const int count = static_cast<int>(std::min<int64_t>(kBlock, columns - column));
    for (int b = 0; b < num_bits; ++b) {
      const int64_t line = b * rows + row;
      const Block block{static_cast<const char*>(weight) + first * bytes, column, count, group_size, scales + line * groups,
                        zeros ? zeros + line * groups : nullptr, bits[b]};
      fn(block, b * rows * columns + first, line * blocks + part);
    }
  });
}

}  // namespace

void fake_quant_cpu(const void* weight, int dtype, const float* scales, const int8_t* zeros, void* values, double* sqerr,
                    int64_t rows, int64_t columns, int64_t group_size, const int32_t* bits, int num_bits, int threads) {
  const int64_t blocks = blocks_of(columns);
  std::vector<float> block_errors(static_cast<size_t>(num_bits * rows * blocks));
  const DType type = static_cast<DType>(dtype);
  const int64_t bytes = type == DType::float32 ? 4 : 2;
  for_each_block(weight, type, scales, zeros, rows, columns, group_size, bits, num_bits, threads,
                 [&](const Block& block, int64_t target, int64_t error) {
                   void* to = static_cast<char*>(values) + target * bytes;
                   if (type == DType::float16) return fake_quant_halves(block, to, &block_errors[static_cast<size_t>(error)]);
                   fake_quant_block(block, type, to, &block_errors[static_cast<size_t>(error)]);
                 });
  for (int64_t i = 0; i < num_bits * rows; ++i) {
    double sum = 0.0;
    for (int64_t block = 0; block < blocks; ++block) sum += block_errors[static_cast<size_t>(i * blocks + block)];
    sqerr[i] = sum;
  }
}

void quantize_cpu(const void* weight, int dtype, const float* scales, const int8_t* zeros, int8_t* codes, int64_t rows,
                  int64_t columns, int64_t group_size, const int32_t* bits, int num_bits, int threads) {
  const DType type = static_cast<DType>(dtype);
  for_each_block(weight, type, scales, zeros, rows, columns, group_size, bits, num_bits, threads,
                 [&](const Block& block, int64_t target, int64_t) {
                   if (type != DType::float16) return quantize_block(block, type, codes + target);
                   alignas(64) float w[kBlock];
                   quantize_block(widened(block, w), DType::float32, codes + target);
                 });
}

}  // namespace clado
