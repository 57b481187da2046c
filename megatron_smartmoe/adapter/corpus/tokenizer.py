"""The sentencepiece tokenizer that is trained here.

Trained here it is BPE with byte fallback, identity normalisation and no whitespace rules, so that source code comes
back as it went in: `decode(encode(text)) == text` for any text without U+2581 (sentencepiece writes spaces as that
character, so that it comes back as a space). Newline and tab are pieces of their own. BPE rather than unigram because
its training counts integers: unigram's EM adds floats, whose sum depends on the number of threads.

Ids: 0 `<unk>`, 1 `<s>`, 2 `</s>`, 3 `<pad>`. Megatron's SentencePieceTokenizer takes `</s>` (`eos_id`) as its `eod`.
The padding id has to be one that text never has, because Megatron's GPTDataset takes it out of the loss.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence

from sentencepiece import SentencePieceTrainer

from megatron_smartmoe.adapter.corpus.documents import read_documents
from megatron_smartmoe.adapter.corpus.records import RecordReader
from megatron_smartmoe.adapter.corpus.sources import SpanGroup
from megatron_smartmoe.errors import ConfigError

# sentencepiece drops training lines longer than 4192 bytes; a character has at most 4.
MAX_LINE_CHARACTERS = 1024


def train(lines: Iterator[str], vocab_size: int) -> bytes:
    """Train on lines (without their ends) and return the model file's bytes, the same for the same lines.

    Raises:
        ConfigError: the lines cannot fill the vocabulary, or it cannot hold their characters.
    """
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            num_threads=1,  # It is written into the model file.
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from error
    return model.getvalue()


def sample_lines(groups: Sequence[tuple[SpanGroup, int]], reader: RecordReader, seed: int, limit: int) -> list[str]:
    """The lines that the tokenizer is trained on: of all groups when they fit, else of groups picked by `seed`.

    Args:
        groups: groups of spans, each with the number of its documents that belong to the corpus.
        reader: reads documents out of JSON records.
        seed: picks the groups.
        limit: bytes to return at most, about.
    """
    order = sorted(range(len(groups)), key=lambda index: hashlib.sha256(f"{seed}:{index}".encode()).digest())
    lines: list[str] = []
    room = limit
    for index in order:
        group, num_documents = groups[index]
        for document, _ in zip(read_documents(group, reader), range(num_documents), strict=False):
            if room <= 0:
                return lines
            part = document.text[:room]
            room -= len(part.encode())
            for line in part.split("\n"):
                starts = range(0, len(line), MAX_LINE_CHARACTERS)
                lines.extend(line[start : start + MAX_LINE_CHARACTERS] for start in starts)
    return lines


def _training_error(message: str, vocab_size: int) -> ConfigError:
    """What the user can do about an error of sentencepiece, whose message names its own C++ lines."""
    if found := re.search(r"too high .* value <= (\d+)", message):
        rule, way_out = f"this corpus fills at most {found[1]} entries", f"Give {found[1]} or less, or more text."
    elif found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        rule = f"256 byte entries, the special ones and this corpus' characters need {found[1]}"
        way_out = f"Give {found[1]} or more."
    else:
        rule = f"sentencepiece cannot train on this corpus ({message[:200]})"
        way_out = "Give another size, for example 4096, or more text."
    return ConfigError("--vocab-size", vocab_size, rule, way_out)
