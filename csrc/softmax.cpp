#include "softmax.h"

#include <algorithm>
#include <cmath>

#include "columns.h"
#include "memory.h"
#include "parallel.h"
#include "row_groups.h"
#include "rows.h"

namespace pyfused {

// ---- row layout: classes contiguous -------------------------------------------------------------

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
        for (int64_t i = 0; i < n; ++i) buffer[i] = (x[i] - high) - low;
        write(buffer, y, n, streams);
      } else if (keeps) {
        scaled(row.kept + first, A(factor * row.rescale(chunk)), buffer, y, n);
      } else {
        scaled_exponentials(input + first, high, A(factor), buffer, y, n, streams);
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
      if (softmax.logarithm) {
        scaled_exponentials(input + first, A(0), total, buffer, buffer, n, false);
        for (int64_t i = 0; i < n; ++i) buffer[i] = dy[i] - buffer[i];
      } else {
        const A* const y = widened(input + first, buffer, n);
        for (int64_t i = 0; i < n; ++i) buffer[i] = y[i] * (dy[i] - total);
      }
      write(buffer, output + first, n, streams);
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
    const A first_max = Normalizer<T>::first_max(input, classes);
    row.template read<Keeps>([this](int64_t first, int64_t) { return input + first; }, output,
                             classes, first_max, [](int64_t, double) {}, [](int64_t, int64_t) {});
  }
};

// ---- column layout: positions contiguous --------------------------------------------------------

template <class T, int64_t kColumns, int64_t kTileClasses>
class SoftmaxColumns : Columns<T, kColumns, kTileClasses> {
  using Base = Columns<T, kColumns, kTileClasses>;
  using A = Accumulate<T>;
  using Base::for_tiles, Base::for_groups, Base::load_tile, Base::store_tile;
  using Base::sum, Base::log_sum, Base::max, Base::x, Base::e;

 public:
  using Base::kPositions;

  SoftmaxColumns(const Softmax<T>& softmax, int64_t first, bool streams)
      : Base(softmax, first, streams), softmax(softmax) {}

  void forward() {
    Base::find_normalizer(softmax.input);
    alignas(kVectorBytes) A last[kColumns];  // what is subtracted, or multiplied by
    if (softmax.logarithm) {
      Base::find_log_sum();
      std::copy_n(log_sum, kColumns, last);
    } else {
      PYFUSED_SIMD()
      for (int64_t b = 0; b < kColumns; ++b) last[b] = A(1 / sum[b]);
    }
    for_tiles(softmax.input, [&](int64_t c, int64_t k) {
      for (int64_t i = 0; i < k; ++i) {
        if (softmax.logarithm) {
          for (int64_t b = 0; b < kColumns; ++b) e[i][b] = (x[i][b] - max[b]) - last[b];
        } else {
          if (softmax.classes > kTileClasses) exponentials(x[i], max, e[i], kColumns);
          for (int64_t b = 0; b < kColumns; ++b) e[i][b] *= last[b];
        }
      }
      store_tile(e, softmax.output, c, k);
    });
  }

