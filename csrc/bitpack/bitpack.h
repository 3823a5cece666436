// Integer codes of 2 to 8 bits <-> dense int32 words.
//
// Row r of `codes` ([rows, columns] int8, contiguous) holds signed codes in [-2^(bits-1), 2^(bits-1) - 1]. Stored is the code
// plus 2^(bits-1), least significant bit first, without gaps inside a row: element k takes bits [k*bits, (k+1)*bits) of the row.
// A row of `words` ([rows, packed_columns(columns, bits)] int32, contiguous) ends on a whole word; the bits left over are zero.
// For 2, 4 and 8 bits this is the `pack-quantized` layout of compressed-tensors.
#pragma once

#include <cstdint>

namespace clado {

constexpr int64_t packed_columns(int64_t columns, int bits) { return (columns * bits + 31) / 32; }

// Returns false when a code lies outside its range (the words are then unspecified).
bool pack_cpu(const int8_t* codes, int32_t* words, int64_t rows, int64_t columns, int bits, int threads);
void unpack_cpu(const int32_t* words, int8_t* codes, int64_t rows, int64_t columns, int bits, int threads);

// Keeps the low `bits` bits of a code outside its range (a check would need a synchronisation).
void pack_cuda(const int8_t* codes, int32_t* words, int64_t rows, int64_t columns, int bits, int device, void* stream);
void unpack_cuda(const int32_t* words, int8_t* codes, int64_t rows, int64_t columns, int bits, int device, void* stream);

}  // namespace clado
