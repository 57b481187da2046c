"""What a person wants to know when a run has ended: one screen, and summary.json for programs."""

from __future__ import annotations

import json
import statistics
import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_smartmoe.adapter.corpus.spec import PreparedCorpus
from megatron_smartmoe.adapter.launch.run_dir import CONFIG_FILE, launcher_command
from megatron_smartmoe.adapter.run_files import write_text
from megatron_smartmoe.cost.account import MACHINE

_SMALLEST_SHARE = 5e-4  # of a step, that is shown: less is 0.0%
SHOWN_TEXT = 80  # characters of the data's text, quotes included


FILE = "summary.json"  # in the run directory


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """How one MoE layer's tokens fell in the last iterations.

    Attributes:
        layer: number in the model, from 1.
        share_E: percent of all assignments, per logical expert.
        expert_imbalance: hottest expert over the mean.
        rank_imbalance: hottest expert-parallel rank over the mean, experts in their contiguous homes.
    """

    layer: int
    share_E: tuple[float, ...]
    expert_imbalance: float
    rank_imbalance: float


def layer_loads(load_LE: list[list[int]], ep: int) -> list[LayerLoad]:
    """The load of every layer that routed anything; `load_LE` is assignments `[L, E]`."""
    loads = []
    for number, counts in enumerate(load_LE, start=1):
        total, experts = sum(counts), len(counts)
        if total:
            per_rank = [sum(counts[rank * experts // ep : (rank + 1) * experts // ep]) for rank in range(ep)]
            loads.append(
                LayerLoad(
                    layer=number,
                    share_E=tuple(100 * count / total for count in counts),
                    expert_imbalance=max(counts) * experts / total,
                    rank_imbalance=max(per_rank) * ep / total,
                )
            )
    return loads


def summarise(gathered: dict[str, Any], args: Namespace) -> dict[str, Any]:
    """Everything the summary says, as plain data (the content of summary.json)."""
    seconds = gathered["step_seconds"]
    step = statistics.median(seconds) if seconds else None
    corpus = _corpus(args)
    return {
        "iterations": gathered["iteration"],
        "train_loss": gathered["train"].get("lm loss"),
        "valid_loss": gathered.get("validation", {}).get("lm loss"),
        "test_loss": gathered.get("test", {}).get("lm loss"),
        "unigram_entropy": corpus.unigram_entropy_nats if corpus else None,
        "seconds_per_step": step,
        "tokens_per_second": args.global_batch_size * args.seq_length / step if step else None,
        "data_begins": gathered.get("first_text"),
        "layers": [vars(load) for load in layer_loads(gathered["load_LE"], args.expert_model_parallel_size)],
    }


def _corpus(args: Namespace) -> PreparedCorpus | None:
    """What scripts/prepare_data.py noted of the dataset, where there is just one and it made it."""
    if args.data_path is None or len(args.data_path) != 1 or not PreparedCorpus.exists(args.data_path[0]):
        return None
    return PreparedCorpus.load(args.data_path[0])


def render(summary: dict[str, Any], args: Namespace, run_dir: Path | None) -> str:
    """The summary as text."""
    head = f"Finished after {summary['iterations']} iterations."
    if summary["train_loss"] is None:
        head += " There was nothing left to train: raise --train-iters to train further."
    lines = ["", "=" * 100, head]
    lines += _loss_lines(summary)
    if summary["tokens_per_second"]:
        speed = (
            f"{summary['tokens_per_second']:,.0f} tokens/s ({summary['seconds_per_step'] * 1e3:.0f} ms a step, median)"
        )
        lines.append(f"  speed            {speed}")
    if summary.get("account"):
        lines.append(f"  share of ideal   {_account_text(summary['account'])}")
    if summary["data_begins"] is not None:
        lines.append(f"  the data begin   {quoted(summary['data_begins'])}")
    lines += _load_lines(summary["layers"], args.expert_model_parallel_size)
    lines += _place_lines(args, run_dir)
    lines += ["=" * 100]
    return "\n".join(lines)


def quoted(text: str) -> str:
    """A text in one line, cut where it gets long; what a terminal or its encoding cannot show is escaped."""
    shown = json.dumps(text, ensure_ascii=False)
    shown = "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in shown)
    shown = shown.encode(sys.stdout.encoding or "utf-8", errors="backslashreplace").decode(
        sys.stdout.encoding or "utf-8"
    )
    return shown if len(shown) <= SHOWN_TEXT else f'{shown[: SHOWN_TEXT - 5]} ..."'


def _loss_lines(summary: dict[str, Any]) -> list[str]:
    lines = []
    if summary["train_loss"] is not None:
        lines.append(f"  training loss    {summary['train_loss']:.4f} nats per token")
    if summary["valid_loss"] is not None:
        lines.append(f"  validation loss  {summary['valid_loss']:.4f} nats per token")
        if summary["unigram_entropy"]:
            entropy = f"{summary['unigram_entropy']:.4f} nats per token"
            lines.append(f"  unigram entropy  {entropy}: the loss of knowing only how frequent each token is")
    return lines


def _account_text(account: dict[str, Any]) -> str:
    """The share of a force-balanced run's speed, the two largest of the terms that cost time, and what is unexplained.

    Args:
        account: `Account.to_json`.
    """
    lost = [term for name, term in account["terms"].items() if name != MACHINE and term["share"] >= _SMALLEST_SHARE]
    lost = sorted(lost, key=lambda term: -float(term["share"]))[:2]
    terms = ", ".join(f"{term['label']} {term['share']:.1%}" for term in lost)
    if account["share_of_ideal"] is None:
        lead = "not measured (--smartmoe-ideal-run RUN)"
        return f"{lead}; known losses: {terms}" if terms else lead
    parts = [f"{account['share_of_ideal']:.1%}", *([f"lost most to: {terms}"] if terms else [])]
    return "; ".join([*parts, f"unexplained {account['unexplained_share']:.1%}"])


def _load_lines(layers: list[dict[str, Any]], ep: int) -> list[str]:
    if not layers:
        return []
    experts = range(len(layers[0]["share_E"]))
    header = "  layer  " + " ".join(f"{f'e{expert}':>5}" for expert in experts) + "   max/mean: expert"
    lines = [
        "",
        "  Load per expert, % of the layer's assignments in the last iterations:",
        header + f"  {f'EP{ep} rank':>8}",
    ]
    for load in layers:
        shares = " ".join(f"{share:5.1f}" for share in load["share_E"])
        lines.append(f"  {load['layer']:5}  {shares}   {load['expert_imbalance']:16.2f}  {load['rank_imbalance']:8.2f}")
    return lines


def _place_lines(args: Namespace, run_dir: Path | None) -> list[str]:
    places = {
        "run directory": run_dir,
        "checkpoints": args.save,
        "TensorBoard": f"tensorboard --logdir {args.tensorboard_dir}" if args.tensorboard_dir else None,
    }
    lines = ["", *(f"  {name:15}  {place}" for name, place in places.items() if place)]
    if run_dir is not None and (run_dir / CONFIG_FILE).is_file():  # the launcher can start it again
        lines += ["", "  Next:", *(f"    {line}" for line in _next_steps(args, run_dir))]
    return lines


def _next_steps(args: Namespace, run_dir: Path) -> list[str]:
    script = launcher_command()
    steps = {}
    if args.save and args.load and args.train_iters:
        more = f"--train-iters {2 * args.train_iters} --override-opt-param-scheduler"
        steps["resume from the checkpoint"] = f"{script} --run-dir {run_dir} {more}"
    steps["see the exact command"] = f"{script} --run-dir {run_dir} --dry-run"
    steps["every flag there is"] = f"{script} --help-megatron"
    width = max(map(len, steps.values()))
    return [f"{command:{width}}  # {purpose}" for purpose, command in steps.items()]


def write(summary: dict[str, Any], path: Path) -> None:
    """Write summary.json."""
    write_text(path, json.dumps(summary, indent=2) + "\n")
