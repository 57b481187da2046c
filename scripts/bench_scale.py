#!/usr/bin/env python3
"""Plans from 8 to 96,000 ranks: what they predict, what they cost, and where balancing pays. Writes docs/scale.svg.

    OMP_NUM_THREADS=1 python scripts/bench_scale.py --out DIR

Every plan runs in a process of its own, whose CPU seconds and largest memory are counted; its result is a file in DIR,
and what is there is not run again. The first table has one model and batch on 256 to 96,000 GPUs; the second an uneven
load on a cluster with NVLink and on one without: the plan, beside that of plain Megatron, which `smartmoe plan`
searches for as well (each with the sizes that suit it best). A plan that is plain Megatron's is marked so. All step
times are predictions of the cost model; only the planner's own CPU time and memory are measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, when the script is run by its path

from megatron_smartmoe.cost.moe_layer import exchange_bytes_s
from megatron_smartmoe.spec.cluster import load_cluster_spec

ROOT = Path(__file__).resolve().parents[1]
NVLINK, COMMODITY = "h100-sxm", "a100-pcie-80gb"
GROWTH = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 96000)
GROWTH_BATCH = 61_440  # samples; every data-parallel size of these worlds divides it
BAGUALU = "configs/scale/bagualu-14.5t.yaml"
# Model -> GPUs and samples of a step.
PAYS = {
    "mixtral-8x22b": ((8, 256), (64, 256), (512, 2048)),
    "qwen3-235b-a22b": ((128, 4096), (1024, 4096), (8192, 16384)),
    "deepseek-v3": ((512, 15360), (2048, 15360), (16384, 15360)),
    BAGUALU: ((96000, 96000),),
}
SKEW = "uneven"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One plan."""

    model: str
    cluster: str
    gpus: int
    batch: int
    skew: str = ""

    @property
    def name(self) -> str:
        """Of the file that its result is in."""
        return f"{Path(self.model).stem}_{self.cluster}_{self.gpus}_{self.batch}_{self.skew or 'assumed'}"

    def command(self, path: Path) -> list[str]:
        """`smartmoe plan`, its JSON written to `path`."""
        given = ["--model", self.model, "--cluster", self.cluster, "--gpus", str(self.gpus)]
        given += ["--global-batch-size", str(self.batch), "--json", str(path)]
        given += ["--skew", self.skew] if self.skew else []
        code = "import sys; from megatron_smartmoe.cli.main import main; sys.exit(main(sys.argv[1:]))"
        return [sys.executable, "-c", code, "plan", *given]


def questions() -> Iterator[tuple[str, Question]]:
    """Every plan with the table that it is for."""
    for gpus in GROWTH:
        yield "growth", Question(model="deepseek-v3", cluster=NVLINK, gpus=gpus, batch=GROWTH_BATCH)
    for model, sizes in PAYS.items():
        for gpus, batch in sizes:
            for cluster in (NVLINK, COMMODITY):
                yield "pays", Question(model=model, cluster=cluster, gpus=gpus, batch=batch, skew=SKEW)


