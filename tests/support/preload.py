"""Imported once by the fork server behind `run_ranks`: what every rank imports, and nothing that starts a thread.

Of the CPU time of a rank that trains a tiny model for eight iterations, more than half went into importing torch's
compiler, registering custom operators with it and parsing Megatron's sources for help texts. So all of that is done
here, for every module of the project, a later one too.
"""

import gc
import importlib
import os
import pkgutil

from megatron_smartmoe.adapter.pretrain import choose_device

if os.environ.get("SMARTMOE_TEST_RANKS") != "cuda":  # see `ranks.on_the_gpu`
    choose_device("cpu")

import megatron.training.training  # noqa: F401
import torch
import torch._dynamo.side_effects
import torch._functorch.aot_autograd
import torch._inductor.standalone_compile
from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_smartmoe import adapter, runtime
from megatron_smartmoe.adapter.flags.parser import build_parser

torch.set_num_threads(1)
for package in (runtime, adapter):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith(".__main__"):
            importlib.import_module(module.name)

# Megatron parses the sources of its configuration classes for help texts: four times in a run, half a second each.
_docstrings: dict[type, dict[str, str]] = {}
_read_docstrings = ArgumentGroupFactory._get_field_docstrings


def _remembered(factory: ArgumentGroupFactory, config_class: type) -> dict[str, str]:
    if config_class not in _docstrings:
        _docstrings[config_class] = _read_docstrings(factory, config_class)
    return _docstrings[config_class]


ArgumentGroupFactory._get_field_docstrings = _remembered
build_parser()
gc.collect()
gc.freeze()  # a rank's garbage collector need not walk, and by that copy, what it shares with all others
