#include "softmax.h"

#include <algorithm>
#include <cmath>

#include "columns.h"
#include "memory.h"
#include "parallel.h"
#include "row_groups.h"
#include "rows.h"
#include "subnormals.h"

namespace pyfused {

// ---- row layout: classes contiguous -------------------------------------------------------------

#ifdef PYFUSED_HAS_REGISTERS
// The sum of x, or with kProducts of x y.
template <bool kProducts, class T> float sum_of(const T* x, const T* y, int64_t n) {
  const auto terms = [=](int64_t i, int64_t left) {
    const Pair of_x = load_pair(x + i, left);
    return kProducts ? of_x * load_pair(y + i, left) : of_x;
  };
  Quad sum = {broadcast(0), broadcast(0)};
  int64_t i = 0;
  for (; i + kQuad <= n; i += kQuad) sum = sum + Quad{terms(i, kPair), terms(i + kPair, kPair)};
  for (; i < n; i += kPair) sum.low = sum.low + zero_after(terms(i, n - i), n - i);
  return sum_of_lanes(sum.low + sum.high);
}

// The gradient of a row, without buffers.
template <bool kLogarithm, class T>
void write_row_gradient(const Softmax<T>& softmax, int64_t position, bool streams) {
  const T* const y = softmax.at(softmax.input, position);
  const T* const dy = softmax.at(softmax.grad_output, position);
  Sum sum;
  for_chunks(softmax.classes, [&](int64_t, int64_t first, int64_t n) {
    sum.add(sum_of<!kLogarithm>(dy + first, y + first, n));
  });
  const float total = roundable(float(sum.value()));
  write_each(
      [=](auto of_output, auto value) {
        if constexpr (kLogarithm) return of_output - exp_floats<T>(value) * total;
        else return value * (of_output - total);
      },
      softmax.at(softmax.output, position), softmax.classes, streams, dy, y);
}
#endif

template <class T> class SoftmaxRow {
  using A = Accumulate<T>;

 public:
  SoftmaxRow(const Softmax<T>& softmax, int64_t position, bool streams)
      : softmax(softmax), position(position), classes(softmax.classes), streams(streams),
        input(softmax.at(softmax.input, position)), output(softmax.at(softmax.output, position)) {}

  void forward() {
    const bool keeps = !softmax.logarithm && classes <= kKept<T>;
    keeps ? read<true>() : read<false>();
    const A high = row.pivot, low = A(std::log(row.sum));
    const double factor = 1 / row.sum;
    for_chunks(classes, [&](int64_t chunk, int64_t first, int64_t n) {
      T* const y = output + first;
      if (softmax.logarithm) {
        const A* const x = widened(input + first, buffer, n);
        A* const result = streams ? buffer : staged(y, buffer);
        for (int64_t i = 0; i < n; ++i) result[i] = (x[i] - high) - low;
        write(result, y, n, streams);
      } else if (keeps) {
        probabilities_of_kept(row.kept + first, A(factor * row.rescale(chunk)), input + first, high,
                              A(factor), buffer, y, n);
      } else {
        probabilities(input + first, high, A(factor), buffer, y, n, streams);
      }
    });
  }

  void backward() {
    const T* const grad_output = softmax.at(softmax.grad_output, position);
    Sum sum;
    for_chunks(classes, [&](int64_t, int64_t first, int64_t n) {
      const A* const dy = widened(grad_output + first, grad_buffer, n);
      if (softmax.logarithm) return add_terms<A>(sum, n, [=](int64_t i) { return dy[i]; });
      const A* const y = widened(input + first, buffer, n);
      add_terms<A>(sum, n, [=](int64_t i) { return dy[i] * y[i]; });
    });
    const A total = A(sum.value());
    for_chunks(classes, [&](int64_t, int64_t first, int64_t n) {
      const A* const dy = widened(grad_output + first, grad_buffer, n);
      A* const result = streams ? buffer : staged(output + first, buffer);
      if (softmax.logarithm) {
        scaled_exponentials(input + first, A(0), total, buffer, result, n, false);
        for (int64_t i = 0; i < n; ++i) result[i] = dy[i] - result[i];
      } else {
        const A* const y = widened(input + first, buffer, n);
        for (int64_t i = 0; i < n; ++i) result[i] = y[i] * (dy[i] - total);
      }
      write(result, output + first, n, streams);
    });
  }

 private:
  const Softmax<T>& softmax;
  const int64_t position, classes;
  const bool streams;
  const T* const input;
  T* const output;
  Normalizer<T> row;
  alignas(kVectorBytes) A buffer[kChunk];
  alignas(kVectorBytes) A grad_buffer[kChunk];

  template <bool Keeps> void read() {
    row.template read<Keeps>([this](int64_t first, int64_t) { return input + first; }, output,
                             classes);
  }
};

// ---- column layout: positions contiguous --------------------------------------------------------

template <class T, int64_t kColumns, int64_t kTileClasses>
class SoftmaxColumns : Columns<T, kColumns, kTileClasses> {
  using Base = Columns<T, kColumns, kTileClasses>;
  using A = Accumulate<T>;
  using Base::add_lanes, Base::for_tiles, Base::for_groups, Base::lines, Base::write_lines;
  using Base::length, Base::sum, Base::max, Base::x, Base::e;

