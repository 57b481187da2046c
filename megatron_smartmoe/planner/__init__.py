"""Which launch: the offline phase. Parallel sizes, memory and time under a load distribution. Pure numpy."""
