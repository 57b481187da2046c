"""Filters for messages that Megatron and torch print at every start, with the reason for each.

A warning that always appears hides the one that matters. No message that depends on what the run does is filtered;
`--logging-level 20` brings back Megatron's INFO lines.
"""

from __future__ import annotations

import logging
import os
import warnings
from functools import partial

# start of the warning's text -> why it is filtered
_WARNINGS = {
    "Transformer Engine and Apex are not installed": "torch modules replace both, as the first lines say",
    "Apex is not installed": "as above",
    "Only transformer-engine>=1.7.0 supports MoE experts": "as above",
    "MimoModelConfig is experimental": "GPT pretraining does not use this model",
    "Could not determine rank from torch.distributed": "the launcher has no rank: it only checks flags",
    "'pin_memory' argument is set as true but no accelerator": "there is no GPU, which the first lines say",
}
# logger -> (part of the message, why it is filtered)
_LOG_LINES = {
    "megatron.core.rerun_state_machine": ("RerunStateMachine", "printed at every evaluation, on every rank"),
    "megatron.core.models.gpt.gpt_model": ("GPTModel IS DEPRECATED", "the release is pinned"),
    "megatron.core.dist_checkpointing.strategies.torch": ("async save is deprecated", "the release is pinned"),
    "megatron.core.datasets.gpt_dataset": ("because path_to_cache is None", "mock data has nothing to cache"),
    "torch.utils.cpp_extension": ("No CUDA runtime is found", "there is no GPU, which the first lines say"),
}


def install() -> None:
    """Filter the messages above on rank 0, and all warnings on other ranks, where they would be repetitions."""
    if int(os.environ.get("RANK", "0")) != 0:
        warnings.filterwarnings("ignore")
    for start in _WARNINGS:
        warnings.filterwarnings("ignore", message=start.replace("(", r"\("))
    for logger, (part, _) in _LOG_LINES.items():
        logging.getLogger(logger).addFilter(partial(_lacks, part))


def _lacks(part: str, record: logging.LogRecord) -> bool:
    return part not in record.getMessage()


def set_log_level(logging_level: int | None) -> None:
    """Apply --logging-level at once: importing Megatron sets INFO, and Megatron applies the flag only after its first
    lines.

    Args:
        logging_level: the flag's value; None changes nothing.
    """
    if logging_level is not None:
        logging.getLogger().setLevel(logging_level)
