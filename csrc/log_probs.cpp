#include "log_probs.h"

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
// at a time, as sums in few lanes would lose digits.
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

// out = e (a + b (x - pivot)). Not inlined for the reason of scaled_exponentials.
template <class U, class A, class T>
PYFUSED_NOINLINE void write_gradient(const U* x, A pivot, A a, A b, A* buffer, T* out, int64_t n,
                                     bool /* streams */) {
  A* const wide = staged(out, buffer);
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) {
    const A y = widen(x[i]) - pivot, e = exp_shifted(y);
    wide[i] = e == 0 ? A(0) : e * (b * y + a);
  }
  store(wide, out, n);
}

#ifdef PYFUSED_HAS_REGISTERS
// exp_floats is 0 at -104, so that an infinite x - pivot counts for nothing.
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
      x, pivot,
      [=](auto z) {
        const auto y = maximum(-104.0f, z - pivot);
        return exp_floats<T>(y) * (y * b + a);
      },
      out, n, streams);
}
template <class A> constexpr bool kInRegisters = std::is_same_v<A, float>;
#else
template <class A> constexpr bool kInRegisters = false;
#endif

// ---- a row --------------------------------------------------------------------------------------

template <class T> class LogProbsRow {
  using A = Accumulate<T>;

 public:
  LogProbsRow(const LogProbs<T>& given, int64_t row)
      : given(given), row(row), classes(given.classes), logits(given.logits + row * given.stride),
        label(given.target[row] - given.first_class),
        ignored(given.target[row] == given.ignore_index) {}

  // The pivot rises as Normalizer's does.
  void forward(const RowValues<double>& values, bool continues) {
    constexpr A lowest = -std::numeric_limits<A>::infinity();
    constexpr double kMaxTerms = 1024;
    const auto value = [&](RowValue name) -> double& { return values.at(name, row); };
    if (ignored) {
      for (int i = 0; i < kRowValues; ++i) value(RowValue(i)) = 0;
      return;
    }
    A pivot = continues ? A(value(kPivot)) : lowest;
    double sum = continues ? value(kSum) : 0, weighted = continues ? value(kWeighted) : 0;
    double target_logit = continues ? value(kTargetLogit) : 0;
    for_chunks(classes, [&](int64_t, int64_t first, int64_t n) {
      with_chunk(first, n, [&](const auto* x) {
        if (uint64_t(label - first) < uint64_t(n)) target_logit = double(widen(x[label - first]));
        const bool begun = continues || first > 0;
        Terms terms{};
        if (begun) terms = terms_of<true>(x, pivot, n);
        if (!begun || !(terms.sum <= std::min(8 * sum, kMaxTerms))) {
          const A high = largest(x, n, pivot), shift = high == lowest ? A(0) : high;
          const double by = double(pivot) - double(shift), factor = std::exp(by);
          weighted = sum > 0 ? factor * (weighted + by * sum) : 0;
          sum *= factor;
          pivot = high;
          terms = terms_of<false>(x, shift, n);
        }
        sum += terms.sum;
        weighted += terms.weighted;
      });
    });
    const double log_sum = std::log(sum), log_p = (target_logit - double(pivot)) - log_sum;
    const double entropy = log_sum - weighted / sum;
    // Rounding would take the logarithm of a probability above 0; a NaN stays.
    value(kLogP) = log_p > 0 ? 0 : log_p;
    value(kEntropy) = entropy < 0 ? 0 : entropy;
    value(kLse) = double(pivot) + log_sum;
    value(kPivot) = double(pivot);
    value(kSum) = sum;
    value(kWeighted) = weighted;
    value(kTargetLogit) = target_logit;
  }

  void backward(const LogProbsGradient<T>& gradient, bool streams) {
    T* const grad = gradient.grad + row * gradient.stride;
    if (ignored) return void(std::fill_n(grad, classes, T{}));
    const double g_log_p = gradient.grad_results.at(kLogP, row);
    const double g_entropy = gradient.grad_results.at(kEntropy, row);
    const double g_lse = gradient.grad_results.at(kLse, row);
    const double log_p = gradient.values.at(kLogP, row), sum = gradient.values.at(kSum, row);
    const double entropy = gradient.values.at(kEntropy, row);
    const A pivot = A(gradient.values.at(kPivot, row));
    const bool capped = given.softcap > 0, has_target = uint64_t(label) < uint64_t(classes);
    // p_c = exp(x_c - pivot) / sum, and log p_c = (x_c - pivot) - log(sum)
    const double factor = (capped ? 1 : given.scale) / sum;
    const A a = A((g_lse - g_log_p - g_entropy * (entropy - std::log(sum))) * factor);
    const A b = A(-g_entropy * factor);
    T at_target{};
    if (has_target) {
      const double t = capped ? std::tanh(double(widen(logits[label])) / given.softcap) : 0;
      const double slope = given.scale * (1 - t) * (1 + t);
      const double p = std::exp(log_p);
      const double others = p == 0 ? 0 : p * (g_lse - g_entropy * (log_p + entropy));
      at_target = narrow<T>(A((others - g_log_p * std::expm1(log_p)) * slope));  // 1 - p, exactly
    }
    for_chunks(classes, [&](int64_t, int64_t first, int64_t n) {
      with_chunk(first, n, [&](const auto* x) {
        const auto write = [&](auto* out, bool to_stream) {
          if (b == 0) return scaled_exponentials(x, pivot, a, buffer, out, n, to_stream);
          write_gradient(x, pivot, a, b, buffer, out, n, to_stream);
        };
        if (!capped) return write(grad + first, streams);
        write(buffer, false);
        for (int64_t i = 0; i < n; ++i) buffer[i] *= slopes[i];
        store(buffer, grad + first, n);
      });
    });
    if (has_target) grad[label] = at_target;
  }

 private:
  const LogProbs<T>& given;
  const int64_t row, classes;
  const T* const logits;
  const int64_t label;  // the target among these classes
  const bool ignored;
  alignas(kVectorBytes) A buffer[kChunk];
  alignas(kVectorBytes) A slopes[kChunk];  // dx/dz, with a softcap

  // Calls body(x) with n logits from a class on, as they are or from the buffer. A loop over memory
  // of any alignment may add up in another order, so that it is for registers alone.
  template <class Body> void with_chunk(int64_t first, int64_t n, const Body& body) {
    const T* const z = logits + first;
    const A scale = A(given.scale), cap = A(given.softcap);
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

template <class T, class Body> void for_rows(const LogProbs<T>& given, const Body& body) {
  const int64_t size = rows_of_block(given.classes);
  const int64_t blocks = (given.rows + size - 1) / size;
  parallel_for_with<LogProbsRow<T>>(blocks, given.threads, [&](int64_t block, auto workspace) {
    const int64_t end = std::min(given.rows, (block + 1) * size);
    for (int64_t row = block * size; row < end; ++row) body(workspace.make(given, row));
  });
}

template <class T>
void log_probs(const LogProbs<T>& given, const RowValues<double>& values, bool continues) {
  for_rows(given, [&](LogProbsRow<T>& row) { row.forward(values, continues); });
}

template <class T>
void log_probs_backward(const LogProbs<T>& given, const LogProbsGradient<T>& gradient) {
  const size_t bytes = size_t(given.rows * given.classes) * sizeof(T);
  const bool streams =
      bytes >= kStreamBytes && gradient.grad != given.logits && has_pages(gradient.grad, bytes);
  for_rows(given, [&](LogProbsRow<T>& row) { row.backward(gradient, streams); });
}

#define PYFUSED_LOG_PROBS(T)                                                   \
  template void log_probs(const LogProbs<T>&, const RowValues<double>&, bool); \
  template void log_probs_backward(const LogProbs<T>&, const LogProbsGradient<T>&);
PYFUSED_LOG_PROBS(float)
PYFUSED_LOG_PROBS(double)
PYFUSED_LOG_PROBS(bfloat16)
PYFUSED_LOG_PROBS(float16)

}  // namespace pyfused
