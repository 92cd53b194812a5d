// A formula of the user's, as a program: instructions, each a vectorised loop over a chunk in L1.
//
// pyfused/ops/program.py makes programs. A place is the number of
//
//   an operand (0 to 3), the value (4), a gradient (5 to 8), a register (from 9 on),
//
// or, after the registers, of a constant: the scale of the gradients, the formula's parameters,
// literals, and what the prologue computes from these, once for a call and in double.
// pointwise_loss.cpp reads and rounds, and applies weights, grad_output and sums.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "parallel.h"
#include "pointwise_loss.h"
#include "vec.h"

namespace pyfused {

constexpr int64_t kProgramChunk = 512;  // elements of a register
constexpr int kProgramRegisters = 32, kProgramConstants = 256;  // at most
constexpr int kValuePlace = kOperands, kRegisterPlace = kValuePlace + 1 + kOperands;

// name, number of operands, and the result from a, b, c and d. Comparisons are 1 or 0. NaN passes
// through minimum and maximum, as in torch.
#define PYFUSED_INSTRUCTIONS(X)                     \
  X(copy, 1, a)                                     \
  X(neg, 1, -a)                                     \
  X(abs, 1, std::abs(a))                            \
  X(sign, 1, A(a > 0) - A(a < 0))                   \
  X(reciprocal, 1, 1 / a)                           \
  X(sqrt, 1, std::sqrt(a))                          \
  X(rsqrt, 1, 1 / std::sqrt(a))                     \
  X(exp, 1, exp_of(a))                              \
  X(expm1, 1, expm1_of(a))                          \
  X(log, 1, log_of(a))                              \
  X(log1p, 1, log1p_of(a))                          \
  X(sin, 1, sine_of<0>(a))                          \
  X(cos, 1, sine_of<1>(a))                          \
  X(tanh, 1, tanh_of(a))                            \
  X(sigmoid, 1, pyfused::sigmoid(a))                \
  X(softplus, 1, pyfused::softplus(a))              \
  X(erf, 1, erf_of(a))                              \
  X(decay, 1, exp_shifted(-std::abs(a)))            \
  X(sigmoid_from, 2, pyfused::sigmoid_from(a, b))   \
  X(softplus_from, 2, pyfused::softplus_from(a, b)) \
  X(add, 2, a + b)                                  \
  X(sub, 2, a - b)                                  \
  X(mul, 2, a* b)                                   \
  X(div, 2, a / b)                                  \
  X(pow, 2, pow_of(a, b))                           \
  X(minimum, 2, b < a || b != b ? b : a)            \
  X(maximum, 2, b > a || b != b ? b : a)            \
  X(lt, 2, A(a < b))                                \
  X(le, 2, A(a <= b))                               \
  X(eq, 2, A(a == b))                               \
  X(muladd, 3, c + a * b)                           \
  X(mulsub, 3, -c + a * b)                          \
  X(submul, 3, c - a * b)                           \
  X(where, 3, a != 0 ? b : c)                       \
  X(where_lt, 4, a < b ? c : d)                     \
  X(where_le, 4, a <= b ? c : d)                    \
  X(where_eq, 4, a == b ? c : d)

struct Instruction {
  int opcode;
  unsigned constants;  // bit k: operand k is a constant
  int out;             // a place
  std::array<int, 4> in;
};

template <class A> using Inputs = std::array<const A*, 4>;
template <class A> using InstructionLoop = void (*)(A* out, const Inputs<A>& in, int64_t n);

// The loops of an instruction, by `constants`.
template <class A> using InstructionRow = std::array<InstructionLoop<A>, 16>;

namespace instructions {
#define PYFUSED_INSTRUCTION(name, count, result)                                                   \
  struct name##_ {                                                                                 \
    static constexpr int operands = count;                                                         \
    template <class A> static PYFUSED_INLINE A of(A a, [[maybe_unused]] A b, [[maybe_unused]] A c, \
                                                  [[maybe_unused]] A d) {                          \
      return result;                                                                               \
    }                                                                                              \
  };
PYFUSED_INSTRUCTIONS(PYFUSED_INSTRUCTION)
#undef PYFUSED_INSTRUCTION
}  // namespace instructions

template <class F> constexpr bool kPeriodic = false;
template <> constexpr bool kPeriodic<instructions::sin_> = true;
template <> constexpr bool kPeriodic<instructions::cos_> = true;

// Whether sine_of() has too few digits of pi for one of them.
template <class A> PYFUSED_INLINE bool far_from_zero(const A* a, int64_t n) {
  A most = 0;
  PYFUSED_SIMD(reduction(max : most))
  for (int64_t i = 0; i < n; ++i) most = std::abs(a[i]) > most ? std::abs(a[i]) : most;
  return most > kMostSine<A>;
}

