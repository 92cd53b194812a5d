#include "row_state.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "memory.h"
#include "parallel.h"
#include "rows.h"

namespace pyfused {

// ---- a chunk of a row ---------------------------------------------------------------------------

struct Terms {
  double sum, weighted;
};

// The sums of e = exp(x - pivot) and of e (x - pivot). Unbounded as in sum_exponentials. Few terms
// at a time, because sums in few lanes would lose digits.
template <bool Unbounded, class T, class A> Terms terms_of(const T* x, A pivot, int64_t n) {
  constexpr int64_t kTerms = 128;
  Terms total{};
  for (int64_t first = 0; first < n; first += kTerms) {
    const int64_t end = std::min(n, first + kTerms);
    A sum = 0, weighted = 0;
    PYFUSED_SIMD(reduction(+ : sum, weighted))
    for (int64_t i = first; i < end; ++i) {
      const A shifted = widen(x[i]) - pivot;
      const A y = Unbounded && shifted > kTop ? A(kTop) : shifted;
      const A e = exp_shifted(y);
      sum += e;
      weighted += e == 0 ? A(0) : e * y;  // 0 * inf is NaN
    }
    total.sum += double(sum);
    total.weighted += double(weighted);
  }
  return total;
}

// out = e (a + b (x - pivot)), where e is 0 below kLeast. Not inlined for the reason of
// scaled_exponentials.
template <class U, class A, class T>
PYFUSED_NOINLINE void write_gradient(const U* x, A pivot, A a, A b, A* buffer, T* out, int64_t n,
                                     bool /* streams */) {
  constexpr A kLeast = -1000;  // finite, as 0 * inf is NaN; but a NaN among a and b stays
  A* const wide = staged(out, buffer);
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) {
    const A shifted = widen(x[i]) - pivot, y = shifted < kLeast ? kLeast : shifted;
    wide[i] = exp_shifted(y) * (b * y + a);
  }
  store(wide, out, n);
}

#ifdef PYFUSED_HAS_REGISTERS
// exp_floats is 0 at -104, so an infinite x - pivot adds 0.
template <bool Unbounded, class T> Terms terms_of(const T* x, float pivot, int64_t n) {
  const auto shifted = [&](auto z) {
    return maximum(-104.0f, Unbounded ? minimum(kTop, z - pivot) : z - pivot);
  };
  Pair sum = broadcast(0), weighted = broadcast(0);
  int64_t i = 0;
  for (; i + kQuad <= n; i += kQuad) {
    prefetch_quad(x + i + kPrefetchDistance<T>);
    const Quad y = shifted(load_quad(x + i)), e = exp_floats<float>(y), term = e * y;
    sum = sum + (e.low + e.high);
    weighted = weighted + (term.low + term.high);
  }
  for (; i < n; i += kPair) {
    const Pair y = shifted(load_pair(x + i, n - i, pivot));
    const Pair e = zero_after(exp_floats<float>(y), n - i);
    sum = sum + e;
    weighted = weighted + e * y;
  }
  return {sum_of_lanes(sum), sum_of_lanes(weighted)};
}

template <class U, class T>
void write_gradient(const U* x, float pivot, float a, float b, float*, T* out, int64_t n,
                    bool streams) {
  a = roundable(a);
  b = roundable(b);
  write_each(
      [=](auto z) {
        const auto y = maximum(-104.0f, z - pivot);
        return exp_floats<T>(y) * (y * b + a);
      },
      out, n, streams, x);
}
template <class A> constexpr bool kInRegisters = std::is_same_v<A, float>;
#else
template <class A> constexpr bool kInRegisters = false;
#endif

// ---- a row --------------------------------------------------------------------------------------

