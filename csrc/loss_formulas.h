// The formulas of the pointwise losses: the loss of one element and its gradients.
//
// A formula is compiled for float and double only, as loops over a chunk in L1. pointwise_loss.cpp
// reads, rounds, and applies weights, grad_output and sums, once for all formulas.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>

#include "parallel.h"
#include "pointwise_loss.h"
#include "vec.h"

namespace pyfused {
PYFUSED_INLINE_ALL

// The third operand is meaningful only in formulas of three operands. The gradient of an operand
// that a formula does not differentiate is never requested.
template <class A> struct Formula {
  explicit Formula(const Parameters&) {}
  A grad_other(A, A, A, A) const { return 0; }
};

// torch: F.mse_loss(x, t). The gradients are scaled before they can overflow.
template <class A> struct MseLoss : Formula<A> {
  using Formula<A>::Formula;
  A value(A x, A t, A) const { return (x - t) * (x - t); }
  A grad_input(A x, A t, A, A scale) const { return 2 * scale * (x - t); }
  A grad_target(A x, A t, A, A scale) const { return 2 * scale * (t - x); }
};

// torch: F.smooth_l1_loss(x, t, beta=beta); with a beta of 0, F.l1_loss(x, t).
template <class A> struct SmoothL1Loss : Formula<A> {
  A beta;
  explicit SmoothL1Loss(const Parameters& p) : Formula<A>(p), beta(A(p[0])) {}
  A value(A x, A t, A) const {
    const A size = std::abs(x - t);
    return size >= beta ? size - beta / 2 : size * (size / beta) / 2;
  }
  A grad_input(A x, A t, A, A scale) const {
    const A d = x - t, size = std::abs(d), part = d < 0 ? -(size / beta) : size / beta;
    const A sign = d > 0 ? A(1) : d < 0 ? A(-1) : A(0);
    return scale * (size >= beta || beta == 0 ? sign : part);
  }
  A grad_target(A x, A t, A, A scale) const { return grad_input(t, x, 0, scale); }
};

// torch: F.l1_loss(x, t).
template <class A> struct L1Loss : Formula<A> {
  using Formula<A>::Formula;
  A value(A x, A t, A) const { return std::abs(x - t); }
  A grad_input(A x, A t, A, A scale) const { return x > t ? scale : x < t ? -scale : A(0); }
  A grad_target(A x, A t, A, A scale) const { return grad_input(t, x, 0, scale); }
};

// torch: F.huber_loss(x, t, delta=delta).
template <class A> struct HuberLoss : Formula<A> {
  A delta;
  explicit HuberLoss(const Parameters& p) : Formula<A>(p), delta(A(p[0])) {}
  A value(A x, A t, A) const {
    const A size = std::abs(x - t);
    return size < delta ? size * size / 2 : delta * (size - delta / 2);
  }
  A grad_input(A x, A t, A, A scale) const {
    const A d = x - t, most = scale * delta;
    return d <= -delta ? -most : d >= delta ? most : scale * d;
  }
  A grad_target(A x, A t, A, A scale) const { return grad_input(t, x, 0, scale); }
};

// torch: F.soft_margin_loss(x, t). Where torch's exp(-t x) overflows, this does not.
template <class A> struct SoftMarginLoss : Formula<A> {
  using Formula<A>::Formula;
  A value(A x, A t, A) const { return softplus(-t * x); }
  A grad_input(A x, A t, A, A scale) const { return -t * sigmoid(-t * x) * scale; }
  A grad_target(A, A, A, A) const { return 0; }
};

// torch: F.hinge_embedding_loss(x, t, margin). A target that is neither 1 nor -1 counts as both.
template <class A> struct HingeEmbeddingLoss : Formula<A> {
  A margin;
  explicit HingeEmbeddingLoss(const Parameters& p) : Formula<A>(p), margin(A(p[0])) {}
  A value(A x, A t, A) const {
    const A far = margin - x;
    return (t != 1 ? (far < 0 ? A(0) : far) : A(0)) + (t != -1 ? x : A(0));
  }
  A grad_input(A x, A t, A, A scale) const {
    const A unlike = t != 1 && margin - x >= 0 ? -scale : A(0);
    return unlike + (t != -1 ? scale : A(0));
  }
  A grad_target(A, A, A, A) const { return 0; }
};

// torch: F.margin_ranking_loss(x, other, y, margin).
template <class A> struct MarginRankingLoss {
  A margin;
  explicit MarginRankingLoss(const Parameters& p) : margin(A(p[0])) {}
  A slack(A x, A other, A y) const { return -y * (x - other) + margin; }
  A value(A x, A other, A y) const {
    const A s = slack(x, other, y);
    return s < 0 ? A(0) : s;
  }
  A grad_input(A x, A other, A y, A scale) const {
    return -y * (slack(x, other, y) >= 0 ? scale : A(0));
  }
  A grad_target(A x, A other, A y, A scale) const { return -grad_input(x, other, y, scale); }
  A grad_other(A x, A other, A y, A scale) const {
    return (other - x) * (slack(x, other, y) >= 0 ? scale : A(0));
  }
};

// torch: F.poisson_nll_loss(x, t, log_input, full, eps).
template <class A, bool log_input, bool full> struct PoissonNll : Formula<A> {
  A eps;
  explicit PoissonNll(const Parameters& p) : Formula<A>(p), eps(A(p[0])) {}
  A value(A x, A t, A) const {
    A loss = log_input ? exp_of(x) - t * x : x - t * log_of(x + eps);
    if constexpr (full) {  // Stirling's approximation of log(t!)
      constexpr A kLogTwoPi = A(1.8378770664093453);
      const A log = log_of(t);
      loss += t <= 1 ? A(0) : t * log - t + (kLogTwoPi + log) / 2;
    }
    return loss;
  }
  A grad_input(A x, A t, A, A scale) const {
    return scale * (log_input ? exp_of(x) - t : 1 - t / (x + eps));
  }
  A grad_target(A x, A t, A, A scale) const {
    A slope = log_input ? -x : -log_of(x + eps);
    if constexpr (full) slope += t <= 1 ? A(0) : log_of(t) + A(0.5) / t;
    return scale * slope;
  }
};
template <class A> using PoissonNllLoss = PoissonNll<A, false, false>;
template <class A> using PoissonNllLossFull = PoissonNll<A, false, true>;
template <class A> using PoissonNllLossLogInput = PoissonNll<A, true, false>;
template <class A> using PoissonNllLossLogInputFull = PoissonNll<A, true, true>;

// torch: F.kl_div(x, t).
template <class A> struct KlDiv : Formula<A> {
  using Formula<A>::Formula;
  A value(A x, A t, A) const { return (t == 0 ? A(0) : t * log_of(t)) - t * x; }
  A grad_input(A, A t, A, A scale) const { return -t * scale; }
  A grad_target(A x, A t, A, A scale) const { return scale * (log_of(t) + t / t - x); }
};

// torch: F.kl_div(x, t, log_target=True).
template <class A> struct KlDivLogTarget : Formula<A> {
  using Formula<A>::Formula;
  A value(A x, A t, A) const { return exp_of(t) * (t - x); }
  A grad_input(A, A t, A, A scale) const { return -exp_of(t) * scale; }
  A grad_target(A x, A t, A, A scale) const {
    const A e = exp_of(t);
    return (e * (t - x) + e) * scale;
  }
};

// torch: F.binary_cross_entropy(x, t). Logarithms are at least -100. The loss of a target outside
// of [0, 1] is NaN.
template <class A> struct BinaryCrossEntropy : Formula<A> {
  using Formula<A>::Formula;
  static A bounded(A log) { return log < -100 ? A(-100) : log; }
  A value(A x, A t, A) const {
    const A loss = (t - 1) * bounded(log1p_of(-x)) - t * bounded(log_of(x));
    return t >= 0 && t <= 1 ? loss : std::numeric_limits<A>::quiet_NaN();
  }
  A grad_input(A x, A t, A, A scale) const {
    const A variance = (1 - x) * x;
    return scale * (x - t) / (variance < A(1e-12) ? A(1e-12) : variance);
  }
  A grad_target(A x, A, A, A scale) const { return scale * (log1p_of(-x) - log_of(x)); }
};

// torch: F.binary_cross_entropy_with_logits(x, t).
//   loss = (1 - t) x + softplus(-x),  softplus(-x) = log(1 + exp(-x))
template <class A> struct BinaryCrossEntropyWithLogits : Formula<A> {
  using Formula<A>::Formula;
  A value(A x, A t, A) const { return (1 - t) * x + softplus(-x); }
  A grad_input(A x, A t, A, A scale) const { return scale * (sigmoid(x) - t); }
  A grad_target(A x, A, A, A scale) const { return -scale * x; }
};

// The same with pos_weight = p:  loss = (1 - t) x + (1 + (p - 1) t) softplus(-x)
template <class A> struct BinaryCrossEntropyWithLogitsPosWeight : Formula<A> {
  using Formula<A>::Formula;
  A value(A x, A t, A p) const { return (1 - t) * x + ((p - 1) * t + 1) * softplus(-x); }
  A grad_input(A x, A t, A p, A scale) const {
    return scale * ((p * t + 1 - t) * sigmoid(x) - p * t);
  }
  A grad_target(A x, A, A p, A scale) const { return scale * (p * softplus(-x) - softplus(x)); }
};

// torch: F.gaussian_nll_loss(x, t, v, full, eps). A variance below eps is replaced by eps, in its
// gradient too.
template <class A> struct GaussianNllLoss {
  A constant, eps;
  explicit GaussianNllLoss(const Parameters& p)
      : constant(p[0] != 0 ? A(0.91893853320467274) : A(0)), eps(A(p[1])) {}
  A at_least(A v) const { return v < eps ? eps : v; }
  A value(A x, A t, A v) const {
    v = at_least(v);
    return (log_of(v) + (x - t) * (x - t) / v) / 2 + constant;
  }
  A grad_input(A x, A t, A v, A scale) const {
    return 2 * (x - t) * (scale / 2 / at_least(v));  // overflows where torch's does
  }
  A grad_target(A x, A t, A v, A scale) const { return grad_input(t, x, v, scale); }
  A grad_other(A x, A t, A v, A scale) const {
    v = at_least(v);
    return (v - (x - t) * (x - t)) / v / v * (scale / 2);
  }
};

// Not in torch: max(q (t - x), (q - 1) (t - x)). As of torch.maximum, the gradient is the mean
// where equal.
template <class A> struct QuantileLoss : Formula<A> {
  A above, below, equal;  // gradients of t above and below x; and of NaN
  explicit QuantileLoss(const Parameters& p)
      : Formula<A>(p), above(A(p[0])), below(A(p[0] - 1)), equal(A(1 - 2 * p[0])) {}
  A value(A x, A t, A) const { return (t - x) * (t < x ? below : above); }
  A grad_input(A x, A t, A, A scale) const {
    const A d = t - x;
    return scale * (d > 0 ? -above : d < 0 ? -below : d == 0 ? equal / 2 : equal);
  }
  A grad_target(A x, A t, A, A scale) const { return -grad_input(x, t, 0, scale); }
};

// Not in torch: log(cosh(d)) = |d| + log(1 + e) - log(2), d = x - t, e = exp(-2 |d|) as in tanh(d).
template <class A> struct LogCoshLoss : Formula<A> {
  using Formula<A>::Formula;
  A value(A x, A t, A) const {
    const A size = std::abs(x - t);
    return size + (log1p_unit(exp_shifted(-2 * size)) - A(0.6931471805599453));
  }
  A grad_input(A x, A t, A, A scale) const { return scale * tanh_of(x - t); }
  A grad_target(A x, A t, A, A scale) const { return scale * tanh_of(t - x); }
};

// Not in torch: max(0, margin - t x), or its square.
template <class A, bool squared> struct Hinge : Formula<A> {
  A margin;
  explicit Hinge(const Parameters& p) : Formula<A>(p), margin(A(p[0])) {}
  A value(A x, A t, A) const {
    const A s = margin - t * x, slack = s < 0 ? A(0) : s;
    return squared ? slack * slack : slack;
  }
  A grad_input(A x, A t, A, A scale) const {
    const A s = margin - t * x;
    return -t * (s >= 0 ? (squared ? 2 * scale * s : scale) : A(0));
  }
  A grad_target(A, A, A, A) const { return 0; }
};
template <class A> using HingeLoss = Hinge<A, false>;
template <class A> using HingeLossSquared = Hinge<A, true>;

// As torchvision.ops.sigmoid_focal_loss: with p = sigmoid(x) and u = p (1 - t) + (1 - p) t,
//   loss = a c u^gamma,  a = alpha t + (1 - alpha) (1 - t), or 1,  c = (1 - t) x + softplus(-x)
//   dloss/dx = a (u^gamma (p - t) + gamma c u^(gamma - 1) p (1 - p) (1 - 2 t))
template <class A, bool square> struct SigmoidFocal : Formula<A> {
  A negative, positive, gamma, ignored;  // a for t = 0 and t = 1; the target to ignore, or NaN
  explicit SigmoidFocal(const Parameters& p)
      : Formula<A>(p), negative(p[0] < 0 ? A(1) : A(1 - p[0])), positive(p[0] < 0 ? A(1) : A(p[0])),
        gamma(A(p[1])), ignored(A(p[2])) {}
  A power(A u) const {
    if constexpr (square) return u * u;
    const A value = exp_of(gamma * log_of(u));  // unconditionally, so that loops have no branch
    return gamma == 0 ? A(1) : value;
  }
  A factor(A t) const { return t == ignored ? A(0) : positive * t + negative * (1 - t); }
  A value(A x, A t, A) const {
    const A u = sigmoid(x) * (1 - t) + sigmoid(-x) * t;
    return factor(t) * (((1 - t) * x + softplus(-x)) * power(u));
  }
  A grad_input(A x, A t, A, A scale) const {
    const A p = sigmoid(x), q = sigmoid(-x), u = p * (1 - t) + q * t;
    // u^(gamma - 1) p q
    const A slope = square ? u * (p * q) : power(u) * (u > 0 ? p * q / u : A(1));
    const A c = (1 - t) * x + softplus(-x);
    scale = t == ignored ? A(0) : scale;  // scale is infinite if all targets are ignored
    return factor(t) * scale * (power(u) * (p - t) + gamma * c * slope * (1 - 2 * t));
  }
  A grad_target(A, A, A, A) const { return 0; }
};
template <class A> using SigmoidFocalLoss = SigmoidFocal<A, false>;
template <class A> using SigmoidFocalLossOfTwo = SigmoidFocal<A, true>;

// ---- loops --------------------------------------------------------------------------------------

// Flattened, as GCC vectorizes no loop that calls, and stops inlining in a file with this many.
template <template <class> class Formula, class A>
PYFUSED_FLATTEN void evaluate(const Parameters& parameters, const LossChunk<A>& chunk) {
  const Formula<A> f(parameters);
  const int64_t n = chunk.n;
  const A scale = chunk.scale;
  const A* const x = chunk.operands[0];
  const A* const t = chunk.operands[1];
  const A* const o = chunk.operands[2];
  const auto fill = [=](A* out, const auto& term) {
    if (!out) return;
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) out[i] = term(x[i], t[i], o[i]);
  };
  A* const value = chunk.value;
  A* const grad_input = chunk.gradients[0];
  const auto value_at = [=](int64_t i) { return f.value(x[i], t[i], o[i]); };
  const auto value_and_grad_at =
      [=](int64_t i) {  // reads the operands once, so that the compiler shares terms
        const A a = x[i], b = t[i], c = o[i], value = f.value(a, b, c);
        grad_input[i] = f.grad_input(a, b, c, scale);
        return value;
      };
  // With gradients, the loss is computed even if it is not wanted, so that a second backward gives
  // the same bits.
  if (chunk.sum) {
    grad_input ? add_terms<A>(*chunk.sum, n, value_and_grad_at)
               : add_terms<A>(*chunk.sum, n, value_at);
  } else if (grad_input) {
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) value[i] = value_and_grad_at(i);
  } else {
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) value[i] = value_at(i);
  }
  fill(chunk.gradients[1], [=](A x, A t, A o) { return f.grad_target(x, t, o, scale); });
  fill(chunk.gradients[2], [=](A x, A t, A o) { return f.grad_other(x, t, o, scale); });
}

