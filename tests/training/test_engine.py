"""What the engines are told, and what they keep, without training with them."""

import pytest
import torch

from sivae_fast.training.engine import TorchEngine, bucket_bytes, check_engine, deepspeed_config, place
from sivae_fast.training.optim import make_optimizer, set_learning_rate


@pytest.mark.parametrize("option", ["bf16", "fp16", "gradient_clipping", "torch_autocast", "optimizer"])
def test_what_two_engines_would_get_wrong_without_a_message_is_refused(option):
    with pytest.raises(ValueError, match=rf"engine\.deepspeed\.{option} is not accepted"):
        check_engine("deepspeed", 1, {option: {}})


def test_stages_that_are_accepted():
    check_engine("torch", 0, {})
    for zero in (0, 1, 2):
        check_engine("deepspeed", zero, {"zero_optimization": {"overlap_comm": True}})
    for kind, zero in (("torch", 1), ("torch", 2), ("deepspeed", 3)):
        with pytest.raises(ValueError, match=rf"engine\.zero={zero}"):
            check_engine(kind, zero, {})


def test_deepspeed_neither_clips_nor_takes_another_stage():
    """Left out, clipping would be at 1."""
    settings = {"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": True, "stage": 3}}
    told = deepspeed_config(1, {**settings, "gradient_clipping": 1.0})
    assert told["gradient_clipping"] == 0 and told["wall_clock_breakdown"]
    assert told["zero_optimization"] == {"overlap_comm": True, "stage": 1}


def test_memory_of_the_buckets():
    """Two engines in float32, two buffers each where communication overlaps."""
    assert bucket_bytes({}) == 2 * 4 * 500_000_000
    assert bucket_bytes({"zero_optimization": {"reduce_bucket_size": 1e3, "overlap_comm": True}}) == 16_000


def test_a_process_has_the_gpu_of_its_place_on_its_host(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert place() == (0, 1, torch.device("cuda", 0))
    for name, value in {"RANK": 9, "WORLD_SIZE": 16, "LOCAL_RANK": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert place() == (9, 16, torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place() == (9, 16, torch.device("cpu"))


@pytest.fixture
def engine():
    """After one step of two weights."""
    used, left = (torch.ones(2, requires_grad=True) for _ in range(2))
    optimizer = make_optimizer([{"params": [used, left], "factor": 1.0}])
    set_learning_rate(optimizer, 0.1)
    engine = TorchEngine({"used": used, "left": left}, optimizer)
    engine.backward((used * left).sum())
    engine.step()
    return engine


def test_weights_that_are_not_used_stay_as_they_are(engine):
    """A level that growing has left has no gradient; one of zeros would move its weights by their moments."""
    used, left = engine.parameters.values()
    before = left.tolist()
    engine.backward(used.sum())
    engine.step()
    assert left.tolist() == before and engine.steps() == 2
    assert set(engine.state()) == {"used", "left"}


def test_a_loaded_state_is_all_there_is(engine):
    """Of a checkpoint from before a level was trained, to which a run returns."""
    engine.load_state({"used": engine.state()["used"]}, 1)
    assert set(engine.state()) == {"used"} and engine.steps() == 1
    engine.load_state({}, 0)
    assert engine.state() == {} and engine.steps() == 0
