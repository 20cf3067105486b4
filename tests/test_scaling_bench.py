"""The scaling bench: what it counts, and the formula it projects with."""

import pytest

from bench.scaling import forecast, measure


def test_each_gradient_is_reduced_once_although_both_phases_pass_both_networks():
    found = measure("torch", 0, 2, iterations=3)
    assert found["calls"] == {"all_reduce": 2}
    parameters = sum(found["bytes_of_parameters"].values())
    # Parameters of the lower levels of detail have no gradient.
    assert 0.99 * parameters < found["bytes"]["all_reduce"] <= parameters
    assert found["bytes_of_moments"] == 2 * found["bytes"]["all_reduce"]
    assert 0 < found["seconds_of_collectives"] < found["seconds"]


def test_forecast():
    """Eight GPUs, 1 GB of gradients, 8 gigabits a second: 1.75 seconds on the wire."""
    row = forecast(8, 10**9, step=1.75, images=4, gbps=8, latency=0)
    assert row["communication_seconds"] == pytest.approx(1.75)
    assert row["after backward"] == pytest.approx(8 * 4 / 3.5, abs=0.1)
    assert row["overlapped, at best"] == pytest.approx(8 * 4 / 1.75, abs=0.1)
    assert (row["efficiency"], row["efficiency overlapped"]) == (0.5, 1.0)
    slower = forecast(8, 10**9, step=1.75, images=4, gbps=8, latency=1e5)
    assert slower["communication_seconds"] == pytest.approx(1.95)
