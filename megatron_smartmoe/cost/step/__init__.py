"""Time of a training step, in terms that add up: dense layers, MoE layers, links, pipeline, data parallelism."""
