"""Elementary functions that the kernels share.

Errors are in units in the last place (ULP) of float32; float64 uses Triton's functions. EXACT is
False if the result is rounded to half precision, for which a relative error of 2e-5 suffices.

torch: the functions of the same names (test_arithmetic.py compares with them in float64)
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def exp_nonpositive(x, EXACT: tl.constexpr = True, SUBNORMAL: tl.constexpr = False):
    """Returns exp(x) for x <= 89 to 2 ULP; exp2 alone has a relative error of x 2**-24.

    GPUs flush subnormal results of exp2 to 0. With SUBNORMAL, they are kept: exp(x) = exp(x / 2)**2
    for x < -44, to 5 ULP. The compiler would fuse a sum in exp2's argument with the product, which
    would then have another rounding error than the one that EXACT corrects.
    """
    if x.dtype == tl.float64:
        power = tl.exp(x)
    else:
        if EXACT:
            x = tl.where(x < -150.0, -150.0, x)  # exp(-150) underflows to 0; keeps NaN
        is_small = x < -44.0
        if SUBNORMAL:
            x = tl.where(is_small, 0.5 * x, x)
        high = x * 1.4426950408889634
        power = tl.exp2(high)
        if EXACT:
            # Add the rounding error of the product, and the low part of log2(e).
            low = tl.fma(x, 1.4426950408889634, -high) + x * 1.9259629911266175e-08
            power *= 1.0 + low * 0.6931471805599453
        if SUBNORMAL:
            power *= tl.where(is_small, power, 1.0)
    return power


@triton.jit
def exp(x, EXACT: tl.constexpr = True):
    """Returns exp(x) to 2 ULP."""
    if EXACT and x.dtype != tl.float64:
        x = tl.where(x > 89.0, 89.0, x)  # exp(89) overflows to inf
    return exp_nonpositive(x, EXACT, SUBNORMAL=EXACT)


@triton.jit
def reciprocal(x, EXACT: tl.constexpr = True):
    """Returns 1 / x to 1 ULP for 2**-100 <= x <= 2**100, at half the cost of a division."""
    if x.dtype == tl.float64:
        y = 1.0 / x
    else:
        root = tl.rsqrt(x)
        y = root * root
        if EXACT:
            y = tl.fma(y, tl.fma(-x, y, 1.0), y)
    return y


@triton.jit
def polynomial(x, coefficients: tl.constexpr):
    """Evaluates a polynomial by Horner's rule; coefficients start with the highest power."""
    value = tl.full([], coefficients[0], x.dtype)
    for k in tl.static_range(1, len(coefficients)):
        value = value * x + coefficients[k]
    return value


@triton.jit
def tanh(x, EXACT: tl.constexpr = True):
    """Returns tanh(x) to 2 ULP: an odd polynomial if |x| < 0.625, else 1 - 2 / (1 + exp(2 |x|))."""
    size = tl.abs(x)
    if x.dtype == tl.float64:
        y = -2.0 * size
        series = tl.full([], 1.0, x.dtype)
        for k in tl.static_range(18, 1, -1):
            series = 1.0 + series * y * (1.0 / k)
        m = tl.where(y > -0.7, y * series, tl.exp(y) - 1.0)  # expm1(y)
        size = -m / (2.0 + m)
    else:
        z = x * x
        small = polynomial(
            z, (-0.00571704982, 0.0206505917, -0.0537435003, 0.133314908, -0.333332837)
        )
        e = exp_nonpositive(-2.0 * size, EXACT)
        large = 1.0 - 2.0 * e * reciprocal(1.0 + e, EXACT)
        size = tl.where(size < 0.625, size + size * z * small, large)
    return tl.where(x == 0.0, x, tl.where(x < 0.0, -size, size))  # keeps -0.0


