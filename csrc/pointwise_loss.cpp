#include "pointwise_loss.h"

#include <algorithm>
#include <iterator>
#include <type_traits>

#include "formulas.h"
#include "memory.h"
#include "parallel.h"
#include "program.h"

namespace pyfused {

constexpr int64_t kLossBlock = 1 << 14;  // elements a thread takes at a time

// The factors of the losses of a chunk and of their gradients; null for 1.
template <class A> struct Factors {
  const A* value = nullptr;
  const A* gradient = nullptr;
};

template <class T>
Factors<Accumulate<T>> factors(const PointwiseLoss<T>& p, int64_t first, int64_t n,
                               Accumulate<T>* weight, Accumulate<T>* grad_output) {
  Factors<Accumulate<T>> found;
  if (p.weight.data) found.value = found.gradient = elements(p.weight, p.order, first, n, weight);
  if (!p.grad_output.data) return found;
  found.gradient = elements(p.grad_output, p.order, first, n, grad_output);
  if (!found.value) return found;
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) grad_output[i] = found.gradient[i] * found.value[i];
  found.gradient = grad_output;
  return found;
}

template <class A> void multiply(A* values, const A* by, int64_t n) {
  if (!by) return;
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) values[i] *= by[i];
}

// The buffers of a chunk.
template <class Formula, class A> struct PointwiseBuffers {
  using Buffer = A[Formula::kChunk];
  alignas(kVectorBytes) Buffer read[kOperands], written[kOperands], value, weight, grad_output;
  typename Formula::template Registers<A> registers;
};

// The elements of a block of each operand in columns; null for other operands.
template <class A> using Gathered = std::array<const A*, kOperands>;

template <class Formula, class T>
void pointwise_chunk(const Formula& formula, const PointwiseLoss<T>& p,
                     const Gathered<Accumulate<T>>& gathered,
                     PointwiseBuffers<Formula, Accumulate<T>>& buffers, Sum& sum, int64_t first,
                     int64_t n, bool streams) {
  using A = Accumulate<T>;
  auto& [read, written, buffer, weight, grad_output, registers] = buffers;
  A* const value = p.unreduced && !streams ? staged(p.unreduced + first, buffer) : buffer;
  // A loss that was reduced has one grad_output for all elements.
  Sum* const summed = p.unreduced || p.weight.data || p.grad_output.step ? nullptr : &sum;
  LossChunk<A> chunk{n, {}, A(1 / p.denominator), summed, value, {}};
  for (int k = 0; k < kOperands; ++k) {
    const Operand<T>& operand = p.operands[k];
    if (gathered[k]) chunk.operands[k] = gathered[k] + first % kLossBlock;
    else if (operand.data) chunk.operands[k] = elements(operand, p.order, first, n, read[k]);
    else chunk.operands[k] = chunk.operands[0];
    T* const gradient = p.gradients[k];
    if (!gradient) continue;
    chunk.gradients[k] = streams ? written[k] : staged(gradient + first, written[k]);
  }
  formula.evaluate(p.parameters, chunk, registers);
  const Factors<A> by = factors(p, first, n, weight, grad_output);
  if (p.reduced && by.value) {
    add_terms<A>(sum, n, [&](int64_t i) { return by.value[i] * value[i]; });
  } else if (p.reduced && !(Formula::kSums && summed)) {
    add_terms<A>(sum, n, [=](int64_t i) { return value[i]; });
  }
  if (p.unreduced) {
    multiply(value, by.value, n);
    write(value, p.unreduced + first, n, streams);
  }
  for (int k = 0; k < kOperands; ++k) {
    if (!chunk.gradients[k]) continue;
    multiply(chunk.gradients[k], by.gradient, n);
    write(chunk.gradients[k], p.gradients[k] + first, n, streams);
  }
}

