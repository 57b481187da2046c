"""`smartmoe convert`: the way from what SOURCE is to a finished OUT."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_smartmoe import __version__
from megatron_smartmoe.checkpoint.inspection import readable_bytes
from megatron_smartmoe.convert.card import model_card
from megatron_smartmoe.convert.families import table_of, with_prediction
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.hf_config import IGNORE_KEY, HFConfig
from megatron_smartmoe.convert.hf_tensors import HFTensors
from megatron_smartmoe.convert.megatron_tensors import MegatronTensors
from megatron_smartmoe.convert.options import DTYPES, ConvertOptions
from megatron_smartmoe.convert.output import check_free
from megatron_smartmoe.convert.ranks import EXPERT
from megatron_smartmoe.convert.reduce import (
    KEEP,
    TEXT,
    ReducedTensors,
    ReduceRecipe,
    loads_of,
    moved_lines,
    reduced_table,
    reductions_of,
)
from megatron_smartmoe.convert.resave import check_optimizer, megatron_to_megatron
from megatron_smartmoe.convert.reverse import config_beside, table_of_checkpoint
from megatron_smartmoe.convert.source import Source, recognise
from megatron_smartmoe.convert.text_loss import losses, tokens_of
from megatron_smartmoe.convert.to_hf import megatron_to_hf
from megatron_smartmoe.convert.to_megatron import hf_to_megatron
from megatron_smartmoe.convert.to_torch import hf_to_torch, megatron_to_torch
from megatron_smartmoe.convert.upcycle import EXPERTS, UpcycledTensors, upcycled_table
from megatron_smartmoe.convert.verify import check_installed, verify
from megatron_smartmoe.errors import ConfigError

EXIT_DIFFERENT = 1  # of a conversion whose ends compute something else


def convert(options: ConvertOptions) -> int:
    """Convert, and say what is done; returns the exit status.

    Raises:
        SmartMoEError: source, output or options are wrong; nothing is written then.
    """
    started = time.perf_counter()
    check_free(options.out)
    if options.verify:
        check_installed(options.spec)
    source = recognise(options.source, options.kind)
    _say(source.said)
    _check_changes(options, source)
    table, ends = None, None
    if options.verify and options.target == "torch":
        rule = "loads a torch_dist checkpoint, and --to torch writes Megatron's older format"
        raise ConfigError("--verify", True, rule, "Leave it out, or verify what --to megatron writes.")
    if source.kind == "hf" and options.target != "hf":
        table = _from_hf(options, source)
        ends = (source.folder, options.out)
    elif source.kind != "hf" and options.target == "hf":
        table = _megatron_to_hf(options, source)
        ends = (options.out, source.folder)
    elif source.kind != "hf" and options.target == "torch":
        _megatron_to_torch(options, source)
    elif source.kind != "hf":
        _megatron_to_megatron(options, source)
    else:
        rule = f"is what {options.source} is already"
        raise ConfigError("--to", options.target, rule, "Pass --to megatron or --to torch.")
    size_bytes = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    _say(f"{options.out} is written: {readable_bytes(size_bytes)} in {time.perf_counter() - started:.1f} s")
    return _verify(options, table, *ends) if options.verify and table is not None and ends is not None else 0


def _check_changes(options: ConvertOptions, source: Source) -> None:
    """Options fit the source: experts are made and removed on the way from Hugging Face to Megatron alone."""
    if source.kind == "hf" and options.target == "megatron" and options.expert_ranks is not None:
        rule = "arranges optimizer state, and a Hugging Face model has none: what is written loads at any parallelism"
        raise ConfigError(EXPERT, options.expert_ranks, rule, "Leave it out.")
    if source.kind != "hf" and options.ignore_config_key:
        rule = "is for the config.json of a Hugging Face SOURCE"
        raise ConfigError(IGNORE_KEY, options.ignore_config_key[0], rule, "Leave it out.")
    for flag, value in (
        (EXPERTS, options.recipe and options.recipe.experts),
        (KEEP, options.reduce and options.reduce.keep),
    ):
        if value is None:
            continue
        if source.kind != "hf":
            raise ConfigError(flag, value, "changes a Hugging Face model", "Convert it --to hf first.")
        if options.target == "hf":
            raise ConfigError(flag, value, "needs --to megatron", "Pass --to megatron; the result converts --to hf.")


def _verify(options: ConvertOptions, table: ModelTable, model: Path, checkpoint: Path) -> int:
    verdicts = verify(model, checkpoint, table, options.verify)
    for verdict in verdicts:
        _say(verdict.line())
    return 0 if all(verdict.is_equal for verdict in verdicts) else EXIT_DIFFERENT


def _from_hf(options: ConvertOptions, source: Source) -> ModelTable:
    config = HFConfig.of(source.folder)
    table = table_of(config, options.ignore_config_key)
    tensors = HFTensors.of(source.folder, config)
    predicts = with_prediction(table, tensors.tensors)
    tensors.check(table)
    dtype = DTYPES[options.dtype] if options.dtype else tensors.dtype("model.embed_tokens.weight")
    if options.recipe is not None:
        recipe, folder, held = options.recipe, source.folder, tensors.tensors
        table = upcycled_table(config, recipe)
        tensors = UpcycledTensors(folder=folder, tensors=held, recipe=recipe, shapes=table.shapes)
        _say(f"upcycled: each layer's block becomes {recipe.experts} experts, a token takes {recipe.topk}")
    tokens = None
    if options.reduce is not None:
        if predicts:
            rule = "is not supported for a model with layers that predict further tokens (MTP)"
            raise ConfigError(KEEP, options.reduce.keep, rule, "Leave it out.")
        if options.reduce.text is not None:
            if options.target == "torch":
                rule = "needs a checkpoint that Megatron loads on one rank"
                raise ConfigError(TEXT, str(options.reduce.text), rule, "Pass --to megatron, or leave it out.")
            check_installed(options.spec, TEXT)
            tokens = tokens_of(options.reduce.text, source.folder, table, TEXT)
        table, tensors = _reduced(options.reduce, config, table, tensors)
    experts = f", {table.num_experts} experts" if table.num_experts else ""
    _say(f"{table.family}, {table.num_layers} layers{experts}, written as {dtype} for the {options.spec} layers")
    if predicts:
        _say(f"with {table.mtp_layers} layer(s) that predict further tokens (MTP), which --verify does not compare")
    how: dict[str, Any] = {"spec": options.spec, "dtype": dtype, "workers": options.workers}
    how["plan"] = _plan(options, dtype, sorted({tensor.path for tensor in tensors.tensors.values()}))
    if options.target == "torch":
        _say(_torch_line(options))
        hf_to_torch(tensors, table, options.out, ranks=options.ranks, **how)
    else:
        hf_to_megatron(tensors, table, options.out, **how)
    if tokens is not None:
        before, after = losses(source.folder, options.out, table, tokens)
        _say(f"loss on {tokens.numel():,} tokens of the text: {before:.4f} before, {after:.4f} after")
    return table


def _reduced(
    recipe: ReduceRecipe, config: HFConfig, table: ModelTable, tensors: HFTensors
) -> tuple[ModelTable, ReducedTensors]:
    """Table and tensors of the model with fewer experts, and a line for each layer of what that costs."""
    made = reduced_table(config, table, recipe.keep)
    reductions = reductions_of(tensors, loads_of(recipe.trace, table), recipe.keep, recipe.method)
    for line in moved_lines(reductions, recipe.method):
        _say(line)
    return made, ReducedTensors(
        folder=tensors.folder,
        tensors=tensors.tensors,
        block=tensors.block,
        reductions=reductions,
        shapes=made.shapes,
    )


def _megatron_to_hf(options: ConvertOptions, source: Source) -> ModelTable:
    if options.verify and source.kind == "torch":
        rule = "loads a torch_dist checkpoint, and this one is in Megatron's older format"
        raise ConfigError("--verify", True, rule, "Convert it --to megatron first, or leave --verify out.")
    # Step 1: what the checkpoint holds, and which family that is.
    tensors = MegatronTensors.of(source.folder)
    arguments = dict(tensors.contents.arguments)
    beside = options.hf_config or config_beside(source.folder, arguments)
    vocab = tensors.vocab_size if beside is None else 0
    table = table_of_checkpoint(arguments, beside, vocab)
    if tensors.num_prediction_layers:
        table.mtp_layers = tensors.num_prediction_layers
        with_prediction(table, [f"model.layers.{table.num_layers}.eh_proj.weight"])
    tensors.check(table.parameters)
    _say(f"{table.family}, {table.num_layers} layers; config.json {'made here' if beside is None else f'of {beside}'}")
    # Step 2: write it.
    dtype = DTYPES[options.dtype] if options.dtype else tensors.dtype(table.parameters[0])
    megatron_to_hf(
        tensors,
        table,
        options.out,
        dtype=dtype,
        workers=options.workers,
        plan=_plan(options, dtype, sorted(path for path in source.folder.rglob("*") if path.is_file())),
        beside=beside,
        card=model_card(table, source.folder, tensors.contents.iteration, arguments),
    )
    return table


def _megatron_to_megatron(options: ConvertOptions, source: Source) -> None:
    if options.verify:
        rule = "compares a Hugging Face model with a checkpoint, and here both ends are checkpoints"
        raise ConfigError("--verify", True, rule, "Leave it out; smartmoe checkpoint compare compares their numbers.")
    contents = MegatronTensors.of(source.folder).contents
    with_optimizer = options.optimizer and check_optimizer(contents, is_sharded=source.kind == "torch_dist")
    there = int(contents.arguments.get("expert_model_parallel_size") or 1)
    experts = f" for expert parallelism {options.expert_ranks or there} (it was saved at {there})"
    state = f"with optimizer state{experts}" if with_optimizer else "without optimizer state"
    _say(f"written {state}, for the {options.spec} layers")
    megatron_to_megatron(
        contents,
        options.out,
        spec=options.spec,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        expert_ranks=options.expert_ranks,
        with_optimizer=with_optimizer,
        workers=options.workers,
        plan={
            **_plan(options, options.dtype or "", sorted(path for path in source.folder.rglob("*") if path.is_file())),
            "ep": options.expert_ranks,
            "optimizer": with_optimizer,
        },
    )


def _megatron_to_torch(options: ConvertOptions, source: Source) -> None:
    contents = MegatronTensors.of(source.folder).contents
    _say(_torch_line(options))
    megatron_to_torch(
        contents,
        options.out,
        spec=options.spec,
        ranks=options.ranks,
        dtype=DTYPES[options.dtype] if options.dtype else None,
        workers=options.workers,
        plan=_plan(options, options.dtype or "", sorted(path for path in source.folder.rglob("*") if path.is_file())),
    )


def _torch_line(options: ConvertOptions) -> str:
    ranks = options.ranks
    sizes = f"tensor parallelism {ranks.tensor}, {ranks.stages} pipeline stage(s), expert parallelism {ranks.expert}"
    return f"written in the torch format, without optimizer state, for {sizes} and no other"


def _plan(options: ConvertOptions, dtype: str, files: list[Path]) -> dict[str, Any]:
    """What makes a conversion the same as one that was killed."""
    states = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return {
        "version": __version__,
        "files": [list(state) for state in states],
        "to": options.target,
        "for": options.spec,
        "ranks": asdict(options.ranks),
        "dtype": dtype,
        "recipe": None if options.recipe is None else asdict(options.recipe),
        "reduce": _reduce_plan(options.reduce),
    }


def _reduce_plan(recipe: ReduceRecipe | None) -> list[Any] | None:
    if recipe is None:
        return None
    return [recipe.keep, recipe.method, str(recipe.trace.absolute()), recipe.trace.stat().st_mtime_ns]


def _say(line: str) -> None:
    print(f"smartmoe convert: {line}", flush=True)
