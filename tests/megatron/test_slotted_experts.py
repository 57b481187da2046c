"""The experts' own functions on one rank: what a GPU run takes, executed on the CPU.

Whatever imports Megatron runs in the one rank of `run_ranks`, where the facade is; it asserts there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.in_one_rank import run_in_one_rank

pytestmark = [pytest.mark.dist, pytest.mark.fast]

HIDDEN, FFN, SLOTS = 16, 24, 4
COUNTS = (5, 0, 7, 1)


def experts_with(dtype: torch.dtype = torch.float32, *, delayed: bool = False, **changes: Any) -> Any:
    """Slotted experts of one rank with drawn weights, the same for every call."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_smartmoe.adapter.moe.experts import SlottedExperts

    options = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 2,
        "num_moe_experts": SLOTS,
        "moe_ffn_hidden_size": FFN,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "bias_activation_fusion": False,
        "use_cpu_initialization": True,
        "gradient_accumulation_fusion": False,
        "params_dtype": dtype,
    }
    config = TransformerConfig(**(options | changes))
    config.delay_wgrad_compute = delayed  # the constructor takes it with the schedule of two micro-batches only
    experts = SlottedExperts(SLOTS, config, ProcessGroupCollection.use_mpu_process_groups())
    generator = torch.Generator().manual_seed(3)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return experts


def results_of(experts: Any, counts: tuple[int, ...] = COUNTS) -> list[torch.Tensor]:
    """Output, gradients of rows, probabilities and what a slot holds, for drawn rows."""
    generator = torch.Generator().manual_seed(7)
    dtype = experts.weight1.dtype
    rows = torch.randn(sum(counts), HIDDEN, generator=generator).to(dtype).requires_grad_()
    probs = torch.rand(sum(counts), generator=generator).requires_grad_()
    experts.zero_grad()
    output, bias = experts(rows, torch.tensor(counts), probs)
    assert bias is None
    output.backward(torch.randn(output.shape, generator=generator).to(dtype))
    return [output.detach(), rows.grad, probs.grad, *(weight.grad for weight in experts.slot_weights())]


def the_fused_activation_is_the_plain_one() -> None:
    """To rounding: in float32 of exponentials, in bfloat16 of what the plain one rounds in between."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        plain = results_of(experts_with(dtype))
        fused = results_of(experts_with(dtype, bias_activation_fusion=True))
        for one, other in zip(fused, plain, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert not torch.equal(fused[0], plain[0])  # or nothing was fused


def gpt_oss_activation_is_megatrons() -> None:
    """Clamped quick GELU with an offset: without fusion this project's formula, with it Megatron's function."""
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    gpt_oss = {"activation_func": quick_gelu, "activation_func_clamp_value": 0.5, "glu_linear_offset": 1.0}
    plain, fused = (results_of(experts_with(**gpt_oss, bias_activation_fusion=fusion)) for fusion in (False, True))
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    for name, value in (("activation_func_clamp_value", None), ("glu_linear_offset", 0.0)):
        assert not torch.allclose(results_of(experts_with(**gpt_oss | {name: value}))[0], plain[0])


GPT_OSS: dict[str, Any] = {"activation_func_clamp_value": 0.5, "glu_linear_offset": 1.0, "add_bias_linear": True}


def stock_with(experts: Any) -> Any:
    """Megatron's SequentialMLP with the same weights and biases."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    parts = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    stock = SequentialMLP(SLOTS, experts.config, parts, ProcessGroupCollection.use_mpu_process_groups())
    missing = stock.load_state_dict(experts.state_dict(), strict=True)
    assert not missing.missing_keys
    for expert in stock.local_experts:
        expert.linear_fc2.explicit_expert_comm = True  # as on several ranks; on one it cannot add a bias
    return stock


def gpt_oss_experts_are_megatrons() -> None:
    """Biases, gates first, clamped quick GELU: every bit of SequentialMLP's, and the rows of an expert without any."""
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    for changes in ({"activation_func": quick_gelu, **GPT_OSS}, {"add_bias_linear": True}):
        ours = experts_with(**changes)
        stock = stock_with(ours)
        stock.zero_grad()
        generator = torch.Generator().manual_seed(7)
        rows = torch.randn(sum(COUNTS), HIDDEN, generator=generator).requires_grad_()
        probs = torch.rand(sum(COUNTS), generator=generator).requires_grad_()
        output, _ = stock(rows, torch.tensor(COUNTS), probs)
        output.backward(torch.randn(output.shape, generator=generator))
        expected = [output.detach(), rows.grad, probs.grad]
        for linear, kind in (
            ("linear_fc1", "weight"),
            ("linear_fc2", "weight"),
            ("linear_fc1", "bias"),
            ("linear_fc2", "bias"),
        ):
            grads = [getattr(getattr(expert, linear), kind).grad for expert in stock.local_experts]
            zeros = torch.zeros_like(grads[0])
            expected.append(torch.stack([zeros if grad is None else grad for grad in grads]))
        found = results_of(ours)
        assert len(found) == len(expected) == 7
        for one, other in zip(found, expected, strict=True):
            assert other.any()
            assert torch.equal(one, other.view(one.shape))


