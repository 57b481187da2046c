"""Wrong command lines: each rule of `megatron_checks.py` with its whole text, judged through Megatron's own parser.

The facade changes torch for the whole process, so one rank of `run_ranks` judges every command line and returns what
was said; the tests below compare.
"""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_smartmoe.adapter.flags import parser
from megatron_smartmoe.adapter.flags.run_defaults import run_defaults
from megatron_smartmoe.adapter.repairs import bucket_padding
from megatron_smartmoe.errors import ConfigError
from tests.support.checks import Case, judge, judge_all
from tests.support.corpus import write_indexed_files
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.fast]

PP2, TP2 = "--pipeline-model-parallel-size 2", "--tensor-model-parallel-size 2 --sequence-parallel"
VPP = f"{PP2} --num-layers-per-virtual-pipeline-stage"
CHECKPOINT_ARGS = "--use-checkpoint-args --load /nowhere --save /nowhere --save-interval 10"
FSDP = "--use-megatron-fsdp --use-distributed-optimizer --ckpt-format fsdp_dtensor"
NOT_HERE = "is not supported by this entry point, which pretrains GPT-MoE. Remove it."
LOWER = "or lower one of these sizes."
MEANING = "See --help-megatron for the meaning of the flags."
NO_FLAG = "is not a flag of Megatron or of smartmoe."
MEGATRON_SAYS = "does not hold for these flags. Change the flags that it names; --help-megatron lists all."


def required(flag: str) -> Case:
    return Case(without=(flag,), says=f"{flag} = None: is required. Pass {flag} N, or a --config that has it.")


