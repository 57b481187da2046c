"""Imported once by the fork server behind `run_ranks`: what every rank imports, and nothing that starts a thread."""

from megatron_smartmoe.adapter.pretrain import choose_device

choose_device("cpu")

import megatron.training.training  # noqa: E402, F401
import torch  # noqa: E402

import megatron_smartmoe.adapter.batch  # noqa: E402
import megatron_smartmoe.adapter.datasets  # noqa: E402
import megatron_smartmoe.adapter.moe.layer_spec  # noqa: E402
import megatron_smartmoe.adapter.records.metrics  # noqa: E402, F401

torch.set_num_threads(1)
