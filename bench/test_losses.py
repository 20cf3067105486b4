"""The loss bench as pytest-benchmark cases: `pytest bench`.

On the CPU the clock is processor time; on a GPU each round waits for the device. `bench/losses.py` has the
careful measurements: CUDA graphs, cold caches, launches, memory.
"""

import time

import pytest
import torch
from losses import SIZES, Inputs, call, misses, providers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TIMER = time.perf_counter if DEVICE == "cuda" else time.process_time
CASES = [(size, batch) for size in SIZES for batch in (4, 64) if size != "image256" or batch == 4]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}", scope="module")
def inputs(request):
    torch.manual_seed(0)
    return Inputs.make(*request.param, DTYPE, DEVICE)


@pytest.mark.benchmark(timer=TIMER, warmup=True, max_time=0.3)
@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("provider", ["plain", "plain, autocast", "fused"])
def test_encoder_phase(benchmark, inputs, provider, direction):
    run = providers(inputs)[provider]
    errors = misses(run, inputs)
    assert max(errors.values()) < (2e-2 if torch.bfloat16 == DTYPE else 1e-4), "no timing of a wrong loss"
    benchmark.extra_info.update(errors, device=DEVICE, dtype=str(DTYPE))
    once = call(run, inputs, direction)

    def finished():
        once()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(finished)
