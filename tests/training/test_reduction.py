"""Gradients that are averaged over two ranks while the backward pass goes on."""

import multiprocessing
import os
import tempfile
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sivae_fast.config import make_config
from sivae_fast.growth import Stage
from sivae_fast.training import reduction
from sivae_fast.training.iteration import Iteration
from sivae_fast.training.reduction import Reduction


def networks() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(8, 8) for _ in range(4))


def loss_of(layers, used, x, log=None):
    for i in used:
        x = layers[i](x)
        if log is not None:
            x.register_hook(lambda gradient, i=i: log.append(f"layer {i}") or gradient)
        x = x.tanh()
    return x.square().sum()


#: The layers of each iteration: the set changes, grows and shrinks as with levels of detail.
ITERATIONS = ((0, 1, 2, 3), (0, 1, 2, 3), (1, 2), (1, 2), (0, 1, 2), (0, 1, 2))


def one_rank(rank: int, file: str, answers) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    reduction.BUCKET_BYTES = 8 * 9 * 4  # one layer
    layers, log = networks(), []
    mine = Reduction([*layers.parameters()])
    send = dist.all_reduce
    dist.all_reduce = lambda flat, **options: log.append(f"sent {flat.numel()}") or send(flat, **options)
    found = []
    for number, used in enumerate(ITERATIONS):
        x = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(number))[rank]
        loss_of(layers, used, x[0]).backward()
        log.clear()  # nothing may have been sent by then
        if number != 3:  # begin() makes it earlier, never different
            mine.begin()
        loss_of(layers, used, x[1], log).backward()
        log.append("backward is over")
        mine.finish()
        found.append(([None if p.grad is None else p.grad.clone() for p in layers.parameters()], [*log]))
        for parameter in layers.parameters():
            parameter.grad = None
    if rank == 0:
        answers.put([([None if g is None else g.tolist() for g in grads], log) for grads, log in found])
    dist.barrier()
    dist.destroy_process_group()


def of_two_ranks(program):
    """What `program` of rank 0 answers."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "meeting")
        ranks = [context.Process(target=program, args=(rank, file, answers)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        try:
            return answers.get(timeout=120)
        finally:
            for rank in ranks:
                rank.join(20)
                rank.kill()


@pytest.fixture(scope="module")
def found():
    return of_two_ranks(one_rank)


@pytest.mark.parametrize("number", range(len(ITERATIONS)))
def test_gradients_are_means_over_ranks_and_sums_over_passes(found, number):
    layers, used = networks(), ITERATIONS[number]
    x = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(number))
    for rank in range(2):
        for part in x[rank]:
            (loss_of(layers, used, part) / 2).backward()
    for parameter, gradient in zip(layers.parameters(), found[number][0], strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(torch.tensor(gradient), parameter.grad, rtol=1e-5, atol=1e-6)


def test_a_bucket_is_sent_while_layers_below_are_differentiated(found):
    second = found[1][1]
    assert second.index("sent 72") < second.index("layer 1") < second.index("backward is over")
    assert [line for line in second if line.startswith("sent")] == ["sent 72"] * 4
    assert found[0][1].index("backward is over") < found[0][1].index("sent 72")  # nothing is known yet


def test_layers_that_leave_and_join_are_sent_once(found):
    for number, used in enumerate(ITERATIONS):
        sent = [int(line.split()[1]) for line in found[number][1] if line.startswith("sent")]
        assert sum(sent) == 72 * len(used)
    without_begin = found[3][1]
    assert without_begin.index("backward is over") < without_begin.index("sent 72")


class Copies(TorchDispatchMode):
    """Records copies of single tensors."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("clone", "copy_", "_to_copy"):
            self.found.append((str(function), tuple(args[0].shape)))
        return function(*args, **(kwargs or {}))


def test_gradients_are_sent_as_they_lie_in_memory(monkeypatch):
    def doubled(flat, async_op):
        flat *= 2
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_reduce", doubled)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 1, 3))
    layers.to(memory_format=torch.channels_last)
    layers(torch.randn(2, 3, 8, 8)).sum().backward()
    expected = [p.grad / 2 for p in layers.parameters()]
    with Copies() as copies:
        Reduction([*layers.parameters()]).finish()
    assert not copies.found
    for parameter, gradient in zip(layers.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient) and parameter.grad.stride() == gradient.stride()


def one_rank_of_training(rank: int, file: str, answers) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    reduction.BUCKET_BYTES = 4000
    model = {
        "resolution": 8, "start_channels": 4, "max_channels": 8, "latent_size": 8, "mapping_layers": 2
    }  # fmt: skip
    objective = {"beta_neg": 16.0, "scale": 0.01}
    config = make_config({"model": model, "objective": objective, "growth": {"images_per_level": 0}})
    training, early = Iteration(config, (3, 8, 8), rank, 2, torch.device("cpu")), []
    for engine in training.engines.values():
        mine, finish = engine.reduction, engine.reduction.finish
        engine.reduction.finish = lambda m=mine, f=finish: (early.append((m._next, len(m._buckets))), f())
    for _ in range(2):
        training.iterate(torch.randn(4, 3, 8, 8), Stage(1, 1.0, 8, 1e-3, 16.0))
    if rank == 0:
        answers.put(early)
    dist.barrier()
    dist.destroy_process_group()


def test_all_is_on_its_way_when_the_backward_pass_of_a_training_iteration_ends():
    """Freezing and thawing the networks between the phases takes no hook away."""
    first_encoder, first_decoder, encoder, decoder = of_two_ranks(one_rank_of_training)
    assert first_encoder == first_decoder == (0, 0)
    assert encoder[0] == encoder[1] > 1 and decoder[0] == decoder[1] > 1
