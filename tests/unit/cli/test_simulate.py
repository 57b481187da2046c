"""`smartmoe simulate`: its numbers, its keys, its replay, its refusals; targets on drawn traces."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.cli.main import main
from megatron_smartmoe.placement.online_options import ReplicaMode
from megatron_smartmoe.report.run_record import with_homes
from megatron_smartmoe.spec.placement import Placement
from megatron_smartmoe.spec.trace import load_trace
from tests.support.synthetic import SyntheticSpec, synthetic_trace

POLICIES = [
    "smartmoe",
    "none",
    "smartmoe2023",
    "lpt",
    "eplb",
    "eplb-hierarchical",
    "fastermoe",
    "echo",
    "ultraep",
    "ultraep-min1",
    "llep",
    "laer",
    "epic",
    "moonep",
    "lplb",
]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A skewed, slowly drifting load on 16 source ranks, two micro-batches apart."""
    path = tmp_path_factory.mktemp("trace") / "drift.npz"
    spec = SyntheticSpec(kind="drifting", num_records=14, num_layers=2, micro_batches=2, skew=1.5, drift=0.02)
    synthetic_trace(spec).save(path)
    return path


def simulate(trace: Path, tmp_path: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of one run."""
    status = main(["simulate", "--trace", str(trace), "--json", str(tmp_path / "out.json"), *arguments])
    return status, json.loads((tmp_path / "out.json").read_text())


def test_every_policy_with_the_promised_keys(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "plot.svg"
    status, content = simulate(
        trace, tmp_path, "--ep", "8", "--spare-slots", "1", "--policy", "all", "--plot", str(plot)
    )
    assert status == 0
    assert list(content["policies"]) == POLICIES
    for numbers in content["policies"].values():
        assert set(numbers["imbalance"]) == {"mean", "p50", "p95", "p99", "worst"}
        assert set(numbers["homes"]) == {"experts_moved", "bytes_moved"}
        assert set(numbers["replicas"]) == {"copies_made"}
        assert numbers["imbalance"]["mean"] >= content["lower_bound"]["mean"] - 1e-9
        assert numbers["plan_ms_per_layer"] >= 0
        assert numbers["predicted_layer_ms"] > 0
        assert numbers["predicted_total_ms"] == pytest.approx(numbers["predicted_layer_ms"] + numbers["migration_ms"])
        share = content["even_load_ms"] / numbers["predicted_total_ms"]
        assert numbers["share_of_even_load"] == pytest.approx(share)
    ours, eplb = content["policies"]["smartmoe"], content["policies"]["eplb"]
    assert ours["imbalance"]["mean"] <= min(1.005, eplb["imbalance"]["mean"])
    assert ours["slots_changed"] <= eplb["slots_changed"] / 2
    assert ours["predicted_layer_ms"] < content["policies"]["none"]["predicted_layer_ms"]
    assert 0 < ours["forecast_error"] < 0.1
    assert all(review["kept"] for review in ours["reviews"])
    assert (content["records"], content["warmup"]) == (12, 2)
    assert plot.read_text().startswith("<?xml")
    check_table(capsys.readouterr().out, content)


def check_table(text: str, content: dict[str, Any]) -> None:
    """Columns are apart, the assumptions are named, and the last lines say who is fastest."""
    lines = text.splitlines()
    assert lines[0].startswith("32 experts on 8 ranks, 1 spare slot per rank, 1 node; 12 records of 2 layers")
    assert lines[1] == (
        "times: cluster 8 H100 SXM per node; experts 4096 x 1536 (assumed; --model names another); "
        "2 micro-batches a record"
    )
    assert lines[2].startswith("smartmoe: replicas auto; one pays off above ")
    titles = next(at for at, line in enumerate(lines) if line.startswith("policy"))
    rows = lines[titles : titles + len(content["policies"]) + 1]
    bars = [[at for at, character in enumerate(row) if character == "|"] for row in rows]
    assert all(bar == bars[0] for bar in bars)
    for row in rows[1:]:
        assert [len(cells.split()) for cells in row.split("|")] == [1, 5, 2, 2, 1, 5], row
    fastest = min(content["policies"], key=lambda name: content["policies"][name]["predicted_total_ms"])
    assert content["fastest"] == fastest
    assert f"fastest: {fastest}, predicted " in text
    assert f"limit: {content['limit_ms']:.3f} ms, " in text
    for numbers in content["policies"].values():
        assert numbers["share_of_limit"] == pytest.approx(content["limit_ms"] / numbers["predicted_total_ms"])


def test_exact_load_replicas_are_perfect(trace: Path, tmp_path: Path) -> None:
    arguments = ("--ep", "16", "--spare-slots", "2", "--replicas", "exact", "--replicas-margin", "0")
    _, content = simulate(trace, tmp_path, *arguments)
    assert content["policies"]["smartmoe"]["imbalance"]["mean"] <= 1.002


def test_replicas_that_do_not_pay_are_not_made(trace: Path, tmp_path: Path) -> None:
    """The price that training applies: on slow links some exact replicas do not pay. Those that the computation hides
    cost nothing, whatever the margin."""
    made, seconds = {}, {}
    arguments = ("--ep", "8", "--spare-slots", "1", "--replicas", "exact", "--cluster", "rtx-4090")
    for margin in ("0", "1", "1000"):
        _, content = simulate(trace, tmp_path, *arguments, "--replicas-margin", margin)
        numbers = content["policies"]["smartmoe"]
        made[margin], seconds[margin] = numbers["replicas"]["copies_made"], numbers["predicted_layer_ms"]
    assert 0 < made["1000"] < made["1"] < made["0"]
    assert seconds["1"] < min(seconds["0"], seconds["1000"])


def test_history_pays_once_for_all_micro_batches(trace: Path, tmp_path: Path) -> None:
    """Two micro-batches a record: the replicas of history are fetched once, those of exact in each."""
    seconds = {}
    for mode in ("history", "exact"):
        arguments = ("--ep", "8", "--spare-slots", "1", "--replicas", mode, "--replicas-margin", "0")
        seconds[mode] = simulate(trace, tmp_path, *arguments)[1]["policies"]["smartmoe"]["predicted_layer_ms"]
    assert seconds["history"] < seconds["exact"]


def test_a_model_and_a_cluster_are_named(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--ep", "8", "--model", "mixtral-8x7b", "--cluster", "h100-sxm", "--policy", "none")
    _, content = simulate(trace, tmp_path, *arguments)
    assert "times: cluster 2x8-h100-sxm; experts 4096 x 14336 (mixtral-8x7b)" in capsys.readouterr().out
    assert (content["prices"]["hidden"], content["prices"]["ffn"]) == (4096, 14336)


def test_auto_plans_from_the_counts_when_history_fails(tmp_path: Path) -> None:
    path = tmp_path / "burst.npz"
    synthetic_trace(SyntheticSpec(kind="burst", num_records=30, num_layers=1, burst_factor=12.0)).save(path)
    found = {}
    for mode in ("history", "auto", "exact"):
        _, content = simulate(path, tmp_path, "--ep", "8", "--spare-slots", "2", "--replicas", mode)
        found[mode] = content["policies"]["smartmoe"]
    assert found["history"]["imbalance"]["worst"] > 1.3  # nobody saw it coming
    assert found["auto"]["imbalance"]["worst"] <= 1.011
    assert 0 < found["auto"]["replans"] < found["exact"]["replans"] == 1
    assert found["auto"]["slots_changed"] < found["exact"]["slots_changed"]


def test_ranks_of_a_megatron_trace_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in range(4):
        line = {"step": 0, "block": "decoder", "layer": 1, "rank": rank, "topk": 1, "top_indices": [[rank % 2], [0]]}
        lines = [json.dumps({**line, "step": step}) for step in range(3)]
        (tmp_path / f"router_trace_rank{rank}.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ("--ep", "2", "--trace-experts", "2")
    status, content = simulate(tmp_path, tmp_path, *arguments, "--trace-ranks", "0-1")
    assert (status, content["layers"]) == (0, 1)
    assert content["policies"]["smartmoe"]["imbalance"]["mean"] == pytest.approx(1.5)  # 3 of 4 tokens for expert 0
    assert main(["simulate", "--trace", str(tmp_path), *arguments, "--trace-ranks", "7"]) == 2
    assert "--trace-ranks = [7]: names no rank" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["simulate", "--trace", str(tmp_path), *arguments, "--trace-ranks", "1-"])
    assert "must be ranks and ranges of them" in capsys.readouterr().err


def test_without_spare_slots_homes_move_and_reach_the_bound(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, content = simulate(trace, tmp_path, "--ep", "8", "--policy", "smartmoe,lpt,none")
    reviews = content["policies"]["smartmoe"]["reviews"]
    assert reviews
    assert all(review["kept"] and review["realised_gain_ms"] > 0 for review in reviews)
    assert "homes moved, reviewed at iteration" in capsys.readouterr().out
    ours, lpt, none = (content["policies"][name] for name in ("smartmoe", "lpt", "none"))
    assert ours["imbalance"]["mean"] <= content["lower_bound"]["mean"] * 1.05
    assert ours["imbalance"]["mean"] < none["imbalance"]["mean"]
    assert ours["homes"]["experts_moved"] < lpt["homes"]["experts_moved"] / 4


def test_nodes_keep_replicas_at_home_and_homes_balance_the_nodes(trace: Path, tmp_path: Path) -> None:
    _, content = simulate(trace, tmp_path, "--ep", "16", "--spare-slots", "1", "--nodes", "2", "--homes-interval", "1")
    assert content["nodes"] == 2
    assert content["policies"]["smartmoe"]["imbalance"]["mean"] <= 1.1


def _nodes_of_groups(decisions: list[dict[str, Any]]) -> set[int]:
    """Numbers of nodes that the groups of 4 experts lie on after every move, 4 ranks of 2 experts to a node."""
    homes, found = Placement.contiguous(num_layers=2, num_experts=32, num_ranks=16), set[int]()
    for decision in decisions:
        if decision["kind"] == "homes" and decision["taken"]:
            homes = with_homes(homes, decision["changes"])
            node_LGE = (homes.home_slot_LE // 8).reshape(2, 8, 4)
            found |= {len(set(nodes)) for groups in node_LGE.tolist() for nodes in groups}
    return found


def test_groups_of_the_routing_stay_whole_as_in_training(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run that recorded the trace had 8 groups; a flag says otherwise."""
    path, saved, lines = tmp_path / "limited.npz", tmp_path / "decisions.jsonl", []
    recorded = load_trace(trace)
    replace(recorded, counts=recorded.counts[:6], iteration=recorded.iteration[:6], meta={"num_groups": 8}).save(path)
    options = ["--ep", "16", "--nodes", "4", "--homes-interval", "1", "--save-decisions", str(saved)]
    for flag in (["--router-num-groups", "1"], []):
        simulate(path, tmp_path, *options, *flag)
        lines.append([json.loads(line) for line in saved.read_text().splitlines()])
    said = capsys.readouterr().out
    assert said.count("group-limited routing (8 groups, 4 nodes): homes move between nodes by whole groups") == 1
    (free, *anywhere), (limited, *whole) = lines
    assert (free.get("router_num_groups"), limited["router_num_groups"]) == (None, 8)
    assert max(_nodes_of_groups(anywhere)) > 1
    assert _nodes_of_groups(whole) == {1}
    assert main(["simulate", "--trace", str(path), "--replay", str(saved)]) == 0
    assert f"all {len(whole)} decisions reproduced" in capsys.readouterr().out


def test_two_hops_are_priced_as_such(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Eight experts a token: between two nodes a token crosses once, not four times."""
    saved, found = tmp_path / "decisions.jsonl", {}
    options = ["--ep", "16", "--nodes", "2", "--cluster", "a100-pcie-40gb", "--save-decisions", str(saved)]
    for dispatcher in (["alltoall"], ["hierarchical", "--top-k", "8"]):
        _, found[dispatcher[0]] = simulate(trace, tmp_path, *options, "--dispatcher", *dispatcher)
    assert found["hierarchical"]["even_load_ms"] < found["alltoall"]["even_load_ms"]
    assert "dispatcher hierarchical, 8 experts a token" in capsys.readouterr().out
    assert main(["simulate", "--trace", str(trace), "--replay", str(saved)]) == 0


@pytest.mark.parametrize("spare", ["0", "1"])
def test_a_replay_reproduces_every_decision(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spare: str
) -> None:
    saved = tmp_path / "decisions.jsonl"
    simulate(trace, tmp_path, "--ep", "8", "--spare-slots", spare, "--save-decisions", str(saved))
    header, *decisions = [json.loads(line) for line in saved.read_text().splitlines()]
    assert header["ep"] == 8
    reviews = [decision for decision in decisions if decision["kind"] == "review"]
    assert all(review["realised_gain_s"] is not None for review in reviews)
    assert reviews or spare == "1"
    assert decisions
    assert {"inputs", "before", "after", "why", "taken", "changes"} <= set(decisions[0])
    assert main(["simulate", "--trace", str(trace), "--replay", str(saved)]) == 0
    assert f"all {len(decisions)} decisions reproduced" in capsys.readouterr().out
    lines = saved.read_text().splitlines()
    reworded = [json.dumps({**json.loads(line), "why": "as an earlier version wrote it"}) for line in lines[1:]]
    saved.write_text("\n".join([lines[0], *reworded]) + "\n")
    assert main(["simulate", "--trace", str(trace), "--replay", str(saved)]) == 0
    lines[2] = lines[2].replace('"iteration": ', '"iteration": 9')
    saved.write_text("\n".join(lines) + "\n")
    assert main(["simulate", "--trace", str(trace), "--replay", str(saved)]) == 1
    assert "replay: line 3 differs (decision 2)" in capsys.readouterr().out
    saved.write_text("\n".join(lines[:2]) + "\n")
    assert main(["simulate", "--trace", str(trace), "--replay", str(saved)]) == 1


def test_what_auto_planned_anew_is_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, saved = tmp_path / "burst.npz", tmp_path / "decisions.jsonl"
    synthetic_trace(SyntheticSpec(kind="burst", num_records=12, num_layers=1, burst_factor=12.0)).save(path)
    simulate(path, tmp_path, "--ep", "8", "--spare-slots", "2", "--save-decisions", str(saved))
    header, *decisions = map(json.loads, saved.read_text().splitlines())
    assert {decision["kind"] for decision in decisions} == {"replicas", "replans"}
    assert main(["simulate", "--trace", str(path), "--replay", str(saved)]) == 0
    assert f"all {len(decisions)} decisions reproduced" in capsys.readouterr().out
    # another plan for one micro-batch is found, and a file of before, without these lines, is replayed
    at = next(at for at, decision in enumerate(decisions) if decision["kind"] == "replans")
    changed = [*decisions[:at], {**decisions[at], "after": "0" * 16}, *decisions[at + 1 :]]
    del header["replans"]
    earlier = [header, *(decision for decision in decisions if decision["kind"] != "replans")]
    for lines, status in (([{**header, "replans": True}, *changed], 1), (earlier, 0)):
        saved.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert main(["simulate", "--trace", str(path), "--replay", str(saved)]) == status


def test_files_of_before_history_could_be_suspended_are_replayed_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A load that is a new one in almost every record, where transfers are dear."""
    path, saved = tmp_path / "drifting.npz", tmp_path / "decisions.jsonl"
    spec = SyntheticSpec(kind="drifting", num_records=12, num_layers=2, num_sources=8, skew=0.3, drift=0.3)
    synthetic_trace(spec).save(path)
    dear = ["--ep", "8", "--spare-slots", "2", "--cluster", "a100-pcie-40gb", "--policy", "smartmoe"]
    _, content = simulate(path, tmp_path, *dear, "--save-decisions", str(saved))
    share = content["policies"]["smartmoe"]["suspended"]
    assert 0 < share < 1
    assert f"; those from history suspended in {share:.1%}" in capsys.readouterr().out
    text = saved.read_text()
    assert "replicas from history suspended in " in text
    assert main(["simulate", "--trace", str(path), "--replay", str(saved)]) == 0
    saved.write_text(text.replace('"suspends": true, ', ""))
    capsys.readouterr()
    assert main(["simulate", "--trace", str(path), "--replay", str(saved)]) == 1
    assert "suspended" not in capsys.readouterr().out.partition("replay:")[0]


def test_a_replay_on_another_trace_says_so(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, other = tmp_path / "decisions.jsonl", tmp_path / "other.npz"
    simulate(trace, tmp_path, "--ep", "16", "--spare-slots", "1", "--save-decisions", str(saved))
    synthetic_trace(SyntheticSpec(kind="uniform", num_records=5, num_layers=2)).save(other)
    assert main(["simulate", "--trace", str(other), "--replay", str(saved)]) == 1
    assert "line 1 differs (the trace or the options)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--ep = None: is required"),
        (["--ep", "5"], "--ep = 5: must divide the trace's 32 experts"),
        (["--ep", "0"], "--ep = 0: must be at least 1"),
        (["--ep", "8", "--spare-slots", "-1"], "--spare-slots = -1: must be at least 0"),
        (["--ep", "8", "--warmup", "14"], "--warmup = 14: leaves none of the trace's 14 records"),
        (["--ep", "8", "--nodes", "-2"], "--nodes = -2: must be at least 1"),
        (["--ep", "8", "--trace-ranks", "0-3"], "--trace-ranks = [0, 1, 2, 3]: is for Megatron's JSONL"),
        (["--ep", "8", "--json", "/nowhere/x.json"], "--json = '/nowhere/x.json': there is no directory /nowhere"),
        (["--ep", "8", "--plot", "plot.tiff"], "--plot = 'plot.tiff': must end in .svg, .png or .pdf"),
        (["--ep", "8", "--replicas-margin", "-1"], "--replicas-margin = -1.0: must be from 0 to 1,000"),
        (["--ep", "8", "--nodes", "3"], "--nodes = 3: must divide --ep 8"),
        (["--ep", "8", "--policy", "best"], "--policy = 'best': is not a known policy. Known: smartmoe, none"),
        (
            ["--ep", "8", "--replay", "/nowhere"],
            "--replay = '/nowhere': does not exist. Make one with --save-decisions.",
        ),
        (
            ["--ep", "8", "--spare-slots", "29"],
            "--spare-slots = 29: must be at most 28, the experts of the other ranks",
        ),
        (["--ep", "8", "--save-trace", "a.txt"], "--save-trace = 'a.txt': must end in .npz"),
        (["--ep", "8", "--trace-stages", "2"], "--trace-stages = 2: is for Megatron's JSONL"),
        (["--ep", "8", "--cluster", "/nowhere.yaml"], "does not exist"),
        (["--ep", "8", "--router-num-groups", "5"], "--router-num-groups = 5: must divide the trace's 32 experts"),
        (["--ep", "8", "--router-num-groups", "0"], "--router-num-groups = 0: must be a whole number of at least 1"),
        (
            ["--ep", "8", "--dispatcher", "hierarchical"],
            "--dispatcher = 'hierarchical': needs a group on several nodes",
        ),
        (
            ["--ep", "8", "--dispatcher", "flex", "--top-k", "33"],
            "--top-k = 33: must be a whole number of at least 1 and at most 32",
        ),
    ],
)
def test_wrong_input_is_one_line(
    trace: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--trace", str(trace), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"ep": 8}', "is not a decision file: its first line lacks the options"),
        ("[]", ":1 = '[]': is not a decision: it is no JSON object"),
        ("{'ep'}", ":1 = \"{'ep'}\": is not JSON"),
        ({"ep": 2.5}, ":1: ep = 2.5: must be a whole number of at least 1"),
        ({"spare_slots": -1}, ":1: spare_slots = -1: must be a whole number of at least 0"),
        ({"replicas": ["x"]}, ":1: replicas = ['x']: must be history, exact or auto"),
        ({"cluster": 3}, ":1: cluster = 3: must be a text"),
        ({"cluster": "a" * 300}, "is neither a file nor a name in configs/clusters"),
        ({"warmup": "1"}, ":1: warmup = '1': must be a whole number"),
        ({"replicas_margin": "1"}, ":1: replicas_margin = '1': must be from 0 to 1,000"),
        ({"dispatcher": "two"}, ":1: dispatcher = 'two': must be one of alltoall, hierarchical, allgather, flex"),
        ({"exchanges": 3}, ":1: exchanges = 3: must be a whole number of at least 4 and at most 6"),
        ({"router_num_groups": "8"}, ":1: router_num_groups = '8': must be a whole number of at least 1"),
    ],
)
def test_a_damaged_decision_file_is_one_line(
    trace: Path, tmp_path: Path, line: str | dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = dict.fromkeys(("ep", "homes_interval", "hidden", "ffn"), 8) | {"spare_slots": 1, "nodes": 1, "warmup": 0}
    head = line if isinstance(line, str) else json.dumps({**good, "replicas": "auto", "cluster": None, **line})
    saved = tmp_path / "decisions.jsonl"
    saved.write_text(head + "\n{}\n")
    assert main(["simulate", "--trace", str(trace), "--replay", str(saved)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_load_without_sources_and_a_dense_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = [[0] * 8, [1, 2, 3, 4, 5, 6, 7, 8]]
    (tmp_path / "weight.json").write_text(json.dumps(weight))
    path = tmp_path / "trace.npz"
    status, content = simulate(
        tmp_path / "weight.json", tmp_path, "--ep", "4", "--spare-slots", "1", "--save-trace", str(path)
    )
    assert status == 0
    assert content["lower_bound"]["mean"] >= 1
    assert content["left_out"] == {"entries": 1, "of": 2, "layers": [0], "iterations": []}
    out = capsys.readouterr().out
    assert "note: it has no source ranks: each rank is taken to route an equal share" in out
    assert (
        "note: 1 of 2 entries by record, layer, group and micro-batch have no assignments (among them layers 0)" in out
    )
    assert simulate(path, tmp_path, "--ep", "4")[1]["policies"]["smartmoe"]["imbalance"]["mean"] >= 1


@pytest.mark.skipif("SMARTMOE_TRACE" not in os.environ, reason="SMARTMOE_TRACE names no recorded trace")
@pytest.mark.parametrize(
    ("ep", "spare", "replicas", "limit"),
    [(4, 1, "history", 1.005), (8, 1, "history", 1.005), (8, 2, "history", 1.003), (16, 1, "history", 1.02),
     (16, 2, "history", 1.005), (8, 2, "exact", 1.002)],
)  # fmt: skip
def test_targets_on_a_recorded_trace(tmp_path: Path, ep: int, spare: int, replicas: ReplicaMode, limit: float) -> None:
    arguments = ["--ep", str(ep), "--spare-slots", str(spare), "--replicas", replicas]
    _, content = simulate(Path(os.environ["SMARTMOE_TRACE"]), tmp_path, *arguments)
    assert content["policies"]["smartmoe"]["imbalance"]["mean"] <= limit


def test_a_dispatcher_has_its_price_and_changes_no_balance(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--ep", "8", "--cluster", "h100-sxm", "--nodes", "2", "--homes-interval", "0"]
    found = {
        name: simulate(trace, tmp_path, *common, "--dispatcher", name)[1] for name in ("alltoall", "allgather", "flex")
    }
    assert f"dispatcher flex, {load_trace(trace).meta['top_k']} experts a token" in capsys.readouterr().out
    ms = {name: content["policies"]["smartmoe"]["predicted_layer_ms"] for name, content in found.items()}
    assert ms["flex"] < ms["alltoall"]
    assert ms["allgather"] != ms["alltoall"]
    assert len({content["policies"]["smartmoe"]["imbalance"]["mean"] for content in found.values()}) == 1
    nameless = replace(load_trace(trace), meta={})
    nameless.save(tmp_path / "nameless.npz")
    assert main(["simulate", "--trace", str(tmp_path / "nameless.npz"), *common, "--dispatcher", "flex"]) == 2
    assert "--top-k = None: is required by --dispatcher flex" in capsys.readouterr().err
    assert main(["simulate", "--trace", str(trace), *common, "--top-k", "2"]) == 2
    assert "--top-k = 2: decides nothing for --dispatcher alltoall" in capsys.readouterr().err


def test_a_replay_with_a_dispatcher(trace: Path, tmp_path: Path) -> None:
    saved = str(tmp_path / "decisions.jsonl")
    common = ["simulate", "--trace", str(trace)]
    flex = ["--ep", "8", "--spare-slots", "1", "--dispatcher", "flex"]
    assert main([*common, *flex, "--save-decisions", saved]) == 0
    assert main([*common, "--replay", saved]) == 0