SIZES = {
    f"{flag} {value}": Case(
        flags=f"{flag} {value}",
        ranks=2,
        says=f"{flag} = {value}: must be at least 1. Remove it, or pass {flag} 1, for example.",
    )
    for flag, value in (
        ("--tensor-model-parallel-size", 0),
        ("--tensor-model-parallel-size", -2),
        ("--pipeline-model-parallel-size", 0),
        ("--context-parallel-size", 0),
        ("--expert-model-parallel-size", 0),
        ("--expert-tensor-parallel-size", 0),
        ("--num-layers-per-virtual-pipeline-stage", 0),
        ("--num-virtual-stages-per-pipeline-rank", 0),
        ("--num-layers", 0),
        ("--hidden-size", 0),
        ("--num-attention-heads", 0),
        ("--num-attention-heads", -4),
        ("--num-query-groups", 0),
        ("--seq-length", 0),
        ("--max-position-embeddings", 0),
        ("--num-experts", 0),
        ("--micro-batch-size", 0),
        ("--global-batch-size", -8),
        ("--moe-router-topk", 0),
    )
}
SUPPORTED = {
    "sft": Case(flags="--sft", says=f"--sft = True: {NOT_HERE}"),
    "document masking": Case(
        flags="--dataloader-inter-document-masking", says=f"--dataloader-inter-document-masking = True: {NOT_HERE}"
    ),
    "hybrid cp": Case(flags="--hybrid-context-parallel", says=f"--hybrid-context-parallel = True: {NOT_HERE}"),
    "rl": Case(flags="--perform-rl-step", says=f"--perform-rl-step = True: {NOT_HERE}"),
    "megatron's yaml": Case(
        flags="--yaml-cfg model.yaml",
        says="--yaml-cfg = 'model.yaml': is not supported: configurations in Megatron's own YAML are not read. Use "
        "--config FILE, or flags.",
    ),
    "distillation": Case(
        flags="--logits-load-dir logits",
        says="--logits-load-dir = 'logits': is not supported by this entry point, which pretrains GPT-MoE: it is for "
        "distillation. Remove it.",
    ),
    "te absent": Case(
        flags="--transformer-impl transformer_engine",
        says="--transformer-impl = 'transformer_engine': needs TransformerEngine, which CPU ranks do not use. "
        "Remove it, or pass --transformer-impl local.",
    ),
    "te present": Case(flags="--transformer-impl transformer_engine --moe-grouped-gemm", te=True),
    "grouped gemm": Case(
        flags="--moe-grouped-gemm",
        says="--moe-grouped-gemm = True: needs TransformerEngine and --transformer-impl transformer_engine. "
        "Remove it, or install TransformerEngine.",
    ),
    "fp8": Case(
        flags="--fp8-format hybrid",
        says="--fp8-format = 'hybrid': needs TransformerEngine. Pass --bf16 instead, or install it.",
    ),
    "mtp with sp": Case(flags=f"{TP2} --mtp-num-layers 1", ranks=2),
    "nccl without gpu": Case(
        flags="--distributed-backend nccl",
        says="--distributed-backend = 'nccl': must be gloo on CPU ranks. Remove it, or pass gloo.",
    ),
    "nccl with gpu": Case(flags="--distributed-backend nccl", cpu=False),
    "batched sends on gloo": Case(
        flags=f"{VPP} 1 --no-overlap-p2p-communication",
        ranks=2,
        says="--no-overlap-p2p-communication = True: is not supported on CPU ranks: the interleaved schedule with "
        "batched sends gives wrong results on gloo. Remove it.",
    ),
    "batched sends on nccl": Case(flags=f"{VPP} 1 --no-overlap-p2p-communication", ranks=2, cpu=False),
    "interleaved": Case(flags=f"{VPP} 1", ranks=2, verdict=True),
}
MODEL = {
    **{f"no {flag}": required(flag) for flag in ("--num-layers", "--hidden-size", "--num-attention-heads")},
    **{f"no {flag}": required(flag) for flag in ("--max-position-embeddings", "--seq-length")},
    "shape from the checkpoint": Case(flags=CHECKPOINT_ARGS, without=("--num-layers", "--seq-length")),
    "heads and tp": Case(
        flags=f"{TP2} --num-attention-heads 3",
        ranks=2,
        says="--num-attention-heads = 3: must be divisible by --tensor-model-parallel-size = 2. Change one of the two, "
        "for example to --num-attention-heads 4.",
    ),
    "query groups": Case(
        flags="--group-query-attention --num-query-groups 3",
        says="--num-attention-heads = 4: must be divisible by --num-query-groups = 3. Change one of the two, for "
        "example to --num-attention-heads 6.",
    ),
    "query groups and tp": Case(
        flags=f"{TP2} --group-query-attention --num-query-groups 1",
        ranks=2,
        says="--num-query-groups = 1: must be divisible by --tensor-model-parallel-size = 2. Change one of the two, "
        "for example to --num-query-groups 2.",
    ),
    "grouped queries": Case(flags=f"{TP2} --group-query-attention --num-query-groups 2", ranks=2, verdict=True),
    "query groups without grouping": Case(flags="--num-query-groups 3", verdict=True),
    "sequence and sp": Case(
        flags=f"{TP2} --seq-length 63",
        ranks=2,
        says="--seq-length = 63: must be divisible by --tensor-model-parallel-size (sequence parallel) = 2. "
        "Change one of the two, for example to --seq-length 64.",
    ),
    "tp and sp": Case(flags=TP2, ranks=2, verdict=True),
    "sequence and cp": Case(
        flags="--context-parallel-size 2 --seq-length 62",
        ranks=2,
        says="--seq-length = 62: must be divisible by 2 x --context-parallel-size = 4. Change one of the two, for "
        "example to --seq-length 64.",
    ),
    "cp": Case(flags="--context-parallel-size 2 --seq-length 60", ranks=2),
    "top-k": Case(
        flags="--moe-router-topk 9",
        says="--moe-router-topk = 9: cannot choose more than --num-experts = 8 experts. Pass a smaller number, "
        "for example 2.",
    ),
    "top-k of all": Case(flags="--moe-router-topk 8", verdict=True),
    "layers and pp": Case(
        flags=f"{PP2} --num-layers 5",
        ranks=2,
        says="--num-layers = 5: must be divisible by --pipeline-model-parallel-size = 2. Pass --num-layers 6, for "
        "example, another --pipeline-model-parallel-size, or an uneven split with --decoder-first-pipeline-num-layers.",
    ),
    "pp": Case(flags=PP2, ranks=2, verdict=True),
    "uneven pp": Case(flags=f"{PP2} --num-layers 5 --decoder-first-pipeline-num-layers 2", ranks=2, verdict=True),
    "the loss counts as a layer": Case(
        flags=f"{PP2} --num-layers 3 --account-for-loss-in-pipeline-split", ranks=2, verdict=True
    ),
    "layers with the loss counted": Case(
        flags=f"{PP2} --account-for-loss-in-pipeline-split",
        ranks=2,
        says="--num-layers = 4: must be divisible by --pipeline-model-parallel-size = 2 (with 1 counted for embedding "
        "and loss). Pass --num-layers 5, for example, another --pipeline-model-parallel-size, or an uneven split with "
        "--decoder-first-pipeline-num-layers.",
    ),
    "virtual stages without pp": Case(
        flags="--num-virtual-stages-per-pipeline-rank 2",
        says="--pipeline-model-parallel-size = 1: the interleaved schedule needs at least two pipeline stages. "
        "Pass 2 or more, or remove the virtual stages.",
    ),
    "layers of a virtual stage": Case(
        flags=f"{VPP} 3",
        ranks=2,
        says="--num-layers / PP = 2: must be divisible by --num-layers-per-virtual-pipeline-stage = 3. Pass a "
        "divisor of the layers of one pipeline stage, for example --num-layers-per-virtual-pipeline-stage 1.",
    ),
    "layers of a virtual rank": Case(
        flags=f"{PP2} --num-virtual-stages-per-pipeline-rank 3",
        ranks=2,
        says="--num-layers / PP = 2: must be divisible by --num-virtual-stages-per-pipeline-rank = 3. Pass a "
        "divisor of the layers of one pipeline stage, for example --num-virtual-stages-per-pipeline-rank 1.",
    ),
    "virtual stages of a rank": Case(flags=f"{PP2} --num-virtual-stages-per-pipeline-rank 2", ranks=2, verdict=True),
}
PARALLELISM = {
    "world and pp": Case(
        flags=PP2,
        ranks=3,
        says="world size = 3: must be a multiple of TP 1 x PP 2 x CP 1 = 2 ranks. Start 4 ranks, for example "
        f"(--nproc), {LOWER}",
    ),
    "ep without experts": Case(
        flags="--expert-model-parallel-size 2",
        ranks=2,
        without=("--num-experts", "--moe-router-topk"),
        says="--expert-model-parallel-size = 2: needs a model with experts. Pass --num-experts 2, for example.",
    ),
    "experts from the checkpoint": Case(
        flags=f"{CHECKPOINT_ARGS} --expert-model-parallel-size 2",
        ranks=2,
        without=("--num-experts", "--moe-router-topk"),
    ),
    "dense": Case(without=("--num-experts", "--moe-router-topk")),
    "experts and ep": Case(
        flags="--expert-model-parallel-size 3",
        ranks=3,
        says="--num-experts = 8: must be divisible by --expert-model-parallel-size = 3. Change one of the two, for "
        "example to --num-experts 9.",
    ),
    "world and ep": Case(
        flags="--expert-model-parallel-size 4",
        ranks=2,
        says="world size = 2: must be a multiple of ETP 1 x EP 4 x PP 1 = 4 ranks. Start 4 ranks, for example "
        f"(--nproc), {LOWER}",
    ),
    "ep": Case(flags="--expert-model-parallel-size 4", ranks=4, verdict=True),
    "tp folded into ep": Case(
        flags=f"{TP2} --expert-tensor-parallel-size 1 --expert-model-parallel-size 2", ranks=2, verdict=True
    ),
    "experts under tp": Case(
        flags="--tensor-model-parallel-size 2",
        ranks=2,
        says="--tensor-model-parallel-size = 2: needs sequence parallelism in a model with experts. "
        "Add --sequence-parallel.",
    ),
}
BATCH = {
    "no micro batch": Case(
        without=("--micro-batch-size",),
        says="--micro-batch-size = None: is required. Pass --micro-batch-size 1, for example.",
    ),
    "global batch": Case(
        flags="--global-batch-size 6",
        ranks=4,
        says="--global-batch-size = 6: must be divisible by --micro-batch-size x data-parallel size (1 x 4) = 4. "
        "Change one of the two, for example to --global-batch-size 8.",
    ),
    "batch and pp": Case(flags=f"{PP2} --global-batch-size 6", ranks=4, verdict=True),
    "no global batch": Case(without=("--global-batch-size",), verdict=True),
}
CHECK_PREFIX = "Check the prefix (without .bin), or make the dataset with scripts/prepare_data.py."
DATASETS = {
    "no dataset": Case(
        without=("--mock-data",),
        says="--data-path = None: is required. Make one with scripts/prepare_data.py and pass "
        "--data-path PREFIX, or pass --mock-data.",
    ),
    "a dataset": Case(flags="--data-path {data}/good", without=("--mock-data",), verdict=True),
    "datasets from a file": Case(flags="--data-args-path {data}/remote", without=("--mock-data",)),
    "an empty list of datasets": Case(
        flags="--data-args-path {data}/list",
        without=("--mock-data",),
        says="--data-path = None: is required. Make one with scripts/prepare_data.py and pass "
        "--data-path PREFIX, or pass --mock-data.",
    ),
    "a dataset that is cut off": Case(
        flags="--data-path {data}/cut",
        says="--data-path = '{data}/cut': {data}/cut.bin has 9 bytes, and {data}/cut.idx says 10: the dataset is cut "
        "off or damaged. Copy it again, or make the dataset with scripts/prepare_data.py --force.",
    ),
    "ids that the tokenizer has not": Case(
        flags="--data-path {data}/large",
        says="--data-path = '{data}/large': has token ids up to 200, and the tokenizer (NullTokenizer) has 128 "
        "entries. Pass --vocab-size 201 or more.",
    ),
    "a file for a prefix": Case(
        flags="--data-path {data}/good.bin",
        says="--data-path = '{data}/good.bin': is a file, and the prefix of both files is needed. "
        "Pass --data-path {data}/good.",
    ),
    "no such dataset": Case(
        flags="--data-path {data}/absent",
        says=f"--data-path = '{{data}}/absent': there is no file {{data}}/absent.bin. {CHECK_PREFIX}",
    ),
    "no index": Case(
        flags="--data-path 0.3 {data}/good 0.7 {data}/no_index",
        says=f"--data-path = '{{data}}/no_index': there is no file {{data}}/no_index.idx. {CHECK_PREFIX}",
    ),
    "no validation set": Case(
        flags="--train-data-path {data}/good --valid-data-path {data}/absent",
        says=f"--valid-data-path = '{{data}}/absent': there is no file {{data}}/absent.bin. {CHECK_PREFIX}",
    ),
    "a remote dataset": Case(flags="--data-path s3://bucket/corpus"),
    "no tokenizer type": Case(
        without=("--tokenizer-type",),
        says="--tokenizer-type = None: is required. Pass --tokenizer-type SentencePieceTokenizer --tokenizer-model "
        "FILE, or NullTokenizer with --mock-data.",
    ),
    "no tokenizer model": Case(
        flags="--tokenizer-type SentencePieceTokenizer",
        says="--tokenizer-model = None: is required by --tokenizer-type SentencePieceTokenizer. Pass --tokenizer-model "
        "PATH, the tokenizer that made the dataset.",
    ),
    "absent tokenizer model": Case(
        flags="--tokenizer-type SentencePieceTokenizer --tokenizer-model {data}/absent",
        says="--tokenizer-model = '{data}/absent': is not a file. Pass the .model file that made the dataset.",
    ),
    "no tokenizer": Case(
        flags="--tokenizer-type SentencePieceTokenizer --tokenizer-model {data}/remote",
        says="--tokenizer-model = '{data}/remote': is not a sentencepiece model. Give a tokenizer: a sentencepiece "
        ".model, a folder with tokenizer.json, or a tiktoken file.",
    ),
    "data comes later": Case(
        flags="--tokenizer-type SentencePieceTokenizer --tokenizer-model {data}/absent",
        without=("--mock-data",),
        data_exists=False,
    ),
}
PARSING = {
    "unknown flag": Case(
        flags="--num-layer 3",
        says=f"command line = '--num-layer': {NO_FLAG} Did you mean --num-layers or --mtp-num-layers or --num-classes?",
    ),
    "unknown flag with =": Case(
        flags="--expert-parallel-size=2",
        says=f"command line = '--expert-parallel-size=2': {NO_FLAG} Did you mean --expert-model-parallel-size or "
        "--expert-tensor-parallel-size or --context-parallel-size?",
    ),
    "like nothing": Case(
        flags="--qqqqqqqqqqqq",
        says=f"command line = '--qqqqqqqqqqqq': {NO_FLAG} See --help-megatron for all flags.",
    ),
    "stray word": Case(
        flags="word",
        says="--vocab-size = 'word': is one value too many. See --help-megatron for the values that it takes.",
    ),
    "no abbreviations": Case(
        flags="--seq-len 64",
        says=f"command line = '--seq-len': {NO_FLAG} Did you mean --seq-length or --seed or --encoder-seq-length?",
    ),
    "wrong type": Case(flags="--lr fast", says=f"--lr = 'fast': invalid float value. {MEANING}"),
    "wrong choice": Case(
        flags="--normalization Norm",
        says=f"--normalization = 'Norm': invalid choice (choose from 'LayerNorm', 'RMSNorm'). {MEANING}",
    ),
    "wrong device": Case(
        flags="--smartmoe-device tpu",
        says=f"--smartmoe-device = 'tpu': invalid choice (choose from 'auto', 'cpu', 'cuda'). {MEANING}",
    ),
    "a value with a quote": Case(flags="--lr it's", says=f'--lr = "it\'s": invalid float value. {MEANING}'),
    "not in the table of an enum": Case(
        flags="--attention-backend quick",
        says=f"--attention-backend = 'quick': invalid value. {MEANING}",
    ),
    "not in the table of scopes": Case(
        flags="--cuda-graph-impl local --cuda-graph-scope somewhere",
        says=f"--cuda-graph-scope = 'somewhere': invalid value. {MEANING}",
    ),
    "no value": Case(flags="--hidden-size", says=f"--hidden-size = None: expected one argument. {MEANING}"),
}
VERDICT = {
    "everything": Case(verdict=True),
    "a division by zero": Case(
        flags="--num-attention-heads 0",
        says="--num-attention-heads = 0: must be at least 1. Remove it, or pass --num-attention-heads 1, for example.",
    ),
    "an assertion with words": Case(
        flags="--overlap-param-gather --use-distributed-optimizer",
        verdict=True,
        says="Megatron's own check = 'Must use --overlap-param-gather with --overlap-grad-reduce': " + MEGATRON_SAYS,
    ),
    "an assertion without words": Case(
        flags="--hidden-size 65",
        verdict=True,
        says=f"Megatron's own check = 'assert args.hidden_size % args.num_attention_heads == 0': {MEGATRON_SAYS}",
    ),
    "a rule of the model's config": Case(
        flags="--recompute-granularity full",
        verdict=True,
        says="Megatron's own check = 'Using recompute_granularity: full so recompute_method must be \"block\" or "
        f'"uniform"\': {MEGATRON_SAYS}',
    ),
    "a printed refusal": Case(
        flags="--checkpoint-activations",
        verdict=True,
        says="Megatron's own check = '--checkpoint-activations is no longer valid, use --recompute-activations, or, "
        f"for more control, --recompute-granularity and --recompute-method.': {MEGATRON_SAYS}",
    ),
}
GROUPS = {
    "sizes": SIZES,
    "supported": SUPPORTED,
    "model": MODEL,
    "parallelism": PARALLELISM,
    "batch": BATCH,
    "datasets": DATASETS,
    "parsing": PARSING,
    "verdict": VERDICT,
}
CASES = {f"{group}: {name}": case for group, cases in GROUPS.items() for name, case in cases.items()}


