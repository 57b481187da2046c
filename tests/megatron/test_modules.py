"""The plain-torch modules against Megatron's and torch's own, the log filters, the summary.

Whatever imports Megatron runs in one rank of `run_ranks`, where the facade is; it asserts there.
"""

from __future__ import annotations

import functools
import json
import logging
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_smartmoe.adapter import hooks, log_filters
from megatron_smartmoe.adapter.local import adam, multi_tensor
from megatron_smartmoe.adapter.records import summary
from megatron_smartmoe.errors import CompatError
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.fast]

SEQUENCE, BATCH, HEADS, GROUPS, HEAD_DIM = 12, 2, 4, 2, 8


def transformer_config(**changes: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    options = {
        "num_layers": 2,
        "hidden_size": HEADS * HEAD_DIM,
        "num_attention_heads": HEADS,
        "num_query_groups": GROUPS,
        "attention_dropout": 0.0,
        "masked_softmax_fusion": False,
        "attention_softmax_in_fp32": True,
    }
    return TransformerConfig(**(options | changes))


def norms_are_marked() -> None:
    from megatron_smartmoe.adapter.local.norm import TorchNorm

    kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
    for kind, norm_cls in kinds.items():
        for marked in (False, True):
            parallel = {"sequence_parallel": marked, "tensor_model_parallel_size": 2 if marked else 1}
            norm = TorchNorm(transformer_config(normalization=kind, **parallel), 32, eps=1e-3, tp_comm=None)
            assert type(norm) is norm_cls
            assert norm.eps == 1e-3
            parameters = dict(norm.named_parameters())
            assert set(parameters) == ({"weight", "bias"} if kind == "LayerNorm" else {"weight"})
            assert all(vars(parameter)["sequence_parallel"] is marked for parameter in parameters.values())


def norm_is_megatrons() -> None:
    """Same numbers as Megatron's own local norm."""
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from megatron_smartmoe.adapter.local.norm import TorchNorm

    x = torch.randn(SEQUENCE, BATCH, 32)
    for kind in ("LayerNorm", "RMSNorm"):
        config = transformer_config(normalization=kind)
        assert torch.equal(TorchNorm(config, 32, 1e-5)(x), WrappedTorchNorm(config, 32, 1e-5)(x))


def zigzag_is_megatrons_order() -> None:
    from megatron.core.utils import get_batch_on_this_cp_rank

    from megatron_smartmoe.adapter.local.attention import zigzag_positions

    for size in (1, 2, 4):
        local = 16 // size
        held = [zigzag_positions(rank, size, local) for rank in range(size)]
        assert torch.equal(torch.cat(held).sort().values, torch.arange(16))
        for rank in range(size):
            batch = {"tokens": torch.arange(16)[None], "cu_seqlens": None}
            with mock.patch.multiple("torch.distributed", get_rank=lambda _: rank, get_world_size=lambda _: size):  # noqa: B023
                theirs = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False)
            assert theirs["tokens"][0].tolist() == held[rank].tolist()


