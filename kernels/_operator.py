"""A function with its gradient as two operators that torch.compile does not look into."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

_LIBRARY = torch.library.Library("sivae_fast", "FRAGMENT")


class FusedOperator:
    """sivae_fast::<name> and sivae_fast::<name>_backward, functional, on every device.

    forward(tensors, constants, plan, numbers, kind) -> outputs
        tensors receive gradients, constants do not; the first `differentiable` outputs have gradients, the
        others are statistics or what the backward pass needs.
    backward(upstream, tensors, constants, outputs, needs, plan, numbers, kind) -> gradients
        upstream: gradients by the differentiable outputs that have one, `needs` marks first which of them
        do and then which tensors want a gradient; `outputs` are those without gradients. Returns the wanted
        gradients.
    fake and backward_fake are the same without data, for tracing. A linear function needs none of its
    `tensors` for its gradient: without keeps_tensors `backward` gets an empty list of them.

    Registered without torch.library.custom_op, whose wrapper takes twice the time a call on the CPU.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., list[Tensor]],
        fake: Callable[..., list[Tensor]],
        backward: Callable[..., list[Tensor]],
        backward_fake: Callable[..., list[Tensor]],
        differentiable: int = 1,
        keeps_tensors: bool = True,
    ):
        self.forward, self.backward, self.differentiable = forward, backward, differentiable
        self.keeps_tensors = keeps_tensors
        self.operator = _define(name, _FORWARD, forward, fake)
        self.backward_operator = _define(f"{name}_backward", _BACKWARD, backward, backward_fake)
        torch.library.register_autograd(self.operator, self._listed_backward, setup_context=self._setup)
        torch.library.register_autograd(self.backward_operator, refuse_second_derivative)

    def __call__(
        self,
        tensors: Sequence[Tensor],
        constants: Sequence[Tensor],
        plan: Sequence[int],
        numbers: Sequence[float],
        kind: str = "",
    ) -> Sequence[Tensor]:
        settings = (plan, numbers, kind)
        if torch.compiler.is_compiling():
            return self.operator(tensors, constants, *settings)
        if torch._C._are_functorch_transforms_active():
            refuse_transform()
        return _Eager.apply(self, settings, len(constants), *constants, *tensors)

    def _setup(self, ctx, inputs, output) -> None:
        tensors, constants, *settings = inputs
        self.save(ctx, tensors, constants, settings, output)

    def save(self, ctx, tensors, constants, settings, output) -> None:
        rest = output[self.differentiable :]
        tensors = tensors if self.keeps_tensors else ()
        ctx.save_for_backward(*tensors, *constants, *rest)
        ctx.sizes, ctx.settings = (len(tensors), len(constants)), settings
        ctx.mark_non_differentiable(*rest)
        ctx.set_materialize_grads(False)

    def gradients(self, ctx, upstream: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
        upstream = upstream[: self.differentiable]
        if not any(needs) or all(gradient is None for gradient in upstream):
            return [None] * len(needs)
        saved, (tensors, constants) = ctx.saved_tensors, ctx.sizes
        parts = saved[:tensors], saved[tensors : tensors + constants], saved[tensors + constants :]
        marks = [*(gradient is not None for gradient in upstream), *needs]
        given = [gradient for gradient in upstream if gradient is not None]
        direct = _plain((*saved, *given)) and not torch.is_grad_enabled()
        run = self.backward if direct else self.backward_operator
        wanted = iter(run(given, *parts, marks, *ctx.settings))
        return [next(wanted) if needed else None for needed in needs]

    def _listed_backward(self, ctx, upstream: Sequence[Tensor | None]):
        needs, constants = ctx.needs_input_grad[:2]
        # To PyTorch an empty list is one of tensors, whatever else it could hold.
        plan, numbers = (None if len(values) else [] for values in ctx.settings[:2])
        return self.gradients(ctx, upstream, needs), [None] * len(constants), plan, numbers, None


class _Eager(torch.autograd.function._SingleLevelFunction):
    """The operators outside torch.compile, without what autograd and dispatch over lists of tensors cost.

    For small batches on the CPU that is more than the arithmetic.
    """

    @staticmethod
    def forward(ctx, fused: FusedOperator, settings, constants: int, *tensors):
        constants, tensors = tensors[:constants], tensors[constants:]
        run = fused.forward if _plain(tensors) else fused.operator
        with torch._C._AutoDispatchBelowAutograd():  # this function is the autograd
            output = run(tensors, constants, *settings)
        ctx.fused = fused
        fused.save(ctx, tensors, constants, settings, output)
        return tuple(output)

    @staticmethod
    def jvp(ctx, *_):
        refuse_transform()

    @staticmethod
    def backward(ctx, *upstream):
        constants = ctx.sizes[1]
        skipped = 3 + constants
        nodes = [node for node, _ in ctx.next_functions[constants:]]  # of tensors alone
        needs = are_wanted(nodes, ctx.needs_input_grad[skipped:])
        return *[None] * skipped, *ctx.fused.gradients(ctx, upstream, needs)


def are_wanted(nodes: Sequence, needs: Sequence[bool]) -> list[bool]:
    """Which of the `needs` the running backward pass uses, by their graph nodes; all that it cannot tell.

    A pass that carries a gradient through the decoder to its latents leaves out the weights' gradients; the
    operators of PyTorch find that out in the same way. Under `torch.autograd.grad` the question raises
    for leaves, and an error for each is slow beside a small loss: after the first, leaves count as wanted.
    """
    found, tells = [], True
    for node, wanted in zip(nodes, needs, strict=True):
        if wanted and (tells or node.next_functions):
            try:
                wanted = torch._C._will_engine_execute_node(node)
            except (AttributeError, RuntimeError):
                tells = False
        found.append(wanted)
    return found


_PLAIN = {Tensor, Parameter}
_FORWARD = "(Tensor[] tensors, Tensor[] constants, int[] plan, float[] numbers, str kind) -> Tensor[]"
_BACKWARD = (
    "(Tensor[] upstream, Tensor[] tensors, Tensor[] constants, Tensor[] outputs, bool[] needs, int[] plan, "
    "float[] numbers, str kind) -> Tensor[]"
)


def _define(name: str, schema: str, function: Callable, fake: Callable) -> torch._ops.OpOverload:
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    operator = getattr(torch.ops.sivae_fast, name).default
    torch.library.register_fake(operator, fake)
    return operator


def _plain(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing but autograd listens to operators: no tracing mode, no tensor subclass."""
    if torch._C._len_torch_dispatch_stack():
        return False
    return {*map(type, tensors)} <= _PLAIN


def refuse_transform():
    raise RuntimeError(
        "the fused operators know backward() and torch.autograd.grad alone, neither forward-mode derivatives "
        "nor torch.func (grad, vjp, jvp, jacrev, jacfwd, hessian, vmap): use the formulas of "
        "sivae_fast.kernels.reference or kernels.style.reference"
    )


def refuse_second_derivative(*_):
    raise RuntimeError(
        "second derivatives of the fused operators do not exist (create_graph=True, gradient penalties, "
        "torch.func.hessian): use the formulas of sivae_fast.kernels.reference or kernels.style.reference"
    )
