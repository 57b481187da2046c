"""The whole story: `prepare(spec)` turns text into a dataset that Megatron can train on.

Two passes over the inputs. The first looks at every line before anything is written, so that a bad line in the last
file does not cost an hour; it also fixes which documents belong to the corpus. The second tokenizes and writes.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tqdm import tqdm

from megatron_smartmoe.adapter.corpus import tokenizer
from megatron_smartmoe.adapter.corpus.indexed import EncodedChunk, Encoder, Totals, entropy_nats, write_indexed
from megatron_smartmoe.adapter.corpus.output import (
    OutputPaths,
    commit,
    exclusive,
    exit_on_sigterm,
    partial,
    partial_files,
    refuse_overwrite,
)
from megatron_smartmoe.adapter.corpus.scan import Scan, scan_documents
from megatron_smartmoe.adapter.corpus.sources import Span, find_spans
from megatron_smartmoe.adapter.corpus.spec import CorpusSpec, PreparedCorpus
from megatron_smartmoe.adapter.corpus.workers import default_workers, ordered_map
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
    check(spec)
    paths = OutputPaths.of(spec.output_prefix)
    spans = find_spans(spec.inputs, python_stdlib=spec.python_stdlib, seed=spec.seed)
    refuse_input_as_output(spans, paths)
    given = given_tokenizer(spec)
    with exit_on_sigterm(), exclusive(paths) as waited:
        if waited and (corpus := made_meanwhile(spec)) is not None:
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


def check(spec: CorpusSpec) -> None:
    """Raises ConfigError for what can be seen to be wrong without reading any input."""
    if not spec.inputs and not spec.python_stdlib:
        raise ConfigError("--input", "", "there is no text to prepare", "Give --input FILE... or --python-stdlib.")
    if (spec.tokenizer_model is None) == (spec.vocab_size is None):
        raise ConfigError(
            "--tokenizer-model, --vocab-size",
            "both" if spec.vocab_size is not None else "neither",
            "exactly one of the two says which tokenizer to use",
            "Give --tokenizer-model FILE to use one, or --vocab-size N to train one here.",
        )
    if spec.tokenizer_model is not None and not spec.tokenizer_model.is_file():
        raise ConfigError("--tokenizer-model", str(spec.tokenizer_model), "no such file", "Check the path.")
    for field, value in (
        ("--vocab-size", spec.vocab_size),
        ("--max-bytes", spec.max_bytes),
        ("--tokenizer-sample-bytes", spec.tokenizer_sample_bytes),
        ("--workers", spec.workers),
    ):
        if value is not None and value < 1:
            raise ConfigError(field, value, "has to be at least 1", "Give a positive number, or leave it out.")
    if not spec.json_keys:
        raise ConfigError("--json-keys", "", "at least one key is needed", "Give --json-keys text.")
    if spec.output_prefix.is_dir() or not spec.output_prefix.name:
        raise ConfigError(
            "--output-prefix", str(spec.output_prefix), "is a directory", "Give a name in it, such as data/corpus."
        )


def refuse_input_as_output(spans: list[Span], paths: OutputPaths) -> None:
    """Raises ConfigError when an output would fall on an input, such as `--input a.json --output-prefix a`."""
    outputs = {name.resolve() for path in paths.targets() for name in (path, partial(path))} | {paths.lock.resolve()}
    for path in {span.path for span in spans}:
        if Path(path).resolve() in outputs:
            raise ConfigError(
                "--output-prefix", path, "an input would be overwritten", "Give another prefix, or another input."
            )


def made_meanwhile(spec: CorpusSpec) -> PreparedCorpus | None:
    """The corpus that the process we waited for made, if it was asked for the same."""
    if not PreparedCorpus.exists(spec.output_prefix):
        return None
    corpus = PreparedCorpus.load(spec.output_prefix)
    return corpus if corpus.request == spec.request() else None


def given_tokenizer(spec: CorpusSpec) -> SentencePieceProcessor | None:
    """The tokenizer that the user gave, or None when one is to be trained."""
    if spec.tokenizer_model is None:
        return None
    return tokenizer.load(spec.tokenizer_model.read_bytes(), str(spec.tokenizer_model))


def train_tokenizer(spec: CorpusSpec, scan: Scan, paths: OutputPaths) -> SentencePieceProcessor:
    """Train a tokenizer on the corpus and write it under its partial name."""
    assert spec.vocab_size is not None
    lines = tokenizer.sample_lines(scan.chunks, spec.json_keys, spec.seed, spec.tokenizer_sample_bytes)
    model = tokenizer.train(iter(lines), spec.vocab_size)
    partial(paths.tokenizer).write_bytes(model)
    return tokenizer.load(model, str(paths.tokenizer))


def encode_documents(
    spec: CorpusSpec, scan: Scan, processor: SentencePieceProcessor
) -> Generator[EncodedChunk, None, None]:
    """Second pass: tokenize the corpus, chunk by chunk, in order. Closing it ends the workers."""
    encoder = Encoder(
        processor=processor,
        eod_id=processor.eos_id() if spec.append_eod else None,
        json_keys=spec.json_keys,
        newline_splits=spec.tokenizer_model is None,
    )
    workers = spec.workers or default_workers()
    bar = tqdm(total=scan.text_bytes, desc="tokenizing", unit="B", unit_scale=True, disable=spec.quiet or None)
    with bar, closing(ordered_map(encoder, scan.chunks, workers=workers)) as encoded:
        for chunk in encoded:
            bar.update(chunk.text_bytes)
            yield chunk


def refuse_changed_input(scan: Scan, totals: Totals) -> None:
    """Raises ConfigError when the second pass read something else than the first."""
    if (scan.num_documents, scan.text_bytes) != (totals.num_documents, totals.text_bytes):
        raise ConfigError(
            "--input",
            f"{totals.num_documents} documents",
            f"had {scan.num_documents} a moment ago: an input is being written to",
            "Start again when the inputs are complete.",
        )


def warn_of_few_documents(corpus: PreparedCorpus) -> None:
    """A file of any size is one document, and Megatron splits between documents only."""
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
