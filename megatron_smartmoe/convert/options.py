"""The options of `smartmoe convert`, shared by the command and the process that it starts."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_smartmoe.convert.hf_config import IGNORE_KEY
from megatron_smartmoe.convert.launches import Launch, launch_of
from megatron_smartmoe.convert.layout import SPECS, Spec
from megatron_smartmoe.convert.ranks import EXPERT, STAGES, TENSOR, Ranks
from megatron_smartmoe.convert.reduce import KEEP, METHOD, METHODS, TEXT, TRACE, ReduceRecipe
from megatron_smartmoe.convert.source import KINDS, Kind
from megatron_smartmoe.convert.upcycle import EXPERTS, GRANULARITY, TOPK, Recipe
from megatron_smartmoe.errors import ConfigError

type Target = Literal["hf", "megatron", "torch"]
TARGETS: tuple[Target, ...] = ("hf", "megatron", "torch")
NOISE, ROUTER_STD, SEED = "--expert-noise", "--router-std", "--seed"
_ROUTER_STD, _SEED = 0.02, 1234  # defaults
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What to convert and how.

    Attributes:
        source: the folder to read.
        out: the folder to write.
        target: the format to write.
        kind: the format of the source; None to recognise it.
        spec: the layer spec of Megatron that the checkpoint is for.
        dtype: type of the written weights, by its short name; None for that of the source.
        workers: files that are written at a time.
        hf_config: folder with the config.json of the model that a checkpoint began with; None to look for it.
        expert_ranks: with optimizer state, the expert parallelism that will load it, None for that of the source; in
            the torch format, the expert-parallel ranks, None for one.
        tensor_ranks: in the torch format, the tensor-parallel ranks; None for one.
        stages: in the torch format, the pipeline stages; None for one.
        optimizer: whether optimizer state is converted too, where the source has some.
        recipe: how experts are made of a dense model; None to convert the model as it is.
        reduce: which experts are removed; None to keep all.
        verify: launches at which both ends are compared; empty for no comparison.
        ignore_config_key: keys of config.json that the user says have no effect.
    """

    source: Path
    out: Path
    target: Target
    kind: Kind | None = None
    spec: Spec = "local"
    dtype: str | None = None
    workers: int = 4
    hf_config: Path | None = None
    expert_ranks: int | None = None
    tensor_ranks: int | None = None
    stages: int | None = None
    optimizer: bool = True
    recipe: Recipe | None = None
    reduce: ReduceRecipe | None = None
    verify: tuple[Launch, ...] = ()
    ignore_config_key: tuple[str, ...] = ()

    @property
    def ranks(self) -> Ranks:
        """Parallelism of the torch format."""
        return Ranks(tensor=self.tensor_ranks or 1, stages=self.stages or 1, expert=self.expert_ranks or 1)

    @classmethod
    def of(cls, parsed: argparse.Namespace) -> ConvertOptions:
        """The options of a parsed command line.

        Raises:
            ConfigError: a number is out of its range, or source and output are the same.
        """
        made = {"recipe": _recipe(parsed), "reduce": _reduce(parsed)}
        values = {name: getattr(parsed, name) for name in cls.__dataclass_fields__ if name not in made} | made
        asked = parsed.verify if parsed.verify is None or parsed.verify else ["1"]
        values["verify"] = tuple(launch_of(text) for text in asked or ())
        values["ignore_config_key"] = tuple(values["ignore_config_key"] or ())
        found = cls(**values)
        for flag, size in ((EXPERT, found.expert_ranks), (TENSOR, found.tensor_ranks), (STAGES, found.stages)):
            if size is not None and size < 1:
                raise ConfigError(flag, size, "must be at least 1", f"For example: {flag} 4.")
        if found.target == "hf":
            for flag, value in (("--for", None if found.spec == "local" else found.spec), (EXPERT, found.expert_ranks)):
                if value is not None:
                    raise ConfigError(flag, value, "has no meaning with --to hf", "Leave it out.")
        elif found.hf_config is not None:
            raise ConfigError("--hf-config", str(found.hf_config), "needs --to hf", "Leave it out.")
        for flag, size in ((TENSOR, found.tensor_ranks), (STAGES, found.stages)):
            if size is not None and found.target != "torch":
                rule = "needs --to torch: a torch_dist checkpoint loads at any tensor and pipeline parallelism"
                raise ConfigError(flag, size, rule, "Leave it out.")
        if found.workers < 1:
            raise ConfigError("--workers", found.workers, "must be at least 1", "For example: --workers 4.")
        source, out = (os.path.realpath(path) for path in (found.source, found.out))
        if out == source or out.startswith(f"{source}{os.sep}"):
            raise ConfigError("OUT", str(found.out), "is SOURCE or lies in it", "Pass another folder.")
        return found


