"""The `smartmoe` command: tools around training that run anywhere, without torch and without Megatron."""
