#include "activation.h"

#include <algorithm>
#include <cmath>

#include "formulas.h"
#include "memory.h"
#include "parallel.h"

namespace pyfused {

PYFUSED_INLINE_ALL
#include "activation_formulas.inc"
PYFUSED_INLINE_END

constexpr int64_t kActivationBlock = 1 << 14;  // elements a thread takes at a time
constexpr int64_t kActivationChunk = 1024;     // elements at a time, in L1

// Calls loop(first element, out, elements) for each chunk of the output, in the accumulation type.
template <class T, class Loop> void map(T* output, int64_t n, int threads, const Loop& loop) {
  const size_t bytes = size_t(n) * sizeof(T);
  const bool streams = bytes >= kStreamBytes && has_pages(output, bytes);
  for_blocks<NoBuffers>(n, kActivationBlock, threads, [=](int64_t first, int64_t end, auto) {
    for (; first < end; first += kActivationChunk) {
      const int64_t count = std::min(kActivationChunk, end - first);
      alignas(kVectorBytes) Accumulate<T> buffer[kActivationChunk];
      Accumulate<T>* const out = streams ? buffer : staged(output + first, buffer);
      loop(first, out, count);
      write(out, output + first, count, streams);
    }
  });
}

template <class T>
const Loaded<T>* loaded(const T* from, [[maybe_unused]] Accumulate<T>* buffer,
                        [[maybe_unused]] int64_t n) {
  if constexpr (std::is_same_v<T, float16>) return widened(from, buffer, n);
  else return from;
}

template <class T> bool scale(T* x, Accumulate<T> factor, int64_t n, int threads) {
  if (!std::isfinite(factor)) return false;
  if (factor == 1) return true;
  map(x, n, threads, [=](int64_t first, Accumulate<T>* out, int64_t count) {
    const Loaded<T>* const from = loaded(x + first, out, count);
    PYFUSED_SIMD()
    for (int64_t i = 0; i < count; ++i) out[i] = factor * widen(from[i]);
  });
  return true;
}

template <class T>
void activation(const ActivationFormula& formula, const Operand<T>& input, T* output,
                const Parameters& parameters, int64_t n, int threads, const Order& order) {
  const auto loop = std::get<ForwardLoop<Loaded<T>>*>(formula.forward);
  map(output, n, threads, [&](int64_t first, Accumulate<T>* out, int64_t count) {
    alignas(kVectorBytes) Loaded<T> buffer[kActivationChunk];
    loop(parameters, elements(input, order, first, count, buffer), out, count);
  });
}

template <class T>
void activation_backward(const ActivationFormula& formula, const Operand<T>& grad_output,
                         const Operand<T>& saved, T* grad_input, const Parameters& parameters,
                         int64_t n, int threads, const Order& order) {
  const auto loop = std::get<BackwardLoop<Loaded<T>>*>(formula.backward);
  const int64_t step = grad_output.step || grad_output.in_rows();
  map(grad_input, n, threads, [&](int64_t first, Accumulate<T>* out, int64_t count) {
    alignas(kVectorBytes) Loaded<T> of_grad[kActivationChunk], of_saved[kActivationChunk];
    const Loaded<T>* const dy = elements(grad_output, order, first, step ? count : 1, of_grad);
    loop(parameters, dy, step, elements(saved, order, first, count, of_saved), out, count);
  });
}

template <template <class> class Formula, class T>
PYFUSED_FLATTEN void forward_loop(const Parameters& parameters, const T* input,
                                  Accumulate<T>* output, int64_t n) {
  const Formula<Accumulate<T>> f(parameters);
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) output[i] = f.forward(widen(input[i]));
}

template <template <class> class Formula, class T>
PYFUSED_FLATTEN void backward_loop(const Parameters& parameters, const T* grad_output, int64_t step,
                                   const T* saved, Accumulate<T>* grad_input, int64_t n) {
  const Formula<Accumulate<T>> f(parameters);
  if (step == 0) {
    const Accumulate<T> same = widen(*grad_output);
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) grad_input[i] = f.backward(same, widen(saved[i]));
  } else {
    PYFUSED_SIMD()
    for (int64_t i = 0; i < n; ++i) {
      grad_input[i] = f.backward(widen(grad_output[i]), widen(saved[i]));
    }
  }
}

template <template <class> class Formula> ActivationFormula named(const char* name) {
  return {name,
          {forward_loop<Formula, float>, forward_loop<Formula, double>,
           forward_loop<Formula, bfloat16>},
          {backward_loop<Formula, float>, backward_loop<Formula, double>,
           backward_loop<Formula, bfloat16>}};
}

std::vector<ActivationFormula> activation_formulas() {
#define PYFUSED_ACTIVATION(name, Formula) named<Formula>(name),
  return {PYFUSED_ACTIVATIONS(PYFUSED_ACTIVATION)};
#undef PYFUSED_ACTIVATION
}

#define PYFUSED_INSTANTIATE(T)                                                                 \
  template void activation(const ActivationFormula&, const Operand<T>&, T*, const Parameters&, \
                           int64_t, int, const Order&);                                        \
  template void activation_backward(const ActivationFormula&, const Operand<T>&,               \
                                    const Operand<T>&, T*, const Parameters&, int64_t, int,    \
                                    const Order&);
PYFUSED_INSTANTIATE(float)
PYFUSED_INSTANTIATE(double)
PYFUSED_INSTANTIATE(bfloat16)
PYFUSED_INSTANTIATE(float16)
#undef PYFUSED_INSTANTIATE

template bool scale(float*, Accumulate<float>, int64_t, int);
template bool scale(double*, Accumulate<double>, int64_t, int);
template bool scale(bfloat16*, Accumulate<bfloat16>, int64_t, int);
template bool scale(float16*, Accumulate<float16>, int64_t, int);

}  // namespace pyfused
