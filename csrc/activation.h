// Activations, and the scaling of a gradient. The formulas are in formulas.h.
#pragma once

#include <array>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <vector>

#include "strides.h"
#include "vec.h"

namespace pyfused {

using Parameters = std::array<double, 3>;  // the numeric parameters of a formula

// Applies a formula to n elements. The output may be the input itself. float16 is widened
// beforehand, by instructions that compilers do not use in these loops.
template <class T> using Loaded = std::conditional_t<std::is_same_v<T, float16>, float, T>;

template <class T>
using ForwardLoop = void(const Parameters&, const T* input, Accumulate<T>* output, int64_t n);

// `saved` is the output or the input, whichever the formula needs. A step of 0 broadcasts one
// grad_output.
template <class T>
using BackwardLoop = void(const Parameters&, const T* grad_output, int64_t step, const T* saved,
                          Accumulate<T>* grad_input, int64_t n);

template <template <class> class Loop>
using OfEachLoaded = std::tuple<Loop<float>*, Loop<double>*, Loop<bfloat16>*>;

struct ActivationFormula {
  const char* name;
  OfEachLoaded<ForwardLoop> forward;
  OfEachLoaded<BackwardLoop> backward;
};

std::vector<ActivationFormula> activation_formulas();

// The checksum of the formulas, from which tests detect modules compiled from another version.
uint32_t formulas_checksum();

template <class T>
void activation(const ActivationFormula& formula, const Operand<T>& input, T* output,
                const Parameters& parameters, int64_t n, int threads, const Order& order);

template <class T>
void activation_backward(const ActivationFormula& formula, const Operand<T>& grad_output,
                         const Operand<T>& saved, T* grad_input, const Parameters& parameters,
                         int64_t n, int threads, const Order& order);

// x *= factor: multiplies a gradient that the forward pass computed by grad_output. Returns false,
// and changes nothing, if the factor is infinite or NaN: masked gradients have to remain 0.
template <class T> bool scale(T* x, Accumulate<T> factor, int64_t n, int threads);

}  // namespace pyfused
