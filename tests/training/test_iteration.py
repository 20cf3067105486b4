"""What an iteration is made of; test_step.py and test_graphs.py have iterations that are made."""

import pytest
import torch

from sivae_fast.config import ConfigError, make_config
from sivae_fast.systems import make_schedule
from sivae_fast.training import iteration
from sivae_fast.training.iteration import Iteration, check_batches


def test_engines_get_their_settings(monkeypatch):
    told = []
    make = lambda model, side, optimizer, **settings: told.append((side, settings))
    monkeypatch.setattr(iteration, "make_engine", make)
    config = make_config(
        {
            "model": {"kind": "mlp"},
            "data": {"kind": "density"},
            "engine": {"kind": "deepspeed", "deepspeed": {"steps_per_print": 7}},
        }
    )
    Iteration(config, (2,), 0, 1, torch.device("cpu"), "deepspeed", 2)
    settings = {"kind": "deepspeed", "zero": 2, "settings": {"steps_per_print": 7}}
    assert told == [("encoder", settings), ("decoder", settings)]


@pytest.mark.parametrize(
    ("micro_batch", "world", "odd"),
    [(None, 1, None), (None, 2, None), (None, 4, 3), (3, 2, 3), (2, 2, None), ("auto", 2, None)],
)
def test_swapped_fakes_need_passes_of_an_even_number(micro_batch, world, odd):
    for swapped in (False, True):
        model = {"kind": "two_encoder", "resolution": 16, "swapped_fakes": swapped}
        train = {"batch": 12, "micro_batch": micro_batch}
        config = make_config({"model": model, "data": {"kind": "factors"}, "train": train})
        schedule = make_schedule(config)
        if swapped and odd:
            with pytest.raises(ConfigError, match=f"=12 over {world} ranks goes in passes of {odd} images"):
                check_batches(config, schedule, world)
        else:
            check_batches(config, schedule, world)
