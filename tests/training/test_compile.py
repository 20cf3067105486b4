"""Training through torch.compile."""

import pytest

from sivae_fast.config import ConfigError, make_config
from sivae_fast.run import read_stats


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_compiled_run_follows_the_eager_one_over_a_level_switch(launch):
    runs = {}
    for compiled in ("false", "true"):
        folder = launch.folder / compiled
        launch(train__compile=compiled, run__folder=folder, timeout=1700)
        runs[compiled] = read_stats(next(folder.iterdir()))
    eager, compiled = runs["false"], runs["true"]
    assert [tick["images"] for tick in eager] == [tick["images"] for tick in compiled]
    assert eager[-1]["images"] == 80
    for a, b in zip(eager, compiled, strict=True):
        for name in ("rec_real", "kl_real"):  # Adam amplifies rounding
            assert b[name] == pytest.approx(a[name], rel=0.02)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model": {"kind": "mlp"}, "data": {"kind": "density"}, "train": {"compile": True}},
            "model.kind=style",
        ),
        ({"train": {"compile": True, "recompute": True}}, "exclude each other"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_config(settings)
