// Two AVX2 registers of floats.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <limits>

#include "registers.h"

#define PYFUSED_HAS_REGISTERS 1

namespace pyfused {

template <> struct Registers<2> { __m256 low, high; };

PYFUSED_INLINE __m256 larger(__m256 x, __m256 y) { return _mm256_max_ps(x, y); }
PYFUSED_INLINE __m256 larger(float x, __m256 y) { return larger(_mm256_set1_ps(x), y); }
PYFUSED_INLINE __m256 at_most(float x, __m256 y) {  // of integers, for which more units are free
  const __m256i bits = _mm256_min_epi32(_mm256_castps_si256(_mm256_set1_ps(x)), _mm256_castps_si256(y));
  return _mm256_castsi256_ps(bits);
}
PYFUSED_INLINE __m256 rounded(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT); }

// n < 128; 0 where it is less than -126.
PYFUSED_INLINE __m256 times_power_of_2(__m256 x, __m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  const __m256i positive = _mm256_max_epi32(exponent, _mm256_setzero_si256());
  return x * _mm256_castsi256_ps(_mm256_slli_epi32(positive, 23));
}

PYFUSED_INLINE Pair both(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PYFUSED_INLINE float sum_of_lanes(Pair x) {
  const __m256 y = x.low + x.high;
  __m128 z = _mm256_castps256_ps128(y) + _mm256_extractf128_ps(y, 1);
  z = z + _mm_movehl_ps(z, z);
  return _mm_cvtss_f32(z + _mm_movehdup_ps(z));
}
PYFUSED_INLINE float largest_lane(Pair x) {
  const __m256 y = larger(x.low, x.high);
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ps(z, _mm_movehdup_ps(z)));
}

// ---- halves: a bfloat16 is the upper half of a float's bits ---------------------------------------

PYFUSED_INLINE __m256 widen(__m128i bits, bfloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
PYFUSED_INLINE __m256 widen(__m128i bits, float16) { return _mm256_cvtph_ps(bits); }

// Rounds to nearest, ties away from zero, as avx512.h does.
PYFUSED_INLINE __m256i narrow(Pair x, bfloat16) {
  const __m256i half = _mm256_set1_epi32(0x8000);
  const __m256i low = _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(x.low), half), 16);
  const __m256i high = _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(x.high), half), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
}
PYFUSED_INLINE __m256i narrow(Pair x, float16) {
  const __m128i low = _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT);
  return _mm256_set_m128i(_mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT), low);
}

// ---- load and store -----------------------------------------------------------------------------

PYFUSED_INLINE const __m128i* bits_of(const void* x) { return static_cast<const __m128i*>(x); }

// The first n elements, and -inf in place of the others.
PYFUSED_INLINE Pair load_pair(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
template <class Half> PYFUSED_INLINE Pair load_pair(const Half* x) {
  return {widen(_mm_loadu_si128(bits_of(x)), Half{}), widen(_mm_loadu_si128(bits_of(x + 8)), Half{})};
}
template <class T> PYFUSED_INLINE Pair load_pair(const T* x, int64_t n) {
  if (n >= 16) return load_pair(x);
  T some[16];
  std::fill_n(some, 16, pyfused::narrow<T>(-std::numeric_limits<float>::infinity()));
  std::copy_n(x, n, some);
  return load_pair(some);
}

PYFUSED_INLINE void store_pair(Pair x, float* to) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
template <class Half> PYFUSED_INLINE void store_pair(Pair x, Half* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(x, Half{}));
}
template <class T> PYFUSED_INLINE void store_pair(Pair x, T* to, int64_t n) {
  if (n >= 16) return store_pair(x, to);
  T some[16];
  store_pair(x, some);
  std::copy_n(some, n, to);
}

// Past the cache, to whole lines.
PYFUSED_INLINE void stream_pair(Pair x, float* to) {
  _mm256_stream_ps(to, x.low);
  _mm256_stream_ps(to + 8, x.high);
}
template <class Half> PYFUSED_INLINE void stream_pair(Pair x, Half* to) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), narrow(x, Half{}));
}

}  // namespace pyfused
