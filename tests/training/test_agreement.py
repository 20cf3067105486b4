"""What ranks tell each other, with stand-ins for the other ranks; test_faults.py has whole runs."""

import copy
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sivae_fast.config import make_config
from sivae_fast.training import agreement
from sivae_fast.training.agreement import RankFailed, RanksDiffer, check_parameters, reasons_shared

LOST = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer\nand more")


@pytest.fixture
def store(monkeypatch):
    """That of the ranks."""
    made = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: made)
    return made


def test_five_differences_are_shown_and_the_others_counted(monkeypatch):
    first, other = ({f"key {i}": f"{value}" for i in range(8)} for value in (1, 2))
    monkeypatch.setattr(agreement, "_gather", lambda facts: [first, {**first, **facts}])
    for count, more in ((5, "key 4=2, rank 0 has 1. Give"), (8, "key 4=2, rank 0 has 1; and 3 more. Give")):
        with pytest.raises(RanksDiffer, match=more):
            agreement.check_same(dict([*other.items()][:count]))


def test_what_holds_for_all_and_what_the_first_one_has(monkeypatch):
    monkeypatch.setattr(agreement, "_gather", lambda value: [True, value])
    assert agreement.everywhere(True) and not agreement.everywhere(False)
    assert agreement.of_first_rank(False) is True


def test_other_versions_of_torch_and_of_the_code_are_told(monkeypatch):
    class Items(list):
        def checksum(self):
            return "of the items"

    def facts():
        config = make_config({})
        return agreement.program_facts(config, "torch", 0), agreement.run_facts(config, Items("ab"))

    before = facts()
    assert before[1].items() >= {"items in the data": "2", "checksum of the data": "of the items"}.items()
    monkeypatch.setattr(torch, "__version__", "another")
    monkeypatch.setattr(agreement, "source_files", lambda: {"sivae_fast/run.py": "another"})
    after = facts()
    assert all(now["torch"] != then["torch"] for now, then in zip(after, before, strict=True))
    assert after[0]["source file sivae_fast/run.py"] != before[0]["source file sivae_fast/run.py"]
    assert after[1]["checksum of the code"] != before[1]["checksum of the code"]


@pytest.mark.parametrize("towards", [-torch.inf, torch.inf])
def test_the_first_parameter_that_differs_is_named(monkeypatch, towards):
    """By the last bit of one number, above or below that of the other rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    kept = []

    def all_reduce(sums, op):
        kept.append(sums.clone())
        assert op == dist.ReduceOp.MAX
        sums.copy_(torch.maximum(sums, kept[0]))

    ranks = {"is_initialized": lambda: True, "get_world_size": lambda: 2, "all_reduce": all_reduce}
    monkeypatch.setattr(agreement, "dist", SimpleNamespace(ReduceOp=dist.ReduceOp, **ranks))
    check_parameters(model)  # the first rank
    other = copy.deepcopy(model)
    check_parameters(other)
    with torch.no_grad():
        for parameter in (other[1].bias, other[2].weight):
            parameter.view(-1)[0] = torch.nextafter(parameter.view(-1)[0], torch.tensor(towards))
    with pytest.raises(RanksDiffer, match=r"2 parameters differ, the first is 1\.bias\."):
        check_parameters(other)


def test_the_reason_of_a_rank_reaches_the_others(store):
    advice = r"The same command resumes from the last checkpoint \(\[gloo.* closed by peer\)$"
    unsaid = rf"^another rank ended without a word .* within engine\.timeout_seconds=60\. {advice}"
    with pytest.raises(RankFailed, match=unsaid), reasons_shared(1, 60):
        raise LOST
    with pytest.raises(KeyError, match="key 5"), reasons_shared(0, 60):
        raise KeyError("key 5")
    for lost in (LOST, dist.DistBackendError("[gloo] closed by peer")):
        with pytest.raises(RankFailed, match=rf"^rank 0 failed: 'key 5'\. {advice}"), reasons_shared(1, 60):
            raise lost


def test_a_store_that_stands_still_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: None)
    asked = threading.Event()
    assert agreement._briefly(lambda store: asked.wait(30), seconds=0.01) is None
    asked.set()
