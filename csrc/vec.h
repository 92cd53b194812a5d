// Element types and elementary functions, written as plain scalar code that compilers vectorise.
//
// Every kernel reads an element type T, computes in Accumulate<T> and rounds once when it writes.
//
//   function        range                            largest error
//   exp_shifted     [-87.33, 7] (double: [-708, 7])  1.01 ULP (double: 1); falls to 0 below
//   log_positive    [1, 2^60]                        1.5 ULP (of 1 below e)
//   log_of          every positive normal value      1.5 ULP; -inf of 0, NaN below
//   exp_of          every value                      1.01 ULP (subnormal results: 1.5)
//   decay           every value, NaN as infinity     1.01 ULP (subnormal results: 1.5)
//   log1p_of        [-1, inf]                        3 ULP; NaN below
//   tanh_of         every value                      3 ULP
//   expm1_of        every value                      2 ULP
//   erf_of          every value                      2.5 ULP
//   sine_of         |x| <= kMostSine                 2.5 ULP (of 2^-12 below)
//   pow_of (float)  every value                      1.3 ULP (subnormal results: 1.8)
//   Normal.below    every value                      5 ULP, and x^2 / 2 of them below -1;
//                                                    0 from kMost on
//   softplus        every value                      3 ULP
//   sigmoid         every value                      3 ULP; 0 where exp(-x) overflows
//   load            every value of T                 exact
//   store           every value of Accumulate<T>     0.5 ULP of T: rounds to nearest even
//
// NaN stays NaN. tests/kernels/test_vec.py measures these errors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __F16C__
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define PYFUSED_RESTRICT __restrict__
#define PYFUSED_INLINE inline __attribute__((always_inline))
#define PYFUSED_NOINLINE __attribute__((noinline))
#define PYFUSED_FLATTEN __attribute__((flatten))  // all that it calls is inlined
#define PYFUSED_PREFETCH(address) __builtin_prefetch(address)
#elif defined(_MSC_VER)
#define PYFUSED_RESTRICT __restrict
#define PYFUSED_INLINE __forceinline
#define PYFUSED_NOINLINE __declspec(noinline)
#define PYFUSED_FLATTEN
#else
#define PYFUSED_RESTRICT
#define PYFUSED_INLINE inline
#define PYFUSED_NOINLINE
#define PYFUSED_FLATTEN
#endif
// Clang's flatten reaches direct calls only: between these two, every function is inlined.
#ifdef __clang__
#define PYFUSED_INLINE_ALL \
  _Pragma("clang attribute push(__attribute__((always_inline)), apply_to = function)")
#define PYFUSED_INLINE_END _Pragma("clang attribute pop")
#else
#define PYFUSED_INLINE_ALL
#define PYFUSED_INLINE_END
#endif
#ifndef PYFUSED_PREFETCH
#define PYFUSED_PREFETCH(address)
#endif

// Tells the compiler that the loop's iterations are independent and its float reductions may be
// reordered. -fopenmp-simd enables these pragmas, which need no OpenMP runtime. The loops are
// correct without them.
#define PYFUSED_PRAGMA(text) _Pragma(#text)
#ifdef __GNUC__
#define PYFUSED_SIMD(...) PYFUSED_PRAGMA(omp simd __VA_ARGS__)
#else
#define PYFUSED_SIMD(...)
#endif

