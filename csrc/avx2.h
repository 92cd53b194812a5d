// AVX2 registers of floats, in pairs: arithmetic, and conversion from and to elements of any type.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "vec.h"

#define PYFUSED_HAS_REGISTERS 1

namespace pyfused {

using Register = __m256;  // of floats

template <int N> struct Registers {
  Registers<N / 2> low, high;
};
template <> struct Registers<2> {
  Register low, high;
};
using Pair = Registers<2>;
using Quad = Registers<4>;

PYFUSED_INLINE __m256 maximum(__m256 x, __m256 y) { return _mm256_max_ps(x, y); }
PYFUSED_INLINE __m256 maximum(float x, __m256 y) { return maximum(_mm256_set1_ps(x), y); }
PYFUSED_INLINE __m256 minimum(float x, __m256 y) {
  // If x > 0, the bits have the same order as integers, which more execution units can compare.
  const __m256i bits =
      _mm256_min_epi32(_mm256_castps_si256(_mm256_set1_ps(x)), _mm256_castps_si256(y));
  return _mm256_castsi256_ps(bits);
}
PYFUSED_INLINE __m256 round_to_int(__m256 x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT);
}

// p 2^n, -127 < n < 128; 0 where x < `least`.
PYFUSED_INLINE __m256 times_power_of_2(__m256 p, __m256 n, __m256 x, float least) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  const __m256 value = p * _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
  return _mm256_and_ps(value, _mm256_cmp_ps(x, _mm256_set1_ps(least), _CMP_NLT_UQ));
}
// t - floor(t); NaN for an infinity.
PYFUSED_INLINE __m256 fraction(__m256 t) { return t - _mm256_floor_ps(t); }
// p 2^floor(t), 1 <= p <= 2, t < 128; 0 below 2^-126.
constexpr bool kPowersOverflow = false;
PYFUSED_INLINE __m256 times_power_of_floor(__m256 p, __m256 t) {
  return times_power_of_2(p, _mm256_floor_ps(t), t, -126.0f);
}

PYFUSED_INLINE Pair broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
PYFUSED_INLINE float sum_of_lanes(Pair x) {
  const __m256 y = x.low + x.high;
  __m128 z = _mm256_castps256_ps128(y) + _mm256_extractf128_ps(y, 1);
  z = z + _mm_movehl_ps(z, z);
  return _mm_cvtss_f32(z + _mm_movehdup_ps(z));
}
PYFUSED_INLINE float largest_lane(Pair x) {
  const __m256 y = maximum(x.low, x.high);
  __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
  z = _mm_max_ps(z, _mm_movehl_ps(z, z));
  return _mm_cvtss_f32(_mm_max_ps(z, _mm_movehdup_ps(z)));
}

// ---- halves: a bfloat16 is the upper half of a float's bits -------------------------------------

PYFUSED_INLINE __m256 widen(__m128i bits, bfloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
PYFUSED_INLINE __m256 widen(__m128i bits, float16) { return _mm256_cvtph_ps(bits); }
template <class Half> PYFUSED_INLINE Pair widen(__m256i bits, Half type) {
  return {widen(_mm256_castsi256_si128(bits), type),
          widen(_mm256_extracti128_si256(bits, 1), type)};
}

// Rounds to nearest; ties of bfloat16 away from zero, as in avx512.h, ties of float16 to even.
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

// Masks of the first n - `from` lanes of 32 bits, and of the first n lanes of 16 bits.
PYFUSED_INLINE __m256i first_lanes(int64_t n, int32_t from = 0) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int32_t(n) - from), lane);
}
PYFUSED_INLINE __m256i first_halves(int64_t n) {
  const __m256i lane = _mm256_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm256_cmpgt_epi16(_mm256_set1_epi16(int16_t(n)), lane);
}

PYFUSED_INLINE Pair load_pair(const float* x) {
  return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)};
}
template <class Half> PYFUSED_INLINE Pair load_pair(const Half* x) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), Half{});
}

// Loads the first n elements, 0 < n <= 16, in pairs, because AVX2 has no masks for 16-bit elements;
// if n is odd, it loads the last one separately. The other lanes are undefined.
template <class Half> PYFUSED_INLINE __m256i load_halves(const Half* x, int64_t n) {
  const __m256i pairs = _mm256_maskload_epi32(reinterpret_cast<const int*>(x), first_lanes(n / 2));
  return _mm256_blendv_epi8(_mm256_set1_epi16(int16_t(x[n - 1].bits)), pairs,
                            first_halves(n / 2 * 2));
}
template <class Half> PYFUSED_INLINE void store_halves(__m256i bits, Half* to, int64_t n) {
  _mm256_maskstore_epi32(reinterpret_cast<int*>(to), first_lanes(n / 2), bits);
  if (n % 2 == 0) return;
  Half all[16];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(all), bits);
  to[n - 1] = all[n - 1];
}

