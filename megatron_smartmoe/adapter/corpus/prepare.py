"""The whole story: `prepare(spec)` turns text into a dataset that Megatron can train on.

Two passes over the inputs. The first reads every line before anything is written, so that a bad line in the last file
does not cost an hour; it also fixes which documents belong to the corpus. The second tokenizes and writes.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

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
from megatron_smartmoe.adapter.corpus.records import RecordReader
from megatron_smartmoe.adapter.corpus.sources import InputFile, find_inputs, find_spans, stdlib_spans
from megatron_smartmoe.adapter.corpus.spec import DEFAULT_TIKTOKEN_SPECIALS, CorpusSpec, PreparedCorpus
from megatron_smartmoe.adapter.tokenizers.base import HUGGING_FACE, SENTENCEPIECE, TIKTOKEN, TextTokenizer
from megatron_smartmoe.adapter.tokenizers.chat import ChatTemplate, ChatTemplateError
from megatron_smartmoe.adapter.tokenizers.huggingface import HuggingFaceTextTokenizer
from megatron_smartmoe.adapter.tokenizers.load import TokenizerOptions, load_tokenizer
from megatron_smartmoe.adapter.tokenizers.sentencepiece import load_sentencepiece
from megatron_smartmoe.adapter.tokenizers.tiktoken import TikTokenOptions
from megatron_smartmoe.errors import ConfigError, one_line
from megatron_smartmoe.workers import ordered_map

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
    files = find_inputs(spec.inputs)
    refuse_input_as_output(files, paths)
    options = tokenizer_options(spec)
    given = load_tokenizer(spec.tokenizer_model, options) if spec.tokenizer_model is not None else None
    if given is None:
        options.refuse_unused(SENTENCEPIECE)
    reader = RecordReader(json_keys=spec.json_keys, chat=chat_template(spec, given))
    with exit_on_sigterm(), exclusive(paths) as waited:
        if waited and PreparedCorpus.exists(spec.output_prefix):  # another process has just made it
            corpus = PreparedCorpus.load(spec.output_prefix)
            if corpus.request == spec.request():
                return corpus
        refuse_overwrite(paths, writes_tokenizer=given is None, force=spec.force)
        with partial_files(paths):
            spans = find_spans(files, paths.unpacked, spec.json_keys)
            spans += stdlib_spans(spec.seed) if spec.python_stdlib else []
            scan = scan_documents(spec, spans, reader)
            text_tokenizer = train_tokenizer(spec, scan, reader, paths) if given is None else given
            with closing(encode_documents(spec, scan, reader, text_tokenizer)) as encoded:
                size = text_tokenizer.facts.vocab_size
                totals = write_indexed(encoded, partial(paths.bin), partial(paths.idx), size)
            refuse_changed_input(scan, totals)
            corpus = describe(spec, scan, text_tokenizer, totals, paths)
            partial(paths.meta).write_text(corpus.to_json(), encoding="utf-8")
            commit(paths)
            num_padding = 0 if corpus.pad_id is None else int(totals.token_counts[corpus.pad_id])
    warn_of_few_documents(corpus)
    warn_of_special_tokens(corpus, num_padding)
    return corpus


def refuse_input_as_output(files: list[InputFile], paths: OutputPaths) -> None:
    """Raise ConfigError when an output would replace an input, such as `--input a.json --output-prefix a`."""
    outputs = {name.resolve() for path in paths.targets() for name in (path, partial(path))} | {paths.lock.resolve()}
    for file in files:
        if file.path.resolve() in outputs:
            raise ConfigError(
                "--output-prefix",
                str(file.path),
                "an input would be overwritten",
                "Give another prefix, or another input.",
            )


def tokenizer_options(spec: CorpusSpec) -> TokenizerOptions:
    """The flags of a given tokenizer."""
    return TokenizerOptions(
        kind=spec.tokenizer_type,
        special_tokens=spec.special_tokens or (),
        include_special_tokens=spec.include_special_tokens,
        tiktoken=TikTokenOptions(
            vocab_size=spec.vocab_size,
            num_special=spec.tiktoken_num_special_tokens,
            special=spec.special_tokens,
            pattern=spec.tiktoken_pattern,
        ),
    )


def chat_template(spec: CorpusSpec, given: TextTokenizer | None) -> ChatTemplate | None:
    """The template that is given, else the tokenizer's own, else none.

    Raises:
        ConfigError: what is given is no template and no file of one.
    """
    own = given.chat if isinstance(given, HuggingFaceTextTokenizer) else None
    if spec.chat_template is None:
        return own
    source = spec.chat_template
    if not ("{{" in source or "{%" in source):
        path = Path(source)
        if not path.is_file():
            raise ConfigError(
                "--chat-template", source, "is no file, and no Jinja template", "Give the file of the template."
            )
        source = path.read_text(encoding="utf-8")
    template = ChatTemplate(source=source, tokens=special_texts(given))
    try:
        template.check()
    except ChatTemplateError as error:
        rule = f"is not a Jinja template ({one_line(error)})"
        raise ConfigError("--chat-template", spec.chat_template, rule, "Correct it.") from error
    return template


def special_texts(given: TextTokenizer | None) -> tuple[tuple[str, str], ...]:
    """The special tokens that a template may name."""
    if given is None:
        return ()
    if isinstance(given, HuggingFaceTextTokenizer):
        return tuple(sorted(given.special.items()))
    facts = given.facts
    named = {"bos_token": facts.bos, "eos_token": facts.eod, "pad_token": facts.pad}
    return tuple((name, token.text) for name, token in named.items() if token is not None)


def train_tokenizer(spec: CorpusSpec, scan: Scan, reader: RecordReader, paths: OutputPaths) -> TextTokenizer:
    """Train a tokenizer on the corpus and write it under its partial name."""
    assert spec.vocab_size is not None
    lines = tokenizer.sample_lines(scan.groups, reader, spec.seed, spec.tokenizer_sample_bytes)
    model = tokenizer.train(iter(lines), spec.vocab_size)
    partial(paths.tokenizer).write_bytes(model)
    return load_sentencepiece(model, paths.tokenizer)


def encode_documents(
    spec: CorpusSpec, scan: Scan, reader: RecordReader, text_tokenizer: TextTokenizer
) -> Generator[EncodedGroup, None, None]:
    """Second pass: tokenize the corpus, group by group, in order. Closing it ends the workers."""
    encoder = Encoder(
        tokenizer=text_tokenizer,
        eod_id=eod_of(text_tokenizer),
        append_eod=spec.append_eod,
        reader=reader,
        newline_splits=spec.tokenizer_model is None,
    )
    bar = tqdm(total=scan.text_bytes, desc="tokenizing", unit="B", unit_scale=True, disable=spec.quiet or None)
    with bar, closing(ordered_map(encoder, scan.groups, workers=spec.workers)) as encoded:
        for group in encoded:
            bar.update(group.text_bytes)
            yield group


def eod_of(text_tokenizer: TextTokenizer) -> int:
    """The id that ends documents; a tokenizer without one is refused when it is loaded."""
    eod = text_tokenizer.facts.eod
    assert eod is not None
    return eod.id


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


def warn_of_special_tokens(corpus: PreparedCorpus, num_padding: int) -> None:
    """Warn when texts spell tokens that mean something to Megatron."""
    if corpus.num_inner_eod:
        logger.warning(
            "the end-of-document token %d is %d times inside a document, because its text spells it: Megatron takes "
            "each for an end",
            corpus.eod_id,
            corpus.num_inner_eod,
        )
    if num_padding and corpus.pad_id != corpus.eod_id:
        logger.warning(
            "the padding token %d is %d times in the data, because a text spells it: Megatron leaves these out of the "
            "loss",
            corpus.pad_id,
            num_padding,
        )


def describe(
    spec: CorpusSpec, scan: Scan, text_tokenizer: TextTokenizer, totals: Totals, paths: OutputPaths
) -> PreparedCorpus:
    """The facts that go into the metadata and to the caller."""
    facts = text_tokenizer.facts
    assert facts.path is not None
    return PreparedCorpus(
        prefix=spec.output_prefix,
        tokenizer_model=facts.path,
        tokenizer_type=facts.kind,
        tokenizer_flags=tokenizer_flags(spec, facts.kind),
        vocab_size=facts.vocab_size,
        eod_id=eod_of(text_tokenizer),
        bos_id=None if facts.bos is None else facts.bos.id,
        pad_id=None if facts.pad is None else facts.pad.id,
        append_eod=spec.append_eod,
        num_documents=totals.num_documents,
        num_tokens=int(totals.token_counts.sum()),
        text_bytes=totals.text_bytes,
        unigram_entropy_nats=entropy_nats(totals.token_counts),
        num_empty_documents=scan.num_empty,
        num_bad_lines=scan.bad_lines.count,
        bad_lines=tuple(str(bad) for bad in scan.bad_lines.first),
        num_inner_eod=totals.num_inner_eod,
        max_token_id=int(totals.token_counts.nonzero()[0].max()),
        bin_bytes=partial(paths.bin).stat().st_size,
        idx_bytes=partial(paths.idx).stat().st_size,
        input_sha256=totals.sha256,
        request=spec.request(),
        command=spec.command,
    )


def tokenizer_flags(spec: CorpusSpec, kind: str) -> tuple[str, ...]:
    """Megatron's flags, beside type and model, that make its tokenizer the one that was used here."""
    flags: list[str] = []
    if spec.special_tokens is not None and kind in (HUGGING_FACE, TIKTOKEN):
        flags += ["--tokenizer-special-tokens", *spec.special_tokens]
    if kind == HUGGING_FACE and not spec.include_special_tokens:
        flags += ["--tokenizer-hf-no-include-special-tokens"]
    if kind == TIKTOKEN:
        flags += [] if spec.vocab_size is None else ["--vocab-size", str(spec.vocab_size)]
        flags += [] if spec.tiktoken_pattern is None else ["--tiktoken-pattern", spec.tiktoken_pattern]
        if spec.tiktoken_num_special_tokens != DEFAULT_TIKTOKEN_SPECIALS:
            flags += ["--tiktoken-num-special-tokens", str(spec.tiktoken_num_special_tokens)]
    return tuple(flags)
