// Between memory, a position after the other, and tiles, a class after the other: squares of 16 positions
// and classes are turned within AVX-512 registers, 1.3 to 2.3 times faster than element by element, and
// squares of 8 within AVX2's.
#pragma once

#include <algorithm>

#include "memory.h"
#include "registers.h"
#include "vec.h"

namespace pyfused {

template <class T> constexpr bool kTransposes = false;

#if defined(PYFUSED_HAS_REGISTERS) && defined(__AVX512F__)
template <> inline constexpr bool kTransposes<float> = true;
template <> inline constexpr bool kTransposes<bfloat16> = true;
template <> inline constexpr bool kTransposes<float16> = true;

constexpr int kSquare = 16;
using Register = __m512;
using Square = Register[kSquare];
using Some = __mmask16;  // of a row's elements

PYFUSED_INLINE Some first_of_row(int64_t n) { return Some((1u << n) - 1); }

// Swaps lanes of 4 bytes across the diagonal, then of 8, 16 and 32.
PYFUSED_INLINE void transpose(Square& rows) {
  Square pairs, quads, halves;
  for (int i = 0; i < kSquare; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kSquare; i += 4) {
    for (int k = 0; k < 2; ++k) {
      const __m512d low = _mm512_castps_pd(pairs[i + k]), high = _mm512_castps_pd(pairs[i + k + 2]);
      quads[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      quads[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
  for (int i = 0; i < kSquare; i += 8) {
    for (int k = 0; k < 4; ++k) {
      halves[i + k] = _mm512_shuffle_f32x4(quads[i + k], quads[i + k + 4], 0x88);
      halves[i + k + 4] = _mm512_shuffle_f32x4(quads[i + k], quads[i + k + 4], 0xdd);
    }
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_f32x4(halves[i], halves[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(halves[i], halves[i + 8], 0xdd);
  }
}

PYFUSED_INLINE __m512 load_row(const float* x, __mmask16 some) { return _mm512_maskz_loadu_ps(some, x); }
PYFUSED_INLINE __m512 load_row(const bfloat16* x, __mmask16 some) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
PYFUSED_INLINE __m512 load_row(const float16* x, __mmask16 some) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(some, x));
}

PYFUSED_INLINE void store_row(__m512 x, float* to, __mmask16 some) { _mm512_mask_storeu_ps(to, some, x); }
PYFUSED_INLINE void store_row(__m512 x, bfloat16* to, __mmask16 some) {  // as narrow() in vec.h
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(to, some, _mm512_cvtepi32_epi16(kept));
}
PYFUSED_INLINE void store_row(__m512 x, float16* to, __mmask16 some) {
  _mm256_mask_storeu_epi16(to, some, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(PYFUSED_HAS_REGISTERS)
template <> inline constexpr bool kTransposes<float> = true;
template <> inline constexpr bool kTransposes<bfloat16> = true;
template <> inline constexpr bool kTransposes<float16> = true;

constexpr int kSquare = 8;
using Register = __m256;
using Square = Register[kSquare];
struct Some { __m256i lanes; int64_t n; };

PYFUSED_INLINE Some first_of_row(int64_t n) { return {first_lanes(n), n}; }

PYFUSED_INLINE void transpose(Square& rows) {
  Square pairs, quads;
  for (int i = 0; i < kSquare; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kSquare; i += 4) {
    for (int k = 0; k < 2; ++k) {
      const __m256d low = _mm256_castps_pd(pairs[i + k]), high = _mm256_castps_pd(pairs[i + k + 2]);
      quads[i + 2 * k] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, high));
      quads[i + 2 * k + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, high));
    }
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
}

// Halves by twos, and where their number is odd the last by itself; what lies beyond is left out later.
PYFUSED_INLINE __m128i twos(Some some) { return _mm256_castsi256_si128(first_lanes(some.n / 2)); }
template <class Half> PYFUSED_INLINE __m256 load_row(const Half* x, Some some) {
  const __m128i pieces = _mm_maskload_epi32(reinterpret_cast<const int*>(x), twos(some));
  const __m128i last = _mm_set1_epi16(int16_t(x[some.n - 1].bits));
  const __m128i whole = _mm256_castsi256_si128(first_halves(some.n / 2 * 2));
  return widen(_mm_blendv_epi8(last, pieces, whole), Half{});
}
PYFUSED_INLINE __m256 load_row(const float* x, Some some) { return _mm256_maskload_ps(x, some.lanes); }

PYFUSED_INLINE __m128i nearest(__m256 x, bfloat16) {  // as narrow() in vec.h
  const __m256i bits = _mm256_castps_si256(x), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
}
PYFUSED_INLINE __m128i nearest(__m256 x, float16) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}
template <class Half> PYFUSED_INLINE void store_row(__m256 x, Half* to, Some some) {
  const __m128i bits = nearest(x, Half{});
  _mm_maskstore_epi32(reinterpret_cast<int*>(to), twos(some), bits);
  if (some.n % 2 == 0) return;
  Half all[kSquare];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(all), bits);
  to[some.n - 1] = all[some.n - 1];
}
PYFUSED_INLINE void store_row(__m256 x, float* to, Some some) { _mm256_maskstore_ps(to, some.lanes, x); }
#endif

#ifdef PYFUSED_HAS_REGISTERS
PYFUSED_INLINE Register& row_of_tile(float* x) { return *reinterpret_cast<Register*>(x); }
PYFUSED_INLINE Register row_of_tile(const float* x) { return *reinterpret_cast<const Register*>(x); }

// Calls body(first position, first class, classes, these of a row) for the squares that cover a tile.
template <class Body> PYFUSED_INLINE void for_squares(int64_t classes, int64_t n, const Body& body) {
  for (int64_t b = 0; b < n; b += kSquare) {
    for (int64_t c = 0; c < classes; c += kSquare) {
      const int64_t wide = std::min<int64_t>(kSquare, classes - c);
      body(b, c, wide, first_of_row(wide));
    }
  }
}

// tile[c][b] = from[b * stride + c]; up to the next whole square, zeros.
template <class T>
void load_transposed(const T* from, int64_t stride, float* tile, int64_t columns, int64_t classes,
                     int64_t n) {
  for_squares(classes, n, [&](int64_t b, int64_t c, int64_t wide, Some some) {
    Square rows;
    const T* const corner = from + b * stride + c;
    for (int i = 0; i < kSquare; ++i) {
      rows[i] = b + i < n ? load_row(corner + i * stride, some) : Register{};
    }
    if (classes > kSquare) {  // else several rows are in one line
      for (int i = 0; i < kSquare; ++i) PYFUSED_PREFETCH(corner + i * stride + kAhead<T>);
    }
    transpose(rows);
    for (int i = 0; i < kSquare; ++i) {
      if (i < wide) row_of_tile(tile + (c + i) * columns + b) = rows[i];
    }
  });
}

// to[b * stride + c] = tile[c][b]
template <class T>
void store_transposed(const float* tile, int64_t columns, T* to, int64_t stride, int64_t classes,
                      int64_t n) {
  for_squares(classes, n, [&](int64_t b, int64_t c, int64_t wide, Some some) {
    Square rows;
    for (int i = 0; i < kSquare; ++i) {
      rows[i] = i < wide ? row_of_tile(tile + (c + i) * columns + b) : Register{};
    }
    transpose(rows);
    for (int i = 0; i < kSquare; ++i) {
      if (b + i < n) store_row(rows[i], to + (b + i) * stride + c, some);
    }
  });
}
#endif

}  // namespace pyfused