 public:
  using Base::positions_of_block;

  SoftmaxColumns(const Softmax<T>& softmax, int64_t first, int64_t n, bool streams)
      : Base(softmax, first, n, streams), softmax(softmax) {}

  void forward() {
    const bool kept = length <= kTileClasses;
    alignas(kVectorBytes) A last[kColumns];  // log(sum) or 1 / sum
    if (softmax.logarithm) {
      Base::template find_normalizer<false>(softmax.input);
      PYFUSED_SIMD()
      for (int64_t b = 0; b < kColumns; ++b) last[b] = log_of(A(sum[b]));
    } else {
      Base::template find_normalizer<true>(softmax.input);
      PYFUSED_SIMD()
      for (int64_t b = 0; b < kColumns; ++b) last[b] = A(1 / sum[b]);
    }
    for_tiles(softmax.input, [&](int64_t c, int64_t k) {
      write_lines(e, softmax.output, c, k, [&](int64_t i, A* y) {
        const A* const logits = x[i];
        if (softmax.logarithm) {
          PYFUSED_SIMD()
          for (int64_t b = 0; b < kColumns; ++b) y[b] = (logits[b] - max[b]) - last[b];
        } else {
          if (!kept) exponentials(logits, max, e[i], kColumns);
          const A* const powers = e[i];
          A lowest = 1;
          PYFUSED_SIMD(reduction(min : lowest))
          for (int64_t b = 0; b < kColumns; ++b) {
            y[b] = powers[b] * last[b];
            lowest = y[b] < lowest ? y[b] : lowest;
          }
          if (lowest < kExact<A>) add_subnormals_of_columns<T>(logits, max, last, y, kColumns);
        }
      });
    });
  }

  void backward() { softmax.logarithm ? backward<true>() : backward<false>(); }

 private:
  const Softmax<T>& softmax;
  Lines<A> grad_output;
  bool paired = false;
  alignas(kVectorBytes) A total[kColumns];

  template <bool kLogarithm> void backward() {
    std::fill_n(sum, kColumns, 0.0);
    for_pairs([&](int64_t, int64_t k) { add_up<kLogarithm>(grad_output, x, k); });
    add_lanes(sum);
    std::copy_n(sum, kColumns, total);
    for_pairs([&](int64_t c, int64_t k) {
      write_lines(e, softmax.output, c, k, [&](int64_t i, A* dx) {
        softmax_gradient<kLogarithm>(grad_output[i], x[i], total, dx, kColumns);
      });
    });
  }

  // sum += dy y, or dy
  template <bool kLogarithm> void add_up(Lines<A> dy, Lines<A> y, int64_t k) {
    for_groups(k, [&](int64_t begin, int64_t end) {
      alignas(kVectorBytes) A part[kColumns];
      sums_of_columns<kColumns, !kLogarithm>(dy.from(begin), y.from(begin), end - begin, part);
      for (int64_t b = 0; b < kColumns; ++b) sum[b] += double(part[b]);
    });
  }

