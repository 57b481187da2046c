"""What things are: plain descriptions, read from files and checked where they are defined. No torch, no Megatron."""
