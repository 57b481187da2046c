"""Faults of released Megatrons that silently change what is trained: recognised by behaviour, repaired at start-up."""
