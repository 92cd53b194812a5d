// Transposes between memory, where the classes of a position are contiguous, and tiles, where the
// positions of a class are. Squares of 16 x 16 elements are transposed in AVX-512 registers, of 8 x
// 8 in AVX2 registers: 1.3 to 2.3 times faster than element by element.
#pragma once

#include <algorithm>

#include "memory.h"
#include "registers.h"
#include "vec.h"

namespace pyfused {

template <class T> constexpr bool kTransposes = false;

#ifdef PYFUSED_HAS_REGISTERS
template <> inline constexpr bool kTransposes<float> = true;
template <> inline constexpr bool kTransposes<bfloat16> = true;
template <> inline constexpr bool kTransposes<float16> = true;

constexpr int kSquare = sizeof(Register) / sizeof(float);
using Square = Register[kSquare];

// Swaps blocks across the diagonal: of 4 bytes, of 8, of 16, and with AVX-512 of 32.
PYFUSED_INLINE void transpose(Square& rows) {
  Square pairs, quads;
  for (int i = 0; i < kSquare; i += 2) {
    pairs[i] = unpack_low_32(rows[i], rows[i + 1]);
    pairs[i + 1] = unpack_high_32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kSquare; i += 4) {
    for (int k = 0; k < 2; ++k) {
      quads[i + 2 * k] = unpack_low_64(pairs[i + k], pairs[i + k + 2]);
      quads[i + 2 * k + 1] = unpack_high_64(pairs[i + k], pairs[i + k + 2]);
    }
  }
#ifdef __AVX512F__
  Square halves;
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
#else
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
  }
#endif
}

PYFUSED_INLINE Register& row_of_tile(float* x) { return *reinterpret_cast<Register*>(x); }
PYFUSED_INLINE Register row_of_tile(const float* x) {
  return *reinterpret_cast<const Register*>(x);
}

// Calls body(first position, first class, classes, their mask) for each square of a tile.
template <class Body> PYFUSED_INLINE void for_squares(int64_t classes, int64_t n,
                                                      const Body& body) {
  for (int64_t b = 0; b < n; b += kSquare) {
    for (int64_t c = 0; c < classes; c += kSquare) {
      const int64_t wide = std::min<int64_t>(kSquare, classes - c);
      if (wide == kSquare) {
        body(b, c, wide, EveryLane{});
      } else {
        body(b, c, wide, first_of_row(wide));
      }
    }
  }
}

// tile[c][b] = from[b * stride + c]; the positions that complete the last square are zeros. With
// kPacked they are left alone, so that there may be as few columns as positions.
template <bool kPacked = false, class T>
void load_transposed(const T* from, int64_t stride, float* tile, int64_t columns, int64_t classes,
                     int64_t n) {
  for_squares(classes, n, [&](int64_t b, int64_t c, int64_t wide, auto mask) {
    Square rows;
    const T* const corner = from + b * stride + c;
    if (b + kSquare <= n) {
      for (int i = 0; i < kSquare; ++i) rows[i] = load_row(corner + i * stride, mask);
    } else {
      for (int i = 0; i < kSquare; ++i) {
        rows[i] = b + i < n ? load_row(corner + i * stride, mask) : Register{};
      }
    }
    for (int i = 0; i < kSquare; ++i) PYFUSED_PREFETCH(corner + i * stride + kPrefetchDistance<T>);
    transpose(rows);
    float* const to = tile + c * columns + b;
    const RowMask positions = first_of_row(std::min<int64_t>(kSquare, n - b));
    for (int i = 0; i < kSquare; ++i) {
      if (i >= wide) continue;
      if (!kPacked) row_of_tile(to + i * columns) = rows[i];
      else if (b + kSquare <= n) store_row(rows[i], to + i * columns, EveryLane{});
      else store_row(rows[i], to + i * columns, positions);
    }
  });
}

// to[b * stride + c] = tile[c][b]
template <bool kPacked = false, class T>
void store_transposed(const float* tile, int64_t columns, T* to, int64_t stride, int64_t classes,
                      int64_t n) {
  for_squares(classes, n, [&](int64_t b, int64_t c, int64_t wide, auto mask) {
    Square rows;
    const float* const from = tile + c * columns + b;
    const RowMask positions = first_of_row(std::min<int64_t>(kSquare, n - b));
    for (int i = 0; i < kSquare; ++i) {
      if (i >= wide) rows[i] = Register{};
      else
        rows[i] =
            kPacked ? load_row(from + i * columns, positions) : row_of_tile(from + i * columns);
    }
    transpose(rows);
    T* const corner = to + b * stride + c;
    for (int i = 0; i < kSquare; ++i) PYFUSED_PREFETCH(corner + i * stride + kPrefetchDistance<T>);
    if (b + kSquare <= n) {
      for (int i = 0; i < kSquare; ++i) store_row(rows[i], corner + i * stride, mask);
    } else {
      for (int i = 0; b + i < n; ++i) store_row(rows[i], corner + i * stride, mask);
    }
  });
}
#endif

}  // namespace pyfused
