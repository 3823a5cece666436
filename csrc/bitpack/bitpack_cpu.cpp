#include "bitpack/bitpack.h"

#include <atomic>
#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

namespace clado {
namespace {

// 32 codes fill exactly `Bits` words, so a block of 32 is the unit of work at every width.
constexpr int kBlock = 32;

// Returns nonzero when a code of the block is out of range.
template <int Bits>
CLADO_INLINE uint32_t pack_block(const int8_t* codes, uint32_t* words) {
  constexpr uint32_t offset = 1u << (Bits - 1), mask = (1u << Bits) - 1u;
  uint32_t outside = 0;
  for (int w = 0; w < Bits; ++w) words[w] = 0;
  for (int k = 0; k < kBlock; ++k) {
    const uint32_t stored = static_cast<uint32_t>(static_cast<int32_t>(codes[k])) + offset;
    outside |= stored & ~mask;
    const int bit = k * Bits, word = bit / 32, shift = bit % 32;
    words[word] |= (stored & mask) << shift;
    if (shift + Bits > 32) words[word + 1] |= (stored & mask) >> (32 - shift);
  }
  return outside;
}

template <int Bits>
CLADO_INLINE void unpack_block(const uint32_t* words, int8_t* codes) {
  constexpr uint32_t offset = 1u << (Bits - 1), mask = (1u << Bits) - 1u;
  for (int k = 0; k < kBlock; ++k) {
    const int bit = k * Bits, word = bit / 32, shift = bit % 32;
    uint32_t stored = words[word] >> shift;
    if (shift + Bits > 32) stored |= words[word + 1] << (32 - shift);
    codes[k] = static_cast<int8_t>(static_cast<int32_t>((stored & mask) - offset));
  }
}

template <int Bits>
CLADO_INLINE void pack_row(const int8_t* codes, int32_t* words, int64_t columns, uint32_t* outside) {
  const int64_t blocks = columns / kBlock, tail = columns % kBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    uint32_t block[Bits];
    *outside |= pack_block<Bits>(codes + b * kBlock, block);
    std::memcpy(words + b * Bits, block, sizeof block);
  }
  if (tail == 0) return;
  int8_t last[kBlock];
  std::memset(last, -(1 << (Bits - 1)), sizeof last);  // stored as zero bits
  std::memcpy(last, codes + blocks * kBlock, static_cast<size_t>(tail));
  uint32_t block[Bits];
  *outside |= pack_block<Bits>(last, block);
  std::memcpy(words + blocks * Bits, block, sizeof(uint32_t) * static_cast<size_t>(packed_columns(tail, Bits)));
}

template <int Bits>
CLADO_INLINE void unpack_row(const int32_t* words, int8_t* codes, int64_t columns) {
  const int64_t blocks = columns / kBlock, tail = columns % kBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    uint32_t block[Bits];
    std::memcpy(block, words + b * Bits, sizeof block);
    unpack_block<Bits>(block, codes + b * kBlock);
  }
  if (tail == 0) return;
  uint32_t block[Bits] = {};
  std::memcpy(block, words + blocks * Bits, sizeof(uint32_t) * static_cast<size_t>(packed_columns(tail, Bits)));
  int8_t last[kBlock];
  unpack_block<Bits>(block, last);
  std::memcpy(codes + blocks * kBlock, last, static_cast<size_t>(tail));
}

CLADO_INLINE void pack_any_body(const int8_t* codes, int32_t* words, int64_t columns, int bits, uint32_t* outside) {
  switch (bits) {
    case 2: return pack_row<2>(codes, words, columns, outside);
    case 3: return pack_row<3>(codes, words, columns, outside);
    case 4: return pack_row<4>(codes, words, columns, outside);
    case 5: return pack_row<5>(codes, words, columns, outside);
    case 6: return pack_row<6>(codes, words, columns, outside);
    case 7: return pack_row<7>(codes, words, columns, outside);
    default: return pack_row<8>(codes, words, columns, outside);
  }
}

CLADO_INLINE void unpack_any_body(const int32_t* words, int8_t* codes, int64_t columns, int bits) {
  switch (bits) {
    case 2: return unpack_row<2>(words, codes, columns);
    case 3: return unpack_row<3>(words, codes, columns);
    case 4: return unpack_row<4>(words, codes, columns);
    case 5: return unpack_row<5>(words, codes, columns);
    case 6: return unpack_row<6>(words, codes, columns);
    case 7: return unpack_row<7>(words, codes, columns);
    default: return unpack_row<8>(words, codes, columns);
  }
}

CLADO_SIMD_KERNEL(pack_any, (const int8_t* codes, int32_t* words, int64_t columns, int bits, uint32_t* outside),
                  (codes, words, columns, bits, outside))
CLADO_SIMD_KERNEL(unpack_any, (const int32_t* words, int8_t* codes, int64_t columns, int bits), (words, codes, columns, bits))

}  // namespace

bool pack_cpu(const int8_t* codes, int32_t* words, int64_t rows, int64_t columns, int bits, int threads) {
  const int64_t packed = packed_columns(columns, bits);
  std::atomic<uint32_t> outside{0};
  parallel_for(rows, threads, [&](int64_t r) {
    uint32_t row_outside = 0;
    pack_any(codes + r * columns, words + r * packed, columns, bits, &row_outside);
    if (row_outside) outside.store(1, std::memory_order_relaxed);
  });
  return outside.load() == 0;
}

void unpack_cpu(const int32_t* words, int8_t* codes, int64_t rows, int64_t columns, int bits, int threads) {
  const int64_t packed = packed_columns(columns, bits);
  parallel_for(rows, threads, [&](int64_t r) { unpack_any(words + r * packed, codes + r * columns, columns, bits); });
}

}  // namespace clado
