"""The published optimizer rule, the equalised learning rate, and averaging."""

import copy
import types

import pytest
import torch

from sivae_fast.models.style import StyleModel
from sivae_fast.training import averaging
from sivae_fast.training.averaging import Average
from sivae_fast.training.engine import TorchEngine
from sivae_fast.training.optim import follows_torch, make_optimizer, parameter_groups, set_learning_rate


def small_model() -> StyleModel:
    torch.manual_seed(0)
    return StyleModel(16, start_channels=4, max_channels=8, latent_size=8, mapping_layers=2).double()


def test_published_rule_with_factors():
    """v <- 0.99 v + 0.01 g^2; p <- p - lr f sqrt(1 - 0.99^t) g / (sqrt(v) + eps); t since the clearing."""
    model = small_model()
    groups = parameter_groups(model, "decoder")
    optimizer = make_optimizer(groups, betas=(0.0, 0.99), eps=1e-3, published_eps=True)
    set_learning_rate(optimizer, 0.01)
    names = [name for group in groups for name in group["names"]]
    parameters = dict(model.named_parameters())
    engine = TorchEngine({name: parameters[name] for name in names}, optimizer)
    factors = model.learning_rate_factors()
    expected = {name: parameters[name].detach().clone() for name in names}
    random = torch.Generator().manual_seed(1)
    for steps in (3, 2):
        moments = {name: torch.zeros_like(expected[name]) for name in names}
        for t in range(1, steps + 1):
            for name in names:
                gradient = torch.randn(expected[name].shape, generator=random, dtype=torch.float64) * 1e-3
                parameters[name].grad = torch.empty_like(parameters[name]).copy_(gradient)
                moments[name] = 0.99 * moments[name] + 0.01 * gradient**2
                step = 0.01 * factors.get(name, 1.0) * (1 - 0.99**t) ** 0.5
                expected[name] -= step * gradient / (moments[name].sqrt() + 1e-3)
            engine.step()
        engine.clear_state()
    for name in names:
        torch.testing.assert_close(parameters[name].detach(), expected[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)])
def test_counting_on_the_device_is_the_same_rule(published, betas):
    """Two factors, a change of the rate, a cleared state; in float64."""

    def run(on_device):
        random = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=random, dtype=torch.float64)
        weights = [draw(5, 7).requires_grad_() for _ in range(3)]
        groups = [{"params": weights[:2], "factor": 1.0}, {"params": weights[2:], "factor": 0.3}]
        optimizer = make_optimizer(
            groups, betas=betas, eps=1e-3, published_eps=published, on_device=on_device
        )
        engine = TorchEngine({str(i): weight for i, weight in enumerate(weights)}, optimizer)
        for steps, rate in ((3, 1e-2), (4, 3e-3)):
            set_learning_rate(optimizer, rate)
            for _ in range(steps):
                for weight in weights[: 2 if rate == 1e-2 else 3]:
                    weight.grad = draw(5, 7)
                engine.step()
            assert engine.steps() == steps
            moments = engine.state()
            engine.clear_state()
            assert engine.steps() == 0 and not engine.state()
        engine.load_state(moments, 4)
        for weight in weights:
            weight.grad = draw(5, 7)
        engine.step()
        assert engine.steps() == 5
        return [weight.detach() for weight in weights]

    for a, b in zip(run(False), run(True), strict=True):
        torch.testing.assert_close(a, b, rtol=0 if not published else 1e-14, atol=1e-15 if published else 0)


def test_groups_hold_every_parameter_once():
    model = small_model()
    named = dict(model.named_parameters())
    found = [
        (name, parameter, group["factor"])
        for side in ("encoder", "decoder")
        for group in parameter_groups(model, side)
        for name, parameter in zip(group["names"], group["params"], strict=True)
    ]
    assert sorted(name for name, _, _ in found) == sorted(named)
    for side, own in (("encoder", ("encoder.", "mapping_tl.")), ("decoder", ("decoder.", "mapping_fl."))):
        assert all(n.startswith(own) for group in parameter_groups(model, side) for n in group["names"])
    assert all(named[name] is parameter for name, parameter, _ in found)
    assert all(factor == model.learning_rate_factors().get(name, 1.0) for name, _, factor in found)


def test_an_adam_that_counts_steps_for_all_tensors_together_is_found_out():
    class OneCounter(torch.optim.Adam):
        def __init__(self, params, adam_w_mode=False, **options):
            super().__init__(params, **options)

        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
            super().step()

    class PerTensor(torch.optim.Adam):
        def __init__(self, params, adam_w_mode=False, **options):
            super().__init__(params, **options)

    assert follows_torch(PerTensor, torch.device("cpu"))
    assert not follows_torch(OneCounter, torch.device("cpu"))


def test_average_has_the_stated_half_life_and_the_style_average():
    model = small_model()
    start = copy.deepcopy(model)
    average = Average(model, half_life=100)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        model.dlatent_avg.fill_(3.0)
    for _ in range(10):
        average.update(10)
    for mine, first in zip(average.model().parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(mine, first + 0.5, rtol=1e-9, atol=1e-9)
    assert torch.equal(average.model().dlatent_avg, model.dlatent_avg)
    assert not average.model().training and not any(p.requires_grad for p in average.model().parameters())
    again = Average(model, half_life=100)
    again.load(average.state())
    for mine, other in zip(again.model().parameters(), average.model().parameters(), strict=True):
        assert torch.equal(mine, other)
    average.update(25)
    for mine, first in zip(average.model().parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(mine, first + 1 - 0.5**1.25, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"average.half_life is 0"):
        Average(model, half_life=0)


def test_buffers_are_means_over_ranks_for_a_while(monkeypatch):
    """Two ranks, of which the other holds twice as much."""
    ranks = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "all_reduce": lambda t: t.mul_(3)}
    monkeypatch.setattr(averaging, "dist", types.SimpleNamespace(**ranks))
    model = small_model()
    model.dlatent_avg.fill_(4.0)
    with pytest.raises(KeyError), averaging.averaged_buffers(model):
        assert (model.dlatent_avg == 6).all() and model._blend == 1
        raise KeyError  # whatever ends it
    assert (model.dlatent_avg == 4).all()
    assert [*averaging.own_buffers(torch.nn.BatchNorm1d(2))] == ["running_mean", "running_var"]  # no counter


def test_loaded_state_continues_in_channels_last_memory():
    """A checkpoint holds plain layouts; fused Adam reads moments and parameters as flat memory."""

    def run(reload: bool) -> list[torch.Tensor]:
        model = small_model()
        groups = parameter_groups(model, "encoder")
        optimizer = make_optimizer(groups, betas=(0.5, 0.99))
        set_learning_rate(optimizer, 0.01)
        named = dict(model.named_parameters())
        engine = TorchEngine({n: named[n] for group in groups for n in group["names"]}, optimizer)
        random = torch.Generator().manual_seed(1)
        for step in range(4):
            if reload and step == 2:
                saved = {
                    name: {
                        key: value.clone(memory_format=torch.contiguous_format) for key, value in m.items()
                    }
                    for name, m in engine.state().items()
                }
                engine.load_state(saved, engine.steps())
            for parameter in engine.parameters.values():
                gradient = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
                parameter.grad = torch.empty_like(parameter).copy_(gradient)
            engine.step()
        return list(engine.parameters.values())

    for plain, reloaded in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, reloaded)


def test_an_unknown_implementation_is_named():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "factor": 1.0}]
    with pytest.raises(ValueError, match=r"optim\.implementation is 'sgd', must be one of .*torch"):
        make_optimizer(groups, implementation="sgd")
