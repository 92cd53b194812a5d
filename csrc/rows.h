// Row layout: the classes of a position are contiguous, and vectors run along them. A row is
// processed in chunks whose buffers stay in L1.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "exponentials.h"
#include "positions.h"
#include "transpose.h"

namespace pyfused {

// From this many classes on the row layout is faster than the column layout. The column layout
// needs a transposed tile, so the threshold depends on whether T is transposed in registers.
template <class T> constexpr int64_t kRowClasses = kTransposes<T> ? 128 : 48;
constexpr int64_t kChunk = 1024;  // classes; the buffers of a chunk stay in L1

// A thread takes blocks of as many rows as have up to this many elements.
constexpr int64_t kBlockElements = 16384;
inline int64_t rows_of_block(int64_t classes) {
  return std::max<int64_t>(1, kBlockElements / classes);
}

// Rows of up to this many classes keep exp(x - pivot), which fits in L1 with the input and the
// output: 1.1 to 1.2 times faster. From twice as many classes on, recomputing it is 1.2 to 1.4
// times faster.
template <class T>
constexpr int64_t kKept = (1 << 15) / (2 * sizeof(T) + sizeof(Accumulate<T>)) / kChunk * kChunk;

// Calls body(chunk index, first class, classes) for each chunk.
template <class Body> void for_chunks(int64_t classes, const Body& body) {
  for (int64_t chunk = 0, first = 0; first < classes; ++chunk, first += kChunk) {
    body(chunk, first, std::min(kChunk, classes - first));
  }
}

// n elements times a scale, which are not rounded to T again; without kScales the elements
// themselves.
template <bool kScales, class T>
PYFUSED_INLINE auto scaled_chunk(const T* x, [[maybe_unused]] Accumulate<T> scale,
                                 [[maybe_unused]] Accumulate<T>* buffer,
                                 [[maybe_unused]] int64_t n) {
  if constexpr (kScales) {
    load(x, buffer, n);
    for (int64_t i = 0; i < n; ++i) buffer[i] *= scale;
    return static_cast<const Accumulate<T>*>(buffer);
  } else {
    return x;
  }
}

// log sum_c exp(x_c) = pivot + log(sum), in one read of a row.
template <class T> class Normalizer {
  using A = Accumulate<T>;
  static constexpr A kLowest = -std::numeric_limits<A>::infinity();
  static constexpr double kMaxTerms = 1024;  // about exp(7)

 public:
  A pivot = kLowest;  // at most 7 below the largest element
  double sum = 0;     // the sum of exp(x - pivot)
  A pivots[kKept<T> / kChunk + 1];         // the pivot that each chunk was summed against
  alignas(kVectorBytes) A kept[kKept<T>];  // exp(x - pivots), where the row keeps it

  // The largest element of a row's first chunk. Callers compute it for the next row before they
  // finish the current one, and the CPU overlaps the two: 1.1 times faster at 1,000 classes.
  static A first_max(const T* x, int64_t classes) {
    return largest(x, std::min(kChunk, classes), kLowest);
  }

  // Sums each chunk against the current pivot. If a chunk outweighs the chunks before it, which is
  // rare, pivot_rises(first, increase) is called, and the pivot rises to the chunk's largest
  // element. chunk_read(first, n) is called after each chunk. at(first, n) is a chunk in memory, of
  // T or of A. `out` is the destination of the row's result.
  template <bool Keeps, class At, class PivotRises, class ChunkRead>
  PYFUSED_INLINE void read(const At& at, T* out, int64_t classes, A first_max,
                           const PivotRises& pivot_rises, const ChunkRead& chunk_read) {
    for_chunks(classes, [&](int64_t chunk, int64_t first, int64_t n) {
      const auto* const x = at(first, n);
      A* const e = Keeps ? kept + first : nullptr;
      T* const result = Keeps ? out + first : nullptr;
      A terms = chunk ? sum_exponentials<Keeps, true>(x, pivot, e, result, n) : 0;
      if (!chunk || !(terms <= std::min(8 * sum, kMaxTerms))) {
        const A high = chunk ? largest(x, n, pivot) : first_max;
        // While every element is -inf the shift is 0: -inf - -inf would be NaN.
        const A shift = high == kLowest ? A(0) : high;
        sum *= exp_shifted(pivot - shift);
        if (chunk) pivot_rises(first, double(high - pivot));
        pivot = high;
        terms = sum_exponentials<Keeps, false>(x, shift, e, result, n);
        // Rounding errors would make losses negative whose true value is 0.
        if (shift == high && terms < 1) terms = 1;
      }
      if (Keeps) pivots[chunk] = pivot;
      sum += terms;
      chunk_read(first, n);
    });
  }

  // Returns the factor that makes the kept exponentials of a chunk relative to the final pivot.
  double rescale(int64_t chunk) const {
    return pivots[chunk] == pivot ? 1 : exp_shifted(pivots[chunk] - pivot);
  }
};

}  // namespace pyfused