// The first n elements, n > 0, and `fill` in the other lanes.
PYFUSED_INLINE Pair load_pair(const float* x, int64_t n, float fill = -INFINITY) {
  if (n >= 16) return load_pair(x);
  const __m256 filled = _mm256_set1_ps(fill);
  const __m256i low = first_lanes(n), high = first_lanes(n, 8);
  return {_mm256_blendv_ps(filled, _mm256_maskload_ps(x, low), _mm256_castsi256_ps(low)),
          _mm256_blendv_ps(filled, _mm256_maskload_ps(x + 8, high), _mm256_castsi256_ps(high))};
}
template <class Half>
PYFUSED_INLINE Pair load_pair(const Half* x, int64_t n, float fill = -INFINITY) {
  if (n >= 16) return load_pair(x);
  const __m256i filled = _mm256_set1_epi16(int16_t(pyfused::narrow<Half>(fill).bits));
  return widen(_mm256_blendv_epi8(filled, load_halves(x, n), first_halves(n)), Half{});
}

// The first n elements, and 0 in the other lanes.
PYFUSED_INLINE Pair zero_after(Pair x, int64_t n) {
  if (n >= 16) return x;
  return {_mm256_and_ps(x.low, _mm256_castsi256_ps(first_lanes(n))),
          _mm256_and_ps(x.high, _mm256_castsi256_ps(first_lanes(n, 8)))};
}

PYFUSED_INLINE void store_pair(Pair x, float* to) {
  _mm256_storeu_ps(to, x.low);
  _mm256_storeu_ps(to + 8, x.high);
}
template <class Half> PYFUSED_INLINE void store_pair(Pair x, Half* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(x, Half{}));
}

// The first n elements.
PYFUSED_INLINE void store_pair(Pair x, float* to, int64_t n) {
  _mm256_maskstore_ps(to, first_lanes(n), x.low);
  _mm256_maskstore_ps(to + 8, first_lanes(n, 8), x.high);
}
template <class Half> PYFUSED_INLINE void store_pair(Pair x, Half* to, int64_t n) {
  n >= 16 ? store_pair(x, to) : store_halves(narrow(x, Half{}), to, n);
}

// Non-temporal stores. `to` is aligned to 64 bytes.
PYFUSED_INLINE void stream_pair(Pair x, float* to) {
  _mm256_stream_ps(to, x.low);
  _mm256_stream_ps(to + 8, x.high);
}
template <class Half> PYFUSED_INLINE void stream_pair(Pair x, Half* to) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), narrow(x, Half{}));
}

// ---- one register of a row, for transpose.h and row_groups.h ------------------------------------

struct EveryLane {};  // instead of a mask

// The first n elements of a row.
struct RowMask {
  __m256i lanes;
  int64_t n;
};

PYFUSED_INLINE RowMask first_of_row(int64_t n) { return {first_lanes(n), n}; }

// The lanes of x in the mask, and `fill` in the others.
PYFUSED_INLINE __m256 within(RowMask mask, __m256 x, float fill = 0) {
  return _mm256_blendv_ps(_mm256_set1_ps(fill), x, _mm256_castsi256_ps(mask.lanes));
}
PYFUSED_INLINE __m256 within(EveryLane, __m256 x, float = 0) { return x; }

// The first lane where x is y, or a number that is too large.
PYFUSED_INLINE int64_t first_equal(__m256 x, float y) {
  return _tzcnt_u32(unsigned(_mm256_movemask_ps(_mm256_cmp_ps(x, _mm256_set1_ps(y), _CMP_EQ_OQ))));
}

// Loads the lanes in the mask, and 0 in the others.
PYFUSED_INLINE __m256 load_row(const float* x, RowMask mask) {
  return _mm256_maskload_ps(x, mask.lanes);
}
template <class Half> PYFUSED_INLINE __m256 load_row(const Half* x, RowMask mask) {
  return within(mask, widen(_mm256_castsi256_si128(load_halves(x, mask.n)), Half{}));
}

PYFUSED_INLINE __m256 load_row(const float* x, EveryLane) { return _mm256_loadu_ps(x); }
template <class Half> PYFUSED_INLINE __m256 load_row(const Half* x, EveryLane) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)), Half{});
}

PYFUSED_INLINE __m128i nearest(__m256 x, bfloat16) {  // rounds like narrow() in vec.h
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
PYFUSED_INLINE void store_row(__m256 x, float* to, RowMask mask) {
  _mm256_maskstore_ps(to, mask.lanes, x);
}
template <class Half> PYFUSED_INLINE void store_row(__m256 x, Half* to, RowMask mask) {
  store_halves(_mm256_castsi128_si256(nearest(x, Half{})), to, mask.n);
}
PYFUSED_INLINE void store_row(__m256 x, float* to, EveryLane) { _mm256_storeu_ps(to, x); }
template <class Half> PYFUSED_INLINE void store_row(__m256 x, Half* to, EveryLane) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), nearest(x, Half{}));
}

// Interleave the low or the high halves of each 16 bytes of x and y, in elements of 32 or 64 bits.
PYFUSED_INLINE __m256 unpack_low_32(__m256 x, __m256 y) { return _mm256_unpacklo_ps(x, y); }
PYFUSED_INLINE __m256 unpack_high_32(__m256 x, __m256 y) { return _mm256_unpackhi_ps(x, y); }
PYFUSED_INLINE __m256 unpack_low_64(__m256 x, __m256 y) {
  return _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
}
PYFUSED_INLINE __m256 unpack_high_64(__m256 x, __m256 y) {
  return _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
}

}  // namespace pyfused
