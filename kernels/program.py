"""Generates a Triton function from the program of a formula, pyfused's or a user's:

    value, gradient of each operand = formula(four operands, numbers, parts, scale, EXACT)

`numbers` are the first three parameters; `parts` are the others, encoded by `parts_of`. EXACT is
False if the result is rounded to half precision.
"""

from __future__ import annotations

import linecache
import struct
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .arithmetic import (  # noqa: F401 programs call them
    exp,
    exp_nonpositive,
    log,
    log1p,
    normal_cdf,
    reciprocal,
    softplus_nonpositive,
    tanh,
)

if TYPE_CHECKING:
    from pyfused.formula_compiler.program import Line, Program

OPERANDS = ("x0", "x1", "x2", "x3")
NUMBERS = 3  # parameters that are passed as separate kernel arguments


def parts_of(parameters: tuple[float, ...]) -> tuple[float, ...]:
    """Encodes each parameter as four floats, which are passed to the kernel as a tuple.

    Triton passes floats in a tuple as float32, and specializes on some integers. Each part has 16
    bits of a float64, which float32 represents exactly.
    """
    n = len(parameters)
    return tuple(map(float, struct.unpack(f"<{4 * n}H", struct.pack(f"<{n}d", *parameters))))


@triton.jit
def parameter(parts, k: tl.constexpr):
    """Decodes parameter k, a float64, from its four parts, lowest bits first."""
    bits = tl.cast(parts[4 * k], tl.int64)
    for i in tl.static_range(1, 4):
        bits |= tl.cast(parts[4 * k + i], tl.int64) << (16 * i)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0)).to(x.dtype)


@triton.jit
def root(x):
    """Returns the correctly rounded square root; tl.sqrt of float32 is approximate."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def expm1(x, EXACT: tl.constexpr):
    """Returns exp(x) - 1 to 4 ULP; near 0, from tanh(x / 2) = expm1(x) / (expm1(x) + 2)."""
    t = tanh(0.5 * x, EXACT)
    return tl.where(tl.abs(x) < 0.5, 2.0 * t / (1.0 - t), exp(x, EXACT) - 1.0)


@triton.jit
def softplus(x, EXACT: tl.constexpr):
    return tl.where(x > 0.0, x, 0.0) + softplus_nonpositive(-tl.abs(x), EXACT)


@triton.jit
def sigmoid_or_zero(decay, x, EXACT: tl.constexpr):
    """Returns torch's sigmoid, which is 0 where exp(-x) overflows; decay is exp(-|x|)."""
    LEAST: tl.constexpr = 2.0**-1024 if x.dtype == tl.float64 else 2.0**-128
    below = tl.where(decay < LEAST, 0.0, decay)
    return tl.where(x < 0.0, below, 1.0) * reciprocal(1.0 + decay, EXACT)


@triton.jit
def power(x, y):
    """Returns x**y, computed in float64, because the error of exp(y log(x)) grows with y log(x)."""
    base, exponent = x.to(tl.float64), y.to(tl.float64)
    size, half = tl.abs(base), 0.5 * exponent
    result = tl.where(size == 1.0, 1.0, tl.exp(exponent * tl.log(size)))  # inf * 0 is NaN
    of_zero = tl.where(exponent < 0.0, float("inf"), 0.0 * exponent)  # NaN if the exponent is NaN
    of_zero = tl.where(exponent > 0.0, 0.0, of_zero)
    result = tl.where(size == 0.0, of_zero, result)
    # Triton computes -x as 0 - x, which is never -0.0.
    of_whole = tl.where(tl.floor(half) != half, -1.0 * result, result)
    of_part = tl.where(base == 0.0, result, tl.where(size < float("inf"), float("nan"), result))
    of_negative = tl.where(tl.floor(exponent) == exponent, of_whole, of_part)
    negative = tl.where(base == 0.0, 1.0 / base, base) < 0.0  # includes -0.0
    result = tl.where(negative, of_negative, result)
    return tl.where(exponent == 0.0, 1.0, result).to(x.dtype)