namespace pyfused {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class T> struct AccumulateType {
  using type = float;
};
template <> struct AccumulateType<double> {
  using type = double;
};
template <class T> using Accumulate = typename AccumulateType<T>::type;

// Buffers hold whole vectors: 64 bytes is the widest register of any ISA built here.
constexpr int64_t kVectorBytes = 64;
template <class A> constexpr int64_t kLanes = kVectorBytes / int64_t(sizeof(A));

template <class To, class From> PYFUSED_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- element types ------------------------------------------------------------------------------

PYFUSED_INLINE float widen(float x) { return x; }
PYFUSED_INLINE double widen(double x) { return x; }
PYFUSED_INLINE float widen(bfloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

template <class T> PYFUSED_INLINE T narrow(Accumulate<T> x);
template <> PYFUSED_INLINE float narrow<float>(float x) { return x; }
template <> PYFUSED_INLINE double narrow<double>(double x) { return x; }
template <> PYFUSED_INLINE bfloat16 narrow<bfloat16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return {uint16_t(x != x ? 0x7fc0u : rounded)};
}

#ifdef __aarch64__  // has instructions for both directions, which compilers vectorise
PYFUSED_INLINE float widen(float16 x) { return bit_cast<__fp16>(x.bits); }
template <> PYFUSED_INLINE float16 narrow<float16>(float x) {
  return {bit_cast<uint16_t>(static_cast<__fp16>(x))};
}
#else
PYFUSED_INLINE float widen(float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  // A subnormal number is the fraction of one from 2^-14 on. No float here is subnormal, because
  // torch.set_flush_denormal would turn it into 0.
  const float small = bit_cast<float>(magnitude + 0x38800000u) - 0x1p-14f;
  const uint32_t large =
      magnitude >= 0x0f800000u ? magnitude | 0x70000000u : magnitude + 0x38000000u;
  const uint32_t value = magnitude < 0x00800000u ? bit_cast<uint32_t>(small) : large;
  return bit_cast<float>(value | uint32_t(x.bits & 0x8000) << 16);
}
template <> PYFUSED_INLINE float16 narrow<float16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = bits >> 16 & 0x8000u;
  // Below 2^-14 the result is subnormal: adding 0.5 aligns its last bit with that of a float.
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? small : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {uint16_t(sign | half)};
}
#endif

template <class T>
PYFUSED_INLINE void load(const T* PYFUSED_RESTRICT from, Accumulate<T>* PYFUSED_RESTRICT to,
                         int64_t n) {
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

template <class T>
PYFUSED_INLINE void store(const Accumulate<T>* PYFUSED_RESTRICT from, T* PYFUSED_RESTRICT to,
                          int64_t n) {
  if (static_cast<const void*>(from) == to) return;  // staged() returned `to`
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) to[i] = narrow<T>(from[i]);
}

// Returns the destination of results before store(): `to` if T needs no rounding, else the buffer.
template <class T> PYFUSED_INLINE Accumulate<T>* staged(T* to, Accumulate<T>* buffer) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) return to;
  return buffer;
}

#ifdef __F16C__
// Compilers do not vectorise the scalar conversions to these two instructions.
PYFUSED_INLINE void load(const float16* PYFUSED_RESTRICT from, float* PYFUSED_RESTRICT to,
                         int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  for (; i < n; ++i) to[i] = widen(from[i]);
}

PYFUSED_INLINE void store(const float* PYFUSED_RESTRICT from, float16* PYFUSED_RESTRICT to,
                          int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  for (; i < n; ++i) to[i] = narrow<float16>(from[i]);
}
#endif

// n elements in Accumulate<T>: `from` itself, or widened into the buffer.
template <class T>
PYFUSED_INLINE const Accumulate<T>* widened(const T* from, Accumulate<T>* buffer, int64_t n) {
  if constexpr (std::is_same_v<T, Accumulate<T>>) {
    return from;
  } else {
    load(from, buffer, n);
    return buffer;
  }
}

template <class T>
PYFUSED_INLINE void load(const T* from, int64_t stride, Accumulate<T>* to, int64_t n) {
  if (stride == 1) return load(from, to, n);
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i * stride]);
}

template <class T>
PYFUSED_INLINE void store(const Accumulate<T>* from, T* to, int64_t stride, int64_t n) {
  if (stride == 1) return store(from, to, n);
  for (int64_t i = 0; i < n; ++i) to[i * stride] = narrow<T>(from[i]);
}

// ---- elementary functions -----------------------------------------------------------------------
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2, with a minimax polynomial for exp(r).
// Adding 1.5 * 2^(mantissa bits) rounds to an integer, and adding the exponent's bias leaves the
// exponent of 2^n in the low bits of the sum. It is 0 at kLeast, and so is 2^n.

template <class A> struct Power {
  A less_1;  // exp(r) - 1
  A scale;  // 2^(n - lift)
};

// exp(r) - 1, |r| <= ln(2) / 2, to be multiplied by 2^n.
PYFUSED_INLINE float exp_less_1(float x, float n) {
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  const float z = r * r;
  float p = 1.38143183e-3f * r + 8.36885128e-3f;
  p = p * z + (4.16684011e-2f * r + 1.66665195e-1f);
  p = p * r + 4.99999934e-1f;
  return p * z + r;
}

