// AVX-512 registers of floats, in pairs: arithmetic, and conversion from and to elements of any
// type.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "vec.h"

#define PYFUSED_HAS_REGISTERS 1

namespace pyfused {

using Register = __m512;  // of floats

template <int N> struct Registers {
  Registers<N / 2> low, high;
};
template <> struct Registers<2> {
  Register low, high;
};
using Pair = Registers<2>;
using Quad = Registers<4>;

PYFUSED_INLINE __m512 maximum(__m512 x, __m512 y) { return _mm512_max_ps(x, y); }
PYFUSED_INLINE __m512 maximum(float x, __m512 y) { return maximum(_mm512_set1_ps(x), y); }
PYFUSED_INLINE __m512 minimum(float x, __m512 y) {
  // If x > 0, the bits have the same order as integers, which more execution units can compare.
  const __m512i bits =
      _mm512_min_epi32(_mm512_castps_si512(_mm512_set1_ps(x)), _mm512_castps_si512(y));
  return _mm512_castsi512_ps(bits);
}
PYFUSED_INLINE __m512 round_to_int(__m512 x) {
  return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT);
}
// p 2^n; 0 where x < `least`.
PYFUSED_INLINE __m512 times_power_of_2(__m512 p, __m512 n, __m512 x, float least) {
  const __mmask16 kept = _mm512_cmp_ps_mask(x, _mm512_set1_ps(least), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(kept, p, n);
}
// t - floor(t); 0 for an infinity.
PYFUSED_INLINE __m512 fraction(__m512 t) { return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF); }
// p 2^floor(t), 1 <= p <= 2; infinity from 2^128 on, and 0 below 2^-126 if subnormal results are
// flushed to 0.
constexpr bool kPowersOverflow = true;
PYFUSED_INLINE __m512 times_power_of_floor(__m512 p, __m512 t) { return _mm512_scalef_ps(p, t); }

PYFUSED_INLINE Pair broadcast(float x) { return {_mm512_set1_ps(x), _mm512_set1_ps(x)}; }
PYFUSED_INLINE float sum_of_lanes(Pair x) { return _mm512_reduce_add_ps(x.low + x.high); }
PYFUSED_INLINE float largest_lane(Pair x) { return _mm512_reduce_max_ps(maximum(x.low, x.high)); }

// A mask of the first n elements of a pair, n < 32.
PYFUSED_INLINE __mmask32 first_of_pair(int64_t n) { return (__mmask32(1) << n) - 1; }

// Lane i holds first + i * step: the indices of two elements of 16 bits, for a permutation.
PYFUSED_INLINE __m512i elements_of_lanes(int32_t first, int32_t step) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(_mm512_set1_epi32(first),
                          _mm512_mullo_epi32(_mm512_set1_epi32(step), lane));
}

// ---- halves: a bfloat16 is the upper half of a float's bits -------------------------------------

PYFUSED_INLINE Pair widen(__m512i bits, bfloat16) {
  constexpr __mmask32 kUpper = 0xaaaaaaaa;
  const __m512i low = elements_of_lanes(0, 1 << 16), high = elements_of_lanes(16 << 16, 1 << 16);
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpper, low, bits)),
          _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(kUpper, high, bits))};
}
PYFUSED_INLINE Pair widen(__m512i bits, float16) {
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(bits)),
          _mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1))};
}

// Rounds to nearest; ties of bfloat16 away from zero, ties of float16 to even. Ties to even in
// bfloat16, and NaN payloads in the lower half, would cost as much as half an exponential.
PYFUSED_INLINE __m512i narrow(Pair x, bfloat16) {
  const __m512i half = _mm512_set1_epi32(0x8000),
                upper = elements_of_lanes(3 << 16 | 1, 4 << 16 | 4);
  return _mm512_permutex2var_epi16(_mm512_add_epi32(_mm512_castps_si512(x.low), half), upper,
                                   _mm512_add_epi32(_mm512_castps_si512(x.high), half));
}
PYFUSED_INLINE __m512i narrow(Pair x, float16) {
  const __m256i low = _mm512_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT);
  const __m256i high = _mm512_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// ---- load and store -----------------------------------------------------------------------------

// The first n elements, and `fill` in the other lanes.
PYFUSED_INLINE Pair load_pair(const float* x, int64_t n = 32, float fill = -INFINITY) {
  if (n >= 32) return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 16)};
  const __m512 filled = _mm512_set1_ps(fill);
  const __mmask32 first = first_of_pair(n);
  return {_mm512_mask_loadu_ps(filled, __mmask16(first), x),
          _mm512_mask_loadu_ps(filled, __mmask16(first >> 16), x + 16)};
}
template <class Half>
PYFUSED_INLINE Pair load_pair(const Half* x, int64_t n = 32, float fill = -INFINITY) {
  if (n >= 32) return widen(_mm512_loadu_si512(x), Half{});
  const __m512i filled = _mm512_set1_epi16(pyfused::narrow<Half>(fill).bits);
  return widen(_mm512_mask_loadu_epi16(filled, first_of_pair(n), x), Half{});
}