# The Triton expression of each instruction.
INSTRUCTIONS = {
    "copy": "{}",
    "neg": "-1.0 * {}",
    "abs": "tl.abs({})",
    "floor": "tl.floor({})",
    "sign": "sign({})",
    "reciprocal": "1.0 / {}",
    "sqrt": "root({})",
    "rsqrt": "1.0 / root({})",
    "exp": "exp({}, EXACT)",
    "expm1": "expm1({}, EXACT)",
    "log": "log({}, EXACT=EXACT)",
    "log1p": "log1p({}, EXACT)",
    "sin": "tl.sin({})",
    "cos": "tl.cos({})",
    "tanh": "tanh({}, EXACT)",
    "erf": "tl.erf({})",
    "ndtr": "normal_cdf({}, EXACT)",
    "density": "0.3989422804014327 * exp_nonpositive(-0.5 * {0} * {0}, EXACT, EXACT)",
    "decay": "exp_nonpositive(-tl.abs({}), EXACT, EXACT)",
    "sigmoid_from": "tl.where({1} < 0.0, {0}, 1.0) * reciprocal(1.0 + {0}, EXACT)",
    "sigmoid_or_zero": "sigmoid_or_zero({0}, {1}, EXACT)",
    "softplus_from": "softplus({1}, EXACT)",
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "pow": "power({}, {})",
    "pow_less": "power({1}, {2})",
    "minimum": "tl.where({1} < {0}, {1}, tl.where({1} != {1}, {1}, {0}))",
    "maximum": "tl.where({1} > {0}, {1}, tl.where({1} != {1}, {1}, {0}))",
    "lt": "tl.where({} < {}, ONE, ZERO)",
    "le": "tl.where({} <= {}, ONE, ZERO)",
    "eq": "tl.where({} == {}, ONE, ZERO)",
    "muladd": "{} * {} + {}",
    "mulsub": "{} * {} - {}",
    "submul": "{2} - {0} * {1}",
    "where": "tl.where({} != 0.0, {}, {})",
    "where_lt": "tl.where({} < {}, {}, {})",
    "where_le": "tl.where({} <= {}, {}, {})",
    "where_eq": "tl.where({} == {}, {}, {})",
}


def source_of(program: Program, name: str) -> str:
    """Returns the source code of a program as a Triton function."""
    operands, constants = OPERANDS, [f"c{k}" for k in range(len(program.constants))]
    names = program.names(operands, constants)
    outputs = ["value", *(f"grad_{x}" for x in operands)]
    values = ["scale.to(tl.float64)"]
    values += [
        f"numbers[{k}]" if k < NUMBERS else f"parameter(parts, {k - NUMBERS})"
        for k in range(program.parameters)
    ]
    values += [
        f'tl.full([], float("{value!r}"), tl.float64)' for value in program.constants[len(values) :]
    ]

    def line(instruction: Line) -> str:
        op, out, arguments = instruction
        return f"{names[out]} = {INSTRUCTIONS[op].format(*[names[a] for a in arguments])}"

    body = [
        *[f"{output} = 0.0" for output in outputs],
        "ONE, ZERO = tl.full([], 1.0, x0.dtype), tl.full([], 0.0, x0.dtype)",
        *[
            f"{name} = ({value}).to(x0.dtype)"
            for name, value in zip(constants, values, strict=True)
        ],
        *map(line, [*program.prologue, *program.body]),
        f"return {', '.join(outputs)}",
    ]
    arguments = ", ".join([*operands, "numbers", "parts", "scale", "EXACT: tl.constexpr"])
    return "\n    ".join([f"@triton.jit\ndef {name}({arguments}):", *body])


def formula_of(program: Program) -> Any:
    """Compiles a program to a Triton function; Triton reads the source from Python's linecache."""
    name = "formula_" + "".join(c if c.isalnum() else "_" for c in program.name)
    source = source_of(program, name)
    file = f"<{program.name} {hash(source):x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace = dict(globals())
    exec(compile(source, file, "exec"), namespace)
    return namespace[name]