def _recipe(parsed: argparse.Namespace) -> Recipe | None:
    if parsed.experts is None:
        for flag, value, unset in (
            (TOPK, parsed.topk, None),
            (GRANULARITY, parsed.granularity, 1),
            (NOISE, parsed.expert_noise, 0.0),
            (ROUTER_STD, parsed.router_std, _ROUTER_STD),
            (SEED, parsed.seed, _SEED),
        ):
            if value != unset:
                raise ConfigError(flag, value, f"needs {EXPERTS}", f"Add {EXPERTS} 8, for example.")
        return None
    return Recipe(
        experts=parsed.experts,
        topk=parsed.topk if parsed.topk is not None else 2 * parsed.granularity,
        granularity=parsed.granularity,
        noise=parsed.expert_noise,
        router_std=parsed.router_std,
        seed=parsed.seed,
    )


def _reduce(parsed: argparse.Namespace) -> ReduceRecipe | None:
    if parsed.keep_experts is None:
        for flag, value in ((METHOD, parsed.reduce_by), (TRACE, parsed.trace), (TEXT, parsed.text)):
            if value is not None:
                raise ConfigError(flag, str(value), f"needs {KEEP}", f"Add {KEEP} 4, for example.")
        return None
    if parsed.trace is None:
        rule = f"needs {TRACE}, which says how much each expert is used"
        raise ConfigError(KEEP, parsed.keep_experts, rule, f"Pass {TRACE} FILE, recorded with --smartmoe-record-trace.")
    if parsed.experts is not None:
        raise ConfigError(KEEP, parsed.keep_experts, f"removes experts, and {EXPERTS} makes some", "Leave one out.")
    if parsed.verify is not None:
        rule = f"compares with SOURCE, which computes something else than a model with {KEEP}"
        raise ConfigError("--verify", True, rule, f"Pass {TEXT} FILE for the loss before and after.")
    method = parsed.reduce_by or METHODS[0]
    return ReduceRecipe(keep=parsed.keep_experts, method=method, trace=parsed.trace, text=parsed.text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    help_text = "a Hugging Face model, a checkpoint of Megatron's (torch_dist or mp_rank_*), or a run directory"
    parser.add_argument("source", type=Path, metavar="SOURCE", help=help_text)
    help_text = "folder to write, which must not exist yet; it appears when all of it is written"
    parser.add_argument("out", type=Path, metavar="OUT", help=help_text)
    help_text = (
        "hf: a Hugging Face folder with safetensors; megatron: a torch_dist checkpoint; torch: Megatron's older "
    )
    help_text += "format, a file for each model-parallel rank, of the weights alone"
    parser.add_argument("--to", dest="target", choices=TARGETS, required=True, help=help_text)
    help_text = "format of SOURCE (default: recognised by what lies in it)"
    parser.add_argument("--from", dest="kind", choices=KINDS, help=help_text)
    help_text = (
        "with --to megatron and torch: the layers that will load it, Megatron's local ones or TransformerEngine's, "
    )
    help_text += "whose checkpoints name some norms differently (default: local)"
    parser.add_argument("--for", dest="spec", choices=SPECS, default="local", help=help_text)
    help_text = "type of the written weights (default: that of SOURCE; bf16 where it is fp8)"
    parser.add_argument("--dtype", choices=tuple(DTYPES), help=help_text)
    help_text = "files that are written at a time, each with one slice of at most 256 MB in memory (default: 4)"
    parser.add_argument("--workers", type=int, default=4, metavar="N", help=help_text)
    help_text = (
        "with --to hf: folder with config.json and tokenizer (default: those that the model was converted from; "
    )
    help_text += "for another model, config.json is made from its arguments)"
    parser.add_argument("--hf-config", type=Path, metavar="DIR", help=help_text)
    help_text = "from a checkpoint to --to megatron: arrange the optimizer state for this expert parallelism; Megatron "
    help_text += (
        "itself loads what was saved at 1 only at 1 (default: as it was saved). With --to torch: expert-parallel "
    )
    help_text += "ranks of the run that will load it (default: 1)"
    parser.add_argument(EXPERT, dest="expert_ranks", type=int, metavar="N", help=help_text)
    help_text = "with --to torch: tensor-parallel ranks of the run that will load it; they cut experts too (default: 1)"
    parser.add_argument(TENSOR, dest="tensor_ranks", type=int, metavar="N", help=help_text)
    help_text = "with --to torch: pipeline stages of the run that will load it (default: 1)"
    parser.add_argument(STAGES, dest="stages", type=int, metavar="N", help=help_text)
    help_text = "from a checkpoint to --to megatron: leave the optimizer state out"
    parser.add_argument("--no-optim", dest="optimizer", action="store_false", help=help_text)
    _add_upcycling(parser)
    _add_reducing(parser)
    help_text = "compare the logits of both ends in float32 when OUT is written, with Megatron on 1 rank or on the "
    help_text += "given launches, such as EP4xPP2; needs transformers. Exit status 1 if they differ by more than 1e-5"
    parser.add_argument("--verify", nargs="*", metavar="LAUNCH", help=help_text)
    help_text = "a key of config.json that is not known here and does not change the model; may be repeated"
    parser.add_argument(IGNORE_KEY, action="append", metavar="KEY", help=help_text)


def _add_upcycling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("upcycling", "make a model with experts from a dense one (Llama, Qwen3)")
    group.add_argument(EXPERTS, type=int, metavar="N", help="experts of each layer, copies of the dense block")
    group.add_argument(TOPK, type=int, metavar="K", help="experts of a token (default: 2 x granularity)")
    help_text = "cut the dense block into G parts, each expert a copy of one; a power of 2 (default: 1)"
    group.add_argument(GRANULARITY, type=int, default=1, metavar="G", help=help_text)
    help_text = (
        "add normal noise to the experts' weights, S times the standard deviation of their row (default: 0, with "
    )
    help_text += "which the first loss is the dense model's)"
    group.add_argument(NOISE, type=float, default=0.0, metavar="S", help=help_text)
    help_text = "standard deviation of the routers' weights (default: 0.02)"
    group.add_argument(ROUTER_STD, type=float, default=_ROUTER_STD, metavar="S", help=help_text)
    group.add_argument(SEED, type=int, default=_SEED, metavar="N", help="of routers and noise (default: 1234)")


def _add_reducing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "fewer experts", "remove the experts of a Hugging Face model that a routing trace sees used least"
    )
    group.add_argument(KEEP, type=int, metavar="N", help="experts that are left of each layer")
    help_text = "prune: leave the others out; merge: average each into the kept expert with the most similar router "
    help_text += "row, weighted by assignments (default: prune)"
    group.add_argument(METHOD, choices=METHODS, help=help_text)
    group.add_argument(TRACE, type=Path, metavar="FILE", help="routing trace of the model, in any format of smartmoe")
    help_text = "print the loss on this text before (transformers) and after (Megatron); SOURCE needs its tokenizer"
    group.add_argument(TEXT, type=Path, metavar="FILE", help=help_text)