def parsed(user: list[str]) -> dict[str, Any]:
    """The values of some arguments, machine defaults and the user's flags together."""
    from megatron_smartmoe.adapter.pretrain import with_defaults

    args = parser.parse(with_defaults(user, cpu=True, say=False))
    names = ("transformer_impl", "moe_token_dispatcher_type", "logging_level", "distributed_backend", "num_layers")
    return {name: getattr(args, name) for name in names}


def help_through_the_launcher() -> tuple[int, str]:
    from megatron_smartmoe.adapter.launch.launcher import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        return main(["--help-megatron"]), said.getvalue()


def connections(flags: str, ranks: int) -> str | None:
    judge(Case(flags=flags, ranks=ranks), Path())
    return os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")


def everything(data: Path) -> dict[str, Any]:
    """All that needs the facade, in one rank."""
    beaten = "--transformer-impl transformer_engine --moe-token-dispatcher-type allgather --logging-level 10"
    return {
        **judge_all(CASES, data),
        "defaults alone": parsed([]),
        "defaults beaten": parsed([*beaten.split(), "--distributed-backend", "nccl", "--num-layers", "2"]),
        "help": help_through_the_launcher(),
        "connections": {
            flags: connections(flags, 2) for flags in ("", TP2, "--context-parallel-size 2", f"{TP2} {FSDP}")
        },
    }


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checks")
    data = folder / "data"
    data.mkdir()
    for name in ("no_index.bin", "list"):
        (data / name).touch()
    (data / "remote").write_text("0.5 s3://bucket/corpus\n")
    for name in ("good", "cut", "large"):
        write_indexed_files(data / name, [[1, 2, 3], [4, 200 if name == "large" else 127]])
    (data / "cut.bin").write_bytes((data / "cut.bin").read_bytes()[:-1])
    results: dict[str, Any] = run_ranks(everything, 1, data, log_dir=folder)[0]
    return results


