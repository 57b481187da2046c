"""What `smartmoe convert --for te` writes, loaded by real TransformerEngine modules on the CPU.

Models of Megatron's TransformerEngine spec are built. Both forms that convert writes are loaded into them, strictly:
every name of the modules, and no other. That these names have the right numbers is what tests compare with the source.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_smartmoe.convert.command import convert
from megatron_smartmoe.convert.families import table_of
from megatron_smartmoe.convert.families.table import ModelTable
from megatron_smartmoe.convert.flags import as_flags
from megatron_smartmoe.convert.hf_config import HFConfig
from megatron_smartmoe.convert.options import TARGETS, ConvertOptions
from scripts.te_package import check

_SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256,
    "max_position_embeddings": 128, "intermediate_size": 96, "rms_norm_eps": 1e-6, "rope_theta": 10000,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_LATENT = {
    "num_key_value_heads": 8, "first_k_dense_replace": 1, "n_shared_experts": 2, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 48, "q_lora_rank": 32, "kv_lora_rank": 24,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 80},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16},
    "deepseek_v3": _LATENT,
    "llama": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
}
_RUN = (
    "--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-5 --seq-length 64 --vocab-size 255 --bf16 "
    "--tokenizer-type NullTokenizer --transformer-impl transformer_engine --no-gradient-accumulation-fusion "
    "--no-rope-fusion --no-masked-softmax-fusion --attention-backend unfused"
).split()
_COMMON = ("args", "checkpoint_version", "iteration")  # what is in a state beside the model


def main() -> int:
    """Print a line for each family and form; ends with torch's error where one does not load."""
    check.RANKS = 1
    check.prepare()
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # Megatron's checks ask
    os.environ |= {"WORLD_SIZE": "1", "RANK": "0"}
    for family, values in FAMILIES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            lines = []
            with contextlib.redirect_stdout(io.StringIO()):
                table = _source(folder / "hf", {"model_type": family, **_SIZES, **values})
                model = _model(table)
                loaded = []
                for target, state in _states(model, folder):
                    model.load_state_dict(state, strict=True)
                    loaded.append({key: weight.detach().clone() for key, weight in model.named_parameters()})
                    lines.append(f"{family}, --to {target} --for te: all {len(state)} names of the modules are loaded")
            one, other = loaded
            same = all(torch.equal(one[key], other[key]) and one[key].any() for key in one)
            print(*lines, f"{family}: both forms give the same numbers in all {len(one)} parameters: {same}", sep="\n")
    return 0


def _source(folder: Path, content: dict[str, Any]) -> ModelTable:
    """A Hugging Face model of random numbers."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content))
    table = table_of(HFConfig.of(folder))
    torch.manual_seed(1)
    save_file(
        {name: torch.randn(shape).bfloat16() for name, shape in table.shapes.items()}, folder / "model.safetensors"
    )
    return table


def _model(table: ModelTable) -> Any:
    from megatron.core.models.gpt import GPTModel
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.models.gpt import default_layer_spec

    grouped = ["--moe-grouped-gemm"] if table.num_experts else []
    sys.argv = ["converted", *as_flags(table.flags), *_RUN, *grouped]
    args = parse_args()
    validate_args(args)
    args.padded_vocab_size = table.vocab_size
    config = gpt_config_from_args(args)
    return GPTModel(
        config=config.transformer,
        transformer_layer_spec=default_layer_spec(config, None),
        vocab_size=table.vocab_size,
        max_sequence_length=128,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    )


def _states(model: Any, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The model's state in each of the two forms, read as Megatron reads it."""
    from megatron.core import dist_checkpointing, parallel_state

    for target in TARGETS[1:]:
        for parameter in model.parameters():  # reading a torch_dist checkpoint writes into them
            parameter.data.zero_()
        convert(ConvertOptions(source=folder / "hf", out=folder / target, target=target, spec="te"))
        release = folder / target / "release"
        if target == "torch":
            yield target, torch.load(release / "mp_rank_00" / "model_optim_rng.pt")["model"]
            continue
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        wanted = model.sharded_state_dict(metadata={"singleton_local_shards": False, "dp_cp_group": group})
        found = dist_checkpointing.load(wanted, str(release))
        yield target, {name: value for name, value in found.items() if name not in _COMMON}


if __name__ == "__main__":
    sys.exit(main())
