#include "row_state.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "memory.h"
#include "parallel.h"
#include "rows.h"

namespace pyfused {

// Normalizer's plain loops over memory of any alignment might add up in another order, so only
// registers read the logits in place.
#ifdef PYFUSED_HAS_REGISTERS
template <class T> constexpr bool kReadsInPlace = std::is_same_v<Accumulate<T>, float>;
#else
template <class T> constexpr bool kReadsInPlace = false;
#endif

template <class T, bool kInPlace> class LogitRow {
  using A = Accumulate<T>;
  static constexpr A kLowest = -std::numeric_limits<A>::infinity();

 public:
  LogitRow(const LogitRows<T>& rows, int64_t index)
      : rows(rows), index(index), classes(rows.classes), logits(rows.logits + index * rows.stride),
        label(rows.target ? rows.target[index] - rows.first_class : -1),
        ignored(rows.target && rows.target[index] == rows.ignore_index),
        row(logits, classes, rows.scale, rows.softcap) {}

  // A branch instead of two instantiations would make rows of few classes 1.1 times slower.
  template <bool kFindsMaximum> void forward(const RowFields<double>& fields, int64_t preceding) {
    const auto value = [&](RowField field) -> double& { return fields.at(field, index); };
    if (ignored) {
      for (int field = 0; field < fields.count; ++field) fields.at(field, index) = 0;
      return;
    }
    const bool smooths = kFindsMaximum && fields.count > kSmooth, continues = preceding > 0;
    Normalizer<T>& state = row.state;
    double target_logit = 0;
    if (continues) {
      state.pivot = A(value(kPivot));
      state.sum = value(kSum);
      state.weighted = value(kWeighted);
      target_logit = value(kTargetLogit);
      if (kFindsMaximum) maximum = A(value(kMaximum));
      if (smooths) smooth = value(kSmooth);
      smooth_pivot = finite_pivot();
    }
    row.template read<false, true>(nullptr, [&](const auto* x, int64_t first, int64_t n) {
      if (uint64_t(label - first) < uint64_t(n)) target_logit = double(widen(x[label - first]));
      if (kFindsMaximum) raise_maximum(first, n);
      if (smooths) add_smooth(x, first, n, preceding);
    });
    const double pivot = double(state.pivot);
    const RowResults results(pivot, state.sum, std::log(state.sum), state.weighted, target_logit);
    value(kLogP) = results.log_p;
    value(kEntropy) = results.entropy;
    value(kLse) = results.lse;
    value(kPivot) = pivot;
    value(kSum) = state.sum;
    value(kWeighted) = state.weighted;
    value(kTargetLogit) = target_logit;
    if (kFindsMaximum) store_maximum(fields, continues);
    if (smooths) value(kSmooth) = smooth;
  }

  void backward(const RowGradients<T>& gradients, bool streams) {
    T* const grad = gradients.grad + index * gradients.stride;
    if (ignored) return void(std::fill_n(grad, classes, T{}));
    const auto value = [&](RowField field) { return gradients.state.at(field, index); };
    const auto grad_of = [&](int field) { return gradients.grad_results.at(field, index); };
    const ResultGradients g{grad_of(0), grad_of(1), grad_of(2), grad_of(3)};
    // The slope of a softcap is multiplied by the scale after it.
    const RowTerms terms = row_terms(g, value(kSum), value(kWeighted), rows.scale);
    T at_target{};
    if (has_target()) {
      const double t = rows.softcap ? std::tanh(double(widen(logits[label])) / *rows.softcap) : 0;
      const double shifted = value(kTargetLogit) - value(kPivot);
      const double weight = rows.weight ? double(rows.weight[rows.first_class + label]) : 1;
      const double dx = terms.at_target(std::exp(shifted), shifted, weight);
      at_target = narrow<T>(A(dx * (1 - t) * (1 + t)));
    }
    row.state.pivot = A(value(kPivot));
    if (!rows.weight && terms.s != 0) std::fill_n(ones, std::min(kChunk, classes), A(1));
    row.write_gradient(terms, false, grad, streams, [&](int64_t first, int64_t) {
      return rows.weight ? rows.weight + rows.first_class + first : ones;
    });
    if (has_target()) grad[label] = at_target;
  }

 private:
  const LogitRows<T>& rows;
  const int64_t index, classes;
  const T* const logits;
  const int64_t label;  // the target among these classes
  const bool ignored;
  A maximum = kLowest;
  int64_t chunk_of_maximum = -1;
  double smooth = 0;  // relative to smooth_pivot
  A smooth_pivot = 0;
  double weight_sum = 0;  // of the first `summed` classes
  int64_t summed = 0;
  alignas(kVectorBytes) A ones[kChunk];
  Row<T, kInPlace> row;

  bool has_target() const { return uint64_t(label) < uint64_t(classes); }

  // Of the logits before the scale and the softcap, which may round several to one number. Not
  // inlined, because this would make the loop over few classes 1.5 times slower.
  PYFUSED_NOINLINE void raise_maximum(int64_t first, int64_t n) {
    const A high = largest(logits + first, n, maximum);
    if (!(high > maximum)) return;
    maximum = high;
    chunk_of_maximum = first;
  }

  PYFUSED_NOINLINE void store_maximum(const RowFields<double>& fields, bool continues) {
    double& highest = fields.at(kMaximum, index);
    double& of_class = fields.at(kIndex, index);
    if (!continues) {
      highest = double(kLowest);
      of_class = double(rows.first_class);
    }
    if (chunk_of_maximum >= 0) {
      highest = double(maximum);
      int64_t i = 0;
      while (widen(logits[chunk_of_maximum + i]) != maximum) ++i;
      of_class = double(rows.first_class + chunk_of_maximum + i);
    }
    if (!std::isnan(fields.at(kSum, index)) || std::isnan(highest)) return;
    const T* const end = logits + classes;
    const T* const nan = std::find_if(logits, end, [](T x) { return std::isnan(widen(x)); });
    if (nan == end) return;
    highest = std::numeric_limits<double>::quiet_NaN();
    of_class = double(rows.first_class + (nan - logits));
  }

  A finite_pivot() const { return std::isfinite(row.state.pivot) ? row.state.pivot : A(0); }

  // Adds w_c (x_c - pivot), and makes the sum of the classes before these relative to the pivot.
  template <class U>
  PYFUSED_NOINLINE void add_smooth(const U* x, int64_t first, int64_t n, int64_t preceding) {
    const A pivot = finite_pivot();
    const A* const weight = rows.weight ? rows.weight + rows.first_class : nullptr;
    if (pivot != smooth_pivot) {
      const int64_t before = preceding + first;
      const A* const added = weight ? weight - preceding + summed : nullptr;
      Sum sum;
      if (weight) add_terms<A>(sum, before - summed, [=](int64_t i) { return added[i]; });
      weight_sum += weight ? sum.value() : double(before - summed);
      summed = before;
      smooth += (double(smooth_pivot) - double(pivot)) * weight_sum;
      smooth_pivot = pivot;
    }
    Sum terms;
    if (weight) {
      add_terms<A>(terms, n, [=](int64_t i) { return weight[first + i] * (widen(x[i]) - pivot); });
    } else {  // in double, because the mean of the logits may be near 0
      const double from = double(pivot);
      add_terms<double>(terms, n, [=](int64_t i) { return double(widen(x[i])) - from; });
    }
    smooth += terms.value();
  }
};

// ---- the batch ----------------------------------------------------------------------------------

template <class T, class Body> void for_rows(const LogitRows<T>& rows, const Body& body) {
  const FlushSubnormals flush;
  const auto run = [&](int64_t first, int64_t end, auto workspace) {
    for (int64_t row = first; row < end; ++row) body(workspace.make(rows, row));
  };
  const auto run_blocks = [&](auto in_place) {
    using OneRow = LogitRow<T, decltype(in_place)::value>;
    for_blocks<OneRow>(rows.rows, rows_of_block(rows.classes), rows.threads, run);
  };
  const bool in_place = kReadsInPlace<T> && rows.scale == 1 && !rows.softcap;
  in_place ? run_blocks(std::bool_constant<kReadsInPlace<T>>()) : run_blocks(std::false_type());
}

template <class T>
void row_state(const LogitRows<T>& rows, const RowFields<double>& state,
               const RowFields<Accumulate<T>>& results, int64_t preceding) {
  if (state.count > kMaximum) {
    for_rows(rows, [&](auto& row) { row.template forward<true>(state, preceding); });
  } else {
    for_rows(rows, [&](auto& row) { row.template forward<false>(state, preceding); });
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
  for_rows(rows, [&](auto& row) { row.backward(gradients, streams); });
}

#define PYFUSED_ROW_STATE(T, A)                                                               \
  template void row_state(const LogitRows<T>&, const RowFields<double>&, const RowFields<A>&, \
                          int64_t);                                                           \
  template void row_gradients(const LogitRows<T>&, const RowGradients<T>&);
PYFUSED_ROW_STATE(float, float)
PYFUSED_ROW_STATE(double, double)
PYFUSED_ROW_STATE(bfloat16, float)
PYFUSED_ROW_STATE(float16, float)

}  // namespace pyfused
