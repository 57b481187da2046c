"""A Hugging Face config.json: values of the types that they must have, and no key that is overlooked.

Whoever reads a key says so by reading it. Keys that were not read, and that are not known to leave the model as it is,
are refused by name: a converted model that computes something else is worse than none.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_smartmoe.errors import ConfigError
from megatron_smartmoe.spec.readers.files import Named
from megatron_smartmoe.spec.readers.json_text import read_object

CONFIG_FILE = "config.json"
IGNORE_KEY = "--ignore-config-key"

# Keys that say nothing about what the model computes: bookkeeping, generation, caches, and what only training uses.
_WITHOUT_EFFECT = frozenset(
    "architectures auto_map model_type torch_dtype dtype transformers_version _name_or_path name_or_path "
    "use_cache pad_token_id bos_token_id eos_token_id unk_token_id sep_token_id decoder_start_token_id "
    "initializer_range attention_dropout hidden_dropout embd_pdrop resid_pdrop output_router_logits "
    "router_aux_loss_coef router_jitter_noise aux_loss_alpha seq_aux pretraining_tp ep_size moe_layer_freq "
    "num_key_value_heads head_dim output_attentions output_hidden_states return_dict is_encoder_decoder id2label "
    "label2id problem_type chunk_size_feed_forward max_window_layers sliding_window use_mla quantization_config "
    "_attn_implementation _attn_implementation_internal attn_implementation task_specific_params tokenizer_class "
    "layer_types is_decoder _experts_implementation".split()
)

_MOST_LAYERS = 10_000


class HFConfig:
    """The content of a config.json."""

    def __init__(self, content: dict[str, Any], path: Path) -> None:
        self.content, self.path = content, path
        self._read: set[str] = set()

    @classmethod
    def of(cls, folder: Path) -> HFConfig:
        """Read the one of a folder.

        Raises:
            ConfigError: it cannot be read, or is no JSON object.
        """
        path = folder / CONFIG_FILE
        named = Named(path=path, field="SOURCE", way_out="Pass the folder of a Hugging Face model.")
        return cls(read_object(named), path)

    @property
    def model_type(self) -> str:
        """The family's name, as transformers has it."""
        found = self.get("model_type", None)
        return found if isinstance(found, str) else ""

    def get(self, key: str, default: Any) -> Any:
        """A value as it is; the default where it is missing or null."""
        self._read.add(key)
        value = self.content.get(key)
        return default if value is None else value

    @property
    def num_layers(self) -> int:
        """Layers of the model.

        Raises:
            ConfigError: they are missing, or more than any model has.
        """
        count = self.size("num_hidden_layers")
        if count > _MOST_LAYERS:
            raise self.refused("num_hidden_layers", f"must be at most {_MOST_LAYERS:,}")
        return count

    def size(self, *keys: str, default: int | None = None) -> int:
        """A whole number, at least 1, under the first of these names that is there.

        Raises:
            ConfigError: it is missing, or something else.
        """
        value: object = None
        for key in keys:
            found = self.get(key, None)
            value = found if value is None else value
        if value is None and default is not None:
            return default
        if type(value) is not int or value < 1:
            raise self.refused(keys[0], "must be a whole number, at least 1")
        return value

    def count(self, key: str, default: int) -> int:
        """A whole number, at least 0.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(key, default)
        if type(value) is not int or value < 0:
            raise self.refused(key, "must be a whole number, at least 0")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number.

        Raises:
            ConfigError: it is missing, or something else.
        """
        value = self.get(key, default)
        if type(value) not in (int, float) or not value > 0:
            raise self.refused(key, "must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            ConfigError: it is something else.
        """
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.refused(key, "must be true or false")
        return value

    def require(self, key: str, wanted: object, default: object, why: str) -> None:
        """Refuse any other value of a key.

        Raises:
            ConfigError: it has one.
        """
        value = self.get(key, default)
        if value != wanted:
            raise self.refused(key, f"is not supported: {why}")

    def refused(self, key: str, rule: str, way_out: str = "This model cannot be converted as it is.") -> ConfigError:
        """The error for the value of a key."""
        return ConfigError(f"{self.path}, {key}", self.content.get(key), rule, way_out)

    def check_all_read(self, allowed: Collection[str] = ()) -> None:
        """Refuse keys that nobody has read and that may change the model.

        Args:
            allowed: further keys to leave out, which the user vouches for.

        Raises:
            ConfigError: there is one.
        """
        for key in self.content:
            if key not in self._read and key not in _WITHOUT_EFFECT and key not in allowed:
                rule = f"is not known here for a model of type {self.model_type!r}, and may change what it computes"
                raise self.refused(key, rule, f"If it does not, pass {IGNORE_KEY} {key}.")
