"""Arithmetic of one element, one latent and one source, shared by all Triton kernels; all of it in fp32.

Comparisons are written so that a NaN passes through: `where(a < b, b, a)` keeps a NaN in a.
"""

import torch
import triton
import triton.language as tl

from . import _launch

# Members of kernels.reference.Member
LINEAR = tl.constexpr(0)
EXPONENTIAL = tl.constexpr(1)
HINGE = tl.constexpr(2)
BATCH_HINGE = tl.constexpr(3)


def product_dtype(dtype: torch.dtype) -> tl.dtype:
    """What matrix products of `dtype` get; Triton's interpreter multiplies the bits of bfloat16."""
    return getattr(tl, str(torch.float32 if _launch.INTERPRET else dtype).removeprefix("torch."))


@triton.jit
def clamped(value, low, high):
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def log1p(value):
    """log(1 + value) for value > -1 without the cancellation of the naive form."""
    total = 1.0 + value
    exact = total == 1.0
    return tl.where(exact, value, tl.log(total) * value / tl.where(exact, 1.0, total - 1.0))


@triton.jit
def expm1(value):
    """exp(value) - 1 without the cancellation of the naive form near 0."""
    total = tl.exp(value)
    near = tl.abs(value) < 0.5
    exact = total == 1.0
    ratio = value / tl.log(tl.where(near & (total != 1.0), total, 2.0))
    return tl.where(near, tl.where(exact, value, (total - 1.0) * ratio), total - 1.0)


@triton.jit
def uniform(bits):
    """[0, 1) of 32 random bits, read as a signed number without its sign."""
    signed = bits.to(tl.int32, bitcast=True)
    return tl.where(signed < 0, -signed - 1, signed).to(tl.float32) * 4.6566127342e-10


@triton.jit
def normal(seed, index):
    """Standard normal numbers at `index` of the Philox stream of `seed`, as `philox.normal` defines them."""
    first, second, _, _ = tl.randint4x(seed, index)
    first = uniform(first)
    half = 3.14159265358979 * (uniform(second) - 0.5)
    # -cos(2 half) by the sine of the half angle: a polynomial, since tl.cos spills for large arguments
    s = half * half
    sine = half * (1 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880 - s / 39916800)))))
    radius = tl.sqrt(-2.0 * tl.log(tl.where(first < 1e-7, 1e-7, first)))
    return radius * (2.0 * sine * sine - 1.0)


@triton.jit
def cut_log(value):
    """Logarithms are cut at -100, as in torch.nn.functional.binary_cross_entropy."""
    return tl.where(value < -100.0, -100.0, value)


@triton.jit
def element_error(x, y, KIND: tl.constexpr, delta):
    """Error of prediction y against target x."""
    d = y - x
    if KIND == "sse":
        return d * d
    elif KIND == "l1":
        return tl.abs(d)
    elif KIND == "huber":
        size = tl.abs(d)
        return tl.where(size > delta, delta * (size - 0.5 * delta), 0.5 * d * d)
    elif KIND == "bce":
        log_y, log_rest = cut_log(tl.log(y)), cut_log(log1p(-y))
        return inside(x, -(x * log_y + (1.0 - x) * log_rest))
    else:
        rest = log1p(tl.exp(-tl.abs(y)))
        return inside(x, tl.where(y < 0.0, 0.0, y) - y * x + rest)


@triton.jit
def inside(x, value):
    """`value`, NaN where the target of a binary cross-entropy is no probability."""
    return tl.where((x >= 0.0) & (x <= 1.0), value, float("nan"))


@triton.jit
def target_gradient(x, y, KIND: tl.constexpr, delta):
    if KIND == "bce":
        log_y, log_rest = cut_log(tl.log(y)), cut_log(log1p(-y))
        return inside(x, log_rest - log_y)
    elif KIND == "bce_logits":
        return inside(x, -y)
    else:
        return -prediction_gradient(x, y, KIND, delta)


@triton.jit
def prediction_gradient(x, y, KIND: tl.constexpr, delta):
    d = y - x
    if KIND == "sse":
        return 2.0 * d
    elif KIND == "l1":
        return tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, 0.0))
    elif KIND == "huber":
        return clamped(d, -delta, delta)
    elif KIND == "bce":
        slope = (1.0 - y) * y
        return inside(x, d / tl.where(slope < 1e-12, 1e-12, slope))
    else:
        # exp of a non-positive number only
        e = tl.exp(-tl.abs(y))
        return inside(x, tl.where(y < 0.0, e, 1.0) / (1.0 + e) - x)


@triton.jit
def kl_element(mean, logvar, prior_mean, prior_logvar):
    d = mean - prior_mean
    ratio = logvar - prior_logvar
    return 0.5 * (expm1(ratio) - ratio + d * d * tl.exp(-prior_logvar))


@triton.jit
def member_statistic(u, q, MEMBER: tl.constexpr):
    if MEMBER == EXPONENTIAL:
        return tl.exp(-q * tl.where(u < 0.0, 0.0, u))
    elif MEMBER == HINGE or MEMBER == BATCH_HINGE:  # noqa: SIM109
        return tl.where(q - u < 0.0, 0.0, q - u)
    else:
        return 1.0


@triton.jit
def member_slope(u, statistic, p, q, MEMBER: tl.constexpr):
    """Derivative of a sample's share by u; `statistic` is `member_statistic` of the same u."""
    if MEMBER == EXPONENTIAL:
        return -p * q * statistic
    elif MEMBER == HINGE or MEMBER == BATCH_HINGE:  # noqa: SIM109
        return tl.where(u < q, -p, 0.0)
    else:
        return 1.0
