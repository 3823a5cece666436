#include <type_traits>

#include "bitpack/bitpack.h"
#include "common/cuda.cuh"

namespace clado {
namespace {

constexpr int kThreads = 256;

// Codes of one thread and the whole words they fill. 16 where that is enough: neighbours then read and write neighbouring memory.
constexpr int run_of(int bits) { return bits % 2 == 0 ? 16 : 32; }
constexpr int words_of(int bits) { return run_of(bits) * bits / 32; }

// Four codes in a word, each less by 2^(bits-1), from four stored values; no byte borrows from its neighbour.
template <int Bits>
__device__ uint32_t signed_bytes(uint32_t stored) {
  constexpr uint32_t kTop = 0x80808080u, kOffset = 0x01010101u << (Bits - 1);
  return Bits == 8 ? stored ^ kTop : ((stored | kTop) - kOffset) ^ kTop;
}

template <int Bits>
__device__ void gather(const uint32_t* four, uint32_t* words) {
  constexpr uint32_t kOffset = 0x01010101u << (Bits - 1), kMask = 0x01010101u * ((1u << Bits) - 1u);
#pragma unroll
  for (int i = 0; i < words_of(Bits); ++i) words[i] = 0;
#pragma unroll
  for (int i = 0; i < run_of(Bits); ++i) {
    const uint32_t stored = (four[i / 4] ^ kOffset) & kMask, code = stored >> (i % 4 * 8) & 0xffu;
    const int word = i * Bits / 32, shift = i * Bits % 32;
    words[word] |= code << shift;
    if (shift + Bits > 32) words[word + 1] |= code >> (32 - shift);
  }
}

template <int Bits>
__device__ void scatter(const uint32_t* words, uint32_t* four) {
#pragma unroll
  for (int i = 0; i < run_of(Bits) / 4; ++i) {
    uint32_t stored = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int bit = (4 * i + k) * Bits, word = bit / 32, shift = bit % 32;
      uint32_t code = words[word] >> shift;
      if (shift + Bits > 32) code |= words[word + 1] << (32 - shift);
      stored |= (code & ((1u << Bits) - 1u)) << (8 * k);
    }
    four[i] = signed_bytes<Bits>(stored);
  }
}

// The words of one run, by the widest accesses that every multiple of their size allows.
template <int Bits>
__device__ void load_words(const int32_t* from, uint32_t* words) {
  constexpr int kWords = words_of(Bits), kStep = kWords % 4 == 0 ? 4 : kWords % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < kWords; i += kStep) {
    if constexpr (kStep == 4) {
      const uint4 x = *reinterpret_cast<const uint4*>(from + i);
      words[i] = x.x, words[i + 1] = x.y, words[i + 2] = x.z, words[i + 3] = x.w;
    } else if constexpr (kStep == 2) {
      const uint2 x = *reinterpret_cast<const uint2*>(from + i);
      words[i] = x.x, words[i + 1] = x.y;
    } else {
      words[i] = static_cast<uint32_t>(from[i]);
    }
  }
}
template <int Bits>
__device__ void store_words(const uint32_t* words, int32_t* to) {
  constexpr int kWords = words_of(Bits), kStep = kWords % 4 == 0 ? 4 : kWords % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int i = 0; i < kWords; i += kStep) {
    if constexpr (kStep == 4)
      __stcs(reinterpret_cast<uint4*>(to + i), make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
    else if constexpr (kStep == 2)
      __stcs(reinterpret_cast<uint2*>(to + i), make_uint2(words[i], words[i + 1]));
    else
      to[i] = static_cast<int32_t>(words[i]);
  }
}

// One thread per run. `Whole`: rows are whole runs and addresses multiples of 16, so that there are no rows to mind.
template <int Bits, bool Whole>
__global__ void pack_kernel(const int8_t* __restrict__ codes, int32_t* __restrict__ words, int64_t runs, int64_t columns) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= runs) return;
  constexpr int kRun = run_of(Bits), kWords = words_of(Bits);
  uint32_t four[kRun / 4] = {}, out[kWords];
  if constexpr (Whole) {
#pragma unroll
    for (int i = 0; i < kRun / 16; ++i) {
      const uint4 x = reinterpret_cast<const uint4*>(codes)[kRun / 16 * index + i];
      four[4 * i] = x.x, four[4 * i + 1] = x.y, four[4 * i + 2] = x.z, four[4 * i + 3] = x.w;
    }
    gather<Bits>(four, out);
    store_words<Bits>(out, words + index * kWords);
  } else {
    const int64_t per_row = (columns + kRun - 1) / kRun, row = index / per_row, run = index - row * per_row;
    const int8_t* from = codes + row * columns + run * kRun;
    const int count = static_cast<int>(columns - run * kRun < kRun ? columns - run * kRun : kRun);
    constexpr uint32_t kZero = 0xffu << (Bits - 1) & 0xffu;  // stored as 0: the bits left over
#pragma unroll
    for (int i = 0; i < kRun; ++i) four[i / 4] |= (i < count ? static_cast<uint8_t>(from[i]) : kZero) << (i % 4 * 8);
    gather<Bits>(four, out);
    int32_t* to = words + row * packed_columns(columns, Bits) + run * kWords;
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if (i * 32 < count * Bits) to[i] = static_cast<int32_t>(out[i]);
  }
}

