"""Moving experts changes nothing of them: weights, main weights, moments, on every layout of ranks and optimizer.

All mixes of one number of ranks share a job; each is trained twice in it, with and without migrations.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.experts import Job, Mix
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

ADAM = {"exp_avg", "exp_avg_sq"}
MIXES = {
    "EP2, fp32": Mix(),
    "EP2, bf16": Mix(bf16=True),
    "EP2, fp32, distributed": Mix(distributed=True),
    "EP2xEDP2, bf16": Mix(edp=2, bf16=True),
    "EP2xEDP2, SGD, bf16": Mix(edp=2, bf16=True, optimizer="sgd"),
    "EP2xEDP2, fp32, distributed": Mix(edp=2, distributed=True),
    "EP2xEDP2, fp16, distributed": Mix(edp=2, fp16=True, distributed=True),
    "EP2xEDP2, bf16, distributed, overlapped": Mix(edp=2, bf16=True, distributed=True, overlap=True),
    "EP2xEDP2, SequentialMLP, bf16, distributed": Mix(edp=2, bf16=True, distributed=True, sequential=True),
    "EP4, bf16, distributed": Mix(ep=4, slots=2, bf16=True, distributed=True),
    "EP2xETP2, bf16, distributed": Mix(etp=2, bf16=True, distributed=True),
    "PP2xEP2, bf16, distributed": Mix(pp=2, bf16=True, distributed=True),
}


def train(mix: Mix, migrate: bool) -> dict[str, Any]:
    """Train; migrate at random after each step if asked; what every expert is, at the end."""
    job = Job(mix)
    exchange = job.exchange()
    facts: dict[str, Any] = {"wire": [], "unchanged": True, "agree": True}
    for number in range(3):
        job.step()
        if migrate:
            before = job.fingerprints()
            plan, report = job.migrate(job.random_homes(number), exchange)
            stays = [
                (s.transfers.source == exchange.worker) & (s.transfers.target == exchange.worker) for s in plan.steps
            ]
            local = sum(int(s.transfers.nbytes[mask].sum()) for s, mask in zip(plan.steps, stays, strict=True))
            sent, received = plan.sent_bytes_W[exchange.worker], plan.received_bytes_W[exchange.worker]
            facts["wire"].append((report.sent_bytes, report.received_bytes, int(sent), int(received)))
            facts["unchanged"] &= job.fingerprints() == before
            facts["agree"] &= job.main_weights_agree()
            assert report.local_bytes == local
            assert (job.homes_LE == job.random_homes(number)).all()
    job.step()
    tensors = [tensor for state in job.states.states().values() for tensor in state.layout.tensors]
    return facts | {
        "state": job.fingerprints(),
        "tensors": {tensor.name for tensor in tensors},
        "cut": any(((t.held_SC2 > 0) & (t.held_SC2 < t.numel)).any() for t in tensors),
    }


def train_all(mixes: dict[str, Mix]) -> dict[str, Any]:
    return {name: (train(mix, True), train(mix, False)) for name, mix in mixes.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """The results of every rank for each mix, with and without migrations."""
    found: dict[str, list[Any]] = {}
    for world_size in (2, 4):
        mixes = {name: mix for name, mix in MIXES.items() if mix.world_size == world_size}
        ranks = run_ranks(train_all, world_size, mixes, log_dir=tmp_path_factory.mktemp("runs"), timeout_s=240)
        found |= {name: [rank[name] for rank in ranks] for name in mixes}
    return found


@pytest.mark.parametrize("name", MIXES)
def test_state_is_that_of_a_run_without_migrations(name: str, runs: dict[str, list[Any]]) -> None:
    for moved, still in runs[name]:
        assert moved["unchanged"]  # by each migration
        assert moved["agree"]  # main weights, rounded, with the weights
        assert moved["state"] == still["state"]  # after all steps, in logical order


@pytest.mark.parametrize("name", MIXES)
def test_bytes_on_the_wire_are_the_predicted(name: str, runs: dict[str, list[Any]]) -> None:
    for moved, _ in runs[name]:
        for sent, received, predicted_sent, predicted_received in moved["wire"]:
            assert sent == predicted_sent > 0
            assert received == predicted_received > 0


@pytest.mark.parametrize("name", MIXES)
def test_everything_that_an_expert_is_moves(name: str, runs: dict[str, list[Any]]) -> None:
    mix = MIXES[name]
    weights = {"linear_fc1.weight", "linear_fc2.weight"} if mix.sequential else {"weight1", "weight2"}
    kept = ({"momentum_buffer"} if mix.optimizer == "sgd" else ADAM) | ({"main"} if mix.bf16 or mix.fp16 else set())
    for moved, _ in runs[name]:
        assert moved["tensors"] == weights | {f"{weight}/{state}" for weight in weights for state in kept}
        assert moved["cut"] == (mix.distributed and mix.edp > 1)  # shards end inside of experts