PYFUSED_INLINE double exp_less_1(double x, double n) {
  const double r = (x - n * 0.69314718036912382) - n * 1.9082149292705877e-10;
  const double z = r * r;
  double p = 2.082952690990506e-09 * r + 2.5112669132722643e-08;
  p = p * z + (2.7557569101588205e-07 * r + 2.755723296538863e-06);
  p = p * z + (2.4801586949222232e-05 * r + 0.00019841269898397378);
  p = p * z + (0.0013888888889096167 * r + 0.008333333333316146);
  p = p * z + (0.04166666666666617 * r + 0.16666666666666685);
  p = p * r + 0.5;
  return p * z + r;
}

// 2^n for n = shifted - kRound.
PYFUSED_INLINE float power_of_2(uint32_t bits) { return bit_cast<float>(bits << 23); }
PYFUSED_INLINE double power_of_2(uint64_t bits) { return bit_cast<double>(bits << 52); }

template <class A> constexpr bool kIsFloat = sizeof(A) == 4;
template <class A> using Bits = std::conditional_t<kIsFloat<A>, uint32_t, uint64_t>;
template <class A> constexpr int kBias = kIsFloat<A> ? 127 : 1023;
template <class A> constexpr A kRounding = kIsFloat<A> ? A(0x1.8p23) : A(0x1.8p52);

// `lift` is 1 where 2^n alone would be infinite, and negative where exp(x) may be subnormal.
// Without `clamps`, x is at least kLeast.
template <int lift = 0, bool clamps = true, class A> PYFUSED_INLINE Power<A> power_of(A x) {
  constexpr A kRound = kRounding<A> + kBias<A> - lift;
  constexpr A kLeast = (kIsFloat<A> ? A(-88) : A(-709)) + A(0.7) * lift;
  if constexpr (clamps) x = kLeast > x ? kLeast : x;
  const A shifted = x * A(1.4426950408889634) + kRound;
  return {exp_less_1(x, shifted - kRound), power_of_2(bit_cast<Bits<A>>(shifted))};
}

// The same for every x, with 2^n as a product of two normal numbers; the first is 0 at kLeast.
template <class A> struct WidePower {
  A less_1, scale, rest;
};
template <class A> PYFUSED_INLINE WidePower<A> wide_power_of(A x) {
  constexpr A kRound = kRounding<A> + 2 * kBias<A>, kLeast = kIsFloat<A> ? A(-176) : A(-1418);
  x = kLeast > x ? kLeast : x;
  const A shifted = x * A(1.4426950408889634) + kRound;
  const Bits<A> bits = bit_cast<Bits<A>>(shifted), half = bits / 2;
  return {exp_less_1(x, shifted - kRound), power_of_2(half), power_of_2(bits - half)};
}

template <class A> PYFUSED_INLINE A exp_shifted(A x) {
  const Power<A> power = power_of(x);
  return power.less_1 * power.scale + power.scale;
}

// The smaller of two numbers that are not both negative; y if x is NaN. Floats are compared as
// integers: where a float is selected, GCC computes what follows for a constant bound separately
// and selects after each operation. AVX-512 is the first to have a minimum of integers of 64 bits.
template <class A> PYFUSED_INLINE A smaller(A x, A y) {
  if constexpr (!kIsFloat<A>) return x < y ? x : y;
  else return bit_cast<A>(std::min(bit_cast<int32_t>(x), bit_cast<int32_t>(y)));
}

// exp(-|x|), as if NaN were infinite. Subnormal results take ten to twenty times as long on many
// processors.
template <class A> constexpr int kSubnormal = sizeof(A) == 4 ? 24 : 54;
template <class A> constexpr A kUnlift = sizeof(A) == 4 ? A(0x1p-24) : A(0x1p-54);
template <class A> PYFUSED_INLINE A decay(A x) {
  constexpr A kMost = kIsFloat<A> ? A(104.8) : A(746.8);  // 0 from here on
  const A size = smaller(A(std::abs(x)), kMost);
  const Power<A> power = power_of<-kSubnormal<A>, false>(-size);
  return (power.less_1 * power.scale + power.scale) * kUnlift<A>;
}

