"""From text to a dataset that Megatron can train on: `prepare(CorpusSpec(...)) -> PreparedCorpus`.

The files, in the order of the data's way: `spec` (what is asked for, what came out), `sources` (which bytes of which
files), `documents` (bytes to documents, bad lines), `scan` (the first pass), `tokenizer` (sentencepiece), `indexed`
(tokens to `.bin/.idx`), `output` (whole or not at all), `workers` (order kept whatever the number of processes),
`prepare` (the story).
"""

from megatron_smartmoe.adapter.corpus.prepare import prepare
from megatron_smartmoe.adapter.corpus.spec import CorpusSpec, PreparedCorpus

__all__ = ["CorpusSpec", "PreparedCorpus", "prepare"]