// The first n elements, and 0 in the other lanes.
PYFUSED_INLINE Pair zero_after(Pair x, int64_t n) {
  if (n >= 32) return x;
  const __mmask32 first = first_of_pair(n);
  return {_mm512_maskz_mov_ps(__mmask16(first), x.low),
          _mm512_maskz_mov_ps(__mmask16(first >> 16), x.high)};
}

PYFUSED_INLINE void store_pair(Pair x, float* to, int64_t n = 32) {
  const __mmask32 first = n < 32 ? first_of_pair(n) : ~__mmask32(0);
  _mm512_mask_storeu_ps(to, __mmask16(first), x.low);
  _mm512_mask_storeu_ps(to + 16, __mmask16(first >> 16), x.high);
}
template <class Half> PYFUSED_INLINE void store_pair(Pair x, Half* to, int64_t n = 32) {
  _mm512_mask_storeu_epi16(to, n < 32 ? first_of_pair(n) : ~__mmask32(0), narrow(x, Half{}));
}

// Non-temporal stores. `to` is aligned to 64 bytes.
PYFUSED_INLINE void stream_pair(Pair x, float* to) {
  _mm512_stream_ps(to, x.low);
  _mm512_stream_ps(to + 16, x.high);
}
template <class Half> PYFUSED_INLINE void stream_pair(Pair x, Half* to) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), narrow(x, Half{}));
}

// ---- one register of a row, for transpose.h and row_groups.h ------------------------------------

using RowMask = __mmask16;
struct EveryLane {};  // instead of a mask

PYFUSED_INLINE RowMask first_of_row(int64_t n) { return RowMask((1u << n) - 1); }

// The lanes of x in the mask, and `fill` in the others.
PYFUSED_INLINE __m512 within(RowMask mask, __m512 x, float fill = 0) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(fill), mask, x);
}
PYFUSED_INLINE __m512 within(EveryLane, __m512 x, float = 0) { return x; }

// The first lane where x is y, or a number that is too large.
PYFUSED_INLINE int64_t first_equal(__m512 x, float y) {
  return _tzcnt_u32(_mm512_cmp_ps_mask(x, _mm512_set1_ps(y), _CMP_EQ_OQ));
}

// Loads the lanes in the mask, and 0 in the others.
PYFUSED_INLINE __m512 load_row(const float* x, RowMask mask) {
  return _mm512_maskz_loadu_ps(mask, x);
}
PYFUSED_INLINE __m512 load_row(const bfloat16* x, RowMask mask) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}
PYFUSED_INLINE __m512 load_row(const float16* x, RowMask mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, x));
}

PYFUSED_INLINE __m512 load_row(const float* x, EveryLane) { return _mm512_loadu_ps(x); }
template <class Half> PYFUSED_INLINE __m512 load_row(const Half* x, EveryLane) {
  return load_row(x, RowMask(~0));
}

PYFUSED_INLINE void store_row(__m512 x, float* to, RowMask mask) {
  _mm512_mask_storeu_ps(to, mask, x);
}
// Rounds like narrow() in vec.h.
PYFUSED_INLINE void store_row(__m512 x, bfloat16* to, RowMask mask) {
  const __m512i bits = _mm512_castps_si512(x), one = _mm512_set1_epi32(1);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtepi32_epi16(kept));
}
PYFUSED_INLINE void store_row(__m512 x, float16* to, RowMask mask) {
  _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
template <class T> PYFUSED_INLINE void store_row(__m512 x, T* to, EveryLane) {
  store_row(x, to, RowMask(~0));
}

// Interleave the low or the high halves of each 16 bytes of x and y, in elements of 32 or 64 bits.
PYFUSED_INLINE __m512 unpack_low_32(__m512 x, __m512 y) { return _mm512_unpacklo_ps(x, y); }
PYFUSED_INLINE __m512 unpack_high_32(__m512 x, __m512 y) { return _mm512_unpackhi_ps(x, y); }
PYFUSED_INLINE __m512 unpack_low_64(__m512 x, __m512 y) {
  return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
}
PYFUSED_INLINE __m512 unpack_high_64(__m512 x, __m512 y) {
  return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
}

}  // namespace pyfused
