"""Arithmetic of one element, one latent and one source, shared by all Triton kernels; all of it in fp32.

Comparisons are written so that a NaN passes through: `where(a < b, b, a)` keeps a NaN in a.
"""

import triton
import triton.language as tl

# Members of kernels.reference.Member
LINEAR = tl.constexpr(0)
EXPONENTIAL = tl.constexpr(1)
HINGE = tl.constexpr(2)
BATCH_HINGE = tl.constexpr(3)


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
    return 0.5 * (tl.exp(ratio) + d * d * tl.exp(-prior_logvar) - 1.0 - ratio)


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
