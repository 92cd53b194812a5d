// Column layout: vectors run along a block of positions. The positions are contiguous and the
// classes strided, as in a (N, C, d1, ..., dk) tensor; or the classes are contiguous but few, and
// the block is transposed when it is loaded and stored. Few positions beside many classes are
// folded: a line of a tile holds several classes of each position, and the results of a position's
// lanes are combined.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "exponentials.h"
#include "memory.h"
#include "parallel.h"
#include "positions.h"
#include "transpose.h"

namespace pyfused {

// A tile of classes x positions stays in L1. With up to this many classes, a tile has more
// positions, so that contiguous pieces of memory are longer: 1.1 to 1.5 times faster for 21 to 32
// classes.
constexpr int64_t kFewClasses = 32;
constexpr int64_t kWide = 128;  // the positions of such a tile, or the lanes of folded positions
constexpr int64_t kNarrow = 32;  // the positions of other tiles

// How many classes of each position a line holds: several where one would leave lanes of the
// narrowest blocks idle, and where there are several lines, of which the last may be incomplete.
inline int64_t classes_of_line(const Positions& shape) {
  const int64_t classes = kWide / std::clamp(shape.inner, int64_t(1), kWide);
  return shape.inner < kNarrow && shape.classes >= 4 * classes ? classes : 1;
}

template <class T, int64_t kColumns, int64_t kTileClasses> class Columns {
 public:
  // The number of positions in each block; the last one may have fewer.
  static int64_t positions_of_block(const Positions& shape) {
    return kFolds && classes_of_line(shape) > 1 ? shape.inner : kColumns;
  }

  // The positions first to first + positions, at most kColumns.
  Columns(const Positions& shape, int64_t first, int64_t positions, bool streams, double scale = 1)
      : shape(shape), fold(kFolds ? classes_of_line(shape) : 1), first(first), positions(positions),
        n(fold * positions), length((shape.classes + fold - 1) / fold), streams(streams),
        scale(A(scale)) {}

 protected:
  using A = Accumulate<T>;
  using Tile = A[kTileClasses][kColumns];
  using Line = T[kColumns];
  using Lanes = double[kColumns];
  static constexpr bool kFolds = kColumns == kWide;

  const Positions& shape;
  const int64_t fold;  // classes of a line: lane b has class b / positions of them
  const int64_t first, positions;
  const int64_t n;  // lanes in use
  const int64_t length;  // lines
  const bool streams;  // outputs larger than the cache use non-temporal stores
  const A scale;  // multiplies the elements that for_tiles loads
  alignas(kVectorBytes) Lanes sum;  // the sum of exp(x - max)
  alignas(kVectorBytes) A max[kColumns];
  Lines<A> x;  // the tile that for_tiles has loaded
  alignas(kVectorBytes) Tile e;  // exp(x - max)

  // Whether the positions of the block have a common stride.
  bool evenly_spaced() const {
    return shape.outer == 1 || first % shape.inner + positions <= shape.inner;
  }
  // Whether k lines of the tensor's memory can be used as a tile: each is kColumns contiguous
  // elements, of which folded lines use n.
  template <class U> bool whole_lines(const View<U>& view, int64_t c, int64_t k) const {
    if (kFolds && fold > 1) return is_run(view) && elements_from(c + k - 1) >= kColumns;
    return view.inner == 1 && n == kColumns && evenly_spaced();
  }
  // Whether folded classes follow each other in memory.
  template <class U> bool is_run(const View<U>& view) const {
    return view.classes == positions && (view.inner == 1 || positions == 1);
  }
  // The elements of the block from a line on.
  int64_t elements_from(int64_t line) const { return (shape.classes - line * fold) * positions; }
  template <class U> U* line_of(const View<U>& view, int64_t c) const {
    return shape.at(view, first) + c * fold * view.classes;
  }

  // Combines the results of each position's lanes, and writes the result to all of them.
  template <class V, class Combine> void combine(V* lanes, const Combine& combined) const {
    for (int64_t classes = fold; kFolds && classes > 1;) {
      const int64_t half = (classes + 1) / 2 * positions, rest = classes * positions - half;
      for (int64_t b = 0; b < rest; ++b) lanes[b] = combined(lanes[b], lanes[half + b]);
      classes = half / positions;
    }
    repeat(lanes);
  }
  template <class V> void repeat(V* lanes) const {
    for (int64_t b = positions; kFolds && b < n; b *= 2) {
      std::copy_n(lanes, std::min(b, n - b), lanes + b);
    }
  }
  void add_lanes(double* lanes) const {
    combine(lanes, [](double x, double y) { return x + y; });
  }
  template <class U> bool transposes(const View<U>& view) const {
    return kTransposes<T> && view.classes == 1 && evenly_spaced();
  }

  // The buffer for transposing a tile element by element: the tile itself, or one of type T.
  Line* transpose_buffer(Tile& tile) {
    if constexpr (std::is_same_v<T, A>) return tile;
    return narrow_tile;
  }

  // Whether the block has one contiguous piece of memory per class, or a few long ones.
  template <class U> bool has_pieces(const View<U>& view) const {
    return view.inner == 1 && (shape.inner >= 16 || evenly_spaced());
  }

  // Calls body(first position in the block, positions) for each contiguous piece of memory, if the
  // positions of one index of the outer dimensions are contiguous.
  template <class Body> void for_pieces(const Body& body) const {
    for (int64_t b = 0, count = 0; b < n; b += count) {
      count = shape.outer == 1 ? n : std::min(n - b, shape.inner - (first + b) % shape.inner);
      // A constant trip count lets the compiler unroll short loops without bounds checks.
      count == kColumns ? body(b, std::integral_constant<int64_t, kColumns>()) : body(b, count);
    }
  }

  // Returns k classes of the block: in the tensor itself if possible, else loaded to the tile.
  Lines<A> lines(const View<const T>& view, int64_t c, int64_t k, Tile& tile) {
    if constexpr (std::is_same_v<T, A>) {
      if (whole_lines(view, c, k)) {
        const Lines<A> found{line_of(view, c), fold * view.classes};
        for (int64_t i = 0; i < k; ++i) prefetch_after(found[i], kColumns);
        return found;
      }
    }
    load_tile(view, c, k, tile);
    return {tile[0], kColumns};
  }

  // The hardware prefetcher cannot follow a stream for each class: 1.1 to 1.3 times faster.
  static void prefetch_after(const T* piece, int64_t count) {
    for (int64_t b = 0; b < count; b += kLanes<T>) PYFUSED_PREFETCH(piece + count + b);
  }

  void load_tile(const View<const T>& view, int64_t c, int64_t k, Tile& tile) {
    if (kFolds && fold > 1) return load_folded(view, c, k, tile);
    if (has_pieces(view)) {
      for_pieces([&](int64_t b, auto count) {
        const T* from = shape.at(view, first + b) + c * view.classes;
        for (int64_t i = 0; i < k; ++i, from += view.classes) {
          load(from, tile[i] + b, count);
          prefetch_after(from, count);
        }
      });
    } else if (transposes(view)) {
      if constexpr (kTransposes<T>) {
        load_transposed(shape.at(view, first) + c, view.inner, tile[0], kColumns, k, n);
      }
    } else {
      Line* const transposed = transpose_buffer(tile);
      for (int64_t b = 0; b < n; ++b) {
        const T* const from = shape.at(view, first + b) + c * view.classes;
        for (int64_t i = 0; i < k; ++i) transposed[i][b] = from[i * view.classes];
      }
      if constexpr (!std::is_same_v<T, A>) {
        for (int64_t i = 0; i < k; ++i) load(transposed[i], tile[i], n);
      }
    }
    for (int64_t i = 0; n < kColumns && i < k; ++i)
      std::fill(tile[i] + n, tile[i] + kColumns, A(0));
  }

  // A tile that is not a run is transposed as classes x positions without gaps.
  void load_folded(const View<const T>& view, int64_t c, int64_t k, Tile& tile) const {
    const T* const from = line_of(view, c);
    const int64_t elements = elements_from(c), classes = std::min(k * fold, elements / positions);
    A* const packed = tile[0];
    if (kTransposes<T> && view.classes == 1) {
#ifdef PYFUSED_HAS_REGISTERS
      if constexpr (kTransposes<T>) {
        load_transposed<true>(from, view.inner, packed, positions, classes, positions);
      }
#endif
    } else if (!is_run(view)) {
      for (int64_t b = 0; b < positions; ++b) {
        for (int64_t j = 0; j < classes; ++j) {
          packed[j * positions + b] = widen(from[b * view.inner + j * view.classes]);
        }
      }
    }
    for (int64_t i = k - 1; i >= 0; --i) {
      const int64_t count = std::min(n, elements - i * n);
      if (!is_run(view)) {
        std::memmove(tile[i], packed + i * n, size_t(count) * sizeof(A));
      } else if (elements - i * n >= kColumns) {
        load(from + i * n, tile[i], kColumns);
        continue;
      } else {
        load(from + i * n, tile[i], count);
      }
      std::fill(tile[i] + count, tile[i] + kColumns, missing);
    }
  }

  void store_folded(Tile& tile, const View<T>& view, int64_t c, int64_t k) const {
    T* const to = line_of(view, c);
    const int64_t elements = elements_from(c), classes = std::min(k * fold, elements / positions);
    A* const packed = tile[0];
    for (int64_t i = 0; i < k; ++i) {
      const int64_t count = std::min(n, elements - i * n);
      if (!is_run(view)) {
        std::memmove(packed + i * n, tile[i], size_t(count) * sizeof(A));
      } else if (i + 1 < k && !streams) {
        store(tile[i], to + i * n, kColumns);  // the next line follows
      } else {
        write(tile[i], to + i * n, count, streams);
      }
    }
    if (is_run(view)) return;
    if (kTransposes<T> && view.classes == 1) {
#ifdef PYFUSED_HAS_REGISTERS
      if constexpr (kTransposes<T>) {
        store_transposed<true>(packed, positions, to, view.inner, classes, positions);
      }
#endif
      return;
    }
    for (int64_t b = 0; b < positions; ++b) {
      for (int64_t j = 0; j < classes; ++j) {
        to[b * view.inner + j * view.classes] = narrow<T>(packed[j * positions + b]);
      }
    }
  }

  // Stores the lines that compute(class in the tile, line of results) writes, through the tile if
  // they cannot be written directly.
  template <class Compute>
  void write_lines(Tile& tile, const View<T>& view, int64_t c, int64_t k, const Compute& compute) {
    if constexpr (std::is_same_v<T, A>) {
      if (whole_lines(view, c, k) && !streams) {
        A* const to = line_of(view, c);
        for (int64_t i = 0; i < k; ++i) compute(i, to + i * fold * view.classes);
        return;
      }
    }
    for (int64_t i = 0; i < k; ++i) compute(i, tile[i]);
    store_tile(tile, view, c, k);
  }

  void store_tile(Tile& tile, const View<T>& view, int64_t c, int64_t k) {
    if (kFolds && fold > 1) return store_folded(tile, view, c, k);
    if (has_pieces(view)) {
      for_pieces([&](int64_t b, auto count) {
        T* const to = shape.at(view, first + b) + c * view.classes;
        for (int64_t i = 0; i < k; ++i) write(tile[i] + b, to + i * view.classes, count, streams);
      });
    } else if (transposes(view)) {
      if constexpr (kTransposes<T>) {
        store_transposed(tile[0], kColumns, shape.at(view, first) + c, view.inner, k, n);
      }
    } else {
      Line* const transposed = transpose_buffer(tile);
      for (int64_t i = 0; i < k; ++i) store(tile[i], transposed[i], n);
      for (int64_t b = 0; b < n; ++b) {
        T* const to = shape.at(view, first + b) + c * view.classes;
        for (int64_t i = 0; i < k; ++i) to[i * view.classes] = transposed[i][b];
      }
    }
  }

  // Calls body(first line, lines) for each tile, with the tile of `view` in x.
  template <class Body> void for_tiles(const View<const T>& view, const Body& body) {
    for (int64_t c = 0; c < length; c += kTileClasses) {
      const int64_t k = std::min(kTileClasses, length - c);
      if (length > kTileClasses || !loaded) {
        if (scale == 1) {
          x = lines(view, c, k, tile);
        } else {
          load_tile(view, c, k, tile);
          for (int64_t i = 0; i < k; ++i) {
            for (int64_t b = 0; b < kColumns; ++b) tile[i][b] *= scale;
          }
          x = {tile[0], kColumns};
        }
      }
      loaded = true;
      body(c, k);
    }
  }

  // Groups of at most 8 classes are summed in A, and the groups in double, so that rounding errors
  // do not grow with the number of classes.
  template <class Body> static void for_groups(int64_t k, const Body& body) {
    for (int64_t i = 0; i < k; i += 8) body(i, std::min(i + 8, k));
  }

  // With Keeps, e holds the exponentials of the last tile.
  template <bool Keeps> PYFUSED_NOINLINE void find_normalizer(const View<const T>& view) {
    constexpr A lowest = -std::numeric_limits<A>::infinity();
    std::fill_n(max, kColumns, lowest);
    std::fill_n(sum, kColumns, 0.0);
    alignas(kVectorBytes) A pivot[kColumns];
    missing = lowest;
    for_tiles(view, [&](int64_t c, int64_t k) {
      for (int64_t b = 0; b < kColumns; ++b) pivot[b] = max[b];
      largest_of_columns<kColumns>(x, k, pivot);
      if (kFolds && fold > 1) {
        combine(pivot, [](A x, A y) { return y > x ? y : x; });
      }
      for (int64_t b = 0; b < kColumns; ++b) {
        const A previous = max[b];
        max[b] = pivot[b];
        pivot[b] = pivot[b] == lowest ? A(0) : pivot[b];
        if (c > 0) sum[b] *= double(exp_shifted(previous - pivot[b]));
      }
      for_groups(k, [&](int64_t begin, int64_t end) {
        alignas(kVectorBytes) A part[kColumns];
        exponentials_of_columns<kColumns, Keeps>(x.from(begin), pivot, end - begin, e[begin], part);
        for (int64_t b = 0; b < kColumns; ++b) sum[b] += double(part[b]);
      });
    });
    missing = 0;
    if (kFolds && fold > 1) {
      add_lanes(sum);
      loaded = false;
    }
  }

  // Reads the lines again, with a value for the classes that the last one lacks.
  void reload_with(A value) {
    if (!kFolds || fold == 1) return;
    missing = value;
    loaded = false;
  }

 private:
  bool loaded = false;  // lines that fit one tile are read once
  A missing = 0;  // stands for the classes that the last line lacks
  alignas(kVectorBytes) Tile tile;
  alignas(kVectorBytes) Line narrow_tile[kTileClasses];
};

}  // namespace pyfused