  // Calls body(first class, classes) with y in x and dy in grad_output.
  template <class Body> void for_pairs(const Body& body) {
    for_tiles(softmax.input, [&](int64_t c, int64_t k) {
      if (length > kTileClasses || !paired) {
        grad_output = lines(softmax.grad_output, c, k, e);
      }
      paired = true;
      body(c, k);
    });
  }
};

// Whether the stride of classes is a multiple of a page: then narrow columns would map to a
// few cache sets, and classes would evict each other.
template <class T> bool far_apart(const Softmax<T>& softmax) {
  return softmax.input.inner == 1 && softmax.inner >= 128 &&
         softmax.input.classes * int64_t(sizeof(T)) % 4096 == 0;
}

// ---- the gradient along a middle dimension ------------------------------------------------------

#ifdef PYFUSED_HAS_REGISTERS
// At most kMost contiguous positions, which are loaded directly into registers: 1.2 to 3 times
// faster than through tiles. The next strip is prefetched only where classes are far apart: there,
// tensors that exceed the cache take 0.8 to 0.9 times as long, but others take up to 1.1 times.
template <bool kLogarithm, class T> class SoftmaxStrip {
 public:
  static constexpr int64_t kMost = 4 * kPair;

  SoftmaxStrip(const Softmax<T>& softmax, int64_t position, bool prefetches)
      : softmax(softmax), prefetches(prefetches), y(softmax.at(softmax.input, position)),
        dy(softmax.at(softmax.grad_output, position)), dx(softmax.at(softmax.output, position)) {}

  void backward(int64_t n) const {
    if (n > 3 * kPair) return backward_of<4>(n - 3 * kPair);
    if (n > 2 * kPair) return backward_of<3>(n - 2 * kPair);
    n > kPair ? backward_of<2>(n - kPair) : backward_of<1>(n);
  }

 private:
  // The number of terms that are summed in a float. Few, because rounding errors add up.
  static constexpr int64_t kTerms = 32;
  const Softmax<T>& softmax;
  const bool prefetches;
  const T *const y, *const dy;
  T* const dx;

  static void prefetch_next(const T* strip) {
    for (int64_t b = kMost; b < 2 * kMost; b += kLanes<T>) PYFUSED_PREFETCH(strip + b);
  }

  // Only the first `last` elements of the last pair are positions.
  template <int kPairs> PYFUSED_INLINE void backward_of(int64_t last) const {
    const auto load = [=](const T* from, int p) {
      return p < kPairs - 1 ? load_pair(from + p * kPair) : load_pair(from + p * kPair, last);
    };
    alignas(kVectorBytes) double sums[kPairs * kPair] = {};
    alignas(kVectorBytes) float total[kPairs * kPair];
    for (int64_t c = 0; c < softmax.classes; c += kTerms) {
      Pair part[kPairs];
      for (Pair& lanes : part) lanes = broadcast(0);
      for (int64_t k = c; k < std::min(softmax.classes, c + kTerms); ++k) {
        const T *const y_k = y + k * softmax.input.classes, *const dy_k =
                                                                dy +
                                                                k * softmax.grad_output.classes;
        if (prefetches) {
          prefetch_next(y_k);
          prefetch_next(dy_k);
          prefetch_next(dx + k * softmax.output.classes);
        }
        for (int p = 0; p < kPairs; ++p) {
          part[p] = part[p] + (kLogarithm ? load(dy_k, p) : load(dy_k, p) * load(y_k, p));
        }
      }
      for (int p = 0; p < kPairs; ++p) store_pair(part[p], total + p * kPair);
      for (int64_t b = 0; b < kPairs * kPair; ++b) sums[b] += double(total[b]);
    }
    std::copy_n(sums, kPairs * kPair, total);
    for (int64_t k = 0; k < softmax.classes; ++k) {
      const T *const y_k = y + k * softmax.input.classes, *const dy_k =
                                                              dy + k * softmax.grad_output.classes;
      T* const dx_k = dx + k * softmax.output.classes;
      for (int p = 0; p < kPairs; ++p) {
        const Pair value = load(y_k, p), of_output = load(dy_k, p),
                   sum = load_pair(total + p * kPair);
        const Pair gradient =
            kLogarithm ? of_output - exp_floats<T>(value) * sum : value * (of_output - sum);
        p < kPairs - 1 ? store_pair(gradient, dx_k + p * kPair)
                       : store_pair(gradient, dx_k + p * kPair, last);
      }
    }
  }
};

template <class T> bool takes_strips(const Softmax<T>& softmax, bool streams) {
  return softmax.backward() && !streams && softmax.inner >= kPair && softmax.input.inner == 1 &&
         softmax.grad_output.inner == 1 && softmax.output.inner == 1;
}

template <bool kLogarithm, class T> void softmax_strips(const Softmax<T>& softmax) {
  using Strip = SoftmaxStrip<kLogarithm, T>;
  const int64_t strips = (softmax.inner + Strip::kMost - 1) / Strip::kMost;
  const bool prefetches = far_apart(softmax);
  parallel_for<NoBuffers>(softmax.outer * strips, softmax.threads, [&](int64_t block, auto) {
    const int64_t begin = block % strips * Strip::kMost;
    const Strip strip(softmax, block / strips * softmax.inner + begin, prefetches);
    strip.backward(std::min(Strip::kMost, softmax.inner - begin));
  });
}
#endif

// ---- groups of short rows -----------------------------------------------------------------------

#ifdef PYFUSED_HAS_REGISTERS
template <class T> class SoftmaxGroup : RowGroup<T> {
  using Base = RowGroup<T>;
  using Base::classes, Base::width, Base::max, Base::sum, Base::e;
  using Base::for_rows, Base::sums;

 public:
  using Base::rows;

  SoftmaxGroup(const Softmax<T>& softmax, int64_t first, int64_t n)
      : Base(softmax.classes, first, n), softmax(softmax), input(Base::rows_of(softmax.input)),
        grad_output(Base::rows_of(softmax.grad_output)), output(Base::rows_of(softmax.output)) {}

  void run() {
    if (!softmax.backward()) {
      softmax.logarithm ? log_softmax() : plain_softmax();
    } else {
      classes <= kSquare ? backward<true>() : backward<false>();
    }
  }

 private:
  const Softmax<T>& softmax;
  const typename Base::template Rows<const T> input, grad_output;
  const typename Base::template Rows<T> output;

  void plain_softmax() {
    Base::template find_normalizer<true>(input);
    row_of_tile(sum) = 1.0f / row_of_tile(sum);
    for_rows(
        [&](int64_t r, const T* x, T* y) {
          const float factor = sum[r], high = max[r];
          const float* const kept = e + r * width;
          Base::for_registers([&](int64_t c, auto mask) {
            PYFUSED_PREFETCH(y + c + kPrefetchDistance<T>);
            Register value = row_of_tile(kept + c) * factor;
            value = with_subnormals<T>(value, load_row(x + c, mask) - high, factor);
            store_row(value, y + c, mask);
          });
        },
        input, output);
  }

  void log_softmax() {
    Base::template find_normalizer<false>(input);
    for (float& lane : sum) lane = log_of(lane);
    for_rows(
        [&](int64_t r, const T* x, T* y) {
          const float high = max[r], low = sum[r];
          Base::for_registers([&](int64_t c, auto mask) {
            PYFUSED_PREFETCH(y + c + kPrefetchDistance<T>);
            store_row((load_row(x + c, mask) - high) - low, y + c, mask);
          });
        },
        input, output);
  }

  // kOne: a row is one register, which is 1.15 to 1.2 times faster at 16 classes.
  template <bool kOne> void backward() {
    const bool logarithm = softmax.logarithm;
    row_of_tile(sum) = sums(
        [&](int64_t, const T* y, const T* dy) {
          Register part = {};
          Base::template for_registers<kOne>([&](int64_t c, auto mask) {
            const Register term = load_row(dy + c, mask);
            part = part + (logarithm ? term : term * load_row(y + c, mask));
          });
          return part;
        },
        input, grad_output);
    for_rows(
        [&](int64_t r, const T* y, const T* dy, T* dx) {
          const float total = sum[r];
          Base::template for_registers<kOne>([&](int64_t c, auto mask) {
            PYFUSED_PREFETCH(dx + c + kPrefetchDistance<T>);
            const Register of_output = load_row(dy + c, mask), value = load_row(y + c, mask);
            store_row(
                logarithm ? of_output - exp_floats<T>(value) * total : value * (of_output - total),
                dx + c, mask);
          });
        },
        input, grad_output, output);
  }
};
#endif

// ---- the batch ----------------------------------------------------------------------------------

template <class T> void softmax_rows(const Softmax<T>& softmax, bool streams) {
  const auto run = [&](int64_t first, int64_t end, auto workspace) {
    for (int64_t position = first; position < end; ++position) {
      if (!softmax.backward()) {
        workspace.make(softmax, position, streams).forward();
        continue;
      }
#ifdef PYFUSED_HAS_REGISTERS
      if constexpr (std::is_same_v<Accumulate<T>, float>) {
        softmax.logarithm ? write_row_gradient<true>(softmax, position, streams)
                          : write_row_gradient<false>(softmax, position, streams);
        continue;
      }
#endif
      workspace.make(softmax, position, streams).backward();
    }
  };
  const int64_t size = rows_of_block(softmax.classes);
  for_blocks<SoftmaxRow<T>>(softmax.positions(), size, softmax.threads, run);
}

#ifdef PYFUSED_HAS_REGISTERS
// Few classes leave lanes idle, which costs more than transposing the rows. Large float outputs are
// limited by memory, and groups have no non-temporal stores. The backward pass of a group reads two
// tensors twice, which exceed L1: at 256 classes, single rows take 0.8 times as long.
template <class T> bool takes_groups(const Softmax<T>& softmax, bool streams) {
  const int64_t classes = softmax.classes, few = softmax.backward() ? 15 : kFewClasses;
  const bool limited_by_memory = streams && std::is_same_v<T, float> && classes >= kRowClasses<T>;
  const int64_t most = softmax.backward() ? 160 : kGroupClasses;
  return softmax.outer == 1 && softmax.classes_contiguous() && classes > few && classes <= most &&
         !limited_by_memory;
}

template <class T> void softmax_groups(const Softmax<T>& softmax) {
  const int64_t rows = SoftmaxGroup<T>::rows(softmax.classes);
  const int64_t size = (rows_of_block(softmax.classes) + rows - 1) / rows * rows;
  const auto run = [&](int64_t first, int64_t end, auto workspace) {
    for (; first < end; first += rows) {
      workspace.make(softmax, first, std::min(rows, end - first)).run();
    }
  };
  for_blocks<SoftmaxGroup<T>>(softmax.positions(), size, softmax.threads, run);
}
#endif

template <class Block, class T> void softmax_columns(const Softmax<T>& softmax, bool streams) {
  const int64_t size = Block::positions_of_block(softmax);
  // For 16-bit types, no block crosses the end of the contiguous positions, unless this leaves too
  // many blocks incomplete.
  const int64_t whole = (softmax.inner + size - 1) / size;
  const bool apart = sizeof(T) == 2 && whole * size * 3 <= softmax.inner * 4;
  const int64_t length = apart ? softmax.inner : softmax.positions();
  const int64_t blocks = (length + size - 1) / size;
  parallel_for<Block>(
      softmax.positions() / length * blocks, softmax.threads, [&](int64_t block, auto workspace) {
        const int64_t begin = block % blocks * size, first = block / blocks * length + begin;
        Block& columns = workspace.make(softmax, first, std::min(size, length - begin), streams);
        softmax.backward() ? columns.backward() : columns.forward();
      });
}

template <class T> void softmax(const Softmax<T>& softmax) {
  const FlushSubnormals flush;
  const size_t bytes = size_t(softmax.positions() * softmax.classes) * sizeof(T);
  const bool streams = bytes >= kStreamBytes && has_pages(softmax.output.data, bytes);
#ifdef PYFUSED_HAS_REGISTERS
  if constexpr (kTransposes<T>) {
    if (takes_groups(softmax, streams)) return softmax_groups(softmax);
    if (takes_strips(softmax, streams)) {
      return softmax.logarithm ? softmax_strips<true>(softmax) : softmax_strips<false>(softmax);
    }
  }
#endif
  if (softmax.classes_contiguous() && softmax.classes >= kRowClasses<T>) {
    softmax_rows(softmax, streams);
  } else if (softmax.classes <= kFewClasses || far_apart(softmax) || classes_of_line(softmax) > 1) {
    softmax_columns<SoftmaxColumns<T, kWide, kFewClasses>>(softmax, streams);
  } else {
    softmax_columns<SoftmaxColumns<T, kNarrow, 128>>(softmax, streams);
  }
}

template void softmax(const Softmax<float>&);
template void softmax(const Softmax<double>&);
template void softmax(const Softmax<bfloat16>&);
template void softmax(const Softmax<float16>&);

}  // namespace pyfused
