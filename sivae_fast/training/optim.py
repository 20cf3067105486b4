"""Optimizers: one for the encoder, one for the decoder.

The published rule is Adam with beta1 = 0 and eps added to the *uncorrected* root of the second moment:

    p <- p - lr * f * sqrt(1 - beta2^t) * g / (sqrt(v) + eps)

which is any Adam whose eps is eps / sqrt(1 - beta2^t) at step t. So every implementation (PyTorch fused,
DeepSpeed, apex) follows it exactly through a hook that sets eps before each step. The factor f of a parameter
(equalised learning rate) is the factor of its parameter group.

A number of the host would be frozen into a captured graph. There `DeviceAdam` takes over, which has the step
count and the rates on the device.
"""

from __future__ import annotations

import importlib
import math
from collections import defaultdict

import torch

from sivae_fast.config import ConfigError
from sivae_fast.contract import Model

#: What Adam keeps of each parameter beside its steps.
MOMENTS = ("exp_avg", "exp_avg_sq")

IMPLEMENTATIONS = ("torch", "deepspeed", "apex")


def parameter_groups(model: Model, side: str) -> list[dict]:
    """Parameters of one side ("encoder" or "decoder"), one group for each learning-rate factor.

    Each group has `params`, their `names` in the model and `factor`.
    """
    factors = model.learning_rate_factors()
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_factor: dict[float, list] = defaultdict(list)
    modules = model.encoder_modules() if side == "encoder" else model.decoder_modules()
    for module in modules:
        for parameter in module.parameters():
            by_factor[factors.get(names[parameter], 1.0)].append(parameter)
    return [
        {"params": params, "names": [names[p] for p in params], "factor": factor}
        for factor, params in sorted(by_factor.items())
    ]


def make_optimizer(
    groups: list[dict],
    *,
    implementation: str = "torch",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    published_eps: bool = False,
    on_device: bool = False,
) -> torch.optim.Optimizer:
    """Adam over `groups`. published_eps: eps is added to the uncorrected root (module docstring).

    on_device: `DeviceAdam`, for captured graphs; PyTorch's implementation only.
    Raises ConfigError when an implementation cannot be constructed here; it says what to use instead.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"optim.implementation is {implementation!r}, must be one of {IMPLEMENTATIONS}")
    device = groups[0]["params"][0].device
    if on_device:
        return DeviceAdam(groups, betas=tuple(betas), eps=eps, published_eps=published_eps)
    common = {"lr": 0.0, "betas": tuple(betas), "eps": eps}
    if implementation == "torch":
        optimizer = torch.optim.Adam(groups, fused=_fused_works(device), **common)
    else:
        optimizer = _construct(implementation, groups, common)
    for group in optimizer.param_groups:
        group["t"] = 0
    optimizer.register_step_pre_hook(lambda self, args, kwargs: _count(self, eps, published_eps))
    return optimizer


class DeviceAdam(torch.optim.Optimizer):
    """PyTorch's fused Adam, with one step count and the learning rates in memory of the device.

    A captured step counts by itself and follows `set_rates`. With `published_eps` the correction of the rates
    is computed on the device, too, and PyTorch's kernel is told an endless number of steps, after which it
    corrects nothing.
    """

    def __init__(
        self, groups: list[dict], *, betas: tuple[float, float], eps: float, published_eps: bool = False
    ):
        super().__init__(groups, {"betas": betas, "eps": eps})
        device = self.param_groups[0]["params"][0].device
        self._betas, self._eps, self._published = betas, eps, published_eps
        self._steps = torch.zeros((), device=device)
        self._endless = torch.full((), math.inf, device=device)
        self._known = [0.0] * len(self.param_groups)
        self._rates = torch.zeros(len(self.param_groups), dtype=torch.float64, device=device)
        # In what the kernel reads: float32 on a GPU, any precision on a CPU.
        kind = torch.float64 if device.type == "cpu" else torch.float32
        self._used = torch.zeros_like(self._rates, dtype=kind)
        for group in self.param_groups:
            group["t"] = self._steps

    def set_rates(self, rates: list[float]) -> None:
        """The learning rate of each group from now on; does not wait for the device."""
        if rates == self._known:
            return
        self._known = rates
        for i, rate in enumerate(rates):
            self._rates[i].fill_(rate)
            self._used[i].fill_(rate)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        (beta1, beta2), eps = self._betas, self._eps
        self._steps += 1
        if self._published:
            steps = self._steps.double()
            self._used.copy_(self._rates * ((1 - beta2**steps).sqrt() / (1 - beta1**steps)))
        count = self._endless if self._published else self._steps
        for group, rate in zip(self.param_groups, self._used.unbind(), strict=True):
            trained = [p for p in group["params"] if p.grad is not None]
            moments = [self._moments(p) for p in trained]
            if trained:
                torch._fused_adam_(
                    trained,
                    [p.grad for p in trained],
                    [first for first, _ in moments],
                    [second for _, second in moments],
                    [],
                    [count] * len(trained),
                    lr=rate,
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=0.0,
                    eps=eps,
                    amsgrad=False,
                    maximize=False,
                )

    def _moments(self, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.state[parameter]
        if not state:
            state |= {name: torch.zeros_like(parameter) for name in MOMENTS}
        return tuple(state[name] for name in MOMENTS)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the rate of all groups, times their factors."""
    if isinstance(optimizer, DeviceAdam):
        optimizer.set_rates([rate * group["factor"] for group in optimizer.param_groups])
        return
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def steps_of(optimizer: torch.optim.Optimizer) -> int:
    """Steps since the state was cleared; waits for the device where they are counted there."""
    return int(optimizer.param_groups[0]["t"])


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["t"], torch.Tensor):
            group["t"].fill_(steps)
        else:
            group["t"] = steps


