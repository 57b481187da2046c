"""`--parallel auto` with Megatron's real parser and checks, and one real run through the launcher."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_smartmoe.planner.arguments import check_plannable, model_from_arguments
from megatron_smartmoe.planner.flags import megatron_flags
from megatron_smartmoe.spec.model import ModelSpec, load_model_spec
from megatron_smartmoe.spec.parallel import ParallelSpec
from megatron_smartmoe.spec.run import load_run_spec
from tests.support.ranks import run_ranks
from tests.support.synthetic import SyntheticSpec, synthetic_trace
from tests.support.training import TINY_MODEL, TINY_TRAINING, metrics

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]
MODELS = [load_model_spec(path) for path in sorted((ROOT / "configs" / "models").glob("*.yaml"))]
MOCK_DATA = "--mock-data --tokenizer-type NullTokenizer --vocab-size 127".split()
MODEL = [*TINY_MODEL, *TINY_TRAINING, *MOCK_DATA, "--train-iters", "2"]
MODEL[MODEL.index("--micro-batch-size") : MODEL.index("--global-batch-size")] = []
QUICKSTART = ["--config", str(ROOT / "configs" / "runs" / "quickstart.yaml")]


def _parsed(models: list[ModelSpec]) -> list[ModelSpec]:
    from megatron_smartmoe.adapter.flags.parser import build_parser

    parser, found = build_parser(), []
    for model in models:
        tokens = megatron_flags(model, ParallelSpec(gpus=1, global_batch=model.global_batch)).megatron
        values = vars(parser.parse_args(tokens))
        check_plannable(values)
        found.append(model_from_arguments(values, model.name))
    return found


def test_flags_read_back_give_every_shipped_model(tmp_path: Path) -> None:
    for model, found in zip(MODELS, run_ranks(_parsed, 1, MODELS, log_dir=tmp_path)[0], strict=True):
        # Megatron's default turns to softmax first with top-1, and a plan says so.
        pre_softmax = model.moe.pre_softmax or (model.moe.top_k == 1 and model.moe.score_function == "softmax")
        moe = replace(model.moe, pre_softmax=pre_softmax)
        assert found == replace(model, moe=moe, uncertain=found.uncertain)


def choice(printed: str) -> str:
    """`TP1 PP1 EP2 DP2 mbs4` of the line that says it."""
    (line,) = [line for line in printed.splitlines() if "choice" in line]
    return line.split("choice")[1].split(":")[0].strip()


# --- a real run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two CPU ranks, two iterations, as scripts/pretrain_gpt_moe.sh starts them; the folder and what was printed."""
    folder = tmp_path_factory.mktemp("trained")
    checkpoints = "--save {run_dir}/c --load {run_dir}/c --save-interval 10 --dist-ckpt-optim-fully-reshardable".split()
    argv = ["--parallel", "auto", "--nproc", "2", "--run-dir", "run", "--smartmoe", *MODEL, *checkpoints]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_smartmoe.adapter.launch", *argv]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def test_it_plans_and_trains(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    assert "smartmoe:   machine   2 x CPU-thread on 1 node, 6.0 GB each (cluster file cpu)\n" in printed
    assert len(metrics(folder / "run")) == 2
    plan = json.loads((folder / "run" / "plan.json").read_text())
    best = plan["best"][0]
    assert best["launch"] == choice(printed)
    assert (plan["question"]["gpus"], best["spec"]["implementation"], best["spec"]["precision"]) == (2, "local", "fp32")
    assert plan["pool"]["launch"] == best["launch"]
    flags = load_run_spec(folder / "run" / "config.yaml").flags
    assert flags["expert-model-parallel-size"] == str(best["spec"]["ep"])
    assert flags["micro-batch-size"] == str(best["spec"]["micro_batch"])


