"""Mistakes of real users: each works, or is one line with the flag, where it was set, its value, and a way out.

The rows of `ROWS` are launched with --dry-run in one process, which has torch and Megatron imported. Mistakes that need
more than a launch, or less (written checkpoints, data, traces, Slurm's environment), have a test where the code is that
they meet: `ELSEWHERE` names it, so that this file is the list of all of them.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.corpus import spec_for, texts, write_jsonl
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.dist

ROOT = Path(__file__).parents[2]

TINY = """
name: tiny
nproc: 2
flags:
  model:
    num-layers: 2
    hidden-size: 32
    num-attention-heads: 4
    ffn-hidden-size: 64
    seq-length: 32
    max-position-embeddings: 32
    position-embedding-type: rope
    normalization: RMSNorm
    swiglu: true
    disable-bias-linear: true
    untie-embeddings-and-output-weights: true
    attention-dropout: 0
    hidden-dropout: 0
  moe:
    num-experts: 8
    moe-router-topk: 2
    moe-ffn-hidden-size: 32
    moe-router-load-balancing-type: aux_loss
    moe-aux-loss-coeff: 1e-3
    moe-router-dtype: fp32
  parallel:
    expert-model-parallel-size: 2
  training:
    micro-batch-size: 2
    global-batch-size: 8
    train-iters: 6
    lr: 1e-2
    min-lr: 1e-3
    lr-decay-style: cosine
    lr-warmup-iters: 1
    clip-grad: 1.0
    seed: 1234
  data:
    data-path: data/corpus
    tokenizer-type: SentencePieceTokenizer
    tokenizer-model: data/corpus.tokenizer.model
    split: 95,5,0
    num-workers: 0
  logging:
    log-interval: 1
    eval-interval: 100
    eval-iters: 0
    rerun-mode: disabled
