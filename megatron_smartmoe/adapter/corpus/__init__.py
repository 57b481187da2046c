"""From text to a dataset that Megatron can train on: `prepare(CorpusSpec(...)) -> PreparedCorpus`.

The files, in the order in which the data passes them: `spec` (the request and the result), `sources` (which bytes of
which files), `documents` (bytes to documents, bad lines, the first pass), `tokenizer` (sentencepiece), `indexed`
(tokens to `.bin/.idx`), `output` (whole or not at all), `workers` (processes, whose number does not change the result),
`prepare` (the whole story), `command` (the command line).
"""

from megatron_smartmoe.adapter.corpus.prepare import prepare
from megatron_smartmoe.adapter.corpus.spec import CorpusSpec, PreparedCorpus

__all__ = ["CorpusSpec", "PreparedCorpus", "prepare"]