template <class Formula, class T>
void pointwise_loss(const Formula& formula, const PointwiseLoss<T>& p) {
  using A = Accumulate<T>;
  using Buffers = PointwiseBuffers<Formula, A>;
  const bool streams = size_t(p.n) * sizeof(T) >= kStreamBytes;
  const auto in_columns = [](const Operand<T>& operand) { return operand.in_columns(); };
  const int64_t gathers = std::count_if(p.operands.begin(), p.operands.end(), in_columns);
  const auto run = [&](int64_t first, int64_t end, auto workspace) {
    Buffers& buffers = workspace.make();
    A* memory = reinterpret_cast<A*>(&buffers + 1);
    Gathered<A> gathered{};
    for (int k = 0; gathers && k < kOperands; ++k) {
      if (!p.operands[k].in_columns()) continue;
      gather_columns(p.operands[k], p.order, first, end - first, memory);
      gathered[k] = memory;
      memory += kLossBlock;
    }
    Sum sum;
    for (; first < end; first += Formula::kChunk) {
      pointwise_chunk(formula, p, gathered, buffers, sum, first,
                      std::min(Formula::kChunk, end - first), streams);
    }
    return sum.value();
  };
  const size_t bytes = sizeof(Buffers) + gathers * kLossBlock * sizeof(A);
  const double loss = sum_of_blocks<T, Buffers>(p.n, kLossBlock, p.threads, run, bytes);
  if (p.reduced) *p.reduced = A(loss / p.denominator);
}

PYFUSED_INLINE_ALL

#include "loss_formulas.inc"

// Flattened, because GCC does not vectorise loops with calls, and limits inlining per file.
template <template <class> class Of, class A>
PYFUSED_FLATTEN void evaluate(const Parameters& parameters, const LossChunk<A>& chunk) {
  const Of<A> f(parameters);
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
  A* const grad_target = chunk.gradients[1];
  const auto value_at = [=](int64_t i) { return f.value(x[i], t[i], o[i]); };
  const auto value_and_grad_at =
      [=](int64_t i) {  // reads the operands once, which lets the compiler share terms
        const A a = x[i], b = t[i], c = o[i], value = f.value(a, b, c);
        grad_input[i] = f.grad_input(a, b, c, scale);
        return value;
      };
  // If the formula overrides the target's gradient, both gradients share terms.
  if constexpr (!std::is_same_v<decltype(&Of<A>::grad_target),
                                decltype(&Formula<A>::grad_target)>) {
    if (!chunk.sum && grad_input && grad_target) {
      PYFUSED_SIMD()
      for (int64_t i = 0; i < n; ++i) {
        const A a = x[i], b = t[i], c = o[i];
        value[i] = f.value(a, b, c);
        grad_input[i] = f.grad_input(a, b, c, scale);
        grad_target[i] = f.grad_target(a, b, c, scale);
      }
      fill(chunk.gradients[2], [=](A x, A t, A o) { return f.grad_other(x, t, o, scale); });
      return;
    }
  }
  // If gradients are computed, so is the loss, even if it is not needed: a second backward pass
  // then gives bitwise identical gradients.
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
  fill(grad_target, [=](A x, A t, A o) { return f.grad_target(x, t, o, scale); });
  fill(chunk.gradients[2], [=](A x, A t, A o) { return f.grad_other(x, t, o, scale); });
}

PYFUSED_INLINE_END

std::vector<LossFormula> loss_formulas() {
#define PYFUSED_LOSS(name, Formula) {name, &evaluate<Formula, float>, &evaluate<Formula, double>},
  return {PYFUSED_LOSSES(PYFUSED_LOSS)};
#undef PYFUSED_LOSS
}

template const InstructionRow<float>* instruction_rows();
template const InstructionRow<double>* instruction_rows();

#define PYFUSED_INSTANTIATE(Formula)                                            \
  template void pointwise_loss(const Formula&, const PointwiseLoss<float>&);    \
  template void pointwise_loss(const Formula&, const PointwiseLoss<double>&);   \
  template void pointwise_loss(const Formula&, const PointwiseLoss<bfloat16>&); \
  template void pointwise_loss(const Formula&, const PointwiseLoss<float16>&);
PYFUSED_INSTANTIATE(LossFormula)
PYFUSED_INSTANTIATE(ProgramFormula)
#undef PYFUSED_INSTANTIATE

}  // namespace pyfused
