// Products of sparse matrices with a few vectors.
//
// A row is stored as 64-bit masks, whose lowest bit is the first column, and its kept weights in order, which start at
// offsets[row]. Inputs are padded to whole masks. The AVX2 code reads eight weights at once, so `values` must be padded, too.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

using Bf16 = uint16_t;

float widen(float value) { return value; }

float widen(Bf16 value) {
  const uint32_t bits = uint32_t(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

void narrow(float value, float& out) { out = value; }

void narrow(float value, Bf16& out) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  out = value != value ? 0x7fc0 : Bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// The processor's own prefetching does not keep up with the loads of single kept weights.
void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address) + 2048, _MM_HINT_T0); }

// ------------------------------------------------------------------------------------------------------------- AVX2

#ifndef __AVX2__
#error "needs a processor with AVX2"
#endif

// For each byte of a mask: which of the next kept weights each of its eight columns has, or -1.
struct Positions {
  int8_t of[256][8];
  Positions() {
    for (int byte = 0; byte < 256; ++byte)
      for (int column = 0, kept = 0; column < 8; ++column) of[byte][column] = byte >> column & 1 ? kept++ : -1;
  }
} const positions;

__m256 load8(const float* values) { return _mm256_loadu_ps(values); }

__m256 load8(const Bf16* values) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}

template <typename T>
float dot(const uint64_t* masks, const T* values, const T* inputs, long words) {
  __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  for (long word = 0; word < words; ++word) {
    prefetch(values);
    for (int byte = 0; byte < 8; ++byte, inputs += 8) {
      const uint8_t mask = masks[word] >> 8 * byte;
      int64_t table;
      std::memcpy(&table, positions.of[mask], 8);
      const __m256i index = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(table));
      const __m256 zeros = _mm256_castsi256_ps(_mm256_srai_epi32(index, 31));
      const __m256 weights = _mm256_andnot_ps(zeros, _mm256_permutevar8x32_ps(load8(values), index));
      sums[byte & 1] = _mm256_add_ps(sums[byte & 1], _mm256_mul_ps(weights, load8(inputs)));
      values += __builtin_popcount(mask);
    }
  }
  float lanes[8], sum = 0;
  _mm256_storeu_ps(lanes, _mm256_add_ps(sums[0], sums[1]));
  for (float lane : lanes) sum += lane;
  return sum;
}

// The 64 weights of one mask.
template <typename T>
void expand64(uint64_t mask, const T* values, T* out) {
  for (int column = 0; column < 64; ++column) {
    const int bit = mask >> column & 1;
    out[column] = bit ? *values : T(0);
    values += bit;
  }
}

// ---------------------------------------------------------------------------------------------------------- AVX-512

#ifdef __AVX512F__

template <>
float dot(const uint64_t* masks, const float* values, const float* inputs, long words) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (long word = 0; word < words; ++word, inputs += 64) {
    const uint64_t mask = masks[word];
    prefetch(values);
    prefetch(values + 16);
#pragma GCC unroll 4
    for (int quarter = 0; quarter < 4; ++quarter) {
      const float* kept = values + __builtin_popcountll(mask & ((1ULL << 16 * quarter) - 1));
      const __m512 weights = _mm512_maskz_expandloadu_ps(__mmask16(mask >> 16 * quarter), kept);
      sums[quarter] = _mm512_fmadd_ps(weights, _mm512_loadu_ps(inputs + 16 * quarter), sums[quarter]);
    }
    values += __builtin_popcountll(mask);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

template <>
void expand64(uint64_t mask, const float* values, float* out) {
  for (int quarter = 0; quarter < 4; ++quarter, out += 16) {
    const __mmask16 part = mask >> 16 * quarter;
    _mm512_storeu_ps(out, _mm512_maskz_expandloadu_ps(part, values));
    values += __builtin_popcount(part);
  }
}

#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)

template <>
float dot(const uint64_t* masks, const Bf16* values, const Bf16* inputs, long words) {
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (long word = 0; word < words; ++word, inputs += 64) {
    const uint64_t mask = masks[word];
    prefetch(values);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Bf16* kept = values + __builtin_popcountll(mask & ((1ULL << 32 * half) - 1));
      const __m512i weights = _mm512_maskz_expandloadu_epi16(__mmask32(mask >> 32 * half), kept);
      const __m512i columns = _mm512_loadu_si512(inputs + 32 * half);
      sums[half] = _mm512_dpbf16_ps(sums[half], (__m512bh)weights, (__m512bh)columns);
    }
    values += __builtin_popcountll(mask);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

template <>
void expand64(uint64_t mask, const Bf16* values, Bf16* out) {
  for (int half = 0; half < 2; ++half, out += 32) {
    const __mmask32 part = mask >> 32 * half;
    _mm512_storeu_si512(out, _mm512_maskz_expandloadu_epi16(part, values));
    values += __builtin_popcount(part);
  }
}

#endif

// ------------------------------------------------------------------------------------------------------- entry points

template <typename T>
void multiply(const uint64_t* masks, const T* values, const int64_t* offsets, const T* inputs, const T* bias,
              T* outputs, long rows, long words, long tokens, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < rows; ++row)
    for (long token = 0; token < tokens; ++token) {
      const float sum = dot(masks + row * words, values + offsets[row], inputs + token * words * 64, words);
      narrow(bias ? sum + widen(bias[row]) : sum, outputs[token * rows + row]);
    }
}

template <typename T>
void expand(const uint64_t* masks, const T* values, const int64_t* offsets, T* dense, long rows, long columns,
            int threads) {
  const long words = (columns + 63) / 64;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < rows; ++row) {
    const T* kept = values + offsets[row];
    for (long word = 0; word < words; ++word) {
      const uint64_t mask = masks[row * words + word];
      const long width = std::min(64L, columns - word * 64);
      T* out = dense + row * columns + word * 64;
      T last[64];
      expand64(mask, kept, width == 64 ? out : last);
      if (width < 64) std::memcpy(out, last, width * sizeof(T));
      kept += __builtin_popcountll(mask);
    }
  }
}

}  // namespace

#define ENTRY_POINTS(NAME, T)                                                                                          \
  extern "C" void multiply_##NAME(const uint64_t* masks, const T* values, const int64_t* offsets, const T* inputs,    \
                                  const T* bias, T* outputs, long rows, long words, long tokens, int threads) {       \
    multiply(masks, values, offsets, inputs, bias, outputs, rows, words, tokens, threads);                             \
  }                                                                                                                    \
  extern "C" void expand_##NAME(const uint64_t* masks, const T* values, const int64_t* offsets, T* dense, long rows,  \
                                long columns, int threads) {                                                           \
    expand(masks, values, offsets, dense, rows, columns, threads);                                                     \
  }

ENTRY_POINTS(float32, float)
ENTRY_POINTS(bfloat16, Bf16)
