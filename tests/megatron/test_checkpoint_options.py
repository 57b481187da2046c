"""Flags for saving and loading: each pair works, or is refused with its whole text before ranks start."""

from __future__ import annotations

import pytest

from tests.support.checks import Case, said_of

pytestmark = [pytest.mark.dist, pytest.mark.fast]

SAVE = "--save /nowhere --save-interval 10"
ASYNC = f"{SAVE} --async-save --use-persistent-ckpt-worker --async-strategy mcore"
GLOBAL = f"{SAVE} --non-persistent-save-interval 5 --non-persistent-ckpt-type global"
BLOCKS_FIRST = "--mtp-num-layers 2 --pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et|tt|tmm|L"
NVRX = "needs the package nvidia-resiliency-ext, which is not installed"
PASS = "Pass --save-interval 1000, for example."
FORMAT = "Pass --ckpt-format torch_dist, or leave it out."

REFUSED = {
    "no interval": (
        "--save /nowhere",
        f"--save-interval = None: is required with --save. {PASS}",
    ),
    "interval 0": (
        "--save /nowhere --save-interval 0",
        f"--save-interval = 0: must be at least 1. {PASS}",
    ),
    "retain 0": (
        f"{SAVE} --save-retain-interval 0",
        "--save-retain-interval = 0: must be at least 1. Pass --save-retain-interval 1000, for example.",
    ),
    "torch_dcp": (f"{SAVE} --ckpt-format torch_dcp", f"--ckpt-format = 'torch_dcp': needs --use-torch-fsdp2. {FORMAT}"),
    "fsdp_dtensor": (
        f"{SAVE} --ckpt-format fsdp_dtensor",
        f"--ckpt-format = 'fsdp_dtensor': needs --use-megatron-fsdp. {FORMAT}",
    ),
    "convert without a place": (
        "--ckpt-convert-format torch --load /nowhere",
        "--ckpt-convert-save = None: is required with --ckpt-convert-format. Add --ckpt-convert-save DIR.",
    ),
    "convert nothing": (
        "--ckpt-convert-format torch --ckpt-convert-save /nowhere",
        "--load = None: is required with --ckpt-convert-format. Add --load DIR.",
    ),
    "legacy in the background": (
        f"{ASYNC} --ckpt-format torch",
        "--async-save = True: is not supported with --ckpt-format torch. Pass --ckpt-format torch_dist, or remove it.",
    ),
    "background without a worker": (
        f"{SAVE} --async-save",
        "--async-save = True: needs --use-persistent-ckpt-worker: Megatron would save synchronously. Add "
        "--use-persistent-ckpt-worker, or remove it.",
    ),
    "worker without background": (
        f"{SAVE} --use-persistent-ckpt-worker",
        "--use-persistent-ckpt-worker = True: has no effect without --async-save. Add --async-save, or remove it.",
    ),
    "background by a package": (
        f"{SAVE} --async-save --use-persistent-ckpt-worker",
        f"--async-strategy = 'nvrx': {NVRX}. Pass --async-strategy mcore, or install it.",
    ),
    "in memory": (
        f"{SAVE} --non-persistent-ckpt-type in_memory",
        "--non-persistent-ckpt-type = 'in_memory': is not supported by Megatron yet. Pass global, or remove it.",
    ),
    "local": (
        f"{SAVE} --non-persistent-ckpt-type local",
        f"--non-persistent-ckpt-type = 'local': {NVRX}. Pass global, or install it.",
    ),
    "non-persistent without a type": (
        f"{SAVE} --non-persistent-save-interval 5",
        "--non-persistent-save-interval = 5: needs a type. Add --non-persistent-ckpt-type global, or remove it.",
    ),
    "non-persistent without a place": (
        "--non-persistent-save-interval 5 --non-persistent-ckpt-type global",
        "--non-persistent-save-interval = 5: has no effect without --save. Add --save DIR, or remove it.",
    ),
    "non-persistent legacy": (
        f"{GLOBAL} --ckpt-format torch",
        "--non-persistent-save-interval = 5: is not supported with --ckpt-format torch. Pass --ckpt-format torch_dist, "
        "or remove it.",
    ),
    "step of nothing": ("--ckpt-step 5", "--ckpt-step = 5: has no effect without --load. Add --load DIR."),
    "main weights and optimizer": (
        "--load /nowhere --load-main-params-from-ckpt",
        "--load-main-params-from-ckpt = True: needs --no-load-optim: the optimizer's own state would replace what it "
        "does. Add --no-load-optim, or remove it.",
    ),
    "arguments of nothing": (
        "--use-checkpoint-args",
        "--load = None: is required with --use-checkpoint-args. Add --load DIR, or --pretrained-checkpoint DIR.",
    ),
    "blocks on the first rank": (
        f"{SAVE} {BLOCKS_FIRST}",
        "--pipeline-model-parallel-layout = 'Et|tt|tmm|L': has prediction blocks (m) on the first pipeline rank, which "
        "then has two embeddings, and Megatron's fully parallel save stops at them. Add --no-ckpt-fully-parallel-save, "
        "or move them to the last pipeline rank.",
    ),
}
WORKS = {
    "torch_dist": SAVE,
    "legacy": f"{SAVE} --ckpt-format torch",
    "legacy, distributed optimizer": f"{SAVE} --ckpt-format torch --use-distributed-optimizer",
    "without optimizer": f"{SAVE} --no-save-optim --no-save-rng",
    "in the background": ASYNC,
    "in the background, constant structure": f"{ASYNC} --ckpt-assume-constant-structure",
    "non-persistent": GLOBAL,
    "retained": f"{SAVE} --save-retain-interval 20",
    "not fully parallel": f"{SAVE} --no-ckpt-fully-parallel-save",
    "fully parallel load": f"{SAVE} --load /nowhere --ckpt-fully-parallel-load",
    "fully reshardable": f"{SAVE} --use-distributed-optimizer --dist-ckpt-optim-fully-reshardable",
    "weights alone": f"{SAVE} --load /nowhere --finetune --no-load-optim --no-load-rng",
    "main weights": f"{SAVE} --load /nowhere --no-load-optim --load-main-params-from-ckpt",
    "blocks on the first rank, not saved": BLOCKS_FIRST,
    "blocks on the first rank, not fully parallel": f"{SAVE} {BLOCKS_FIRST} --no-ckpt-fully-parallel-save",
    "blocks on the last rank": f"{SAVE} {BLOCKS_FIRST} --pipeline-model-parallel-layout Et|tt|t|mmL",
    "checked by Megatron too": f"{SAVE} --verify-integrity",
}
RANKS = {name: 4 for name in (*REFUSED, *WORKS) if name.startswith("blocks on")}
CASES = {
    **{name: Case(flags=flags, says=says, ranks=RANKS.get(name, 1)) for name, (flags, says) in REFUSED.items()},
    **{name: Case(flags=flags, verdict=True, ranks=RANKS.get(name, 1)) for name, flags in WORKS.items()},
    "blocks on the first rank, nobody to share the save with": Case(flags=f"{SAVE} {BLOCKS_FIRST}", ranks=2),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    return said_of(CASES, tmp_path_factory.mktemp("options"))


@pytest.mark.parametrize("name", CASES)
def test_saves_and_loads(name: str, said: dict[str, str | None]) -> None:
    assert said[name] == CASES[name].says