template <class A> PYFUSED_INLINE A exp_of(A x) {
  constexpr A kTop = sizeof(A) == 4 ? 89 : 710;  // infinite from here on
  const WidePower<A> power = wide_power_of(x);
  const A value = (power.less_1 * power.scale + power.scale) * power.rest;
  // Selected, because the product fused with a subtraction (FMA) would not overflow.
  return x >= kTop ? std::numeric_limits<A>::infinity() : value;
}

// log(x) = e ln 2 + log(1 + t), with x = 2^e (1 + t) and 1 + t in [sqrt(1/2), sqrt(2)).
// With s = t / (2 + t), log(1 + t) = 2 s + s^3 P(s^2); the order of additions rounds t last.
PYFUSED_INLINE double log_positive(double x) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd, kFraction = 0x000fffffffffffff;
  const uint64_t bits = bit_cast<uint64_t>(x) - kSqrtHalf;
  const double e = bit_cast<double>(bit_cast<uint64_t>(0x1p52) | bits >> 52) - 0x1p52;
  const double t = bit_cast<double>((bits & kFraction) + kSqrtHalf) - 1.0;
  const double s = t / (2.0 + t), z = s * s, half = 0.5 * t * t;
  double p = 0.146178727830158736;
  p = p * z + 0.153315969501069441;
  p = p * z + 0.181828932190875385;
  p = p * z + 0.222222110728351284;
  p = p * z + 0.285714286263992815;
  p = p * z + 0.399999999998984447;
  p = p * z + 0.666666666666666973;
  const double low = s * (half + z * p) + e * 1.9082149292705877e-10;
  const double value = e * 0.6931471803691238 + (t - (half - low));
  return x != x ? x : value;
}

// 2/3 + 2/5 z + 2/7 z^2 + ...: log((1 + s) / (1 - s)) = 2 s + s z (this), with z = s^2.
template <int terms, int k = 1> PYFUSED_INLINE double log_series(double z) {
  constexpr double term = 2.0 / (2 * k + 1);
  if constexpr (k == terms) return term;
  else return term + z * log_series<terms, k + 1>(z);
}

// log(1 + t) + extra; the order of additions rounds t last.
template <int terms> PYFUSED_INLINE double log1p_series(double t, double extra) {
  const double s = t / (2 + t), z = s * s, half = 0.5 * t * t;
  return t - (half - (s * (half + z * log_series<terms>(z)) + extra));
}

// log(1 + t) + extra, 1 + t in [sqrt(1/2), sqrt(2)).
PYFUSED_INLINE float log1p_reduced(float t, float extra) {
  const float z = t * t;
  float p = -0.0763455331f * t + 0.12761648f;
  p = p * z + (-0.131602049f * t + 0.142017901f);
  p = p * z + (-0.166233793f * t + 0.200012296f);
  p = p * z + (-0.250008196f * t + 0.333333313f);
  return t - (0.5f * z - (p * (z * t) + extra));
}
PYFUSED_INLINE double log1p_reduced(double t, double extra) { return log1p_series<10>(t, extra); }

template <class A> PYFUSED_INLINE A log_of(A x) {
  constexpr bool kFloat = sizeof(A) == 4;
  using Bits = std::conditional_t<kFloat, uint32_t, uint64_t>;
  constexpr int kMantissa = kFloat ? 23 : 52;
  constexpr A kInteger = kFloat ? A(0x1p23) : A(0x1p52), kBias = kFloat ? 127 : 1023;
  constexpr A kLeast = kFloat ? A(0x1p-126) : A(0x1p-1022);
  constexpr Bits kSqrtHalf = Bits(kFloat ? 0x3f3504f3 : 0x3fe6a09e667f3bcd);
  constexpr Bits kOne = Bits(kBias) << kMantissa, kFraction = (Bits(1) << kMantissa) - 1;
  const bool tiny = x < kLeast;  // a subnormal number is scaled to a normal one
  const Bits bits = bit_cast<Bits>(x * (tiny ? kInteger : A(1))) + (kOne - kSqrtHalf);
  const A biased = bit_cast<A>(bit_cast<Bits>(kInteger) | bits >> kMantissa);
  const A e = biased - (tiny ? kInteger + kBias + kMantissa : kInteger + kBias);
  const A t = bit_cast<A>((bits & kFraction) + kSqrtHalf) - 1;
  const A high = kFloat ? A(0.693359375) : A(0.6931471803691238);
  const A low = kFloat ? A(-2.12194440e-4) : A(1.9082149292705877e-10);
  const A value = e * high + log1p_reduced(t, e * low);
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  const A below = x == 0 ? -kInfinity : std::numeric_limits<A>::quiet_NaN();
  const A finite = x < kInfinity ? value : x;
  return x > 0 ? finite : below;
}