def _count(optimizer: torch.optim.Optimizer, eps: float, published_eps: bool) -> None:
    for group in optimizer.param_groups:
        group["t"] += 1
        if published_eps:
            group["eps"] = eps / (1 - group["betas"][1] ** group["t"]) ** 0.5


def _fused_works(device: torch.device) -> bool:
    return device.type in ("cuda", "cpu")


def _construct(implementation: str, groups: list[dict], common: dict) -> torch.optim.Optimizer:
    """A third-party fused Adam, probed by construction: a Python-only build can be imported but no more."""
    module = {"deepspeed": "deepspeed.ops.adam", "apex": "apex.optimizers"}[implementation]
    device = groups[0]["params"][0].device
    if device.type != "cuda":
        raise ConfigError(
            f"optim.implementation={implementation} needs a GPU, parameters are on {device}: use torch"
        )
    try:
        fused = importlib.import_module(module).FusedAdam
        optimizer = fused(groups, adam_w_mode=False, **common)
    except Exception as error:
        raise ConfigError(
            f"optim.implementation={implementation} cannot be used here ({error}): use torch"
        ) from error
    if not follows_torch(fused, device):
        raise ConfigError(
            f"optim.implementation={implementation} differs from PyTorch's Adam here: use torch"
        )
    return optimizer


def follows_torch(fused: type, device: torch.device, steps: int = 4) -> bool:
    """Whether `fused` equals torch.optim.Adam when a tensor joins late, as in progressive growing.

    Implementations that count steps per group rather than per tensor fail this.
    """

    def run(kind: type, **extra) -> list[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        weights = [torch.randn(64, device=device, generator=generator).requires_grad_() for _ in range(2)]
        optimizer = kind(weights, lr=1e-2, betas=(0.0, 0.99), **extra)
        for step in range(steps):
            for index, weight in enumerate(weights):
                gradient = torch.randn(64, device=device, generator=generator)
                weight.grad = gradient if index == 0 or step >= steps // 2 else None
            optimizer.step()
        return weights

    pairs = zip(run(torch.optim.Adam), run(fused, adam_w_mode=False), strict=True)
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)