@triton.jit
def log2_approximate(x):
    """Returns log2(x) with an error of 2**-22; tl.log2 takes 30 instructions on NVIDIA GPUs."""
    if INTERPRETED or not is_cuda():
        return tl.log2(x)
    return tl.inline_asm_elementwise(
        "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def log_near_1(f):
    """Returns log(1 + f) for |f| <= 1/8, with a relative error of 7e-6."""
    return f * polynomial(f, (-0.25316338, 0.33649129, -0.49998862, 0.99999381))


@triton.jit
def log(x, A: tl.constexpr = tl.float32, EXACT: tl.constexpr = True):
    """Returns log(x) to 1 ULP; near 1, the GPU's instruction has an error of up to 2**-22.

    With A = tl.float64, the result for a float32 x is float64, with an error of up to 2**-24; from
    x = 2 on, rounding to float32 would have a larger error.

    Decomposes x = (1 + f) 2**k with 2/3 <= 1 + f < 4/3. Returns -inf for 0, NaN for x < 0.
    """
    if x.dtype == tl.float64:
        log = tl.log(x)
    elif not EXACT:
        large = log2_approximate(x) * 0.6931471805599453
        log = tl.where(tl.abs(x - 1.0) < 0.125, log_near_1(x - 1.0), large)
    else:
        # A literal with fewer digits would make Triton compare in float64.
        subnormal = x < 1.1754943508222875e-38
        u = tl.where(subnormal, x * 8388608.0, x)
        bits = u.to(tl.int32, bitcast=True)
        k = (bits - 0x3F2AAAAB) & -0x800000  # k << 23, at the exponent bits
        f = (bits - k).to(tl.float32, bitcast=True) - 1.0
        k -= tl.where(subnormal, 23 << 23, 0)
        rest = polynomial(
            f,
            (-0.133117437, 0.140062273, -0.120781489, 0.140008256, -0.166895032,
             0.200107709, -0.249995068, 0.333332092, -0.5),
        )  # fmt: skip
        log = k.to(A) * 8.262958294867817e-08 + (f * f * rest + f).to(A)  # log(2) / 2**23
        log = tl.where((u > 0.0) & (u < float("inf")), log, u - tl.abs(tl.rsqrt(u)))
    return log


@triton.jit
def log1p(x, EXACT: tl.constexpr = True):
    """Returns log(1 + x) to 2 ULP, corrected for the rounding of 1 + x."""
    u = 1.0 + x
    if EXACT or x.dtype == tl.float64:
        corrected = tl.where(u < float("inf"), log(u) + (x - (u - 1.0)) / u, log(u))
        y = tl.where(u > 0.0, corrected, log(u))
    else:
        large = log2_approximate(u) * 0.6931471805599453
        y = tl.where(tl.abs(x) < 0.125, log_near_1(x), large)
    return y


@triton.jit
def softplus_nonpositive(x, EXACT: tl.constexpr = True):
    """Returns log(1 + exp(x)) for x <= 0 to 2 ULP; cheaper than log1p, as exp(x) is in [0, 1]."""
    y = exp_nonpositive(x, EXACT, SUBNORMAL=EXACT)
    if x.dtype == tl.float64:
        log = log1p(y)
    elif not EXACT:
        log = y * polynomial(
            y, (-0.0238691248, 0.101222217, -0.210048631, 0.325206659, -0.499361362, 0.999991598)
        )
    else:
        rest = polynomial(
            y,
            (-0.00324402517, 0.0198514629, -0.0569595359, 0.106036551, -0.153055921,
             0.196759388, -0.249541342, 0.333299637, -0.499999017),
        )  # fmt: skip
        log = y * y * rest + y
    return log


@triton.jit
def normal_cdf(x, EXACT: tl.constexpr):
    """Returns the cumulative distribution function of the standard normal distribution.

    If not EXACT, approximates log2 of the tail below -|x| by a polynomial; the relative error is
    6e-6 near 0, where results are large, and 2e-4 at -13.
    """
    if EXACT:
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    else:
        size = tl.abs(x)
        log2_tail = polynomial(
            tl.where(size > 16.0, 16.0, size),
            (-2.11011364e-09, 1.52696359e-07, -4.83653639e-06, 8.88746217e-05, -0.00106317201,
             0.00886523817, -0.0544763766, -0.458105296, -1.15134382, -0.999991477),
        )  # fmt: skip
        tail = tl.exp2(log2_tail)
        cdf = tl.where(x < 0.0, tail, 1.0 - tail)
    return cdf


@triton.jit
def widened(x):
    """Converts half precision to float32."""
    return x.to(tl.float64 if x.dtype == tl.float64 else tl.float32)
