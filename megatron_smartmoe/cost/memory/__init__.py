"""What a launch holds in a rank's memory: Megatron's own buffers to the byte, activations under a load distribution."""