template <int Bits, bool Whole>
__global__ void unpack_kernel(const int32_t* __restrict__ words, int8_t* __restrict__ codes, int64_t runs, int64_t columns) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= runs) return;
  constexpr int kRun = run_of(Bits), kWords = words_of(Bits);
  uint32_t in[kWords], four[kRun / 4];
  if constexpr (Whole) {
    load_words<Bits>(words + index * kWords, in);
    scatter<Bits>(in, four);
#pragma unroll
    for (int i = 0; i < kRun / 16; ++i)
      __stcs(reinterpret_cast<uint4*>(codes) + kRun / 16 * index + i,
             make_uint4(four[4 * i], four[4 * i + 1], four[4 * i + 2], four[4 * i + 3]));
  } else {
    const int64_t per_row = (columns + kRun - 1) / kRun, row = index / per_row, run = index - row * per_row;
    const int count = static_cast<int>(columns - run * kRun < kRun ? columns - run * kRun : kRun);
    const int32_t* from = words + row * packed_columns(columns, Bits) + run * kWords;
#pragma unroll
    for (int i = 0; i < kWords; ++i) in[i] = i * 32 < count * Bits ? static_cast<uint32_t>(from[i]) : 0u;
    scatter<Bits>(in, four);
    int8_t* to = codes + row * columns + run * kRun;
#pragma unroll
    for (int i = 0; i < kRun; ++i)
      if (i < count) to[i] = static_cast<int8_t>(four[i / 4] >> (i % 4 * 8) & 0xffu);
  }
}

// launch(bits, whole) with both as types.
template <class Launch>
void with_bits(int bits, bool whole, Launch launch) {
  const auto at = [&](auto width) { whole ? launch(width, std::true_type()) : launch(width, std::false_type()); };
  switch (bits) {
    case 2: return at(std::integral_constant<int, 2>());
    case 3: return at(std::integral_constant<int, 3>());
    case 4: return at(std::integral_constant<int, 4>());
    case 5: return at(std::integral_constant<int, 5>());
    case 6: return at(std::integral_constant<int, 6>());
    case 7: return at(std::integral_constant<int, 7>());
    default: return at(std::integral_constant<int, 8>());
  }
}

bool is_whole(const void* codes, const void* words, int64_t columns, int bits) {
  return columns % run_of(bits) == 0 && is_aligned(codes, 16) && is_aligned(words, 16);
}

}  // namespace

void pack_cuda(const int8_t* codes, int32_t* words, int64_t rows, int64_t columns, int bits, int device, void* stream) {
  const int64_t runs = rows * ceil_div(columns, run_of(bits));
  if (runs == 0) return;
  const DeviceGuard guard(device);
  with_bits(bits, is_whole(codes, words, columns, bits), [&](auto width, auto whole) {
    pack_kernel<decltype(width)::value, decltype(whole)::value>
        <<<static_cast<unsigned>(ceil_div(runs, kThreads)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(codes, words, runs, columns);
  });
  check_launch("pack");
}

void unpack_cuda(const int32_t* words, int8_t* codes, int64_t rows, int64_t columns, int bits, int device, void* stream) {
  const int64_t runs = rows * ceil_div(columns, run_of(bits));
  if (runs == 0) return;
  const DeviceGuard guard(device);
  with_bits(bits, is_whole(codes, words, columns, bits), [&](auto width, auto whole) {
    unpack_kernel<decltype(width)::value, decltype(whole)::value>
        <<<static_cast<unsigned>(ceil_div(runs, kThreads)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(words, codes, runs, columns);
  });
  check_launch("unpack");
}

}  // namespace clado
