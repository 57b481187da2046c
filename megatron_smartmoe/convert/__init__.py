"""Models in and out: Hugging Face folders and Megatron's checkpoints, a slice of a tensor at a time.

`python -m megatron_smartmoe.convert` is the command; `smartmoe convert` starts it. The way of a conversion:

    source.recognise   what SOURCE is: a Hugging Face folder, a checkpoint of Megatron's, a run directory
    families           what a config.json says: Megatron's flags, and which rows of which tensors make a parameter
    plan               the files to write, and the slices that each of them holds
    output             they are written by several workers into a folder beside OUT, which becomes OUT at the end

A packing is a list of rows: everything that Megatron arranges differently (queries, keys and values by group, gate and
linear part of an expert in one tensor) are rows of the same length in another order. So both directions follow from
one table, a slice of any tensor can be read alone, and what went in comes out bit for bit.
"""