def answer(question: Question, out: Path) -> dict[str, Any]:
    """The plan, from its file or made now; with CPU seconds and bytes of the process that made it."""
    path, plan = out / f"{question.name}.json", out / "plan.json"
    if not path.exists():
        plan.unlink(missing_ok=True)
        process = subprocess.Popen(question.command(plan), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        assert process.stderr is not None
        said = process.stderr.read().decode()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        content: dict[str, Any] = {"question": asdict(question), "cpu_s": used.ru_utime + used.ru_stime}
        content |= {"memory_bytes": used.ru_maxrss * 1024, "refused": said.strip() if process.returncode else ""}
        if not process.returncode:
            found = json.loads(plan.read_text())
            content |= {"best": found["best"][0], "plain": found.get("plain")}
            content |= {"shapes": found["shapes"], "priced": found["priced"]}
        path.write_text(json.dumps(content, indent=1) + "\n")
    return dict(json.loads(path.read_text()))


def growth_table(answers: list[dict[str, Any]]) -> list[str]:
    """The planner's cost by the number of GPUs."""
    lines = ["| GPUs | launch | predicted step | tokens/s a GPU | shapes | priced | planned in (CPU) | peak memory |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for each in answers:
        best = each["best"]
        cells = [f"{each['question']['gpus']:,}", _launch(best), f"{best['expected_s']:.2f} s"]
        cells += [f"{best['tokens_per_s_per_gpu']:,.0f}", f"{each['shapes']:,}", f"{each['priced']:,}"]
        cells += [f"{each['cpu_s']:.1f} s", f"{each['memory_bytes'] / 1e6:.0f} MB"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def pays_table(answers: list[dict[str, Any]]) -> list[str]:
    """The best launch beside plain Megatron's, and what it spends its time on."""
    lines = [
        "| model | GPUs | cluster | plain Megatron | planned | faster by | expert GEMMs | all-to-all inside, between "
        "| sent |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in answers:
        question = each["question"]
        cells = [Path(question["model"]).stem, f"{question['gpus']:,}", question["cluster"]]
        if each["refused"]:
            lines.append("| " + " | ".join([*cells, "does not fit", "does not fit", "", "", "", ""]) + " |")
            continue
        plain, best = each["plain"], each["best"]
        step_s, time_s = best["expected_s"], best["time_s"]
        inside_s, between_s = (time_s.get(f"all-to-all {where} nodes", 0.0) for where in ("inside", "between"))
        gemm_s = time_s["experts: GEMM of the busiest rank's tokens"]
        cells += ["does not fit" if plain is None else f"{plain['launch']}: {plain['expected_s']:.2f} s"]
        cells += [f"{_launch(best)}: {step_s:.2f} s", "" if plain is None else f"{_gain(each):.1%}"]
        cells += [f"{gemm_s / step_s:.0%}", f"{inside_s / step_s:.0%}, {between_s / step_s:.0%}"]
        cells += [f"{_sent_bytes(inside_s, between_s, question['cluster']) / 1e9:,.0f} GB"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _launch(best: dict[str, Any]) -> str:
    """A launch, marked where it is one of plain Megatron."""
    return str(best["launch"]) + ("" if best["flags"]["smartmoe"] else " plain")


def _gain(answer: dict[str, Any]) -> float:
    """By how much the planned step is faster than plain Megatron's."""
    return float(answer["plain"]["expected_s"] / answer["best"]["expected_s"] - 1)


def _sent_bytes(inside_s: float, between_s: float, cluster: str) -> float:
    """Bytes over the busiest GPU's ports in these seconds of a step's all-to-alls, at the shares that the model has."""
    spec = load_cluster_spec(Path(cluster))
    inside, between = (exchange_bytes_s(spec, between_nodes=crosses) for crosses in (False, True))
    return inside_s * inside + between_s * between


def draw(growth: list[dict[str, Any]], pays: list[dict[str, Any]], path: Path) -> None:
    """Time and memory of the planner by GPUs; what is gained over plain Megatron, on both clusters."""
    from matplotlib.ticker import NullLocator

    from megatron_smartmoe.report import plot_style

    with plot_style.styled():
        figure, (cost, gain) = plot_style.plt.subplots(1, 2, figsize=(9, 3.4), layout=plot_style.columns())
        gpus = [each["question"]["gpus"] for each in growth]
        memory = [each["memory_bytes"] / 1e7 for each in growth]
        cost.plot(gpus, [each["cpu_s"] for each in growth], "o-", color=plot_style.OURS, label="CPU seconds")
        cost.plot(gpus, memory, "s--", color=plot_style.BLUE, label="peak memory, 10 MB")
        cost.set(xscale="log", xlabel="GPUs", ylim=(0, None), title="One plan of DeepSeek-V3 on one core, measured")
        cost.set_xticks([256, 1024, 4096, 16384, 96000], ["256", "1,024", "4,096", "16,384", "96,000"])
        cost.xaxis.set_minor_locator(NullLocator())
        cost.legend()
        found: dict[str, dict[str, float]] = {}
        for each in pays:
            if not each["refused"] and each["plain"] is not None:
                question = each["question"]
                label = f"{Path(question['model']).stem}, {question['gpus']:,}"
                found.setdefault(label, {})[question["cluster"]] = 100 * _gain(each)
        for place, (cluster, colour) in enumerate(((NVLINK, plot_style.BLUE), (COMMODITY, plot_style.OURS))):
            rows = [at + 0.4 * place for at in range(len(found))]
            gain.barh(rows, [gains.get(cluster, 0.0) for gains in found.values()], 0.4, color=colour, label=cluster)
        gain.set_yticks([at + 0.2 for at in range(len(found))], list(found))
        gain.invert_yaxis()
        gain.set(xlabel="faster by, %", title=f"Step against plain Megatron, {SKEW} load, predicted")
        gain.legend()
        plot_style.save(figure, path)


def main() -> None:
    """Make the plans, print the tables, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results; those that are there are kept")
    parser.add_argument(
        "--plot", type=Path, default=ROOT / "docs" / "scale.svg", help="picture (default: docs/scale.svg)"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {"growth": [], "pays": []}
    for table, question in questions():
        found[table].append(answer(question, options.out))
        print(
            question.name,
            f"{found[table][-1]['cpu_s']:.1f} s",
            found[table][-1]["refused"],
            file=sys.stderr,
            flush=True,
        )
    print("\n".join([*growth_table(found["growth"]), "", *pays_table(found["pays"])]))
    draw(found["growth"], found["pays"], options.plot)


if __name__ == "__main__":
    main()