  void backward() {
    std::fill_n(sum, kColumns, 0.0);
    for_pairs([&](int64_t, int64_t k) {
      for_groups(k, [&](int64_t begin, int64_t end) {
        alignas(kVectorBytes) A part[kColumns] = {};
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t b = 0; b < kColumns; ++b) {
            part[b] += softmax.logarithm ? e[i][b] : e[i][b] * x[i][b];
          }
        }
        for (int64_t b = 0; b < kColumns; ++b) sum[b] += double(part[b]);
      });
    });
    alignas(kVectorBytes) A total[kColumns];
    std::copy_n(sum, kColumns, total);
    std::fill_n(max, kColumns, A(0));
    for_pairs([&](int64_t c, int64_t k) {
      for (int64_t i = 0; i < k; ++i) {
        if (softmax.logarithm) {
          exponentials(x[i], max, x[i], kColumns);
          for (int64_t b = 0; b < kColumns; ++b) e[i][b] -= x[i][b] * total[b];
        } else {
          for (int64_t b = 0; b < kColumns; ++b) e[i][b] = x[i][b] * (e[i][b] - total[b]);
        }
      }
      store_tile(e, softmax.output, c, k);
    });
  }

 private:
  const Softmax<T>& softmax;
  bool paired = false;

  // Calls body(first class, classes) with y in x and dy in e.
  template <class Body> void for_pairs(const Body& body) {
    for_tiles(softmax.input, [&](int64_t c, int64_t k) {
      if (softmax.classes > kTileClasses || !paired) load_tile(softmax.grad_output, c, k, e);
      paired = true;
      body(c, k);
    });
  }
};

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
        [&](int64_t r, T* y) {
          const float factor = sum[r];
          const float* const kept = e + r * width;
          Base::for_registers([&](int64_t c, auto mask) {
            PYFUSED_PREFETCH(y + c + kPrefetchDistance<T>);
            store_row(row_of_tile(kept + c) * factor, y + c, mask);
          });
        },
        output);
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
  const int64_t size = rows_of_block(softmax.classes);
  const int64_t blocks = (softmax.positions() + size - 1) / size;
  parallel_for_with<SoftmaxRow<T>>(blocks, softmax.threads, [&](int64_t block, auto workspace) {
    const int64_t end = std::min(softmax.positions(), (block + 1) * size);
    for (int64_t position = block * size; position < end; ++position) {
      SoftmaxRow<T>& row = workspace.make(softmax, position, streams);
      softmax.backward() ? row.backward() : row.forward();
    }
  });
}

#ifdef PYFUSED_HAS_REGISTERS
// Few classes leave lanes without work, which costs more than to transpose the rows. Large outputs
// of floats are limited by memory, and groups have no non-temporal stores.
template <class T> bool takes_groups(const Softmax<T>& softmax, bool streams) {
  const int64_t classes = softmax.classes, few = softmax.backward() ? 15 : kFewClasses;
  const bool limited_by_memory = streams && std::is_same_v<T, float> && classes >= kRowClasses<T>;
  return softmax.outer == 1 && softmax.classes_contiguous() && classes > few &&
         classes <= kGroupClasses && !limited_by_memory;
}

template <class T> void softmax_groups(const Softmax<T>& softmax) {
  const int64_t rows = SoftmaxGroup<T>::rows(softmax.classes);
  const int64_t size = (rows_of_block(softmax.classes) + rows - 1) / rows * rows;
  const int64_t blocks = (softmax.positions() + size - 1) / size;
  parallel_for_with<SoftmaxGroup<T>>(blocks, softmax.threads, [&](int64_t block, auto workspace) {
    const int64_t end = std::min(softmax.positions(), (block + 1) * size);
    for (int64_t first = block * size; first < end; first += rows) {
      workspace.make(softmax, first, std::min(rows, end - first)).run();
    }
  });
}
#endif

template <class Block, class T> void softmax_columns(const Softmax<T>& softmax, bool streams) {
  constexpr int64_t size = Block::kPositions;
  const int64_t blocks = (softmax.positions() + size - 1) / size;
  parallel_for_with<Block>(blocks, softmax.threads, [&](int64_t block, auto workspace) {
    Block& columns = workspace.make(softmax, block * size, streams);
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
  }
#endif
  if (softmax.classes_contiguous() && softmax.classes >= kRowClasses<T>) {
    softmax_rows(softmax, streams);
  } else if (softmax.classes <= kFewClasses) {
    softmax_columns<SoftmaxColumns<T, 128, kFewClasses>>(softmax, streams);
  } else {
    softmax_columns<SoftmaxColumns<T, 32, 128>>(softmax, streams);
  }
}

template void softmax(const Softmax<float>&);
template void softmax(const Softmax<double>&);
template void softmax(const Softmax<bfloat16>&);
template void softmax(const Softmax<float16>&);

}  // namespace pyfused
