"""Which of Megatron's options the parts of this project go with: docs/compatibility.md, from the checks."""