// log(1 + x) = log(u) + lost / u, where u is 1 + x rounded. 2 - u is near enough to 1 / u where the
// correction counts.
template <class A> PYFUSED_INLINE A log1p_of(A x) {
  const A u = 1 + x, lost = x - (u - 1);
  return log_of(u) + (u < 2 ? lost * (2 - u) : A(0));
}

// log(1 + e), 0 <= e <= 1, without e * e, which would be subnormal for most small e.
PYFUSED_INLINE float log1p_unit(float e) {
  float p = -0.00329046859f * e + 0.0200862419f;
  p = p * e + -0.057457231f;
  p = p * e + 0.106611282f;
  p = p * e + -0.153448805f;
  p = p * e + 0.196921021f;
  p = p * e + -0.24958019f;
  p = p * e + 0.333304644f;
  p = p * e + -0.499999315f;
  return e * (p * e + 1);
}
PYFUSED_INLINE double log1p_unit(double e) { return log1p_series<16>(e, 0.0); }

// log(1 + exp(x)), from decay(x).
template <class A> PYFUSED_INLINE A softplus_from(A e, A x) {
  return log1p_unit(e) + (x < 0 ? A(0) : x);
}
template <class A> PYFUSED_INLINE A softplus(A x) { return softplus_from(decay(x), x); }

// tanh(|x|) = (1 - e) / (1 + e), e = exp(-2 |x|).
template <class A> PYFUSED_INLINE A tanh_of(A x) {
  const Power<A> power = power_of(-2 * std::abs(x));
  const A less_1 = power.less_1 * power.scale + (power.scale - 1);  // e - 1
  return std::copysign(less_1 / (1 + (power.less_1 * power.scale + power.scale)), x);
}

// 1 / (1 + exp(-x)): like torch's, it is 0 where exp(-x) is infinite.
template <class A> PYFUSED_INLINE A sigmoid(A x) {
  constexpr A kMost = kIsFloat<A> ? A(87.3) : A(708.3);  // exp(-x) is 0
  constexpr A kInfinite = kIsFloat<A> ? A(88.9) : A(709.9);  // exp(-x) is infinite, half of it not
  const Power<A> power = power_of<1, false>(smaller(-smaller(x, kMost), kInfinite));
  const A value = 1 / (1 + 2 * (power.less_1 * power.scale + power.scale));
  return x == x ? value : x;
}
// The same from decay(x), which softplus computes, too; not 0 where it is subnormal.
template <class A> PYFUSED_INLINE A sigmoid_from(A e, A x) {
  const A one_or_nan = x >= 0 ? A(1) : x;
  return (x < 0 ? e : one_or_nan) / (1 + e);
}
template <class A> PYFUSED_INLINE A sigmoid_beside_softplus(A x) {
  return sigmoid_from(decay(x), x);
}

// exp(a^2 / 2) P(X <= -a), X of the standard normal distribution, as a minimax rational function.
PYFUSED_INLINE float normal_tail(float a) {
  float p = 0.00402866164f, q = 0.0100982161f;
  p = p * a + 0.0400415957f;
  p = p * a + 0.181477755f;
  p = p * a + 0.435918361f;
  q = q * a + 0.100376695f;
  q = q * a + 0.464831591f;
  q = q * a + 1.19519651f;
  q = q * a + 1.6697216f;
  return (p * a + 0.5f) / (q * a + 1);
}