template <class T> class LogitRow {
  using A = Accumulate<T>;
  static constexpr A kLowest = -std::numeric_limits<A>::infinity();

 public:
  LogitRow(const LogitRows<T>& rows, int64_t row)
      : rows(rows), row(row), classes(rows.classes), logits(rows.logits + row * rows.stride),
        label(rows.target ? rows.target[row] - rows.first_class : -1),
        ignored(rows.target && rows.target[row] == rows.ignore_index) {}

  // The pivot rises as Normalizer's does. A branch instead of two instantiations would make rows of
  // few classes 1.1 times slower.
  template <bool kFindsMaximum> void forward(const RowFields<double>& state, bool continues) {
    constexpr double kMaxTerms = 1024;
    const auto value = [&](RowField field) -> double& { return state.at(field, row); };
    if (ignored) {
      for (int field = 0; field < state.count; ++field) state.at(field, row) = 0;
      return;
    }
    A pivot = continues ? A(value(kPivot)) : kLowest;
    double sum = continues ? value(kSum) : 0, weighted = continues ? value(kWeighted) : 0;
    double target_logit = continues ? value(kTargetLogit) : 0;
    if (kFindsMaximum && continues) maximum = A(value(kMaximum));
    for_chunks(classes, [&](int64_t, int64_t first, int64_t n) {
      with_chunk(first, n, [&](const auto* x) {
        if (uint64_t(label - first) < uint64_t(n)) target_logit = double(widen(x[label - first]));
        const bool begun = continues || first > 0;
        Terms terms{};
        if (begun) terms = terms_of<true>(x, pivot, n);
        if (!begun || !(terms.sum <= std::min(8 * sum, kMaxTerms))) {
          const A high = largest(x, n, pivot), shift = high == kLowest ? A(0) : high;
          const double by = double(pivot) - double(shift), factor = std::exp(by);
          weighted = sum > 0 ? factor * (weighted + by * sum) : 0;
          sum *= factor;
          pivot = high;
          terms = terms_of<false>(x, shift, n);
        }
        sum += terms.sum;
        weighted += terms.weighted;
        if (kFindsMaximum) raise_maximum(x, first, n);
      });
    });
    const double log_sum = std::log(sum), log_p = (target_logit - double(pivot)) - log_sum;
    const double entropy = log_sum - weighted / sum;
    // Rounding could make the log-probability positive; NaN is kept.
    value(kLogP) = log_p > 0 ? 0 : log_p;
    value(kEntropy) = entropy < 0 ? 0 : entropy;
    value(kLse) = double(pivot) + log_sum;
    value(kPivot) = double(pivot);
    value(kSum) = sum;
    value(kWeighted) = weighted;
    value(kTargetLogit) = target_logit;
    if (kFindsMaximum) store_maximum(state, continues);
    if (kFindsMaximum && state.count > kSmooth) {
      value(kSmooth) = (continues ? value(kSmooth) : 0) + weighted_sum();
    }
  }

  void backward(const RowGradients<T>& gradients, bool streams) {
    T* const grad = gradients.grad + row * gradients.stride;
    if (ignored) return void(std::fill_n(grad, classes, T{}));
    const auto value = [&](RowField field) { return gradients.state.at(field, row); };
    const auto grad_of = [&](int field) { return gradients.grad_results.at(field, row); };
    const double g_log_p = grad_of(0), g_entropy = grad_of(1), g_lse = grad_of(2);
    const double g_smooth = grad_of(3);
    const double log_p = value(kLogP), entropy = value(kEntropy), sum = value(kSum);
    const A pivot = A(value(kPivot));
    const bool capped = rows.softcap > 0, has_target = uint64_t(label) < uint64_t(classes);
    // p_c = exp(x_c - pivot) / sum, and log p_c = (x_c - pivot) - log(sum)
    const double slope = capped ? 1 : rows.scale, factor = slope / sum;
    const A a = A((g_lse - g_log_p - g_entropy * (entropy - std::log(sum))) * factor);
    const A b = A(-g_entropy * factor), smooth = A(g_smooth * slope);
    T at_target{};
    if (has_target) {
      const double t = capped ? std::tanh(double(widen(logits[label])) / rows.softcap) : 0;
      const double p = std::exp(log_p);
      const double others = p == 0 ? 0 : p * (g_lse - g_entropy * (log_p + entropy));
      const A* const weight = class_weight(label);
      const double smoothed = weight ? g_smooth * double(*weight) : g_smooth;
      // 1 - p without cancellation
      const double of_target = others - g_log_p * std::expm1(log_p) + smoothed;
      at_target = narrow<T>(A(of_target * rows.scale * (1 - t) * (1 + t)));
    }
    for_chunks(classes, [&](int64_t, int64_t first, int64_t n) {
      with_chunk(first, n, [&](const auto* x) {
        const auto write = [&](auto* out, bool to_stream) {
          if (b == 0) return scaled_exponentials(x, pivot, a, buffer, out, n, to_stream);
          write_gradient(x, pivot, a, b, buffer, out, n, to_stream);
        };
        if (!capped && smooth == 0) return write(grad + first, streams);
        write(buffer, false);
        const A* const weight = class_weight(first);
        for (int64_t i = 0; smooth != 0 && i < n; ++i) {
          buffer[i] += weight ? smooth * weight[i] : smooth;
        }
        for (int64_t i = 0; capped && i < n; ++i) buffer[i] *= slopes[i];
        store(buffer, grad + first, n);
      });
    });
    if (has_target) grad[label] = at_target;
  }

 private:
  const LogitRows<T>& rows;
  const int64_t row, classes;
  const T* const logits;
  const int64_t label;  // the target among these classes
  const bool ignored;
  A maximum = kLowest;
  int64_t chunk_of_maximum = -1;
  alignas(kVectorBytes) A buffer[kChunk];
  alignas(kVectorBytes) A slopes[kChunk];  // dx/dz, with a softcap

  // The weights from a class on; null if all are 1.
  const A* class_weight(int64_t first) const {
    return rows.weight ? rows.weight + rows.first_class + first : nullptr;
  }

  // Not inlined, because this would make the loop over few classes 1.5 times slower.
  template <class U> PYFUSED_NOINLINE void raise_maximum(const U* x, int64_t first, int64_t n) {
    const A high = largest(x, n, maximum);
    if (!(high > maximum)) return;
    maximum = high;
    chunk_of_maximum = first;
  }

  PYFUSED_NOINLINE void store_maximum(const RowFields<double>& state, bool continues) {
    double& highest = state.at(kMaximum, row);
    double& index = state.at(kIndex, row);
    if (!continues) {
      highest = double(kLowest);
      index = double(rows.first_class);
    }
    if (chunk_of_maximum >= 0) {
      highest = double(maximum);
      int64_t found = chunk_of_maximum;
      with_chunk(found, std::min(kChunk, classes - found), [&](const auto* x) {
        while (widen(x[found - chunk_of_maximum]) != maximum) ++found;
      });
      index = double(rows.first_class + found);
    }
    if (!std::isnan(state.at(kSum, row)) || std::isnan(highest)) return;
    const T* const end = logits + classes;
    const T* const nan = std::find_if(logits, end, [](T x) { return std::isnan(widen(x)); });
    if (nan == end) return;
    highest = std::numeric_limits<double>::quiet_NaN();
    index = double(rows.first_class + (nan - logits));
  }

  // sum_c w_c x_c
  PYFUSED_NOINLINE double weighted_sum() {
    Sum sum;
    for_chunks(classes, [&](int64_t, int64_t first, int64_t n) {
      with_chunk(first, n, [&](const auto* x) {
        const A* const weight = class_weight(first);
        add_terms<A>(sum, n,
                     [=](int64_t i) { return weight ? weight[i] * widen(x[i]) : A(widen(x[i])); });
      });
    });
    return sum.value();
  }

  // Calls body(x) with n logits from a class on, in place or from the buffer. A loop over memory of
  // any alignment might add up in another order, so only registers read the logits in place.
  template <class Body> void with_chunk(int64_t first, int64_t n, const Body& body) {
    const T* const z = logits + first;
    const A scale = A(rows.scale), cap = A(rows.softcap);
    if constexpr (kInRegisters<A>) {
      if (cap == 0 && scale == 1) return body(z);
    }
    load(z, buffer, n);
    if (cap > 0) {
      PYFUSED_SIMD()
      for (int64_t i = 0; i < n; ++i) {
        const A t = tanh_of(buffer[i] / cap);
        buffer[i] = cap * t;
        slopes[i] = (1 - t) * (1 + t) * scale;
      }
    }
    for (int64_t i = 0; i < n; ++i) buffer[i] *= scale;
    body(static_cast<const A*>(buffer));
  }
};

