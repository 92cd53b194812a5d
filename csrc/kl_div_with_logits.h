// The divergence of a student's predictions from a teacher's, from the logits of both.
//
//   p = softmax(scale x), q = softmax(scale y), m = beta q + (1 - beta) p
//   beta 0     loss = sum_c q_c (log q_c - log p_c)
//              dloss/dx_c = scale (p_c - q_c)
//   beta 1     loss = sum_c p_c r_c,                                  r_c = log p_c - log q_c
//              dloss/dx_c = scale p_c (r_c - loss)
//   otherwise  loss = sum_c beta q_c s_c + (1 - beta) p_c r_c,        r_c = log p_c - log m_c
//              dloss/dx_c = (1 - beta) scale p_c (r_c - sum_k p_k r_k),   s_c = log q_c - log m_c
//
// 0 log 0 is 0, and scale is 1 / temperature. The last line is the generalised Jensen-Shannon
// divergence of Agarwal et al. 2024 (arXiv 2306.13649).
//
// torch: F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1) for beta 0, with the two
// exchanged for beta 1
//
// Shapes: x and y are (N, C), with classes contiguous. Memory traffic: x and y are read once from
// memory and the gradient is written once; later reads hit the cache.
#pragma once

#include <optional>

#include "cross_entropy.h"

namespace pyfused {

template <class T> struct KlDiv {
  using A = Accumulate<T>;
  int64_t rows, classes;
  const T* student;
  int64_t student_stride;  // between rows
  const T* teacher;
  int64_t teacher_stride;
  double beta, scale;
  const A* token_weight;  // factors of the losses; null for ones
  Reduction reduction;
  std::optional<double> denominator;  // of the mean; the sum of the token weights if absent
  const A* grad_output;  // for each row with Reduction::none, else one; null for ones
  A* loss;  // for each row with Reduction::none, else one; null if not computed
  T* grad;  // the student's; may be its logits; null if not computed
  int64_t grad_stride;
  int threads;
};

// Rows whose token weight is 0 are not read.
template <class T> void kl_div_with_logits(const KlDiv<T>& kl);

}  // namespace pyfused
