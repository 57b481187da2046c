"""What a checkpoint's model computes: logits, the layers' outputs and the routers' choices on given tokens.

The ranks are those of a training run, through the same entry, and end where training would begin: the model is built
from the flags, the checkpoint is loaded as by any run, and one forward pass goes through all pipeline stages. Each rank
that holds a part of the result writes it to a file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_smartmoe.adapter.device import choose_device, refuse_old_megatron
from megatron_smartmoe.adapter.pretrain import with_defaults
from megatron_smartmoe.errors import SmartMoEError

if TYPE_CHECKING:
    import torch

# What a forward pass of a loaded checkpoint needs besides the model's own flags.
FLAGS = (
    "--micro-batch-size 1 --train-iters 1 --lr 1e-5 --lr-decay-style constant --eval-iters 0 --eval-interval 1000 "
    "--mock-data --split 99,1,0 --num-workers 0 --rerun-mode disabled --smartmoe-rehearsal off --logging-level 40 "
    "--finetune --no-load-optim --no-load-rng --tokenizer-type NullTokenizer --smartmoe-watchdog off"
).split()


def probe(argv: Sequence[str], tokens: Sequence[Sequence[int]], out: Path) -> None:
    """Compute and write `rank<N>.pt` files. One call per process; ranks come from the environment.

    Args:
        argv: flags of the model, its parallelism and its checkpoint, without `FLAGS`.
        tokens: sequences of equal length.
        out: folder of the files, which exists.
    """
    cpu = choose_device("auto")
    refuse_old_megatron()
    length, count = len(tokens[0]), len(tokens)
    shape = ["--seq-length", str(length), "--global-batch-size", str(count * _data_ranks(argv))]
    flags = with_defaults([*argv, *FLAGS, *shape], cpu=cpu, say=False)
    from megatron_smartmoe.adapter import pretrain

    pretrain.check_flags(flags, cpu=cpu)  # also sets what Megatron asserts of the environment
    try:
        pretrain.train(flags, cpu=cpu, callbacks=[_probe_callback(tokens, out)])
    except _Done:
        import torch

        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


class _Done(Exception):
    """The forward pass is over."""


def _data_ranks(argv: Sequence[str]) -> int:
    """Data-parallel ranks: of all ranks, those that no other kind of parallelism takes."""
    import os

    model_ranks = 1
    for flag in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size"):
        if flag in argv:
            model_ranks *= int(argv[list(argv).index(flag) + 1])
    return int(os.environ["WORLD_SIZE"]) // model_ranks


def _probe_callback(tokens: Sequence[Sequence[int]], out: Path) -> Any:
    from megatron_smartmoe.adapter.hooks import Callback
    from megatron_smartmoe.adapter.run import Run

    class Probe(Callback):
        """Computes when the checkpoint is loaded, and ends the rank."""

        def on_start(self, run: Run) -> None:
            _compute(run, tokens, out)
            raise _Done

    return Probe()


def _compute(run: Any, tokens: Sequence[Sequence[int]], out: Path) -> None:
    import torch
    from megatron.core import mpu
    from megatron.core.pipeline_parallel import get_forward_backward_func

    found: dict[str, Any] = {"layers": {}, "routers": {}}
    for chunk in run.model_chunks:
        chunk.eval()
    _record(run.chunks, found)
    batch = torch.tensor(tokens)
    chunks = run.model_chunks

    def batches() -> Iterator[torch.Tensor]:
        for number in range(len(batch)):
            yield batch[number : number + 1]

    def forward_step(iterator: Iterator[torch.Tensor], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        one = next(iterator).to(next(model.parameters()).device)
        positions = torch.arange(one.shape[1], device=one.device)[None]
        return model(one, positions, None), lambda output, non_loss_data=False: output

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[batches() for _ in chunks] if len(chunks) > 1 else batches(),
            model=list(chunks),
            num_microbatches=len(batch),
            seq_length=batch.shape[1],
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    if mpu.is_pipeline_last_stage(ignore_virtual=True):
        found["logits"] = torch.cat([_all_columns(output) for output in outputs]).float().cpu()
    if mpu.get_data_parallel_rank() == 0 and mpu.get_tensor_model_parallel_rank() == 0:
        torch.save(found, out / f"rank{torch.distributed.get_rank()}.pt")


def _record(chunks: Sequence[Any], found: dict[str, Any]) -> None:
    """Have layers and routers leave what they return, by the number of the layer, from 0."""
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.transformer_layer import TransformerLayer

    def layer_hook(number: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            found["layers"].setdefault(number, []).append(_all_tokens(hidden).transpose(0, 1).float().cpu())

        return hook

    def router_hook(number: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            found["routers"].setdefault(number, []).append(_all_tokens(output[1].int()).bool().cpu())

        return hook

    for chunk in chunks:
        for module in chunk.decoder.modules():
            if isinstance(module, TransformerLayer):
                module.register_forward_hook(layer_hook(module.layer_number - 1))
            elif isinstance(module, TopKRouter):
                module.register_forward_hook(router_hook(module.layer_number - 1))


def _all_tokens(part: torch.Tensor) -> torch.Tensor:
    """A tensor over the tokens, all of them, where sequence parallelism spreads them."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
    from megatron.training import get_args

    if not get_args().sequence_parallel:
        return part
    gathered: torch.Tensor = gather_from_sequence_parallel_region(part.contiguous())
    return gathered


def _all_columns(part: torch.Tensor) -> torch.Tensor:
    """Logits of the whole vocabulary, where tensor parallelism spreads it."""
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    gathered: torch.Tensor = gather_from_tensor_model_parallel_region(part.contiguous())
    return gathered


def main() -> None:
    """`python -m megatron_smartmoe.adapter.probe REQUEST`: a JSON file with argv, tokens and out."""
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        probe(request["argv"], request["tokens"], Path(request["out"]))
    except SmartMoEError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
