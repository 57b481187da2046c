"""Gates of the literature on Megatron's router: `table` lists them, each has its definition in a file of its own."""