PYFUSED_INLINE double normal_tail(double a) {
  double p = 2.1502020922697467e-07, q = 5.389757360652774e-07;
  p = p * a + 6.742430113733502e-06;
  p = p * a + 0.00010362635356383029;
  p = p * a + 0.0010160199928161886;
  p = p * a + 0.006990281935566641;
  p = p * a + 0.03513493000693753;
  p = p * a + 0.13050944153673993;
  p = p * a + 0.35426853679661285;
  p = p * a + 0.6756961619839004;
  p = p * a + 0.8254691295220501;
  q = q * a + 1.6900765962838638e-05;
  q = q * a + 0.0002602917235727818;
  q = q * a + 0.002563685207760173;
  q = q * a + 0.017780713134188386;
  q = q * a + 0.09058319220124782;
  q = q * a + 0.3441465712188851;
  q = q * a + 0.971165327796318;
  q = q * a + 1.988369000556898;
  q = q * a + 2.805270244065429;
  q = q * a + 2.4488228198469657;
  return (p * a + 0.5) / (q * a + 1);
}

// The standard normal distribution. exp(-a^2 / 2) is 0 from kMost on, which without `subnormal` is
// before results, and products with gradients, are subnormal.
template <class A, bool subnormal = false> struct Normal {
  A density, below;

  PYFUSED_INLINE explicit Normal(A x) {
    constexpr int kLift = subnormal ? -kSubnormal<A> : 24;
    constexpr A kFactor = subnormal ? kUnlift<A> : A(0x1p24);  // 2^kLift
    constexpr A kMost =
        subnormal ? A(kIsFloat<A> ? 14.47 : 38.64) : A(kIsFloat<A> ? 11.95 : 37.215);
    const A size = std::abs(x), a = size > kMost ? kMost : size;
    const Power<A> e = power_of<kLift, false>(a * a * A(-0.5));
    // The scale comes last, because exp(-a^2 / 2) / 2^kLift may be subnormal.
    const A power = e.less_1 * kFactor + kFactor, tail = power * normal_tail(a) * e.scale;
    density = power * A(0.39894228040143268) * e.scale;
    below = x < 0 ? tail : 1 - tail;
  }
};

// (P(X <= x) - 1/2) / x, |x| < 1, of z = x^2.
PYFUSED_INLINE float normal_middle(float z) {
  float p = -7.66053817e-06f;
  p = p * z + 0.000113502296f;
  p = p * z + -0.00118634399f;
  p = p * z + 0.00997332848f;
  p = p * z + -0.0664903606f;
  return p * z + 0.39894228f;
}

PYFUSED_INLINE double normal_middle(double z) {
  double p = 4.07432697742662748e-12;
  p = p * z + -1.1064328282755891e-10;
  p = p * z + 2.27041375856760001e-9;
  p = p * z + -4.12241075141608136e-8;
  p = p * z + 6.65967987965523131e-7;
  p = p * z + -9.44465579310384581e-6;
  p = p * z + 0.000115434687516559416;
  p = p * z + -0.00118732821546803438;
  p = p * z + 0.009973557010035022;
  p = p * z + -0.0664903800669054265;
  return p * z + 0.398942280401432678;
}

// 2 P(X <= x sqrt(2)) - 1.
template <class A> PYFUSED_INLINE A erf_of(A x) {
  const A u = x * A(1.4142135623730951), a = std::abs(u);
  const A small = 2 * u * normal_middle(u * u), tail = Normal<A>(-a).below;
  return a < 1 ? small : std::copysign(1 - 2 * tail, x);
}

template <class A> PYFUSED_INLINE A expm1_of(A x) {
  constexpr A kTop = sizeof(A) == 4 ? 89 : 710;
  const Power<A> power = power_of<1>(x);
  const A value = 2 * (power.less_1 * power.scale + (power.scale - A(0.5)));
  return x >= kTop ? std::numeric_limits<A>::infinity() : value;
}

