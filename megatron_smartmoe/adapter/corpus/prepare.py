"""The whole story: `prepare(spec)` turns text into a dataset that Megatron can train on.

Two passes over the inputs. The first reads every line before anything is written, so that a bad line in the last file
does not cost an hour; it also fixes which documents belong to the corpus. The second tokenizes and writes.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from megatron_smartmoe.adapter.corpus import tokenizer
from megatron_smartmoe.adapter.corpus.documents import Scan, scan_documents
from megatron_smartmoe.adapter.corpus.indexed import EncodedGroup, Encoder, Totals, entropy_nats, write_indexed
from megatron_smartmoe.adapter.corpus.output import (
    OutputPaths,
    commit,
    exclusive,
    exit_on_sigterm,
    partial,
    partial_files,
    refuse_overwrite,
)
from megatron_smartmoe.adapter.corpus.sources import Span, find_spans
from megatron_smartmoe.adapter.corpus.spec import CorpusSpec, PreparedCorpus
from megatron_smartmoe.adapter.corpus.workers import ordered_map
from megatron_smartmoe.errors import ConfigError

logger = logging.getLogger(__name__)

# Megatron's default --split gives 3% of the documents to validation.
FEW_DOCUMENTS = 34


def prepare(spec: CorpusSpec) -> PreparedCorpus:
    """Make the dataset that `spec` asks for.

    Safe to call from several processes at once with the same prefix: one works, the others wait and return its result.

    Raises:
        ConfigError: something about the request or the inputs is wrong; nothing was written.
        OSError: the disk is full or fails; nothing is left behind.
    """
    spec.check()
    paths = OutputPaths.of(spec.output_prefix)
    spans = find_spans(spec.inputs, python_stdlib=spec.python_stdlib, seed=spec.seed)
    refuse_input_as_output(spans, paths)
    given = None
    if spec.tokenizer_model is not None:
        given = tokenizer.load(spec.tokenizer_model.read_bytes(), str(spec.tokenizer_model))
    with exit_on_sigterm(), exclusive(paths) as waited:
        if waited and PreparedCorpus.exists(spec.output_prefix):  # another process has just made it
            corpus = PreparedCorpus.load(spec.output_prefix)
            if corpus.request == spec.request():
                return corpus
        refuse_overwrite(paths, writes_tokenizer=given is None, force=spec.force)
        with partial_files(paths):
            scan = scan_documents(spec, spans)
            processor = train_tokenizer(spec, scan, paths) if given is None else given
            with closing(encode_documents(spec, scan, processor)) as encoded:
                totals = write_indexed(encoded, partial(paths.bin), partial(paths.idx), processor.get_piece_size())
            refuse_changed_input(scan, totals)
            corpus = describe(spec, scan, processor, spec.tokenizer_model or paths.tokenizer, totals)
            partial(paths.meta).write_text(corpus.to_json(), encoding="utf-8")
            commit(paths)
    warn_of_few_documents(corpus)
    return corpus


def refuse_input_as_output(spans: list[Span], paths: OutputPaths) -> None:
    """Raise ConfigError when an output would replace an input, such as `--input a.json --output-prefix a`."""
    outputs = {name.resolve() for path in paths.targets() for name in (path, partial(path))} | {paths.lock.resolve()}
    for path in {span.path for span in spans}:
        if Path(path).resolve() in outputs:
            raise ConfigError(
                "--output-prefix", path, "an input would be overwritten", "Give another prefix, or another input."
            )


def train_tokenizer(spec: CorpusSpec, scan: Scan, paths: OutputPaths) -> SentencePieceProcessor:
    """Train a tokenizer on the corpus and write it under its partial name."""
    assert spec.vocab_size is not None
    lines = tokenizer.sample_lines(scan.groups, spec.json_keys, spec.seed, spec.tokenizer_sample_bytes)
    model = tokenizer.train(iter(lines), spec.vocab_size)
    partial(paths.tokenizer).write_bytes(model)
    return tokenizer.load(model, str(paths.tokenizer))


def encode_documents(
    spec: CorpusSpec, scan: Scan, processor: SentencePieceProcessor
) -> Generator[EncodedGroup, None, None]:
    """Second pass: tokenize the corpus, group by group, in order. Closing it ends the workers."""
    encoder = Encoder(
        processor=processor,
        eod_id=processor.eos_id() if spec.append_eod else None,
        json_keys=spec.json_keys,
        newline_splits=spec.tokenizer_model is None,
    )
    bar = tqdm(total=scan.text_bytes, desc="tokenizing", unit="B", unit_scale=True, disable=spec.quiet or None)
    with bar, closing(ordered_map(encoder, scan.groups, workers=spec.workers)) as encoded:
        for group in encoded:
            bar.update(group.text_bytes)
            yield group


def refuse_changed_input(scan: Scan, totals: Totals) -> None:
    """Raise ConfigError when the second pass has not read the same as the first."""
    if (scan.num_documents, scan.text_bytes) != (totals.num_documents, totals.text_bytes):
        raise ConfigError(
            "--input",
            f"{totals.num_documents} documents",
            f"were {scan.num_documents} in the first pass: an input is being written to",
            "Start again when the inputs are complete.",
        )


def warn_of_few_documents(corpus: PreparedCorpus) -> None:
    """Warn when validation may get no document: a file of any size is one, and Megatron splits between documents."""
    if corpus.num_documents < FEW_DOCUMENTS:
        logger.warning(
            "%s holds %d documents, and Megatron's --split cuts between documents: validation may get none. "
            "Give more and smaller files, or JSON lines, or --split 100,0,0.",
            corpus.prefix,
            corpus.num_documents,
        )


def describe(
    spec: CorpusSpec, scan: Scan, processor: SentencePieceProcessor, model_path: Path, totals: Totals
) -> PreparedCorpus:
    """The facts that go into the metadata and to the caller."""
    return PreparedCorpus(
        prefix=spec.output_prefix,
        tokenizer_model=model_path,
        vocab_size=processor.get_piece_size(),
        eod_id=processor.eos_id(),
        append_eod=spec.append_eod,
        num_documents=totals.num_documents,
        num_tokens=int(totals.token_counts.sum()),
        text_bytes=totals.text_bytes,
        unigram_entropy_nats=entropy_nats(totals.token_counts),
        num_empty_documents=scan.num_empty,
        num_bad_lines=scan.num_bad_lines,
        bad_lines=tuple(str(bad) for bad in scan.bad_lines),
        input_sha256=totals.sha256,
        request=spec.request(),
        command=spec.command,
    )
