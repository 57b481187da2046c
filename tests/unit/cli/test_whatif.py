"""`smartmoe whatif`: what it says about a machine that is known, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_smartmoe.cli.main import main
from megatron_smartmoe.spec.trace import RoutingTrace
from tests.support.arguments import LAUNCH, VALUES
from tests.support.synthetic import SyntheticSpec, synthetic_trace

RANKS, RECORDS, LAYERS, EXPERTS = 4, 20, 2, 16
SAMPLES, TOKENS = 8, 512  # of a step, of a sample
ARGUMENTS: dict[str, Any] = {
    **VALUES,
    **LAUNCH,
    "num_layers": LAYERS,
    "hidden_size": 256,
    "moe_ffn_hidden_size": 1024,
    "num_experts": EXPERTS,
    "seq_length": TOKENS,
    "global_batch_size": SAMPLES,
    "expert_model_parallel_size": RANKS,
    "transformer_impl": "local",
    "vocab_size": 1024,
    "world_size": RANKS,
    "distributed_backend": "gloo",
    "smartmoe": True,
    "smartmoe_homes": "off",
    "smartmoe_record_trace": "None",
}
ABSENT = object()  # what a release without the flag wrote
TOKEN_S, REST_S = 1e-4, 0.3  # of the machine of these tests: per assignment of a rank, and all else of a step


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    """A skewed load, as four source ranks recorded it."""
    spec = SyntheticSpec(
        kind="zipf",
        num_records=RECORDS,
        num_layers=LAYERS,
        num_sources=RANKS,
        num_experts=EXPERTS,
        tokens_per_source=SAMPLES * TOKENS // RANKS,
        skew=2.0,
        num_ranks=RANKS,
    )
    trace = synthetic_trace(spec)
    return RoutingTrace(
        counts=trace.counts, iteration=np.arange(1, RECORDS + 1), layer=trace.layer, meta={"top_k": 2, "source": "test"}
    )


@pytest.fixture(scope="module")
def loads_NR(trace: RoutingTrace) -> np.ndarray:
    """Assignments that each rank computed, all layers."""
    loads_NLE = trace.counts.astype(int).sum(axis=2)
    return np.asarray(loads_NLE.reshape(RECORDS, LAYERS, RANKS, -1).sum(axis=(1, 3)))


@pytest.fixture(scope="module")
def run_dir(trace: RoutingTrace, loads_NR: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a machine where time is known, its spread 1%."""
    run = tmp_path_factory.mktemp("runs") / "some-run"
    run.mkdir()
    write_arguments(run, {})
    rng = np.random.default_rng(1)
    seconds_NR = (REST_S + TOKEN_S * loads_NR) * (1 + 0.01 * rng.standard_normal(loads_NR.shape))
    rows = [f"{n + 1},{r},{seconds_NR[n, r]:.6f}" for n in range(RECORDS) for r in range(RANKS)]
    (run / "cpu.csv").write_text("\n".join(["iteration,rank,seconds", *rows]) + "\n")
    lines = [{"iteration": n + 1, "lm loss": 5.0, "seconds_per_step": seconds_NR[n].max()} for n in range(RECORDS)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trace.save(run / "trace.npz")
    return run


def write_arguments(run: Path, changed: dict[str, Any]) -> None:
    values = {name: value for name, value in {**ARGUMENTS, **changed}.items() if value is not ABSENT}
    text = "".join(f"  {name} {'.' * (50 - len(name))} {value}\n" for name, value in values.items())
    (run / "arguments.txt").write_text(text)


def whatif(run: Path, *arguments: str, of: Sequence[str] = ("--step-times", "cpu.csv")) -> dict[str, Any]:
    """The JSON of one call, whose files are in the run directory."""
    named = [str(run / word) if word.endswith(".csv") else word for word in of]
    output = run / "whatif.json"
    assert main(["whatif", str(run), "--trace", str(run / "trace.npz"), *named, *arguments, "--json", str(output)]) == 0
    content: dict[str, Any] = json.loads(output.read_text())
    return content


def step_s(content: dict[str, Any], **launch: object) -> dict[str, Any]:
    """The one setting with this launch."""
    found = [one for one in content["settings"] if all(one["launch"][name] == is_ for name, is_ in launch.items())]
    assert len(found) == 1, [one["label"] for one in content["settings"]]
    setting: dict[str, Any] = found[0]
    return setting


def test_balance_and_ep_are_predicted_on_a_machine_that_is_known(
    run_dir: Path, loads_NR: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only tokens cost anything here, and the prediction of a balanced step is that machine's, but for what replicas
    are thought to cost: the run had none."""
    content = whatif(run_dir, "--spare-slots", "0,1", "--replicas", "exact", "--ep", "2,4")
    run, balanced = step_s(content, ep=4, spare_slots=0), step_s(content, ep=4, spare_slots=1)
    assert run["is_run"]
    assert run["step_s"] == pytest.approx(content["measured"]["step_s"], rel=0.02)
    assert balanced["imbalance"] < 1.02 < run["imbalance"]
    expected_s = REST_S + TOKEN_S * float(loads_NR.mean())
    assert expected_s < balanced["step_s"] < 1.06 * expected_s < 0.9 * run["step_s"]
    assert balanced["bar"] < 0.1
    assert balanced["replica_bytes"] > run["replica_bytes"] == 0
    two = step_s(content, ep=2, spare_slots=0)  # ranks of a pair share the load of twice as many experts
    assert two["imbalance"] < run["imbalance"]
    assert two["memory_bytes"] > run["memory_bytes"]
    assert two["bar"] > run["bar"], "the optimizer of twice as many experts is not in the run"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "some-run, on 4 x CPU-thread (cpu): predicted steps (CPU time of the busiest rank), "
        "routed as iterations 5 to 20"
    )
    assert all(len(line) <= 100 for line in lines[1:7])


def test_the_run_is_replayed_with_its_own_moves(run_dir: Path, trace: RoutingTrace) -> None:
    """After step 9 rank 0 and rank 3 exchange an expert: the fit is as good as the machine is regular."""
    home_E = np.arange(EXPERTS) // (EXPERTS // RANKS)
    loads_NE = trace.counts[:, 0].astype(int).sum(axis=1)  # of the first layer, in which experts 0 and 12 move
    loads_NR = trace.counts.astype(int).sum(axis=2).reshape(RECORDS, LAYERS, RANKS, -1).sum(axis=(1, 3))
    exchanged_N = loads_NE[:, 12] - loads_NE[:, 0]
    assert home_E[[0, 12]].tolist() == [0, 3]
    assert abs(exchanged_N).min() > 200, "an exchange that nobody would notice"
    loads_NR[9:, 0] += exchanged_N[9:]
    loads_NR[9:, 3] -= exchanged_N[9:]
    rng = np.random.default_rng(5)
    seconds_NR = (REST_S + TOKEN_S * loads_NR) * (1 + 0.005 * rng.standard_normal(loads_NR.shape))
    rows = [f"{n + 1},{r},{seconds_NR[n, r]:.6f}" for n in range(RECORDS) for r in range(RANKS)]
    (run_dir / "moved.csv").write_text("\n".join(["iteration,rank,seconds", *rows]) + "\n")
    changes = [[0, 0, 0, 0, 12], [0, 3, 0, 12, 0]]
    names = ("why", "before", "after", "inputs")
    decision = {"iteration": 9, "kind": "homes", "group": -1, "taken": True, "changes": changes} | dict.fromkeys(
        names, ""
    )
    (run_dir / "smartmoe.jsonl").write_text(json.dumps(decision) + "\n")
    try:
        content = whatif(run_dir, "--micro-batch-size", "2", of=("--step-times", "moved.csv"))
    finally:
        (run_dir / "smartmoe.jsonl").unlink()
    assert content["fit"]["noise"] < 0.01
    assert content["settings"][0]["experts_moved"] == 2


def test_wall_time_of_the_log(run_dir: Path) -> None:
    content = whatif(run_dir, "--homes-interval", "0,10", of=())
    assert content["measured"]["what"] == "wall_s"
    assert content["measured"]["measurements"] == RECORDS - 4  # the first fifth of the records is warm-up
    moving, fixed = step_s(content, homes_interval=10), step_s(content, homes_interval=0)
    assert moving["experts_moved"] > 0
    assert moving["migration_bytes"] > 0
    assert moving["step_s"] < fixed["step_s"]


def test_what_auto_chose_is_what_is_priced(run_dir: Path, tmp_path: Path) -> None:
    """On two nodes of two ranks, a hierarchical dispatch sends fewer rows."""
    found = {}
    for dispatch in ("", "flat", "hierarchical"):
        run = tmp_path / f"run {dispatch}"
        shutil.copytree(run_dir, run)
        write_arguments(run, {"smartmoe_dispatch": "auto"})
        if dispatch:
            chosen = {"dispatch": dispatch, "overlap_degree": 1, "ranks_per_node": 2}
            (run / "launch.json").write_text(json.dumps(chosen))
        found[dispatch] = whatif(run, "--ep", "2", of=())
    said = {dispatch: [note for note in content["notes"] if "auto" in note] for dispatch, content in found.items()}
    assert said[""] == ["the run did not write what --smartmoe-dispatch auto was: taken to be flat"]
    assert said["flat"] == ["--smartmoe-dispatch auto was flat in the run, and is taken to be so in every setting"]
    flat, hops = (found[dispatch]["settings"][0] for dispatch in ("flat", "hierarchical"))
    assert hops["exchange_bytes"] < 0.99 * flat["exchange_bytes"]
    assert [one["launch"].get("dispatch", "flat") for one in found["hierarchical"]["settings"]] == [
        "hierarchical",
        "flat",  # EP 2 lies on one node
    ]


def test_measured_parts_of_steps_narrow_the_bars(run_dir: Path, loads_NR: np.ndarray) -> None:
    """account.jsonl of the same machine: the experts' time apart from the rest, a tenth of which is dispatch."""
    rng = np.random.default_rng(4)
    header = {"version": 1, "basis": "cpu", "stages": [0] * RANKS, "micro_batches": 2, "virtual": 1}
    lines: list[dict[str, Any]] = [header]
    for n in range(RECORDS):
        parts_RP = np.zeros((RANKS, 6))
        parts_RP[:, 0], parts_RP[:, 1], parts_RP[:, 2] = 0.9 * REST_S, 0.1 * REST_S, TOKEN_S * loads_NR[n]
        seconds = (parts_RP * (1 + 0.01 * rng.standard_normal(parts_RP.shape))).tolist()
        lines.append({"iteration": n + 1, "iterations": 1, "seconds": seconds, "counts": [[0.0] * 8] * RANKS})
    path = run_dir / "account.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        by_parts = whatif(run_dir, "--micro-batch-size", "2", of=())
    finally:
        path.unlink()
    whole = whatif(run_dir, "--micro-batch-size", "2")
    assert by_parts["measured"]["what"] == "cpu_s_of_busiest_rank"
    assert by_parts["fit"]["factors"]["layers"]["deviation"] < whole["fit"]["factors"]["layers"]["deviation"]
    assert step_s(by_parts, micro_batch=2)["bar"] < step_s(whole, micro_batch=2)["bar"]


def test_stages_that_wait_for_each_other_are_fitted_to_wall_time(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "stages"
    shutil.copytree(run_dir, run)
    write_arguments(run, {"pipeline_model_parallel_size": 2, "world_size": 2 * RANKS})
    header = {"version": 1, "basis": "cpu", "stages": [0, 1], "micro_batches": 2, "virtual": 1}
    row = {"iteration": 1, "iterations": 1, "seconds": [[0.1] * 6] * 2, "counts": [[0.0] * 8] * 2}
    (run / "account.jsonl").write_text(f"{json.dumps(header)}\n{json.dumps(row)}\n")
    content = whatif(run, "--ep", "2", of=())
    assert content["measured"]["what"] == "wall_s"
    assert content["notes"][0].startswith("fitted to wall time: CPU time of ranks says nothing about waiting for each ")
    capsys.readouterr()
    assert main(["whatif", str(run), "--trace", str(run / "trace.npz"), "--step-times", str(run / "cpu.csv")]) == 2
    assert "is for runs in which every rank has all layers, and this one has pipeline" in capsys.readouterr().err


def test_the_fit_shows_in_the_bars(run_dir: Path, loads_NR: np.ndarray) -> None:
    """The same machine with steps ten times as noisy: wider bars."""
    rng = np.random.default_rng(2)
    seconds_NR = (REST_S + TOKEN_S * loads_NR) * (1 + 0.1 * rng.standard_normal(loads_NR.shape))
    rows = [f"{n + 1},{r},{max(seconds_NR[n, r], 0.1):.6f}" for n in range(RECORDS) for r in range(RANKS)]
    (run_dir / "noisy.csv").write_text("\n".join(["iteration,rank,seconds", *rows]) + "\n")
    calm = whatif(run_dir, "--micro-batch-size", "2")
    noisy = whatif(run_dir, "--micro-batch-size", "2", of=("--step-times", "noisy.csv"))
    assert all(wide["bar"] > one["bar"] for wide, one in zip(noisy["settings"], calm["settings"], strict=True))


def test_more_nodes_and_another_machine(run_dir: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    content = whatif(run_dir, "--nodes", "1,2", "--ep", "4,8", "--cluster", "cpu", "--plot", str(plot), of=())
    assert {one["launch"]["gpus"] for one in content["settings"]} == {4, 8}
    assert len(content["left_out"]) == 1  # EP 8 on one node of four ranks
    same, run = content["settings"][1], content["settings"][0]
    assert same["step_s"] == pytest.approx(run["step_s"])
    assert same["bar"] > run["bar"], "what was fitted on the run's machine is less sure on another"
    assert "Predicted from some-run" in plot.read_text()
    assert any("equal part of a recorded rank's tokens" in note for note in content["notes"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ep", "3"], "settings = None: there is none to predict: ETP x EP x PP = 3 does not divide 4 ranks. Pass"),
        ([], "settings = None: there is none to predict: they are all the run's own. Pass others with --ep, "),
        (["--replicas", "never"], "--replicas = 'never': is not a way of planning replicas. Choose from history, "),
        (["--cluster", "h100-sxm"], "--cluster = 'h100-sxm': has GPUs, and the run trained on CPU ranks: what was"),
        (["--plot", "a.gif"], "--plot = 'a.gif': must end in .svg, .png or .pdf. For example: --plot whatif.svg."),
        (["--records", "2"], "--records = 2: must be at least 5. For example: --records 200."),
        (["--micro-batch-size", "0"], "--micro-batch-size = 0: must be from 1 to 1,000,000. For example: "),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    run_dir: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["whatif", str(run_dir), "--trace", str(run_dir / "trace.npz"), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"smartmoe whatif: {said}")


@pytest.mark.parametrize(
    ("changed", "files", "said"),
    [
        (
            {},
            {"trace.npz": None},
            "RUN = 'run': has no routing trace, so it says nothing about other settings",
        ),
        ({"global_batch_size": 16}, {}, "--trace = 'trace.npz': has 8,192 assignments of a layer and iteration"),
        ({"num_experts": None}, {}, "RUN = 'run': trained a model without experts. Give a run with --num-experts."),
        ({"distributed_backend": "nccl"}, {}, "--run-cluster = None: is required: the run does not say on which "),
        ({"num_layers": 3}, {}, "--trace = 'trace.npz': has 2 layers, and the run 3 with experts. Pass"),
        ({"num_layers": 3, "smartmoe_dispatch": ABSENT}, {}, "--trace = 'trace.npz': has 2 layers, and the run 3"),
        ({"swiglu": ABSENT}, {}, "RUN = 'run': has no swiglu in its arguments.txt, as another Megatron or another "),
        ({}, {"metrics.jsonl": ""}, "RUN = 'run': has 0 measured steps: must be at least 4. Train longer, or with a"),
        (
            {},
            {"cpu.csv": "iteration,rank,seconds\n1,0,0.5\n"},
            "--step-times = 'cpu.csv': lacks rank 1 of iteration 1.",
        ),
        (
            {},
            {"launch.json": '{"dispatch": "flat", "overlap_degree": 1, "ranks_per_node": 0}'},
            "DIR/launch.json.ranks_per_node = 0: must be at least 1. Take it away, or restore it.",
        ),
        (
            {"smartmoe_dispatch": "hierarchical"},
            {
                "cpu.csv": "iteration,rank,seconds\n"
                + "".join(f"{n + 1},{r},0.5\n" for n, r in np.ndindex(RECORDS, RANKS))
            },
            "--smartmoe-dispatch = 'hierarchical': is not predicted from CPU seconds: what a rank passes on as a ",
        ),
    ],
)
def test_a_run_that_says_nothing_is_refused(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
    files: dict[str, str | None],
    said: str,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_arguments(run, {"smartmoe_record_trace": "trace.npz", **changed})
    for name in ("metrics.jsonl", "trace.npz"):
        (run / name).write_bytes((run_dir / name).read_bytes())
    for name, text in files.items():
        (run / name).unlink() if text is None else (run / name).write_text(text)
    monkeypatch.chdir(run)
    times = ["--step-times", "cpu.csv"] if "cpu.csv" in files else []
    assert main(["whatif", str(run), "--ep", "2", *times]) == 2
    assert capsys.readouterr().err.startswith(f"smartmoe whatif: {said.replace('DIR', str(run))}")
