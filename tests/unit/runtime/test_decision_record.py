"""What a run records at its start is read back, and so is what earlier versions recorded."""

import json
from dataclasses import asdict, replace
from pathlib import Path

from megatron_smartmoe.cost.replicas import LegPrice, TransferPrice
from megatron_smartmoe.placement.online_options import OnlineOptions
from megatron_smartmoe.placement.plan_replicas import ReplicaOptions
from megatron_smartmoe.runtime.decisions.record import ReplicasStart, Stage, Start, read_starts

PRICE = TransferPrice(fetch=LegPrice(inside_tokens=7.0, between_tokens=9.0, hidden_tokens=2.0), num_nodes=2)
START = Start(
    version=1,
    iteration=0,
    trace="trace.npz",
    logs={},
    num_experts=8,
    num_ranks=4,
    groups=1,
    expert_shares=1,
    spare_slots=1,
    micro_batches=2,
    stages=(Stage(layers=(1, 2), passes=(1, 1)),),
    homes=None,
    replicas=ReplicasStart(
        mode="auto",
        used_slots=1,
        online=OnlineOptions(replica=ReplicaOptions(or_group=True, price=PRICE), exact_price=PRICE),
        exact_price=PRICE,
        scope_nodes=1,
        num_nodes=2,
    ),
    pool=None,
)


def read(folder: Path, text: str) -> Start:
    (folder / "decisions").mkdir()
    (folder / "decisions" / "start-000000.json").write_text(text)
    return read_starts(folder)[0]


def test_prices_are_read_back(tmp_path: Path) -> None:
    assert read(tmp_path, START.to_text()) == START


def test_one_number_for_every_transfer_as_earlier_versions_wrote_it(tmp_path: Path) -> None:
    content = asdict(START)
    replicas = content["replicas"]
    del replicas["online"]["replica"]["or_group"]  # written before replicas could leave their nodes where it pays,
    del replicas["online"]["replica"]["may_suspend"]  # and before those from history could be suspended
    del replicas["exact_price"], replicas["online"]["exact_price"], replicas["online"]["replica"]["price"]
    replicas["exact_price_tokens"], replicas["online"]["exact_price_tokens"] = 155.0, 0.0
    replicas["online"]["replica"]["replica_price_tokens"] = 61
    found = read(tmp_path, json.dumps(content)).replicas
    assert found is not None
    online = OnlineOptions(replica=ReplicaOptions(price=TransferPrice.of_each(61.0), may_suspend=False))
    expected = replace(online, exact_price=TransferPrice.of_each(0.0))
    assert found == ReplicasStart(
        mode="auto",
        used_slots=1,
        online=expected,
        exact_price=TransferPrice.of_each(155.0),
        scope_nodes=1,
        num_nodes=2,
    )
