"""The rehearsal: what every rank will build is built once, without ranks, before any rank starts.

Checks by hand name the mistakes that somebody thought of. All others used to end as a traceback on every rank, some of
them in the middle of training. So a child process goes through what a rank goes through: Megatron's configuration,
tokenizer, learning-rate and batch-size schedules, process groups (torch's fake ones), datasets, and for each pipeline
stage that differs from the others the model on tensors without memory, with one micro-batch forward and backward. What
any of it raises becomes one line: the user's flag and where it was set, its value, what Megatron or torch said, and a
file with the details.

What it cannot show: memory (predicted, by the planner's model), speed, and what other ranks do. TransformerEngine's
modules need a GPU; in their place the rehearsal builds Megatron's own of the same sizes.

`rehearse.py` is the door, `steps.py` the story.
"""
