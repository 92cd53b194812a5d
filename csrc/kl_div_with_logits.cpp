#include "kl_div_with_logits.h"

#include <algorithm>

#include "memory.h"
#include "parallel.h"
#include "rows.h"

namespace pyfused {

// log p - log m and log q - log m from log p and log q. exp(-|log p - log q|) does not overflow.
template <class A> PYFUSED_NOINLINE void divide_by_mixture(A beta, A* log_p, A* log_q, int64_t n) {
  constexpr A kLow = A(-1e30);  // -inf - -inf would be NaN
  const A rest = 1 - beta;
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) {
    const A a = kLow > log_p[i] ? kLow : log_p[i], b = kLow > log_q[i] ? kLow : log_q[i];
    const A difference = a - b, ratio = exp_shifted(-std::abs(difference));
    const bool more = difference >= 0;
    const A log_m = log_of(more ? rest + beta * ratio : beta + rest * ratio);
    log_p[i] = (more ? A(0) : difference) - log_m;
    log_q[i] = (more ? -difference : A(0)) - log_m;
  }
}

template <class T, bool kInPlace> class KlDivRow {
  using A = Accumulate<T>;
  using OneRow = Row<T, kInPlace>;

 public:
  KlDivRow(const KlDiv<T>& kl, int64_t row)
      : kl(kl), student(kl.student + row * kl.student_stride, kl.classes, kl.scale),
        teacher(kl.teacher + row * kl.teacher_stride, kl.classes, kl.scale) {
    find_normalizer(student);
    find_normalizer(teacher);
  }

  // Returns the loss, and writes the gradient times `scale` where there is one.
  double run(T* grad, double scale, bool streams) {
    Sum of_teacher, of_student, total;  // the total of p differs from 1 by rounding errors
    for_chunks(kl.classes, [&](int64_t, int64_t first, int64_t n) {
      read(first, n);
      if (kl.beta < 1) {
        add_terms<A>(of_teacher, n, [&](int64_t i) { return product(q[i], log_q[i]); });
      }
      if (kl.beta > 0) {
        add_terms<A>(of_student, n, [&](int64_t i) { return product(p[i], log_p[i]); });
        add_terms<A>(total, n, [&](int64_t i) { return p[i]; });
      } else if (grad) {
        for (int64_t i = 0; i < n; ++i) p[i] = (p[i] - q[i]) * A(scale);
        write(p, grad + first, n, streams);
      }
    });
    if (kl.beta == 0) return of_teacher.value();
    const double share = kl.beta < 1 ? 1 - kl.beta : 1;
    const double of_p = of_student.value() / total.value();
    const A mean = A(of_p), factor = A(share * scale);
    for_chunks(grad ? kl.classes : 0, [&](int64_t, int64_t first, int64_t n) {
      read(first, n);
      for (int64_t i = 0; i < n; ++i) p[i] = product(p[i], log_p[i] - mean) * factor;
      write(p, grad + first, n, streams);
    });
    return share * of_p + (kl.beta < 1 ? kl.beta * of_teacher.value() : 0);
  }

 private:
  const KlDiv<T>& kl;
  OneRow student, teacher;
  alignas(kVectorBytes) A p[kChunk];
  alignas(kVectorBytes) A q[kChunk];
  alignas(kVectorBytes) A log_p[kChunk];  // less log q, or log m
  alignas(kVectorBytes) A log_q[kChunk];

  static A product(A probability, A logarithm) {
    const A term = probability * logarithm;
    return probability == 0 ? A(0) : term;
  }

  static void find_normalizer(OneRow& row) {
    row.template read<false, false>(nullptr, [](const auto*, int64_t, int64_t) {});
  }

  static void log_softmax(OneRow& row, int64_t first, int64_t n, A* probability, A* logarithm) {
    const auto* const x = row.chunk(first, n);
    const A high = row.state.pivot, low = A(std::log(row.state.sum));
    scaled_exponentials(x, high, A(1 / row.state.sum), probability, probability, n, false);
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) logarithm[i] = (widen(x[i]) - high) - low;
  }

  void read(int64_t first, int64_t n) {
    log_softmax(student, first, n, p, log_p);
    log_softmax(teacher, first, n, q, log_q);
    if (kl.beta == 0) {
      for (int64_t i = 0; i < n; ++i) log_q[i] -= log_p[i];
    } else if (kl.beta == 1) {
      for (int64_t i = 0; i < n; ++i) log_p[i] -= log_q[i];
    } else {
      divide_by_mixture(A(kl.beta), log_p, log_q, n);
    }
  }
};

template <class T> double mean_denominator(const KlDiv<T>& kl) {
  if (kl.denominator) return *kl.denominator;
  if (!kl.token_weight) return double(kl.rows);
  Sum weights;
  for (int64_t row = 0; row < kl.rows; ++row) weights.add(kl.token_weight[row]);
  return weights.value();
}

template <class T> void kl_div_with_logits(const KlDiv<T>& kl) {
  const FlushSubnormals flush;
  using A = Accumulate<T>;
  const size_t bytes = size_t(kl.rows * kl.classes) * sizeof(T);
  const bool streams =
      kl.grad && bytes >= kStreamBytes && kl.grad != kl.student && has_pages(kl.grad, bytes);
  const bool each = kl.reduction == Reduction::none;
  const double denominator = kl.reduction == Reduction::mean ? mean_denominator(kl) : 1;
  const auto run = [&](int64_t first, int64_t end, auto workspace) {
    Sum sum;
    for (int64_t row = first; row < end; ++row) {
      T* const grad = kl.grad ? kl.grad + row * kl.grad_stride : nullptr;
      const double weight = kl.token_weight ? double(kl.token_weight[row]) : 1;
      const double grad_output = kl.grad_output ? double(kl.grad_output[each ? row : 0]) : 1;
      double loss = 0;
      if (weight == 0) {
        if (grad) std::fill_n(grad, kl.classes, T{});
      } else {
        const double scale = weight * grad_output / denominator * kl.scale;
        loss = weight * workspace.make(kl, row).run(grad, scale, streams);
      }
      if (kl.loss && each) kl.loss[row] = A(loss);
      sum.add(loss);
    }
    return sum.value();
  };
  const int64_t size = rows_of_block(kl.classes);
  const auto sum_of = [&](auto in_place) {
    return sum_of_blocks<T, KlDivRow<T, in_place>>(kl.rows, size, kl.threads, run);
  };
  const double loss = kl.scale == 1 ? sum_of(std::true_type()) : sum_of(std::false_type());
  if (kl.loss && !each) *kl.loss = A(loss / denominator);
}

template void kl_div_with_logits(const KlDiv<float>&);
template void kl_div_with_logits(const KlDiv<double>&);
template void kl_div_with_logits(const KlDiv<bfloat16>&);
template void kl_div_with_logits(const KlDiv<float16>&);

}  // namespace pyfused