def attentions(**changes: Any) -> tuple[Any, Any]:
    """Megatron's and ours, from the same config."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_smartmoe.adapter.local.attention import SDPAttention

    config = transformer_config(**{name: value for name, value in changes.items() if name != "softmax_scale"})
    arguments = {
        "config": config,
        "layer_number": 1,
        "attn_mask_type": AttnMaskType.causal,
        "attention_type": "self",
        "softmax_scale": changes.get("softmax_scale"),
        "pg_collection": ProcessGroupCollection.use_mpu_process_groups(),
    }
    return DotProductAttention(**arguments), SDPAttention(**arguments)


def compare_attention(heads: int, groups: int, **changes: Any) -> None:
    theirs, ours = attentions(num_attention_heads=heads, num_query_groups=groups, kv_channels=HEAD_DIM, **changes)
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
    drawn = [torch.randn(SEQUENCE, BATCH, h, HEAD_DIM) for h in (heads, groups, groups)]
    results = []
    for attention in (theirs, ours):
        inputs = [x.clone().requires_grad_() for x in drawn]
        out = attention(*inputs, mask, attn_mask_type=attention_mask_type())
        assert out.shape == (SEQUENCE, BATCH, heads * HEAD_DIM)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        results.append([out.detach(), *(x.grad for x in inputs)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def attention_mask_type() -> Any:
    from megatron.core.transformer.enums import AttnMaskType

    return AttnMaskType.causal


def attention_is_megatrons() -> None:
    """Outputs and gradients, with and without grouped queries, with a scale of its own."""
    compare_attention(HEADS, HEADS)
    compare_attention(HEADS, GROUPS)
    compare_attention(HEADS, 1)
    compare_attention(HEADS, GROUPS, softmax_scale=0.5)


def repeated_keys_and_values_change_nothing() -> None:
    """What a GPU gets beside a mask: the same bits forward, and gradients that are summed over a group's queries."""
    from unittest import mock

    from megatron_smartmoe.adapter.local import attention

    _, ours = attentions(num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=HEAD_DIM)
    ours.cp_group = mock.Mock(**{"size.return_value": 2, "rank.return_value": 1})
    drawn = [torch.randn(SEQUENCE, BATCH, h, HEAD_DIM) for h in (HEADS, GROUPS, GROUPS)]
    calls, results = [], []
    real = attention.F.scaled_dot_product_attention

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        calls.append((key.size(1), value.size(1), options["enable_gqa"]))
        return real(query, key, value, **options)

    for is_repeated in (False, True):
        inputs = [x.clone().requires_grad_() for x in drawn]
        with (
            mock.patch.object(
                attention, "gather_from_sequence_parallel_region", lambda x, group: torch.cat([x, 2 * x])
            ),
            mock.patch.object(attention, "has_no_kernel_for_groups", lambda query, found=is_repeated: found),
            mock.patch.object(attention.F, "scaled_dot_product_attention", attend),
        ):
            out = ours(*inputs, None)
        out.sum().backward()
        results.append([out.detach(), *(x.grad for x in inputs)])
    assert calls == [(GROUPS, GROUPS, True), (HEADS, HEADS, False)]
    assert torch.equal(results[0][0], results[1][0])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def attention_drops_out_in_training_only() -> None:
    _, ours = attentions(attention_dropout=0.5)
    inputs = [torch.randn(SEQUENCE, BATCH, h, HEAD_DIM) for h in (HEADS, GROUPS, GROUPS)]
    assert torch.equal(ours.eval()(*inputs, None), ours(*inputs, None))
    assert not torch.equal(ours.train()(*inputs, None), ours(*inputs, None))


def attention_refuses_what_it_does_not_have() -> None:
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_smartmoe.adapter.local.attention import SDPAttention, _refuse_unsupported

    refused: dict[str, dict[str, Any]] = {
        "--window-size": {"window_size": (4, 0)},
        "--apply-query-key-layer-scaling": {"apply_query_key_layer_scaling": True},
        "--softmax-type": {"softmax_type": "learnable"},
    }
    for option, changes in refused.items():
        assert_refused(option, functools.partial(attentions_ours, **changes))
    mask = AttnMaskType.padding
    assert_refused("attention mask padding", lambda: _refuse_unsupported(transformer_config(), mask))
    _, ours = attentions()
    with pytest.raises(CompatError, match="no packed sequences and no attention bias"):
        SDPAttention.forward(ours, torch.zeros(1), torch.zeros(1), torch.zeros(1), None, packed_seq_params=object())


def attentions_ours(**changes: Any) -> Any:
    from megatron_smartmoe.adapter.local.attention import SDPAttention

    return SDPAttention(transformer_config(**changes), 1, attention_mask_type(), "self")


def assert_refused(option: str, build: Callable[[], object]) -> None:
    with pytest.raises(CompatError) as caught:
        build()
    assert str(caught.value) == (
        f"SDPAttention does not have {option}. Pass --attention-backend unfused for Megatron's own attention, "
        "or install TransformerEngine."
    )