@pytest.mark.parametrize("name", CASES)
def test_each_rule_says_field_value_rule_and_way_out(name: str, said: dict[str, Any]) -> None:
    assert said[name] == CASES[name].says


def test_the_defaults_of_a_machine_without_gpu_reach_megatron(said: dict[str, Any]) -> None:
    alone = said["defaults alone"]
    assert alone["moe_token_dispatcher_type"] == "alltoall"
    assert alone["logging_level"] == 30
    assert alone["distributed_backend"] == "gloo"
    assert alone["num_layers"] is None


def test_the_flags_of_the_user_beat_the_defaults(said: dict[str, Any]) -> None:
    assert said["defaults beaten"] == {
        "transformer_impl": "transformer_engine",
        "moe_token_dispatcher_type": "allgather",
        "logging_level": 10,
        "distributed_backend": "nccl",
        "num_layers": 2,
    }


def test_help_lists_the_flags_of_both(said: dict[str, Any]) -> None:
    status, text = said["help"]
    assert status == 0
    for flag in (
        "--smartmoe-device {auto,cpu,cuda}",
        "--smartmoe-run-dir DIR",
        "--moe-router-topk",
        "--tp-comm-overlap",
    ):
        assert flag in text


def test_kernels_start_in_order_where_parallelism_needs_it(said: dict[str, Any]) -> None:
    assert said["connections"][""] is None
    assert said["connections"][TP2] == "1"
    assert said["connections"]["--context-parallel-size 2"] == "1"