// log(x) of a float that is not negative, to 2^-33.
PYFUSED_INLINE double log_wide(float x) {
  constexpr uint64_t kOne = 0x3ff0000000000000, kSqrtHalf = 0x3fe6a09e667f3bcd;
  constexpr uint64_t kFraction = 0x000fffffffffffff;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const uint64_t bits = bit_cast<uint64_t>(double(x)) + (kOne - kSqrtHalf);
  const double e = bit_cast<double>(bit_cast<uint64_t>(0x1p52) | bits >> 52) - (0x1p52 + 1023);
  const double t = bit_cast<double>((bits & kFraction) + kSqrtHalf) - 1;
  const double s = t / (2 + t), z = s * s;
  const double value = e * 0.6931471805599453 + (s * z * log_series<5>(z) + 2 * s);
  return x > 0 && x < kInfinity ? value : x == 0 ? -kInfinity : x;
}

// exp(y log(x)), whose error grows with the exponent: the logarithm is a double, and the
// exponential is of two floats that add up to it.
PYFUSED_INLINE float pow_of(float x, float y) {
  const float size = std::abs(x), half = y / 2;
  double exponent = size == 1 ? 0.0 : y * log_wide(size);
  exponent = exponent < -200 ? -200 : exponent;
  const float high = float(exponent), low = float(exponent - high);
  const WidePower<float> power = wide_power_of(high);
  const float less_1 = power.less_1 + (low + low * power.less_1);
  const float finite = (less_1 * power.scale + power.scale) * power.rest;
  const float value = high >= 89 ? std::numeric_limits<float>::infinity() : finite;
  const bool whole = std::trunc(y) == y, odd = whole & (std::trunc(half) != half);
  const bool undefined = (x < 0) & !whole & (size <= std::numeric_limits<float>::max());
  const float defined = odd ? std::copysign(value, x) : value;
  const float of_any = undefined ? std::numeric_limits<float>::quiet_NaN() : defined;
  return ((y == 0) | (x == 1)) ? 1.0f : of_any;
}
PYFUSED_INLINE double pow_of(double x, double y) { return std::pow(x, y); }

// sin(x + quarter pi / 2), |x| <= kMostSine: x = n pi / 2 + r in three parts of pi / 2, and the
// polynomials of Cephes and fdlibm for |r| <= pi / 4.
template <class A> constexpr A kMostSine = sizeof(A) == 4 ? A(8192) : A(1 << 20);

PYFUSED_INLINE float sine_rest(float z) {
  return (z * -1.9515295891e-4f + 8.3321608736e-3f) * z - 1.6666654611e-1f;
}
PYFUSED_INLINE float cosine_rest(float z) {
  return (z * 2.443315711809948e-5f - 1.388731625493765e-3f) * z + 4.166664568298827e-2f;
}
PYFUSED_INLINE double sine_rest(double z) {
  double s = 1.58969099521155010221e-10;
  s = s * z - 2.50507602534068634195e-08;
  s = s * z + 2.75573137070700676789e-06;
  s = s * z - 1.98412698298579493134e-04;
  s = s * z + 8.33333333332248946124e-03;
  return s * z - 1.66666666666666324348e-01;
}
PYFUSED_INLINE double cosine_rest(double z) {
  double c = -1.13596475577881948265e-11;
  c = c * z + 2.08757232129817482790e-09;
  c = c * z - 2.75573143513906633035e-07;
  c = c * z + 2.48015872894767294178e-05;
  c = c * z - 1.38888888888741095749e-03;
  return c * z + 4.16666666666666019037e-02;
}

template <int quarter, class A> PYFUSED_INLINE A sine_of(A x) {
  constexpr bool kFloat = sizeof(A) == 4;
  using Bits = std::conditional_t<kFloat, int32_t, int64_t>;
  constexpr A kRound = kFloat ? A(0x1.8p23) : A(0x1.8p52);
  const A shifted = x * A(0.63661977236758134) + kRound, n = shifted - kRound;
  A r = x - n * (kFloat ? A(1.5703125) : A(1.57079632673412561417));
  r -= n * (kFloat ? A(4.837512969970703125e-4) : A(6.07710050630396597660e-11));
  r -= n * (kFloat ? A(7.54978995489188216e-8) : A(2.02226624879595063154e-21));
  const A z = r * r;
  const A sine = r + r * z * sine_rest(z), cosine = 1 - (z / 2 - z * z * cosine_rest(z));
  const Bits turn = bit_cast<Bits>(shifted) + quarter;
  const A value = turn & 1 ? cosine : sine;
  return turn & 2 ? -value : value;
}

}  // namespace pyfused