def adam_is_given_to_megatron() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    assert optimizer.USING_PYTORCH_OPTIMIZER
    hooks.use_torch_adam()
    assert optimizer.Adam is distrib_optimizer.Adam is adam.TorchAdam
    assert not optimizer.USING_PYTORCH_OPTIMIZER
    hooks.use_torch_adam()  # where a fused Adam is found, nothing happens
    assert optimizer.Adam is adam.TorchAdam


def the_loop_is_prepared_once() -> None:
    import megatron.core.datasets.utils as utils
    import megatron.training.training as training

    hooks.prepare_megatron(cpu=True)
    hooked = training.initialize_megatron, utils.compile_helpers
    assert utils.compile_helpers() is None  # no `make`
    assert training.initialize_megatron.keywords == {"allow_no_cuda": True}
    hooks.prepare_megatron(cpu=True)
    assert (training.initialize_megatron, utils.compile_helpers) == hooked


def clipping_is_given_to_megatron() -> None:
    """On a GPU: the norm that clips, and what it scales, are those of Megatron's own functions, to rounding."""
    import megatron.core.optimizer.clip_grads as clip_grads

    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((4, 3), (5,))]
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        for p in params:
            p.grad = torch.randn(p.shape)
        norm = clip_grads.get_grad_norm_fp32([p.grad for p in params if p.grad is not None])
        clip_grads.clip_grad_by_total_norm_fp32(params, max_norm=0.5, total_norm=norm)
        results.append([torch.tensor(norm), *(p.grad for p in params)])
        hooks.use_multi_tensor_clipping()
    assert clip_grads.l2_norm_impl is multi_tensor.l2_norm
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


IN_A_RANK = [
    norms_are_marked,
    norm_is_megatrons,
    zigzag_is_megatrons_order,
    attention_is_megatrons,
    repeated_keys_and_values_change_nothing,
    attention_drops_out_in_training_only,
    attention_refuses_what_it_does_not_have,
    adam_is_given_to_megatron,
    clipping_is_given_to_megatron,
    the_loop_is_prepared_once,
]