def test_a_resumed_run_is_launched_the_same_way(trained: tuple[Path, str], tmp_path: Path) -> None:
    """As long as that is possible; what cannot be kept is said, and what the checkpoint needs is kept even then."""
    folder, printed = trained
    longer = ["--run-dir", "run", "--train-iters", "3", "--override-opt-param-scheduler"]
    cases = {"again": longer, "other ranks": [*longer, "--nproc", "4"]}
    said = run_ranks(_launched, 1, cases, folder, log_dir=tmp_path)[0]
    status, again, errors = said["again"]
    where = Path("run") / "plan.json"
    assert (status, errors) == (0, "")
    assert again.startswith(f"# --parallel auto: reuses the plan in {where} (remove it to plan again)\n")
    assert choice(again) == choice(printed)
    status, other, errors = said["other ranks"]
    assert (status, errors) == (0, "")
    assert f"planned again, the plan in {where} no longer applies: it is for 2 ranks, this job has 4\n" in other
    ep = "EP 1" if "EP1" in choice(printed) else "EP > 1"
    assert f"{ep} and a distributed optimizer, as in the checkpoint" in other


# --- dry runs, all in one process that has Megatron imported; its facade counts as a GPU, hence the device

Said = tuple[int, str, str]


def _launched(cases: dict[str, list[str]], folder: Path) -> dict[str, Said]:
    """Status, stdout and stderr of a dry run of each."""
    from megatron_smartmoe.adapter.launch.launcher import main

    os.chdir(folder)
    found = {}
    for name, argv in cases.items():
        out, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            status = main(["--parallel", "auto", "--dry-run", "--smartmoe-device", "cpu", *argv])
        found[name] = (status, out.getvalue(), errors.getvalue())
    return found


LAUNCHES = {
    "an uneven pipeline": "--num-layers 5 --pipeline-model-parallel-size 2",
    "virtual stages": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "tensor parallel experts": "--tensor-model-parallel-size 2 --expert-tensor-parallel-size 2",
    "recomputed": "--recompute-granularity full",
    "overlapped": "--overlap-param-gather",
    "a layout": "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Etttt|L",
    "context parallel": "--context-parallel-size 2",
    "prediction blocks": "--mtp-num-layers 1",
    "moved experts": "--smartmoe --expert-model-parallel-size 2",
    "copies and pieces": "--smartmoe --smartmoe-spare-slots 1 --smartmoe-overlap-degree 2",
}


TRACE = Path("traces") / "burst.npz"
LOADS = {
    "for a skew": (["--parallel-skew", "3"], "--parallel-skew: hottest expert 3x; worst: hottest expert 4x"),
    "for a trace": (["--parallel-trace", str(TRACE)], "trace, median record; trace, worst 5%"),
}
ERRORS = {
    "nothing fits": (
        [*QUICKSTART, "--hidden-size", "8192", "--moe-ffn-hidden-size", "32768"],
        "error: --parallel = 'auto': on 4 ranks no launch fits: the smallest needs ",
        " Use more ranks or a smaller model or sequence.",
    ),
    "no launch agrees": (
        [*QUICKSTART, "--tensor-model-parallel-size", "3"],
        "error: --parallel = 'auto': on 4 ranks no launch is possible: TP x PP x CP = 3 does not divide 4 ranks.",
        "or remove one of: --tensor-model-parallel-size 3.",
    ),
    "no model": ([], "error: --num-layers = None: is required by --parallel auto.", "a --config that has it."),
    "no vocabulary": (
        [*TINY_MODEL, "--global-batch-size", "8"],
        "error: --vocab-size = None: is required by --parallel auto",
        "number of entries, for example 32000.",
    ),
    "another split": (
        [*QUICKSTART, "--decoder-first-pipeline-num-layers", "1"],
        "error: --decoder-first-pipeline-num-layers = '1' (command line): is a pipeline split that --parallel auto",
        "or remove --parallel auto.",
    ),
    "a trace of another model": (
        [*QUICKSTART, "--num-experts", "4", "--parallel-trace", str(TRACE)],
        "error: --parallel-trace = 8: has 8 experts, the model has 4.",
        " Pass a trace of this model, or --parallel-skew 3.",
    ),
    "no cluster file": (
        [*QUICKSTART, "--smartmoe-cluster", "absent.yaml"],
        "error: ",
        "absent.yaml",
    ),
}
KEPT = [*QUICKSTART, "--tensor-model-parallel-size", "2", "--no-use-distributed-optimizer"]
NO_PLAN = ["--run-dir", "broken", *MODEL]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dry")
    (path / "broken").mkdir()
    (path / "broken" / "plan.json").write_text("{")
    (path / TRACE).parent.mkdir()
    spec = SyntheticSpec(kind="burst", num_experts=8, num_records=20, num_layers=2)
    synthetic_trace(spec).save(path / TRACE)
    return path


