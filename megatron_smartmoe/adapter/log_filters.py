"""What Megatron and torch say at every start that tells a user nothing new, with the reason for each.

A log is read by people: a warning that always appears hides the one that matters. Nothing is dropped that depends on
what the run does; everything else Megatron says stays, and `--logging-level 20` brings back its INFO lines.
"""

from __future__ import annotations

import logging
import os
import warnings

# start of the warning's text -> why it tells nothing
_WARNINGS = {
    "Transformer Engine and Apex are not installed": "the defaults of this machine say so, and replace both",
    "Apex is not installed": "as above",
    "Only transformer-engine>=1.7.0 supports MoE experts": "as above",
    "MimoModelConfig is experimental": "a model that GPT pretraining does not use",
    "Could not determine rank from torch.distributed": "the launcher has no rank; it checks flags",
    "'pin_memory' argument is set as true but no accelerator": "there is no GPU, which the first lines say",
}
# logger -> part of the message -> why it tells nothing
_LOG_LINES = {
    "megatron.core.rerun_state_machine": ("RerunStateMachine", "said at every evaluation, on every rank"),
    "megatron.core.models.gpt.gpt_model": ("GPTModel IS DEPRECATED", "the release is pinned"),
    "megatron.core.dist_checkpointing.strategies.torch": ("async save is deprecated", "the release is pinned"),
    "megatron.core.datasets.gpt_dataset": ("because path_to_cache is None", "mock data has nothing to cache"),
    "torch.utils.cpp_extension": ("No CUDA runtime is found", "there is no GPU, which the first lines say"),
}


def install() -> None:
    """Filter the messages above on rank 0, and all warnings on other ranks: one voice is enough."""
    if int(os.environ.get("RANK", "0")) != 0:
        warnings.filterwarnings("ignore")
    for start in _WARNINGS:
        warnings.filterwarnings("ignore", message=start.replace("(", r"\("))
    for logger, (part, _) in _LOG_LINES.items():
        logging.getLogger(logger).addFilter(lambda record, part=part: part not in record.getMessage())


def lower_voice(logging_level: int | None) -> None:
    """Apply --logging-level at once: importing Megatron sets INFO, and its own handling comes after the first lines."""
    if logging_level is not None:
        logging.getLogger().setLevel(logging_level)
