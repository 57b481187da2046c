"""The one place that reads files which somebody else may have written or damaged.

`files` opens them, `json_text`, `csv_rows`, `numpy_files` and `torch_files` read what is in them (`spec.yaml_io` reads
YAML with the same means), `values` checks the types of what was read. What they promise, whatever the bytes are: the
content, or a ConfigError that names the file and, where there are lines, the line; no more memory than a small multiple
of the file's size, whatever sizes its headers declare; and no program that the file carries is run.
"""
