#include "bitpack/bitpack.h"
#include "common/cuda.cuh"

namespace clado {
namespace {

constexpr int kThreads = 256;

// One thread per word: it gathers the codes whose bits fall into it.
__global__ void pack_kernel(const int8_t* codes, int32_t* words, int64_t rows, int64_t columns, int64_t packed, int bits) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows * packed) return;
  const int64_t row = index / packed, first_bit = (index % packed) * 32;
  const uint32_t offset = 1u << (bits - 1), mask = (1u << bits) - 1u;
  uint32_t word = 0;
  for (int64_t k = first_bit / bits; k < columns && k * bits < first_bit + 32; ++k) {
    const uint32_t stored = (static_cast<uint32_t>(static_cast<int32_t>(codes[row * columns + k])) + offset) & mask;
    const int shift = static_cast<int>(k * bits - first_bit);
    word |= shift >= 0 ? stored << shift : stored >> -shift;
  }
  words[index] = static_cast<int32_t>(word);
}

// One thread per code.
__global__ void unpack_kernel(const int32_t* words, int8_t* codes, int64_t rows, int64_t columns, int64_t packed, int bits) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rows * columns) return;
  const int64_t row = index / columns, bit = (index % columns) * bits;
  const int32_t* source = words + row * packed + bit / 32;
  const int shift = static_cast<int>(bit % 32);
  const uint32_t offset = 1u << (bits - 1), mask = (1u << bits) - 1u;
  uint32_t stored = static_cast<uint32_t>(source[0]) >> shift;
  if (shift + bits > 32) stored |= static_cast<uint32_t>(source[1]) << (32 - shift);
  codes[index] = static_cast<int8_t>(static_cast<int32_t>((stored & mask) - offset));
}

}  // namespace

void pack_cuda(const int8_t* codes, int32_t* words, int64_t rows, int64_t columns, int bits, int device, void* stream) {
  const int64_t packed = packed_columns(columns, bits), total = rows * packed;
  if (total == 0) return;
  const DeviceGuard guard(device);
  pack_kernel<<<static_cast<unsigned>(ceil_div(total, kThreads)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      codes, words, rows, columns, packed, bits);
  check_launch("pack");
}

void unpack_cuda(const int32_t* words, int8_t* codes, int64_t rows, int64_t columns, int bits, int device, void* stream) {
  const int64_t total = rows * columns;
  if (total == 0) return;
  const DeviceGuard guard(device);
  unpack_kernel<<<static_cast<unsigned>(ceil_div(total, kThreads)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      words, codes, rows, columns, packed_columns(columns, bits), bits);
  check_launch("unpack");
}

}  // namespace clado
