"""Expert migration in Megatron: which tensors of model and optimizer belong to an expert, and moving them."""
