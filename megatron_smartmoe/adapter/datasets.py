"""The datasets: Megatron's own GPT datasets from Megatron's own flags, on the ranks that read them."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.training import get_args, get_tokenizer, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import read_object

# Fields of Megatron's dataset config that are flags of another name.
_RENAMED = {
    "random_seed": "seed",
    "sequence_length": "seq_length",
    "path_to_cache": "data_cache_path",
    "create_attention_mask": "create_attention_mask_in_dataloader",
    "fast_cache_load": "dataloader_fast_cache_load",
    "defer_npy_index_mmap": "dataloader_defer_npy_index_mmap",
}
_SAME_NAME = (
    "split multiple_validation_sets full_validation num_dataset_builder_threads mmap_bin_files reset_position_ids "
    "reset_attention_mask eod_mask_loss object_storage_cache_path mid_level_dataset_surplus allow_ambiguous_pad_tokens "
    "context_parallel_size data_parallel_size"
).split()
_FIM = "fim_rate fim_spm_rate fim_split_sample fim_fragment_rate fim_no_prefix".split()


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Megatron's dataset configuration from its flags."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = args.per_dataset_sequences_path
    values: dict[str, Any] = {name: getattr(args, name) for name in _SAME_NAME}
    values |= {name: getattr(args, flag) for name, flag in _RENAMED.items()}
    values |= {
        "tokenizer": get_tokenizer(),
        "blend": blend,
        "blend_per_split": blend_per_split,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        "sequences_per_dataset": _sequences(sequences) if sequences else None,
    }
    if not args.fim_data:
        return GPTDatasetConfig(**values)
    values |= {name: getattr(args, name) for name in _FIM}
    values["fim_extra_tokens"] = {
        name: getattr(args, f"fim_{name}_token") for name in ("prefix", "middle", "suffix", "pad", "eod")
    }
    return GPTFIMDatasetConfig(**values)


def _sequences(path: str) -> dict[str, Any]:
    """The content of --per-dataset-sequences-path: sequences by dataset."""
    return read_object(Named(path=Path(path), field="--per-dataset-sequences-path", way_out="Give a JSON object."))


def _leave_out_unused(config: GPTDatasetConfig, num_samples: list[int]) -> None:
    """Leave out the splits of a blend of which no sample is asked: a blend of no samples is an assertion in Megatron.

    A single dataset is built as it is: the name of its index on disk depends on the splits.
    """
    if config.split_matrix is not None and config.blend is not None and len(config.blend[0]) > 1:
        pairs = zip(config.split_matrix, num_samples, strict=True)
        config.split_matrix = [None if asked == 0 else part for part, asked in pairs]


def _is_built_on_this_rank(vp_stage: int | None) -> bool:
    """Only tensor-parallel rank 0 reads, and only stages that need tokens or labels."""
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    if is_first_or_last_pipeline_stage(vp_stage):
        return True
    config = core_transformer_config_from_args(get_args())
    return bool(mtp_on_this_rank(config.pipeline_model_parallel_layout, config.mtp_num_layers, False, vp_stage))


def train_valid_test_datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> Any:
    """Build the three datasets; Megatron calls this on every rank.

    Args:
        num_samples: sequences needed for training, validation and test.
        vp_stage: virtual pipeline stage, or None.

    Returns:
        (train, valid, test), each None on ranks that do not read it.
    """
    args = get_args()
    kind = MockGPTDataset if args.mock_data else GPTFIMDataset if args.fim_data else GPTDataset
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    config = dataset_config(args)
    _leave_out_unused(config, num_samples)
    builder = BlendedMegatronDatasetBuilder(kind, num_samples, partial(_is_built_on_this_rank, vp_stage), config)
    return builder.build()


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron: call on all ranks