def as_argv(options: ConvertOptions) -> list[str]:
    """The command line of these options."""
    argv = [str(options.source), str(options.out), "--to", options.target, "--for", options.spec]
    given: list[tuple[str, Any]] = [("--from", options.kind), ("--dtype", options.dtype)]
    given += [("--workers", options.workers), ("--hf-config", options.hf_config)]
    given += [(EXPERT, options.expert_ranks), (TENSOR, options.tensor_ranks), (STAGES, options.stages)]
    for flag, value in given:
        argv += [flag, str(value)] if value is not None else []
    argv += [] if options.optimizer else ["--no-optim"]
    if options.verify:
        argv += ["--verify", *("1" if launch.num_ranks == 1 else launch.name for launch in options.verify)]
    if options.recipe is not None:
        recipe = options.recipe
        argv += [EXPERTS, str(recipe.experts), TOPK, str(recipe.topk), GRANULARITY, str(recipe.granularity)]
        argv += [
            NOISE,
            str(recipe.noise),
            ROUTER_STD,
            str(recipe.router_std),
            SEED,
            str(recipe.seed),
        ]
    if options.reduce is not None:
        argv += [KEEP, str(options.reduce.keep), METHOD, options.reduce.method, TRACE, str(options.reduce.trace)]
        argv += [TEXT, str(options.reduce.text)] if options.reduce.text is not None else []
    for key in options.ignore_config_key:
        argv += [IGNORE_KEY, key]
    return argv