def test_fsdp_is_left_with_its_connections(said: dict[str, Any]) -> None:
    assert said["connections"][f"{TP2} {FSDP}"] is None


REASONS = {
    "alltoall": "tokens go only to the ranks that own their experts",
    "--transformer-impl": "TransformerEngine is not installed",
    "--no-gradient-accumulation-fusion": "neither TransformerEngine nor apex is installed",
    "gloo": "no GPU: gloo, and functions are not compiled",
}


@pytest.mark.parametrize(
    ("cpu", "transformer_engine", "apex", "expected"),
    [
        (False, True, True, {"alltoall"}),
        (False, True, False, {"alltoall"}),
        (False, False, True, {"alltoall", "--transformer-impl"}),
        (False, False, False, {"alltoall", "--transformer-impl", "--no-gradient-accumulation-fusion"}),
        (True, False, False, set(REASONS)),
    ],
)
def test_each_machine_gets_the_defaults_it_needs(
    cpu: bool, transformer_engine: bool, apex: bool, expected: set[str]
) -> None:
    defaults = parser.machine_defaults(cpu=cpu, transformer_engine=transformer_engine, apex=apex)
    found = {flag: default.reason for default in defaults for flag in default.flags}
    assert {flag: found[flag] for flag in found if flag in REASONS} == {flag: REASONS[flag] for flag in expected}
    assert found["--no-one-logger"] == "an NVIDIA-internal service"


