#include "bitpack/bitpack.h"

#include <atomic>
#include <cstring>

#include "common/parallel.h"
#include "common/simd.h"

namespace clado {
namespace {

// 32 codes fill exactly `Bits` words: four 64-bit lanes of eight codes. A lane's codes are brought together by halves (pairs,
// fours, eights), then its bytes are closed up by a shuffle of two lanes.
constexpr int kCodes = 32;
constexpr int kHalf = 16;
using Bytes = uint8_t __attribute__((vector_size(kCodes)));
using Lanes = uint64_t __attribute__((vector_size(kCodes)));
using Pair = uint8_t __attribute__((vector_size(kHalf)));  // two lanes

// A mask of every other field of `width` bits, fields `space` bits apart, from field `first` on.
constexpr uint64_t every_other(int space, int width, int first) {
  uint64_t mask = 0;
  for (int at = first * space; at < 64; at += 2 * space) mask |= ((uint64_t{1} << width) - 1) << at;
  return mask;
}

// Two fields of Width bits, Space apart, become one of 2 * Width; and back.
template <int Width, int Space>
CLADO_INLINE Lanes join(Lanes x) {
  return (x & every_other(Space, Width, 0)) | ((x & every_other(Space, Width, 1)) >> (Space - Width));
}
template <int Width, int Space>
CLADO_INLINE Lanes part(Lanes x) {
  return (x & every_other(Space, Width, 0)) | ((x << (Space - Width)) & every_other(Space, Width, 1));
}

// The first `Bits` bytes of both lanes, one after the other; and back (the bytes above are then of no account).
template <int Bits>
CLADO_INLINE Pair close_up(Pair x) {
  Pair from{};
  for (int j = 0; j < 2 * Bits; ++j) from[j] = static_cast<uint8_t>(j / Bits * 8 + j % Bits);
  return __builtin_shuffle(x, from);
}
template <int Bits>
CLADO_INLINE Pair spread_out(Pair x) {
  Pair from{};
  for (int j = 0; j < kHalf; ++j) from[j] = static_cast<uint8_t>(j % 8 < Bits ? j / 8 * Bits + j % 8 : 0);
  return __builtin_shuffle(x, from);
}

CLADO_INLINE Bytes both(Pair low, Pair high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
                                 24, 25, 26, 27, 28, 29, 30, 31);
}

// Bytes of a block of 32 packed codes, and those that a block touches: the halves are read and written 16 bytes at a time.
template <int Bits>
constexpr int kPacked = 4 * Bits;
template <int Bits>
constexpr int kTouched = 2 * Bits + kHalf;

// Adds to `outside` what lies out of range. Bytes from kPacked to kTouched are overwritten.
template <int Bits>
CLADO_INLINE void pack_block(const int8_t* codes, char* packed, Bytes* outside) {
  constexpr uint8_t offset = 1u << (Bits - 1), mask = static_cast<uint8_t>((1u << Bits) - 1u);
  Bytes stored;
  std::memcpy(&stored, codes, sizeof stored);
  stored += offset;
  *outside |= stored & static_cast<uint8_t>(~mask);
  if constexpr (Bits < 8) {
    Lanes x;
    std::memcpy(&x, &stored, sizeof x);
    x = join<4 * Bits, 32>(join<2 * Bits, 16>(join<Bits, 8>(x)));
    std::memcpy(&stored, &x, sizeof stored);
  }
  for (int half = 0; half < 2; ++half) {
    Pair pair;
    std::memcpy(&pair, reinterpret_cast<const char*>(&stored) + half * kHalf, sizeof pair);
    pair = close_up<Bits>(pair);
    std::memcpy(packed + half * 2 * Bits, &pair, sizeof pair);
  }
}

template <int Bits>
CLADO_INLINE void unpack_block(const char* packed, int8_t* codes) {
  constexpr uint8_t offset = 1u << (Bits - 1);
  Pair low, high;
  std::memcpy(&low, packed, sizeof low);
  std::memcpy(&high, packed + 2 * Bits, sizeof high);
  Bytes stored = both(spread_out<Bits>(low), spread_out<Bits>(high));
  if constexpr (Bits < 8) {
    Lanes x;
    std::memcpy(&x, &stored, sizeof x);
    x = part<Bits, 8>(part<2 * Bits, 16>(part<4 * Bits, 32>(x)));
    std::memcpy(&stored, &x, sizeof stored);
  }
  stored -= offset;
  std::memcpy(codes, &stored, sizeof stored);
}

// fn(block, whole) for all blocks of `columns` codes; not whole: it must not touch more than its own codes and bytes.
template <int Bits, class Fn>
CLADO_INLINE void for_each_block(int64_t columns, Fn fn) {
  const int64_t blocks = (columns + kCodes - 1) / kCodes, bytes = 4 * packed_columns(columns, Bits);
  const int64_t whole = bytes < kTouched<Bits> ? 0 : (bytes - kTouched<Bits>) / kPacked<Bits> + 1;
  int64_t b = 0;
  for (; b < whole && b < columns / kCodes; ++b) fn(b, true);
  for (; b < blocks; ++b) fn(b, false);
}

template <int Bits>
CLADO_INLINE void pack_row(const int8_t* codes, char* packed, int64_t columns, bool* inside) {
  Bytes outside{};
  for_each_block<Bits>(columns, [&](int64_t b, bool whole) __attribute__((always_inline)) {
    const int8_t* from = codes + b * kCodes;
    char* to = packed + b * kPacked<Bits>;
    if (whole) return pack_block<Bits>(from, to, &outside);
    const int64_t count = columns - b * kCodes < kCodes ? columns - b * kCodes : kCodes;
    int8_t last[kCodes];
    char bytes[kTouched<Bits>];
    std::memset(last, -(1 << (Bits - 1)), sizeof last);  // stored as zero bits
    std::memcpy(last, from, static_cast<size_t>(count));
    pack_block<Bits>(last, bytes, &outside);
    std::memcpy(to, bytes, static_cast<size_t>(4 * packed_columns(count, Bits)));
  });
  Lanes any;
  std::memcpy(&any, &outside, sizeof any);
  for (int i = 0; i < 4; ++i) *inside &= any[i] == 0;
}

template <int Bits>
CLADO_INLINE void unpack_row(const char* packed, int8_t* codes, int64_t columns) {
  for_each_block<Bits>(columns, [&](int64_t b, bool whole) __attribute__((always_inline)) {
    const char* from = packed + b * kPacked<Bits>;
    if (whole) return unpack_block<Bits>(from, codes + b * kCodes);
    const int64_t count = columns - b * kCodes < kCodes ? columns - b * kCodes : kCodes;
    char bytes[kTouched<Bits>] = {};
    int8_t last[kCodes];
    std::memcpy(bytes, from, static_cast<size_t>(4 * packed_columns(count, Bits)));
    unpack_block<Bits>(bytes, last);
    std::memcpy(codes + b * kCodes, last, static_cast<size_t>(count));
  });
}

CLADO_INLINE void pack_any_body(const int8_t* codes, char* packed, int64_t columns, int bits, bool* inside) {
  switch (bits) {
    case 2: return pack_row<2>(codes, packed, columns, inside);
    case 3: return pack_row<3>(codes, packed, columns, inside);
    case 4: return pack_row<4>(codes, packed, columns, inside);
    case 5: return pack_row<5>(codes, packed, columns, inside);
    case 6: return pack_row<6>(codes, packed, columns, inside);
    case 7: return pack_row<7>(codes, packed, columns, inside);
    default: return pack_row<8>(codes, packed, columns, inside);
  }
}

CLADO_INLINE void unpack_any_body(const char* packed, int8_t* codes, int64_t columns, int bits) {
  switch (bits) {
    case 2: return unpack_row<2>(packed, codes, columns);
    case 3: return unpack_row<3>(packed, codes, columns);
    case 4: return unpack_row<4>(packed, codes, columns);
    case 5: return unpack_row<5>(packed, codes, columns);
    case 6: return unpack_row<6>(packed, codes, columns);
    case 7: return unpack_row<7>(packed, codes, columns);
    default: return unpack_row<8>(packed, codes, columns);
  }
}

CLADO_SIMD_KERNEL(pack_any, (const int8_t* codes, char* packed, int64_t columns, int bits, bool* inside),
                  (codes, packed, columns, bits, inside))
CLADO_SIMD_KERNEL(unpack_any, (const char* packed, int8_t* codes, int64_t columns, int bits), (packed, codes, columns, bits))

// A long row is cut at whole words so that the threads share it: fn(row, first column, columns).
constexpr int64_t kPiece = 1 << 14;

template <class Fn>
void for_each_piece(int64_t rows, int64_t columns, int threads, Fn fn) {
  const int64_t pieces = (columns + kPiece - 1) / kPiece;
  threads = threads_for(rows * columns, threads);
  parallel_for(rows * pieces, threads, [&](int64_t i) {
    const int64_t first = i % pieces * kPiece, rest = columns - first;
    fn(i / pieces, first, rest < kPiece ? rest : kPiece);
  });
}

}  // namespace

bool pack_cpu(const int8_t* codes, int32_t* words, int64_t rows, int64_t columns, int bits, int threads) {
  const int64_t packed = packed_columns(columns, bits);
  std::atomic<bool> all_inside{true};
  for_each_piece(rows, columns, threads, [&](int64_t row, int64_t first, int64_t count) {
    bool inside = true;
    char* target = reinterpret_cast<char*>(words + row * packed + first / 32 * bits);
    pack_any(codes + row * columns + first, target, count, bits, &inside);
    if (!inside) all_inside.store(false, std::memory_order_relaxed);
  });
  return all_inside.load();
}

void unpack_cpu(const int32_t* words, int8_t* codes, int64_t rows, int64_t columns, int bits, int threads) {
  const int64_t packed = packed_columns(columns, bits);
  for_each_piece(rows, columns, threads, [&](int64_t row, int64_t first, int64_t count) {
    const char* source = reinterpret_cast<const char*>(words + row * packed + first / 32 * bits);
    unpack_any(source, codes + row * columns + first, count, bits);
  });
}

}  // namespace clado
