"""Engines: backward, gradient reduction and optimizer step of one side (encoder or decoder).

Two engines train the two sides. `TorchEngine` needs PyTorch alone; `DeepSpeedEngine` adds ZeRO 1 and 2.
The networks are called directly, never through an engine; the side that is not trained has
`requires_grad` off; gradients are made by `engine.backward` only. Other ways of combining two optimizers
with ZeRO were measured to be silently wrong (frozen halves stepped, ranks drifting apart), so there is no
option for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sivae_fast.contract import Model
from sivae_fast.training.agreement import reasons_shared
from sivae_fast.training.meeting import meeting_point
from sivae_fast.training.optim import MOMENTS, parameter_groups, set_steps, steps_of
from sivae_fast.training.reduction import Reduction


class TorchEngine:
    """Plain PyTorch: gradients averaged over ranks while the backward pass goes on."""

    def __init__(self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer):
        self.parameters, self.optimizer = parameters, optimizer
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.reduction = Reduction([*parameters.values()]) if several else None

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Adds the gradients of a scalar loss; call once for each micro-batch.

        last: no other micro-batch follows before `step`.
        """
        if last and self.reduction:
            self.reduction.begin()
        loss.backward()

    def step(self) -> None:
        """Averages the gradients over ranks, updates the parameters and clears the gradients."""
        if self.reduction:
            self.reduction.finish()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def clear_state(self) -> None:
        """Forgets moments and step counts, as at a switch of the level of detail."""
        self.optimizer.state.clear()
        set_steps(self.optimizer, 0)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Full moments by parameter name, {} before the first step; a collective call on every rank."""
        return {
            name: {key: self.optimizer.state[parameter][key] for key in MOMENTS}
            for name, parameter in self.parameters.items()
            if parameter in self.optimizer.state
        }

    def steps(self) -> int:
        """Optimizer steps since the state was cleared."""
        return steps_of(self.optimizer)

    def left_out(self) -> bool:
        """Whether a step was left out since the state was loaded, for a gradient that was not finite."""
        return False  # it is made, and the next losses tell

    def load_state(self, state: dict[str, dict[str, Tensor]], steps: int) -> None:
        self.clear_state()
        set_steps(self.optimizer, steps)
        for name, moments in state.items():
            parameter = self.parameters[name]
            self.optimizer.state[parameter] = {
                "step": _step_tensor(steps, parameter.device),
                # In the memory layout of the parameter: fused Adam walks both as flat memory.
                **{key: torch.empty_like(parameter).copy_(moments[key]).detach() for key in MOMENTS},
            }

    def parameters_changed(self) -> None:
        """To be called after parameters were written from outside."""


class DeepSpeedEngine:
    """DeepSpeed with ZeRO 0, 1 or 2 over float32 weights."""

    def __init__(
        self,
        modules: nn.Module,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        zero: int,
        settings: dict,
    ):
        deepspeed = _import_deepspeed()
        self.parameters, self.optimizer, self.zero = parameters, optimizer, zero
        self._left_out_before = 0
        for parameter in parameters.values():  # DeepSpeed flattens weights and cannot keep channels last
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        self._engine, *_ = deepspeed.initialize(
            model=modules,
            optimizer=optimizer,
            config=deepspeed_config(zero, settings),
            dist_init_required=False,
        )

    def backward(self, loss: Tensor, last: bool = True) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        self._engine.step()

    def clear_state(self) -> None:
        self.optimizer.state.clear()
        set_steps(self.optimizer, 0)

    def steps(self) -> int:
        return steps_of(self.optimizer)

    def state(self) -> dict[str, dict[str, Tensor]]:
        if not self.zero:
            return TorchEngine.state(self)
        if not self.steps():
            return {}
        from deepspeed.utils import safe_get_full_optimizer_state as full

        self._link_state()
        return {
            name: {key: full(parameter, key) for key in MOMENTS}
            for name, parameter in self.parameters.items()
        }

    def left_out(self) -> bool:
        # ZeRO 1 and 2 only warn: weights stay finite, and a network might never be trained again.
        return self._engine.skipped_steps > self._left_out_before

    def load_state(self, state: dict[str, dict[str, Tensor]], steps: int) -> None:
        self._left_out_before = self._engine.skipped_steps
        if not self.zero:
            TorchEngine.load_state(self, state, steps)
            return
        from deepspeed.utils import safe_set_full_optimizer_state as set_full

        self.clear_state()
        set_steps(self.optimizer, steps)
        if not state:
            return
        for flat in self._engine.optimizer.single_partition_of_fp32_groups:
            self.optimizer.state[flat] = {
                "step": _step_tensor(steps, flat.device),
                **{key: torch.zeros_like(flat) for key in MOMENTS},
            }
        self._link_state()
        for name, moments in state.items():
            for key in MOMENTS:
                set_full(self.parameters[name], moments[key], key)

    def _link_state(self) -> None:
        """DeepSpeed links moments to parameters once, after the first parameter group's first step.

        The other groups, and every group after `clear_state`, have to be linked again. Private names: a test
        guards them.
        """
        self._engine.optimizer._hp_optimizer_states_linked = False
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def parameters_changed(self) -> None:
        if self.zero:
            from deepspeed.utils import safe_set_full_fp32_param

            for parameter in self.parameters.values():
                safe_set_full_fp32_param(parameter, parameter.detach())


def make_engine(
    model: Model, side: str, make_optimizer, *, kind: str, zero: int = 0, settings: dict | None = None
) -> TorchEngine | DeepSpeedEngine:
    """Engine of one side ("encoder" or "decoder"); `make_optimizer(groups)` builds its optimizer."""
    groups = parameter_groups(model, side)
    own = {name for group in groups for name in group["names"]}
    parameters = {name: p for name, p in model.named_parameters() if name in own}
    optimizer = make_optimizer(groups)
    if kind == "torch":
        return TorchEngine(parameters, optimizer)
    modules = model.encoder_modules() if side == "encoder" else model.decoder_modules()
    return DeepSpeedEngine(nn.ModuleList(modules), parameters, optimizer, zero=zero, settings=settings or {})


def deepspeed_config(zero: int, extra: dict) -> dict:
    """DeepSpeed's settings. Clipping is written out because leaving it out means clipping at 1.0."""
    return {
        **extra,
        "train_micro_batch_size_per_gpu": 1,  # only ratios of batch sizes enter DeepSpeed's arithmetic
        "managed_gradient_accumulation": False,
        "gradient_clipping": 0.0,
        "zero_optimization": {**extra.get("zero_optimization", {}), "stage": zero},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def bucket_bytes(settings: dict) -> int:
    """Memory of the buffers in which two DeepSpeed engines with ZeRO 1 or 2 reduce gradients, in float32."""
    zero = settings.get("zero_optimization", {})
    buffers = 2 if zero.get("overlap_comm") else 1
    return 2 * buffers * 4 * int(zero.get("reduce_bucket_size", 500_000_000))


def check_engine(kind: str, zero: int, settings: dict) -> None:
    """Refuses combinations that are wrong without a message; names the option and what is accepted."""
    if kind == "torch" and zero:
        raise ValueError(f"engine.zero={zero} needs engine.kind=deepspeed; the torch engine has zero=0 only")
    if zero not in (0, 1, 2):
        raise ValueError(
            f"engine.zero={zero}: ZeRO 0, 1 and 2 are accepted. Stage 3 applies stale gradients to levels of "
            "detail that left the graph, and saves little for networks of this size"
        )
    for key in ("bf16", "fp16", "gradient_clipping", "torch_autocast", "optimizer"):
        if key in settings:
            raise ValueError(
                f"engine.deepspeed.{key} is not accepted: with two engines it was measured to differ "
                "silently from plain training. Use train.precision=bf16 for autocast over float32 weights"
            )


def place() -> tuple[int, int, torch.device]:
    """(rank, world, device) of this process, under deepspeed, torchrun or plain python."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if not torch.cuda.is_available():
        return rank, world, torch.device("cpu")
    return rank, world, torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def distributed(kind: str, timeout: int) -> Iterator[tuple[int, int, torch.device]]:
    """`place` of this process, in a process group where there are several.

    timeout: seconds after which a rank that waits for another one gives up. Raises RankFailed for that, and
    where another rank is lost.
    """
    rank, world, device = place()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit, failed = timedelta(seconds=timeout), True
    try:
        with reasons_shared(rank, timeout):
            if world > 1 or kind == "deepspeed":
                os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
                backend = "nccl" if device.type == "cuda" else "gloo"
                store = meeting_point(rank, world, limit)
                dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=world)
            yield rank, world, device
        failed = False
    finally:
        # NCCL's end waits for collectives that a lost rank never joins; the process is about to end anyway.
        if dist.is_initialized() and not (failed and dist.get_backend() == "nccl"):
            dist.destroy_process_group()


def deepspeed_missing() -> str | None:
    """Why DeepSpeed cannot be used, or None."""
    try:
        _import_deepspeed()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _import_deepspeed():
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")
    import deepspeed
    import deepspeed.ops

    # Building this op takes 50 s at start-up and serves inference only.
    if isinstance(getattr(deepspeed.ops, "__compatible_ops__", None), dict):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    if dist.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def _step_tensor(steps: int, device: torch.device) -> Tensor:
    return torch.tensor(float(steps), dtype=torch.float32, device=device)