def blocks_of_gate_and_linear_rows() -> None:
    """Interleaved experts are those without, whose rows are in another order, in which GEMMs round otherwise."""
    block = 4
    changes: dict[str, Any] = {"add_bias_linear": True, "moe_mlp_glu_interleave_size": block}
    for fused in (False, True):
        # biases and SwiGLU are fused by no function of Megatron's; the configuration takes it
        ours = experts_with(bias_activation_fusion=fused, **changes)
        plain = experts_with(bias_activation_fusion=fused, add_bias_linear=True)
        order = torch.arange(2 * FFN).view(-1, 2, block).transpose(0, 1).reshape(-1)
        plain.weight1.data.copy_(ours.weight1.data[:, order])
        plain.biases1.bias.data.copy_(ours.biases1.bias.data[:, :, order])
        found, expected = results_of(ours), results_of(plain)
        found[3], found[5] = found[3][:, order], found[5][:, :, order]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def latent_experts_have_the_projected_size() -> None:
    experts = experts_with(moe_latent_size=HIDDEN // 2)
    assert [tuple(weight.shape) for weight in experts.slot_weights()] == [
        (SLOTS, 2 * FFN, HIDDEN // 2),
        (SLOTS, HIDDEN // 2, FFN),
    ]


def no_rows_are_no_error() -> None:
    for fused in (False, True):
        output, *_, grad1, grad2 = results_of(experts_with(bias_activation_fusion=fused), (0,) * SLOTS)
        assert output.shape == (0, HIDDEN)
        assert not grad1.any()
        assert not grad2.any()


RECOMPUTED: dict[str, Any] = {
    "recompute_granularity": "selective",
    "recompute_modules": ["moe_act"],
    "moe_grouped_gemm": True,
}


def a_recomputed_activation_changes_no_bit() -> None:
    for fused in (False, True):
        kept = results_of(experts_with(bias_activation_fusion=fused))
        recomputed = results_of(experts_with(bias_activation_fusion=fused, **RECOMPUTED))
        for one, other in zip(recomputed, kept, strict=True):
            assert torch.equal(one, other)


def a_recomputed_activation_is_not_kept() -> None:
    """Neither what the activation makes of gate and linear part, nor what its own backward pass would need."""
    kept: list[int] = []
    for options in ({}, RECOMPUTED):
        experts, sizes = experts_with(**options), dict[int, int]()

        def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        rows, probs = torch.randn(13, HIDDEN, requires_grad=True), torch.rand(13, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            experts(rows, torch.tensor(COUNTS), probs)
        kept.append(sum(sizes.values()))
    assert kept[0] - kept[1] >= 13 * FFN * 4


def summed(dtype: torch.dtype, *, micro_batches: int = 4, **options: Any) -> list[torch.Tensor]:
    """What Megatron's wrapper for data parallelism has in `main_grad` of both weights after some micro-batches."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    experts = experts_with(dtype, **options)
    delayed = experts.config.delay_wgrad_compute
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=True, delay_wgrad_compute=delayed)
    model = DistributedDataParallel(experts.config, ddp, experts)
    handed_over: list[bool] = []
    for weight in experts.parameters():
        weight.register_hook(lambda gradient: handed_over.append(gradient is not None))
    generator = torch.Generator().manual_seed(7)
    for number in range(micro_batches):
        rows = torch.randn(sum(COUNTS), HIDDEN, generator=generator).to(dtype).requires_grad_()
        probs = torch.rand(sum(COUNTS), generator=generator).requires_grad_()
        for group in model.expert_parallel_bucket_groups + model.bucket_groups:
            group.is_last_microbatch = number == micro_batches - 1  # as in Megatron's schedule
        output, _ = model(rows, torch.tensor(COUNTS), probs)
        output.backward(torch.randn(output.shape, generator=generator).to(dtype))
        experts.backward_dw()
    assert handed_over.count(True) == (0 if delayed else 2 * micro_batches), handed_over
    model.finish_grad_sync()  # stops if a gradient was not reported to the bucket's group
    return [weight.main_grad.clone() for weight in experts.parameters()]


FUSED: dict[str, Any] = {"gradient_accumulation_fusion": True}
DELAYED: dict[str, Any] = {"delayed": True}


def accumulated_gradients_are_not_rounded() -> None:
    """The gradient of an expert in bfloat16 with float32 sums is nearer to the exact one, however it is computed."""
    rounded = summed(torch.bfloat16)
    fused = summed(torch.bfloat16, **FUSED)
    for one, other in zip(fused, rounded, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)
        as_bf16 = one.bfloat16().float()
        assert (one != as_bf16).any()
        assert not one[COUNTS.index(0)].any()
    for options in (RECOMPUTED, DELAYED):
        for one, other in zip(summed(torch.bfloat16, **FUSED, **options), fused, strict=True):
            assert torch.equal(one, other)
    # One micro-batch: autograd's gradient is this one, rounded once
    for one, other in zip(
        summed(torch.bfloat16, micro_batches=1, **FUSED), summed(torch.bfloat16, micro_batches=1), strict=True
    ):
        assert not torch.equal(one, other)
        assert torch.equal(one.bfloat16().float(), other)


def in_float32_no_bit_changes() -> None:
    for options in (dict[str, Any](), RECOMPUTED, DELAYED):
        for one, other in zip(summed(torch.float32, **FUSED, **options), summed(torch.float32), strict=True):
            assert torch.equal(one, other)


CHECKS: tuple[Callable[[], None], ...] = (
    the_fused_activation_is_the_plain_one,
    gpt_oss_activation_is_megatrons,
    gpt_oss_experts_are_megatrons,
    blocks_of_gate_and_linear_rows,
    latent_experts_have_the_projected_size,
    no_rows_are_no_error,
    a_recomputed_activation_changes_no_bit,
    a_recomputed_activation_is_not_kept,
    accumulated_gradients_are_not_rounded,
    in_float32_no_bit_changes,
)


def test_all(tmp_path: Path) -> None:
    run_in_one_rank(CHECKS, tmp_path)
