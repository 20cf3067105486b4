"""`pytest bench` runs the benchmarks that the test configuration skips."""

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if any("bench" in str(argument) for argument in config.args):
        config.option.benchmark_skip = False
        torch.set_num_threads(1)  # a second thread's waiting would count as processor time