PYFUSED_INLINE_END

// gamma 2, the usual value, needs neither a logarithm nor an exponential.
template <class A> void sigmoid_focal_loss(const Parameters& parameters,
                                           const LossChunk<A>& chunk) {
  (parameters[1] == 2 ? evaluate<SigmoidFocalLossOfTwo, A>
                      : evaluate<SigmoidFocalLoss, A>)(parameters, chunk);
}

#define PYFUSED_LOSS(name, Formula) {name, &evaluate<Formula, float>, &evaluate<Formula, double>}
constexpr LossFormula kLossFormulas[] = {
    PYFUSED_LOSS("mse_loss", MseLoss),
    PYFUSED_LOSS("smooth_l1_loss", SmoothL1Loss),
    PYFUSED_LOSS("l1_loss", L1Loss),
    PYFUSED_LOSS("huber_loss", HuberLoss),
    PYFUSED_LOSS("soft_margin_loss", SoftMarginLoss),
    PYFUSED_LOSS("hinge_embedding_loss", HingeEmbeddingLoss),
    PYFUSED_LOSS("margin_ranking_loss", MarginRankingLoss),
    PYFUSED_LOSS("poisson_nll_loss", PoissonNllLoss),
    PYFUSED_LOSS("poisson_nll_loss_full", PoissonNllLossFull),
    PYFUSED_LOSS("poisson_nll_loss_log_input", PoissonNllLossLogInput),
    PYFUSED_LOSS("poisson_nll_loss_log_input_full", PoissonNllLossLogInputFull),
    PYFUSED_LOSS("kl_div", KlDiv),
    PYFUSED_LOSS("kl_div_log_target", KlDivLogTarget),
    PYFUSED_LOSS("quantile_loss", QuantileLoss),
    PYFUSED_LOSS("log_cosh_loss", LogCoshLoss),
    PYFUSED_LOSS("hinge_loss", HingeLoss),
    PYFUSED_LOSS("hinge_loss_squared", HingeLossSquared),
    {"sigmoid_focal_loss", &sigmoid_focal_loss<float>, &sigmoid_focal_loss<double>},
    PYFUSED_LOSS("binary_cross_entropy", BinaryCrossEntropy),
    PYFUSED_LOSS("binary_cross_entropy_with_logits", BinaryCrossEntropyWithLogits),
    PYFUSED_LOSS("binary_cross_entropy_with_logits_pos_weight",
                 BinaryCrossEntropyWithLogitsPosWeight),
    PYFUSED_LOSS("gaussian_nll_loss", GaussianNllLoss),
};

}  // namespace pyfused
