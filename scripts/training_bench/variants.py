"""What is compared: flags of each variant, and the model that all of them train."""

from __future__ import annotations

from dataclasses import dataclass

WITHOUT_BALANCING = ("--smartmoe", "--smartmoe-homes", "off")
SPARE = (*WITHOUT_BALANCING, "--smartmoe-spare-slots", "1", "--smartmoe-replicas-margin", "0")
HOMES_INTERVAL = 3  # steps: the first move falls among those that do not count
SHADOWS = 16  # slots of a rank for FasterMoE's shadows, which takes memory for them as it comes
VARIANTS = {
    "ideal": WITHOUT_BALANCING,  # with a trace that is rewritten to even load
    "stock": (),
    "off": WITHOUT_BALANCING,
    "exact": (*SPARE, "--smartmoe-replicas", "exact"),
    "history": (*SPARE, "--smartmoe-replicas", "history"),
    "auto": (*SPARE, "--smartmoe-replicas", "auto"),
    "ultraep": (*SPARE, "--smartmoe-replicas", "exact"),
    "fastermoe": (
        *WITHOUT_BALANCING,
        *("--smartmoe-spare-slots", str(SHADOWS), "--smartmoe-replicas-margin", "0", "--smartmoe-replicas", "exact"),
    ),
    "smartmoe2023": (
        *("--smartmoe", "--smartmoe-homes", "on", "--smartmoe-homes-interval", str(HOMES_INTERVAL)),
        *("--smartmoe-homes-margin", "1", "--smartmoe-homes-horizon", "1000000"),  # whatever a move costs
    ),
}


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
