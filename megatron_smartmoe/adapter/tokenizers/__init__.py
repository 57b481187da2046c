"""Tokenizers, as data preparation uses them and as Megatron builds them: which file is which, ids, special tokens."""