def run_all() -> dict[str, str | None]:
    """Each check's failure, as text."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)  # Megatron's attention draws from its own stream
    torch.manual_seed(1)
    failures = {check.__name__: failure_of(check) for check in IN_A_RANK}
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return failures


def failure_of(check: Callable[[], None]) -> str | None:
    import traceback

    try:
        check()
    except BaseException:
        return traceback.format_exc()
    return None


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    result: dict[str, str | None] = run_ranks(run_all, 1, log_dir=tmp_path_factory.mktemp("modules"))[0]
    return result


@pytest.mark.parametrize("name", [check.__name__ for check in IN_A_RANK])
def test_with_megatron(name: str, failures: dict[str, str | None]) -> None:
    assert failures[name] is None, failures[name]


# --- Adam: torch alone


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 3), (5,), ())]


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], first: int, steps: int) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("torch_cls", "adam_w_mode"), [(torch.optim.AdamW, True), (torch.optim.Adam, False)], ids=["AdamW", "Adam"]
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_torchs(torch_cls: Any, adam_w_mode: bool, weight_decay: float) -> None:
    options = OPTIONS | {"weight_decay": weight_decay}
    expected, found = parameters(), parameters()
    train(torch_cls(expected, **options), expected, 0, 20)
    train(adam.TorchAdam(found, adam_w_mode=adam_w_mode, **options), found, 0, 20)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found[0], parameters()[0])


@pytest.mark.parametrize("adam_w_mode", [True, False])
def test_the_fused_adam_is_the_same_adam(adam_w_mode: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU run takes, on the CPU, where torch has the same kernel; also with a parameter without elements."""
    results = []
    for fused in (True, False):
        monkeypatch.setattr(adam, "_is_fusible", lambda *lists, fused=fused: fused)
        params = [*parameters(), torch.nn.Parameter(torch.zeros(0, 3))]
        optimizer = adam.TorchAdam(params, adam_w_mode=adam_w_mode, **OPTIONS)
        train(optimizer, params, 0, 20)
        assert optimizer.param_groups[0]["step"] == 20
        assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())
        results.append([*params, *(each for state in optimizer.state.values() for each in state.values())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    assert not all(torch.equal(*pair) for pair in zip(*results, strict=True))  # or one of them was both


def test_only_gpu_tensors_of_one_type_are_fused() -> None:
    on_gpu, half = (mock.Mock(is_cuda=True, device="cuda:0", dtype=dtype) for dtype in (torch.float32, torch.float16))
    assert adam._is_fusible([on_gpu], [on_gpu])
    assert not adam._is_fusible([on_gpu], [half])
    assert not adam._is_fusible([torch.zeros(1)], [torch.zeros(1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_scale_of_many_tensors(dtype: torch.dtype) -> None:
    tensors = [torch.randn(shape).to(dtype) for shape in ((4, 3), (5,), (0, 2), ())]
    expected = torch.cat([tensor.float().flatten() for tensor in tensors]).norm()
    flag = torch.zeros(1, dtype=torch.int)
    norm, each = multi_tensor.l2_norm(1, flag, [tensors], False)
    assert (norm.shape, norm.dtype, each) == ((1,), torch.float32, None)
    torch.testing.assert_close(norm[0], expected, rtol=1e-5, atol=1e-6)
    scaled = [tensor * 0.25 for tensor in tensors]
    into = [torch.empty_like(tensor, dtype=torch.float32) for tensor in tensors]
    multi_tensor.scale(1, flag, [tensors, into], 0.25)
    for tensor, other in zip(into, scaled, strict=True):
        assert torch.equal(tensor, other.float())
    places = [tensor.data_ptr() for tensor in tensors]
    multi_tensor.scale(1, flag, [tensors, tensors], 0.25)
    assert places == [tensor.data_ptr() for tensor in tensors]
    for tensor, other in zip(tensors, scaled, strict=True):
        assert torch.equal(tensor, other)


def test_adam_keeps_its_step_in_the_group() -> None:
    params = parameters()
    optimizer = adam.TorchAdam([{"params": params[:2]}, {"params": params[2:], "lr": 1e-3}], lr=1e-2)
    train(optimizer, params, 0, 3)
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in optimizer.state.values())


def test_adam_goes_on_from_its_state() -> None:
    whole, halves = parameters(), parameters()
    train(adam.TorchAdam(whole, **OPTIONS), whole, 0, 10)
    first = adam.TorchAdam(halves, **OPTIONS)
    train(first, halves, 0, 5)
    second = adam.TorchAdam(halves, **OPTIONS | {"lr": 1.0})
    second.load_state_dict(first.state_dict())
    train(second, halves, 5, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


def test_adam_leaves_parameters_without_gradient() -> None:
    params = parameters()
    optimizer = adam.TorchAdam(params, **OPTIONS)
    params[0].grad = torch.ones_like(params[0])
    before = params[1].clone()
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state


def test_adam_without_bias_correction() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = adam.TorchAdam([p], lr=1.0, betas=(0.5, 0.75), eps=0.0, bias_correction=False)
    p.grad = torch.full((1,), 4.0)
    assert optimizer.step(lambda: "the loss") == "the loss"
    assert p.item() == -(0.5 * 4.0) / (0.25 * 16.0) ** 0.5


def test_adam_refuses_cuda_graphs() -> None:
    with pytest.raises(ValueError, match="--optimizer-cuda-graph needs FusedAdam: install TransformerEngine or apex"):
        adam.TorchAdam(parameters(), capturable=True)


# --- log filters


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install the filters and undo them."""
    loggers = {name: logging.getLogger(name) for name in log_filters._LOG_LINES}
    filters = {name: list(logger.filters) for name, logger in loggers.items()}
    with warnings.catch_warnings():
        warnings.resetwarnings()

        def install_as(rank: int) -> None:
            monkeypatch.setenv("RANK", str(rank))
            log_filters.install()

        yield install_as
    for name, logger in loggers.items():
        logger.filters = filters[name]


def warned(text: str) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.warn_explicit(text, UserWarning, "some_file.py", len(text))
    return bool(caught)


def test_warnings_that_always_come_are_not_shown(quiet: Any) -> None:
    quiet(0)
    assert not any(warned(f"{start} and so on.") for start in log_filters._WARNINGS)
    assert warned("Loss is NaN")
    assert warned(f"Note: {next(iter(log_filters._WARNINGS))}")


def test_other_ranks_show_no_warnings(quiet: Any) -> None:
    quiet(1)
    assert not warned("Loss is NaN")


def test_log_lines_that_always_come_are_not_shown(quiet: Any, caplog: pytest.LogCaptureFixture) -> None:
    quiet(0)
    for name, (part, _) in log_filters._LOG_LINES.items():
        logging.getLogger(name).warning("%s: %s", part, "and so on")
        logging.getLogger(name).warning("news")
        logging.getLogger("another").warning(part)
    assert [record.name for record in caplog.records if record.getMessage() == "news"] == list(log_filters._LOG_LINES)
    assert not [record for record in caplog.records if record.getMessage().endswith("and so on")]
    assert len(caplog.records) == 2 * len(log_filters._LOG_LINES)


def test_the_logging_level_counts_at_once() -> None:
    root = logging.getLogger()
    before = root.level
    try:
        log_filters.set_log_level(40)
        assert root.level == 40
        log_filters.set_log_level(None)
        assert root.level == 40
    finally:
        root.setLevel(before)


# --- summary

LOAD_LE = [[0, 0, 0, 0], [10, 20, 30, 40], [100, 0, 0, 0]]


def test_the_load_of_each_layer() -> None:
    """10 + 20 against 30 + 40 on two ranks; the layer that routed nothing is left out."""
    second, third = summary.layer_loads(LOAD_LE, ep=2)
    assert second == summary.LayerLoad(
        layer=2, share_E=(10.0, 20.0, 30.0, 40.0), expert_imbalance=40 * 4 / 100, rank_imbalance=70 * 2 / 100
    )
    assert (third.layer, third.expert_imbalance, third.rank_imbalance) == (3, 4.0, 2.0)


@pytest.mark.parametrize(("ep", "imbalance"), [(1, 1.0), (2, 1.4), (4, 1.6)])
def test_the_imbalance_of_ranks_depends_on_their_number(ep: int, imbalance: float) -> None:
    assert summary.layer_loads(LOAD_LE[1:2], ep)[0].rank_imbalance == pytest.approx(imbalance)


def test_no_experts_no_load() -> None:
    assert summary.layer_loads([], ep=1) == []


def arguments(**changes: Any) -> Namespace:
    options: dict[str, Any] = {
        "global_batch_size": 16,
        "seq_length": 128,
        "expert_model_parallel_size": 2,
        "data_path": None,
        "save": "runs/a/checkpoints",
        "load": "runs/a/checkpoints",
        "tensorboard_dir": "runs/a/tensorboard",
        "train_iters": 300,
    }
    return Namespace(**(options | changes))


GATHERED = {
    "iteration": 300,
    "train": {"lm loss": 3.25, "load_balancing_loss": 1.0},
    "validation": {"lm loss": 3.5},
    "step_seconds": [0.25, 0.125, 4.0],
    "load_LE": LOAD_LE[1:],
}
RENDERED = """
====================================================================================================
Finished after 300 iterations.
  training loss    3.2500 nats per token
  validation loss  3.5000 nats per token
  unigram entropy  6.1250 nats per token: the loss of knowing only how frequent each token is
  speed            8,192 tokens/s (250 ms a step, median)

  Load per expert, % of the layer's assignments in the last iterations:
  layer     e0    e1    e2    e3   max/mean: expert  EP2 rank
      1   10.0  20.0  30.0  40.0               1.60      1.40
      2  100.0   0.0   0.0   0.0               4.00      2.00

  run directory    runs/a
  checkpoints      runs/a/checkpoints
  TensorBoard      tensorboard --logdir runs/a/tensorboard

  Next:
    scripts/pretrain_gpt_moe.sh --run-dir runs/a --train-iters 600 --override-opt-param-scheduler  \
# resume from the checkpoint
    scripts/pretrain_gpt_moe.sh --run-dir runs/a --dry-run                                         \
# see the exact command
    scripts/pretrain_gpt_moe.sh --help-megatron                                                    \
# every flag there is
===================================================================================================="""

NOTHING_LEFT = "Finished after 0 iterations. There was nothing left to train: raise --train-iters to train further."


def test_the_whole_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = summary.summarise(GATHERED, arguments()) | {"unigram_entropy": 6.125}
    monkeypatch.chdir(tmp_path)
    Path("runs/a").mkdir(parents=True)
    of_a_script = summary.render(content, arguments(), Path("runs/a"))
    Path("runs/a/config.yaml").touch()  # the launcher's
    assert summary.render(content, arguments(), Path("runs/a")) == RENDERED
    assert of_a_script == RENDERED[: RENDERED.index("\n\n  Next:")] + RENDERED[-101:]


TERMS = {"machine": 0.02, "imbalance": 0.0123, "shapes": 0.0001, "replicas": 0.031, "planning": 0.0051}


@pytest.mark.parametrize(
    ("terms", "share", "unexplained", "line"),
    [
        (TERMS, 0.953, -0.0024, "95.3%; lost most to: replicas 3.1%, imbalance 1.2%; unexplained -0.2%"),
        ({"machine": 0.02, "shapes": 0.0001}, 1.004, -0.0041, "100.4%; unexplained -0.4%"),
        (
            TERMS,
            None,
            None,
            "not measured (--smartmoe-ideal-run RUN); known losses: replicas 3.1%, imbalance 1.2%",
        ),
        ({}, None, None, "not measured (--smartmoe-ideal-run RUN)"),
    ],
)
def test_the_summary_says_where_the_time_went(
    terms: dict[str, float], share: float | None, unexplained: float | None, line: str
) -> None:
    account = {
        "share_of_ideal": share,
        "unexplained_share": unexplained,
        "terms": {name: {"label": name, "share": value} for name, value in terms.items()},
    }
    content = summary.summarise(GATHERED, arguments()) | {"account": account}
    lines = summary.render(content, arguments(), None).splitlines()
    assert f"  share of ideal   {line}" in lines


def test_the_summary_of_a_run_that_did_nothing() -> None:
    """Loaded at its last iteration, a dense model, nothing saved."""
    gathered = {"iteration": 0, "train": {}, "step_seconds": [], "load_LE": []}
    args = arguments(save=None, load=None, tensorboard_dir=None)
    content = summary.summarise(gathered, args)
    rule = "=" * 100
    assert summary.render(content, args, None) == f"\n{rule}\n{NOTHING_LEFT}\n\n{rule}"
    assert {value for name, value in content.items() if name not in ("iterations", "layers")} == {None}


def test_the_summary_for_programs(tmp_path: Path) -> None:
    content = summary.summarise(GATHERED, arguments())
    summary.write(content, tmp_path / "summary.json")
    read = json.loads((tmp_path / "summary.json").read_text())
    assert read["tokens_per_second"] == 16 * 128 / 0.25
    assert read["train_loss"] == 3.25
    assert read["test_loss"] is None
    assert read["layers"][0] == {
        "layer": 1,
        "share_E": [10.0, 20.0, 30.0, 40.0],
        "expert_imbalance": 1.6,
        "rank_imbalance": 1.4,
    }


def test_the_entropy_is_that_of_the_one_corpus(tmp_path: Path) -> None:
    """Of a mixture, or of a dataset that somebody else made, nothing is known."""
    for data_path in (None, [], ["0.5", "a", "0.5", "b"], [str(tmp_path / "absent")]):
        assert summary.summarise(GATHERED, arguments(data_path=data_path))["unigram_entropy"] is None
