"""Expert migration: tensors of an expert, staging memory, the exchange between ranks, all or nothing."""