MOVES_AND_SAVES = (
    "--smartmoe --expert-model-parallel-size 2 --use-distributed-optimizer --save runs/x --num-experts 8".split()
)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", True),
        ("--smartmoe-homes off", False),
        ("--smartmoe-homes dry", False),
        ("--no-save-optim", False),
        ("--ckpt-format torch", False),
        ("--expert-model-parallel-size 1", False),
        ("--non-persistent-ckpt-type local", False),
    ],
)
def test_optimizer_state_of_experts_that_move_is_saved_by_parameter(flags: str, expected: bool) -> None:
    defaults = run_defaults([*MOVES_AND_SAVES, *flags.split()])
    assert [default.flags for default in defaults] == ([("--dist-ckpt-optim-fully-reshardable",)] if expected else [])


def test_the_users_word_wins_over_that_default(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_smartmoe.adapter.pretrain import with_defaults

    user = [*MOVES_AND_SAVES, "--no-dist-ckpt-optim-fully-reshardable"]
    assert parser.parse(with_defaults(MOVES_AND_SAVES, cpu=True, say=False)).dist_ckpt_optim_fully_reshardable is True
    assert parser.parse(with_defaults(user, cpu=True, say=False)).dist_ckpt_optim_fully_reshardable is False
    assert parser.parse(["--lr", "1"]).dist_ckpt_optim_fully_reshardable is False  # Megatron's own default
    monkeypatch.setattr(bucket_padding, "is_sound", lambda: False)
    assert run_defaults(MOVES_AND_SAVES) == []


def test_defaults_are_printed_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_smartmoe.adapter.pretrain import with_defaults

    argv = with_defaults(["--lr", "1"], cpu=True, say=True)
    assert argv[-2:] == ["--lr", "1"]
    lines = capsys.readouterr().out.splitlines()
    backend = "--distributed-backend gloo --no-bias-swiglu-fusion --no-bias-gelu-fusion"
    assert lines[-1] == f"smartmoe: default {backend}   (no GPU: gloo, and functions are not compiled)"
    assert with_defaults(["--lr", "1"], cpu=True, say=False) == argv
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("argv", "device"),
    [
        ([], "auto"),
        (["--num-layers", "4", "--smartmoe-device", "cpu", "--lr", "1"], "cpu"),
        (["--smartmoe-device=cuda"], "cuda"),
    ],
)
def test_the_device_is_known_before_megatron_parses(argv: list[str], device: str) -> None:
    assert parser.device_from(argv) == device


def test_a_wrong_device_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        parser.device_from(["--smartmoe-device", "tpu"])
    assert str(caught.value) == "--smartmoe-device = 'tpu': must be one of auto, cpu, cuda. Remove it for auto."


def test_a_device_without_its_value_is_a_config_error() -> None:
    with pytest.raises(ConfigError) as caught:
        parser.device_from(["--smartmoe-device"])
    assert str(caught.value) == f"--smartmoe-device = None: expected one argument. {MEANING}"