// The output may be one of the inputs.
template <class F, class A, unsigned constants>
PYFUSED_FLATTEN void instruction_loop(A* out, const Inputs<A>& in, int64_t n) {
  const A *const a = in[0], *const b = in[1], *const c = in[2], *const d = in[3];
  const A a0 = *a, b0 = *b, c0 = *c, d0 = *d;
  if (kPeriodic<F> && far_from_zero(a, constants & 1 ? 1 : n)) {
    const auto exact = [](A x) {
      return std::is_same_v<F, instructions::sin_> ? std::sin(x) : std::cos(x);
    };
    for (int64_t i = 0; i < n; ++i) out[i] = exact(constants & 1 ? a0 : a[i]);
    return;
  }
  if constexpr (std::is_same_v<F, instructions::pow_> && constants != 0) {
    // GCC does not vectorise the loop with conditions that are the same for all elements.
    A same[kProgramChunk];
    std::fill_n(same, n, constants & 1 ? a0 : b0);
    const Inputs<A> vectors{constants & 1 ? same : a, constants & 2 ? same : b, a, a};
    return instruction_loop<F, A, 0>(out, vectors, n);
  }
  PYFUSED_SIMD()
  for (int64_t i = 0; i < n; ++i) {
    out[i] = F::template of<A>(constants & 1 ? a0 : a[i], constants & 2 ? b0 : b[i],
                               constants & 4 ? c0 : c[i], constants & 8 ? d0 : d[i]);
  }
}

// An operand that does not exist is another name of the first.
template <class F, class A, unsigned... constants>
constexpr InstructionRow<A> instruction_row(std::integer_sequence<unsigned, constants...>) {
  constexpr unsigned all = (1u << F::operands) - 1;
  return {&instruction_loop<F, A, (constants & all) | (constants & 1 ? 15u & ~all : 0u)>...};
}

template <class A> const InstructionRow<A>* instruction_rows() {
#define PYFUSED_ROW(name, count, result) \
  instruction_row<instructions::name##_, A>(std::make_integer_sequence<unsigned, 16>{}),
  static constexpr InstructionRow<A> rows[] = {PYFUSED_INSTRUCTIONS(PYFUSED_ROW)};
#undef PYFUSED_ROW
  return rows;
}
extern template const InstructionRow<float>* instruction_rows();  // in pointwise_loss.cpp
extern template const InstructionRow<double>* instruction_rows();

#define PYFUSED_NAME(name, count, result) {#name, count},
constexpr std::pair<const char*, int> kInstructions[] = {PYFUSED_INSTRUCTIONS(PYFUSED_NAME)};
#undef PYFUSED_NAME

struct Program {
  std::vector<Instruction> prologue, body;
  std::vector<double> constants;  // the scale and the parameters are filled in by a call
  int parameters, registers;
  bool has_value;
};

// A program with the numbers of a call, in the place of a LossFormula.
class ProgramFormula {
 public:
  ProgramFormula(const Program& program, const std::vector<double>& parameters, double denominator)
      : program_(program), doubles_(program.constants) {
    if (int(parameters.size()) != program.parameters) {
      throw std::invalid_argument("parameters: expected one for each of the program's");
    }
    doubles_[0] = 1 / denominator;
    std::copy(parameters.begin(), parameters.end(), doubles_.begin() + 1);
    const int first = kRegisterPlace + program.registers;
    for (const Instruction& each : program.prologue) {
      Inputs<double> in;
      for (int k = 0; k < 4; ++k) in[k] = &doubles_[each.in[k] - first];
      instruction_rows<double>()[each.opcode][0](&doubles_[each.out - first], in, 1);
    }
    floats_.assign(doubles_.begin(), doubles_.end());
  }

  template <class A> void evaluate(const Parameters&, const LossChunk<A>& chunk) const {
    alignas(kVectorBytes) A registers[kProgramRegisters][kProgramChunk];
    const std::vector<A>& constants = constants_of(A());
    std::array<const A*, kRegisterPlace + kProgramRegisters + kProgramConstants> place;
    std::array<A*, kRegisterPlace + kProgramRegisters> out;
    for (int i = 0; i < program_.registers; ++i) {
      place[kRegisterPlace + i] = out[kRegisterPlace + i] = registers[i];
    }
    const int first_constant = kRegisterPlace + program_.registers;
    for (size_t i = 0; i < constants.size(); ++i) place[first_constant + i] = &constants[i];
    for (int64_t first = 0; first < chunk.n; first += kProgramChunk) {
      const int64_t n = std::min(kProgramChunk, chunk.n - first);
      for (int k = 0; k < kOperands; ++k) {
        place[k] = chunk.operands[k] + first;
        out[kValuePlace + 1 + k] = chunk.gradients[k] ? chunk.gradients[k] + first : nullptr;
        place[kValuePlace + 1 + k] = out[kValuePlace + 1 + k];
      }
      place[kValuePlace] = out[kValuePlace] = chunk.value + first;
      for (const Instruction& each : program_.body) {
        const Inputs<A> in{place[each.in[0]], place[each.in[1]], place[each.in[2]],
                           place[each.in[3]]};
        instruction_rows<A>()[each.opcode][each.constants](out[each.out], in, n);
      }
      if (chunk.sum && program_.has_value) {
        const A* const value = chunk.value + first;
        add_terms<A>(*chunk.sum, n, [=](int64_t i) { return value[i]; });
      }
    }
  }

 private:
  const std::vector<float>& constants_of(float) const { return floats_; }
  const std::vector<double>& constants_of(double) const { return doubles_; }

  const Program& program_;
  std::vector<double> doubles_;
  std::vector<float> floats_;
};

}  // namespace pyfused