// ---- the batch ----------------------------------------------------------------------------------

template <class T, class Body> void for_rows(const LogitRows<T>& rows, const Body& body) {
  const FlushSubnormals flush;
  const auto run = [&](int64_t first, int64_t end, auto workspace) {
    for (int64_t row = first; row < end; ++row) body(workspace.make(rows, row));
  };
  for_blocks<LogitRow<T>>(rows.rows, rows_of_block(rows.classes), rows.threads, run);
}

template <class T>
void row_state(const LogitRows<T>& rows, const RowFields<double>& state,
               const RowFields<Accumulate<T>>& results, bool continues) {
  if (state.count > kMaximum) {
    for_rows(rows, [&](LogitRow<T>& row) { row.template forward<true>(state, continues); });
  } else {
    for_rows(rows, [&](LogitRow<T>& row) { row.template forward<false>(state, continues); });
  }
  for (int field = 0; field < results.count; ++field) {
    const double* const from = &state.at(field, 0);
    std::copy(from, from + rows.rows, &results.at(field, 0));
  }
}

template <class T>
void row_gradients(const LogitRows<T>& rows, const RowGradients<T>& gradients) {
  const size_t bytes = size_t(rows.rows * rows.classes) * sizeof(T);
  const bool streams =
      bytes >= kStreamBytes && gradients.grad != rows.logits && has_pages(gradients.grad, bytes);
  for_rows(rows, [&](LogitRow<T>& row) { row.backward(gradients, streams); });
}

#define PYFUSED_ROW_STATE(T, A)                                                               \
  template void row_state(const LogitRows<T>&, const RowFields<double>&, const RowFields<A>&, \
                          bool);                                                              \
  template void row_gradients(const LogitRows<T>&, const RowGradients<T>&);
PYFUSED_ROW_STATE(float, float)
PYFUSED_ROW_STATE(double, double)
PYFUSED_ROW_STATE(bfloat16, float)
PYFUSED_ROW_STATE(float16, float)

}  // namespace pyfused
