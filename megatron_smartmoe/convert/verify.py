"""`--verify`: what transformers computes with one end of a conversion, and Megatron with the other, in float32.

Logits are compared relative to the largest logit, on random tokens and, where there is a tokenizer, on a text. If they
differ by more than float32 explains, the outputs of the layers tell the first layer that is wrong. The choices of the
routers are compared in any case: a wrong order of softmax and top-k leaves the choices equal and the logits not.
Megatron runs in processes of its own, as many as the launch asks for.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_smartmoe.checkpoint.directory import RELEASE, iteration_of
from megatron_smartmoe.convert.carried import padded_vocab
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.flags import as_flags
from megatron_smartmoe.convert.launches import Launch
from megatron_smartmoe.convert.layout import Spec
from megatron_smartmoe.errors import CheckpointError, ConfigError

TOLERANCE = 1e-5  # of the largest logit; float32 sums in another order give 1e-6
_LENGTH = 48  # tokens of a sequence
_TEXT = (
    "A mixture of experts sends every token to a few of its experts, which a router chooses. The experts of a layer "
    "are spread over the ranks, so the tokens travel to them and back, and the slowest rank decides how long it takes."
)
# Started, not imported: only the adapter imports Megatron.
_PROBE = "megatron_smartmoe.adapter.probe"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a model computes.

    Attributes:
        logits: `[sequences, tokens, vocabulary]`.
        layers: outputs of the layers, `[sequences, tokens, hidden]`, by the layer's number.
        routers: chosen experts, bool `[sequences x tokens, experts]`, by the layer's number.
    """

    logits: torch.Tensor
    layers: Mapping[int, torch.Tensor]
    routers: Mapping[int, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How two ends of a conversion compare.

    Attributes:
        launch: Megatron's ranks.
        difference: the largest of the logits, relative to the largest logit.
        routed: assignments of tokens to experts that were compared.
        differing: of these, those that differ.
        first_layer: the first layer whose output differs by more than the tolerance, where the logits do; None if none.
        layer_difference: of that layer, relative to its largest output.
    """

    launch: str
    difference: float
    routed: int
    differing: int
    first_layer: int | None = None
    layer_difference: float = 0.0

    @property
    def is_equal(self) -> bool:
        """Whether the ends compute the same, up to float32."""
        return self.difference <= TOLERANCE

    def line(self) -> str:
        """The result, for a line."""
        text = f"verify, {self.launch}: logits differ by {self.difference:.2e} of the largest (at most {TOLERANCE:g})"
        if self.routed:
            text += f"; {self.differing:,} of {self.routed:,} choices of the routers differ"
        if self.is_equal:
            return text
        if self.first_layer is None:
            return f"{text}; no layer differs: look at the last layer, its norm and the output layer"
        return f"{text}; first layer that differs: {self.first_layer} (by {self.layer_difference:.2e})"


def verify(model: Path, checkpoint: Path, table: ModelTable, launches: Sequence[Launch]) -> list[Verdict]:
    """Compare the model of a Hugging Face folder with that of a checkpoint, at each launch.

    Raises:
        CheckpointError: Megatron could not load the checkpoint; the message ends with what it said.
    """
    tokens = _tokens(model, table.vocab_size)
    wanted = of_transformers(model, tokens, table.num_layers)
    return [compare(launch.name, wanted, of_megatron(checkpoint, table, tokens, launch)) for launch in launches]


def compare(launch: str, wanted: Outputs, found: Outputs) -> Verdict:
    """Compare what two models compute."""
    routed = differing = 0
    for number, chosen in wanted.routers.items():
        if number in found.routers:
            both = chosen & found.routers[number]
            routed += int(chosen.sum())
            differing += int(chosen.sum() - both.sum())
    difference = relative(found.logits[..., : wanted.logits.shape[-1]], wanted.logits)
    first, of_layer = None, 0.0
    if not difference <= TOLERANCE:
        for number in sorted(set(wanted.layers) & set(found.layers)):
            of_layer = relative(found.layers[number], wanted.layers[number])
            if not of_layer <= TOLERANCE:
                first = number
                break
    return Verdict(
        launch=launch,
        difference=difference,
        routed=routed,
        differing=differing,
        first_layer=first,
        layer_difference=of_layer,
    )


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def _tokens(model: Path, vocab_size: int) -> torch.Tensor:
    """Two random sequences, and a text where the folder has a tokenizer."""
    generator = torch.Generator().manual_seed(1)
    random = torch.randint(0, vocab_size, (2, _LENGTH), generator=generator)
    if not any((model / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return random
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(model)(_TEXT)["input_ids"]
    text = torch.tensor([(found * (_LENGTH // len(found) + 1))[:_LENGTH]])
    return torch.cat([random, text])


def check_installed(spec: Spec, flag: str = "--verify") -> None:
    """What a comparison needs is installed.

    Args:
        spec: the layers that the checkpoint is for.
        flag: that asked for it.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("transformers") is None:
        rule = "needs transformers, which is not installed"
        raise ConfigError(flag, True, rule, "Run pip install 'transformers>=5', or leave it out.")
    if spec == "te" and importlib.util.find_spec("transformer_engine") is None:
        rule = "needs TransformerEngine for a checkpoint --for te, and it is not installed"
        raise ConfigError(flag, True, rule, "Leave it out, or convert --for local.")


def of_transformers(model: Path, tokens: torch.Tensor, num_layers: int) -> Outputs:
    """What transformers computes with the model of a folder."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    routers: dict[int, torch.Tensor] = {}

    def recorded(number: int, num_experts: int) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            if isinstance(output, tuple) and len(output) == 3:  # logits, weights, chosen experts
                chosen = torch.zeros(output[2].shape[0], num_experts, dtype=torch.bool)
                routers[number] = chosen.scatter(1, output[2], True)

        return hook

    for number, layer in enumerate(loaded.model.layers):
        gate = getattr(layer.mlp, "gate", None)
        weight = getattr(gate, "weight", None)
        if isinstance(gate, torch.nn.Module) and isinstance(weight, torch.Tensor):
            gate.register_forward_hook(recorded(number, weight.shape[0]))
    with torch.no_grad():
        output = loaded(tokens, output_hidden_states=True)
    layers = {number: output.hidden_states[number + 1] for number in range(num_layers - 1)}  # the last one is normed
    return Outputs(logits=output.logits, layers=layers, routers=routers)


def of_megatron(checkpoint: Path, table: ModelTable, tokens: torch.Tensor, launch: Launch) -> Outputs:
    """What Megatron computes with a checkpoint, on the ranks of a launch.

    Raises:
        CheckpointError: a rank failed; the message ends with what it said.
    """
    argv = [*as_flags(table.flags), "--padded-vocab-size", str(padded_vocab(table.vocab_size))]
    argv += ["--vocab-size", str(table.vocab_size - 1), *_load_flags(checkpoint), *launch.flags]
    with tempfile.TemporaryDirectory(prefix="smartmoe-verify-") as name:
        folder = Path(name)
        request = folder / "request.json"
        request.write_text(json.dumps({"argv": argv, "tokens": tokens.tolist(), "out": name}))
        _run_ranks(request, launch, checkpoint)
        parts = [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]
    layers = {number: torch.cat(found) for part in parts for number, found in part["layers"].items()}
    routers = {number: torch.cat(found) for part in parts for number, found in part["routers"].items()}
    logits = next(part["logits"] for part in parts if "logits" in part)
    return Outputs(logits=logits, layers=layers, routers=routers)


def _load_flags(checkpoint: Path) -> list[str]:
    """Flags that load a directory of checkpoints, or the folder of one iteration."""
    iteration = iteration_of(checkpoint)
    if iteration is not None:
        return ["--load", str(checkpoint.parent), "--ckpt-step", str(iteration)]
    return ["--load", str(checkpoint.parent if checkpoint.name == RELEASE else checkpoint)]


def _run_ranks(request: Path, launch: Launch, checkpoint: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {
        "WORLD_SIZE": launch.num_ranks,
        "LOCAL_WORLD_SIZE": launch.num_ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", 1),
    }
    ranks = []
    for rank in range(launch.num_ranks):
        environment = {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        with (request.parent / f"rank{rank}.log").open("wb") as log:
            command = [sys.executable, "-m", _PROBE, str(request)]
            ranks.append(
                subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=subprocess.STDOUT)
            )
    statuses = [rank.wait() for rank in ranks]
    failed = next((rank for rank, status in enumerate(statuses) if status), None)
    if failed is not None:
        lines = (request.parent / f"rank{failed}.log").read_text(errors="replace").strip().splitlines()
        said = lines[-1] if lines else f"exit status {statuses[failed]}"
        raise CheckpointError(str(checkpoint), f"could not be run by Megatron on {launch.name}", said)