@pytest.fixture(scope="module")
def said(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Said]:
    cases = {name: ["--nproc", "4", *MODEL, *flags.split()] for name, flags in LAUNCHES.items()}
    cases |= {name: argv for name, (argv, _, _) in ERRORS.items()} | {"kept": KEPT, "no plan": NO_PLAN}
    cases |= {name: ["--nproc", "4", *MODEL, *argv] for name, (argv, _) in LOADS.items()}
    found: dict[str, Said] = run_ranks(_launched, 1, cases, folder, log_dir=tmp_path_factory.mktemp("logs"))[0]
    return found


@pytest.mark.parametrize("name", LAUNCHES)
def test_what_is_chosen_passes_megatrons_checks(name: str, said: dict[str, Said]) -> None:
    status, printed, errors = said[name]
    assert (status, errors) == (0, "")
    assert choice(printed)


def test_a_launch_with_more_to_switch_than_homes_gets_the_pool(said: dict[str, Said]) -> None:
    """Spare slots and pieces were asked for; whether there is anything to switch depends on the EP that was chosen."""
    _, printed, _ = said["copies and pieces"]
    assert ("--smartmoe-pool auto" in printed) is ("EP1" not in choice(printed))
    assert "--smartmoe-pool" not in said["moved experts"][1]
    assert "--smartmoe-pool" not in said["recomputed"][1]


def test_the_command_line_is_kept_and_the_configuration_replaced(said: dict[str, Said]) -> None:
    status, printed, errors = said["kept"]
    assert (status, errors) == (0, "")
    assert "#   kept      --tensor-model-parallel-size 2, --no-use-distributed-optimizer\n" in printed
    assert "#   replaced  the configuration's " in printed
    assert choice(printed).startswith("TP2 ")
    for flag in ("--sequence-parallel", "--global-batch-size 16", "--smartmoe-homes-interval 40"):
        assert f"  {flag} \\\n" in printed
    assert "  --use-distributed-optimizer" not in printed
    subprocess.run(["bash", "-n"], input=printed, text=True, check=True)


@pytest.mark.parametrize("name", LOADS)
def test_it_plans_for_the_load_that_is_asked_for(name: str, said: dict[str, Said]) -> None:
    status, printed, errors = said[name]
    assert (status, errors) == (0, "")
    assert f"#   load      {LOADS[name][1]}\n" in printed
    assert "--parallel-" not in printed.split("choice")[1]  # the launcher's own flags stay with it


@pytest.mark.parametrize("name", ERRORS)
def test_wrong_input_is_one_line(name: str, said: dict[str, Said]) -> None:
    _, begins, holds = ERRORS[name]
    status, printed, error = said[name]
    assert (status, printed) == (2, "")
    assert error.startswith(begins)
    assert holds in error
    assert len(error.splitlines()) == 1


def test_a_file_that_is_no_plan_is_refused(said: dict[str, Said]) -> None:
    path = Path("broken") / "plan.json"
    rule = "is not JSON: Expecting property name enclosed in double quotes (column 2)"
    error = f"error: {path}:1 = '{{': {rule}. Remove {path} to plan again.\n"
    assert said["no plan"] == (2, "", error)


def test_dry_runs_leave_nothing(said: dict[str, Said], folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["broken", TRACE.parent.name]
