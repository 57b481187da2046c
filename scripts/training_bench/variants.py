"""What is compared: flags of each variant, and a peer's rule in this project's executor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_smartmoe.placement.layer_plan import LayerPlan, LayerProblem, tokens_by_rank
from megatron_smartmoe.placement.split import assign_sources
from megatron_smartmoe.simulate.baselines.ultraep import UltraEp

WITHOUT_BALANCING = ("--smartmoe", "--smartmoe-homes", "off")
SPARE = (*WITHOUT_BALANCING, "--smartmoe-spare-slots", "1", "--smartmoe-replicas-margin", "0")
VARIANTS = {
    "ideal": WITHOUT_BALANCING,  # with a trace that is rewritten to even load
    "stock": (),
    "off": WITHOUT_BALANCING,
    "exact": (*SPARE, "--smartmoe-replicas", "exact"),
    "history": (*SPARE, "--smartmoe-replicas", "history"),
    "auto": (*SPARE, "--smartmoe-replicas", "auto"),
    "ultraep": (*SPARE, "--smartmoe-replicas", "exact"),
}
ULTRAEP = UltraEp(min_tokens_per_replica=1)  # its 1,024 are for larger batches: here it would make no replica


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model that is trained.

    Attributes:
        layers: transformer layers, each with experts.
        hidden: H.
        ffn: inner size of an expert.
        tokens: of a rank in a micro-batch, the sequence length.
        experts: E.
        top_k: experts of a token.
        micro_batches: of a step.
    """

    layers: int
    hidden: int
    ffn: int
    tokens: int
    experts: int
    top_k: int
    micro_batches: int

    def flags(self, ranks: int, steps: int) -> list[str]:
        """Flags of the model and its training that all variants share."""
        return (
            f"--num-layers {self.layers} --hidden-size {self.hidden} --num-attention-heads 4 "
            f"--ffn-hidden-size {self.ffn} --seq-length {self.tokens} --max-position-embeddings {self.tokens} "
            "--position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear "
            "--untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 "
            f"--moe-ffn-hidden-size {self.ffn} --moe-router-load-balancing-type none --moe-router-dtype fp32 "
            f"--num-experts {self.experts} --moe-router-topk {self.top_k} --expert-model-parallel-size {ranks} "
            f"--micro-batch-size 1 --global-batch-size {ranks * self.micro_batches} --train-iters {steps} "
            "--lr 1e-4 --lr-decay-style constant --eval-iters 0 --eval-interval 100000 --log-interval 1 "
            "--logging-level 40 --rerun-mode disabled --mock-data --tokenizer-type NullTokenizer --vocab-size 1023 "
            "--num-workers 0 --smartmoe-rehearsal off"
        ).split()


class RuleInExecutor:
    """Has the executor place replicas and split tokens by UltraEP's rule, in place of our exact plan."""

    def __init__(self) -> None:
        self.plans = 0
        self._latest: LayerPlan | None = None

    def install(self) -> None:
        """Replace the two functions that the executor plans with, in the plan that is made step by step."""
        from megatron_smartmoe.runtime.replicas import dispatch_plan

        for name, own in (("exact_slots", self.exact_slots), ("split_tokens", self.split_tokens)):
            if not hasattr(dispatch_plan, name):
                raise SystemExit(
                    f"{dispatch_plan.__name__} no longer calls {name}: a peer's rule cannot be put into it"
                )
            setattr(dispatch_plan, name, own)
        planner = dispatch_plan.DispatchPlanner
        planner.plan = lambda at, *planned: dispatch_plan.plan_in_steps(at.view, *planned)  # type: ignore[method-assign]

    def exact_slots(self, counts_RE: Any, slots_RS: Any, home_slots: int, **prices: Any) -> Any:
        """Slots by the rule, as wide as the executor's."""
        num_slots = slots_RS.shape[1]
        problem = LayerProblem(counts_RE=counts_RE, slots_RS=slots_RS, spare_slots=num_slots - home_slots)
        plan = ULTRAEP.plan(problem)
        assert (plan.slots_RS[:, :home_slots] == slots_RS[:, :home_slots]).all(), "the rule moves homes"
        self._latest, self.plans = plan, self.plans + 1
        missing = num_slots - plan.slots_RS.shape[1]
        return np.pad(plan.slots_RS, ((0, 0), (0, missing)), constant_values=-1)

    def split_tokens(self, counts_RE: Any, slots_RS: Any, home_slots: int, num_nodes: int = 1) -> Any:
        """Tokens by the rule's quotas."""
        assert self._latest is not None, "the executor splits before it plans"
        tokens_ER = whole(tokens_by_rank(self._latest, counts_RE), counts_RE.sum(axis=0))
        return assign_sources(counts_RE, slots_RS, tokens_ER, num_nodes)


def whole(tokens_ER: Any, load_E: Any) -> Any:
    """Whole tokens with the same sum for every expert, the largest remainders rounded up."""
    whole_ER = np.floor(tokens_ER + 1e-9).astype(np.int64)
    for expert, missing in enumerate(load_E - whole_ER.sum(axis=1)):
        whole_ER[expert, np.argsort(whole_ER[expert] - tokens_ER[expert], kind="stable")[:missing]] += 1
    return whole_ER
