"""Losses of a tiny run, kept in a file: whatever changes them has to say so.

`python -m tests.training.test_golden` writes the file anew.
"""

import json
from pathlib import Path

import pytest
import torch

from sivae_fast.config import make_config
from sivae_fast.draws import Draws, Rows
from sivae_fast.systems import make_model, make_objective
from sivae_fast.training.step import Step

GOLDEN = Path(__file__).with_name("golden_losses.json")


def losses() -> dict[str, list[float]]:
    """Six iterations in float64, over a level switch, by plain gradient descent."""
    model_config = {
        "resolution": 16, "start_channels": 4, "max_channels": 8, "latent_size": 8, "mapping_layers": 2
    }  # fmt: skip
    objective_config = {"beta_rec": 0.5, "beta_kl": 0.3, "beta_neg": 8.0, "scale": 0.01}
    config = make_config({"model": model_config, "objective": objective_config})
    model = make_model(config).double()
    step = Step(model, make_objective(config, (3, 16, 16)))
    sides = [torch.optim.SGD(p, lr=1e-3) for p in (step.encoder_parameters, step.decoder_parameters)]
    found = {"encoder": [], "decoder": []}
    for i in range(6):
        lod, blend = (1, 1.0) if i < 3 else (2, 0.2 * (i - 2))
        model.set_level(lod, blend)
        draws = Draws(0, 4 * i, Rows.all(4))
        x = draws.stream("data").uniform(4, 3, 4 << lod, 4 << lod, dtype=torch.float64) * 2 - 1
        loss, shared = step.encoder_phase(x, draws)
        loss.loss.backward()
        sides[0].step()
        found["encoder"].append(loss.loss.item())
        loss = step.decoder_phase(x, draws, shared)
        loss.loss.backward()
        sides[1].step()
        found["decoder"].append(loss.loss.item())
        model.zero_grad()
    return found


def test_losses_are_the_kept_ones():
    kept = json.loads(GOLDEN.read_text())
    for name, values in losses().items():
        assert values == pytest.approx(kept[name], rel=1e-7), name


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(losses(), indent=1) + "\n")