"""
MOCK = "--mock-data --tokenizer-type NullTokenizer --vocab-size 127"


class Row(NamedTuple):
    """Flags behind the configuration, and what is printed: part of the error, None where the run works."""

    flags: str
    says: str | None = None
    config: str = "tiny.yaml"


ROWS = {
    "as it is": Row(""),
    "the quickstart with fewer iterations than its warm-up": Row(f"--train-iters 12 {MOCK}", config="quickstart"),
    "warm-up longer than the run": Row(
        "--lr-warmup-iters 20",
        "--lr-warmup-iters = 20 (command line): must be less than --train-iters = 6, when the learning rate",
    ),
    "warm-up of the file longer than the run": Row(
        "--train-iters 1",
        "--lr-warmup-iters = 1 (tiny.yaml, flags.training.lr-warmup-iters): must be less than --train-iters = 1",
    ),
    "minimal learning rate above the peak": Row(
        "--min-lr 1", "--min-lr = '1' (command line): flags: assert args.min_lr <= args.lr"
    ),
    "evaluation without data": Row(
        "--split 100,0,0 --eval-iters 2 --eval-interval 3",
        "--split = '100,0,0' (command line): leaves no data for the validation that --eval-iters 2 asks for",
    ),
    "a split with a sign": Row("--split=-1,1,0", "--split = '-1,1,0' (command line): must be numbers that are not neg"),
    "a split with a word": Row(
        "--split most,some", "--split = 'most,some' (command line): must be one to three numbers"
    ),
    "a split with four numbers": Row("--split 1,1,1,1", "--split = '1,1,1,1' (command line): must be at most three"),
    "a split of nothing": Row("--split 0,0,0", "--split = '0,0,0' (command line): leaves nothing for training, valid"),
    "a blend without evaluation": Row("--data-path 0.3 data/corpus 0.7 data/other --eval-iters 0 --split 95,5,0"),
    "a pattern of layers that is too long": Row(
        "--num-layers 4 --moe-layer-freq ([0]*2+[1]*3)",
        "--moe-layer-freq = [0, 0, 1, 1, 1] (command line): has 5 entries, and --num-layers is 4",
    ),
    "no layer with experts to balance": Row(
        "--num-layers 4 --moe-layer-freq ([0]*4) --smartmoe",
        "--moe-layer-freq = [0, 0, 0, 0] (command line): has no layer with experts, and --smartmoe balances experts",
    ),
    "groups with too few experts": Row(
        "--moe-router-num-groups 4 --moe-router-group-topk 1 --moe-router-topk 4",
        "= '4' (command line): model: selected index k out of range",
    ),
    "a batch size that ranks cannot share": Row(
        '--no-global-batch-size --step-batch-size-schedule "0:4 512:7"',
        "--step-batch-size-schedule = '0:4 512:7' (command line): batch sizes: current global batch size (7) is",
    ),
    "a tokenizer that is no model": Row(
        "--tokenizer-model tiny.yaml", "--tokenizer-model = 'tiny.yaml' (command line)"
    ),
    "a vocabulary that is too small": Row(
        "--tokenizer-type NullTokenizer --vocab-size 100",
        "--data-path = 'data/corpus' (tiny.yaml, flags.data.data-path): has token ids up to",
    ),
    "no interval between evaluations": Row("--no-eval-interval"),
    "a ramp that Megatron ignores": Row(
        "--rampup-batch-size 4 4 16 --global-batch-size 12",
        "--rampup-batch-size = [4, 4, 16] (command line): is ignored by Megatron 0.19",
    ),
    "a folder without a checkpoint": Row(
        "--load empty", "--load = 'empty' (command line): has no checkpoint: there is no latest_checkpointed_iteration"
    ),
    "the first start of a run that resumes": Row("--load empty --save empty --save-interval 3"),
    "experts whose activation is to be recomputed": Row(
        "--smartmoe --recompute-granularity selective --recompute-modules moe_act",
    ),
    "experts that are to be offloaded": Row(
        "--smartmoe --fine-grained-activation-offloading --offload-modules expert_fc1",
        "--offload-modules = 'expert_fc1' (command line): has expert_fc1, which is a part of Megatron's experts",
    ),
    "saves at no interval": Row("--save other", "--save-interval = None: is required with --save"),
    "routing replay": Row(
        "--moe-enable-routing-replay", "--moe-enable-routing-replay = True (command line): would do nothing"
    ),
    "layers of the last stage without stages": Row(
        "--decoder-last-pipeline-num-layers 1", "--decoder-last-pipeline-num-layers = '1' (command line): flags: "
    ),
    "mock data in the place of the file's": Row("--mock-data"),
    "a switch with a value": Row(
        "",
        "--swiglu = 'true' (texts.yaml, flags.model.swiglu): takes no value: it is a switch.",
        config="texts.yaml",
    ),
    "an option of vision models": Row("--num-classes 10", "--num-classes = 10 (command line): is an option of vision"),
    "old names and what has no effect": Row("--use-mcore-models --use-flash-attn"),
}


# The test that covers a mistake, and a text of it by which the case is found.
ELSEWHERE = {
    "a Hugging Face tokenizer": ("tests/dist/test_tokenizers.py::test_it_trains_and_resumes", "HuggingFaceTokenizer"),
    "resuming from a save without optimizer": (
        "tests/megatron/test_checkpoint_options.py::test_saves_and_loads",
        "--no-save-optim",
    ),
    "the torch format, saved with --smartmoe and loaded without": (
        "tests/megatron/test_checkpoint_options.py::test_saves_and_loads",
        "--ckpt-format torch",
    ),
    "Megatron's routing traces on CPU ranks, without the launcher": (
        "tests/megatron/test_rehearsal.py::test_without_the_launcher_ranks_train_after_the_rehearsal",
        "--moe-routing-trace-path",
    ),
    "lines of JSON under another suffix": (
        "tests/unit/adapter/test_corpus_formats.py::test_every_kind_of_file_gives_its_documents",
        "a.ndjson",
    ),
    "compressed lines of JSON": (
        "tests/unit/adapter/test_corpus_formats.py::test_every_kind_of_file_gives_its_documents",
        "a.jsonl.gz",
    ),
    "documents under another key": (
        "tests/unit/adapter/test_corpus_errors.py::test_a_wrong_key_lists_the_keys_that_are_there",
        "--json-keys",
    ),
    "a trace of a layer without assignments": (
        "tests/unit/simulate/test_run.py::test_what_has_no_assignments_is_left_out_and_counted",
        "left_out",
    ),
    "Slurm's interactive step on one node of two": (
        "tests/unit/adapter/test_launch_topology.py::test_the_shell_of_salloc_in_a_step_of_its_own_starts_srun",
        "4294967290",
    ),
    "a Slurm variable that the container's environment lacks": (
        "tests/unit/adapter/test_launch_topology.py::test_variables_of_a_step_that_are_missing_or_odd",
        "SLURM_LOCALID",
    ),
    "Megatron traces whose micro-batches vary": (
        "tests/unit/spec/test_trace.py::test_micro_batches_may_vary",
        "micro_batch",
    ),
    "Megatron traces with a step that is no number": (
        "tests/unit/spec/test_trace.py::test_a_damaged_megatron_line_is_named",
        "step = 'a'",
    ),
    "a weight matrix of EPLB": (
        "tests/unit/spec/test_trace_loads.py::test_a_matrix_is_a_load_of_every_layer",
        "EPLB",
    ),
    "a finished run that is started again": (
        "tests/dist/test_checkpoint_saves.py::test_a_finished_run_that_is_started_again_leaves_its_checkpoint_alone",
        "train-iters",
    ),
    "SIGTERM to ranks that save at another signal": (
        "tests/unit/adapter/test_launch_process.py::test_sigterm_is_forwarded_and_the_child_has_its_time",
        "--exit-signal SIGUSR2",
    ),
}


class Launched(NamedTuple):
    """What one launch did."""

    status: int
    stdout: str
    stderr: str


def _launch_all(folder: Path, rows: dict[str, Row]) -> dict[str, Launched]:
    """Every row in this process."""
    import shlex

    from megatron_smartmoe.adapter.launch.launcher import main

    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["LOCAL_WORLD_SIZE"] = "8"  # devices that the facade counts
    found = {}
    for name, row in rows.items():
        out, err = io.StringIO(), io.StringIO()
        argv = ["--config", row.config, *shlex.split(row.flags), "--dry-run"]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(argv)
        found[name] = Launched(status, out.getvalue(), err.getvalue())
    return found


def _prepare(folder: Path) -> None:
    from megatron_smartmoe.adapter.corpus import prepare

    inputs = write_jsonl(folder / "texts.jsonl", texts(400))
    (folder / "data").mkdir()
    prepare(spec_for(folder / "data" / "corpus", inputs))
    for suffix in (".bin", ".idx"):
        (folder / "data" / f"other{suffix}").write_bytes((folder / "data" / f"corpus{suffix}").read_bytes())


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Launched]:
    folder = tmp_path_factory.mktemp("field")
    (folder / "tiny.yaml").write_text(TINY)
    (folder / "texts.yaml").write_text(TINY.replace("swiglu: true", 'swiglu: "true"'))
    (folder / "empty").mkdir()
    run_ranks(_prepare, 1, folder, log_dir=folder / "log")
    found: Sequence[dict[str, Launched]] = run_ranks(_launch_all, 1, folder, ROWS, log_dir=folder / "log")
    return found[0]


@pytest.mark.parametrize("name", ROWS)
def test_it_works_or_is_one_line(name: str, launched: dict[str, Launched]) -> None:
    status, stdout, stderr = launched[name]
    assert "Traceback" not in stdout + stderr
    if ROWS[name].says is None:
        assert (status, stderr) == (0, "")
        assert "parameters per rank" in stdout
        return
    assert status == 2
    assert stdout == ""
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith("error: --")
    assert str(ROWS[name].says) in stderr


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_cases_have_their_tests(name: str) -> None:
    node, text = ELSEWHERE[name]
    path, _, function = node.partition("::")
    source = (ROOT / path).read_text()
    names = {each.name for each in ast.walk(ast.parse(source)) if isinstance(each, ast.FunctionDef)}
    assert function in names
    assert text in source


def test_details_are_in_a_file_that_the_line_names(launched: dict[str, Launched]) -> None:
    stderr = launched["groups with too few experts"].stderr
    found = re.search(r"Details: (\S+)\.$", stderr.strip())
    assert found is not None
    assert "Traceback (most recent call last)" in Path(found[1]).read_text()


def test_a_report_says_what_was_seen(launched: dict[str, Launched]) -> None:
    stdout = launched["as it is"].stdout
    assert re.search(r"^# pipeline stage 0: 2 MoE layers, [\d,]+ parameters per rank$", stdout, re.MULTILINE)
    assert re.search(r"^# memory of the fullest rank, predicted: \d+ MiB \(weights ", stdout, re.MULTILINE)
    assert re.search(r"^# train data: 48 samples, \d+ in an epoch: [\d.]+ epochs$", stdout, re.MULTILINE)


def test_what_has_no_effect_is_said(launched: dict[str, Launched]) -> None:
    stdout = launched["old names and what has no effect"].stdout
    assert "# note: --use-mcore-models has no effect: Megatrons core models" in stdout
    assert "# note: --use-flash-attn has no effect" in stdout


def test_the_first_start_is_said(launched: dict[str, Launched]) -> None:
    stdout = launched["the first start of a run that resumes"].stdout
    assert "# there is no checkpoint in empty yet: training starts from iteration 0 and saves there\n" in stdout
