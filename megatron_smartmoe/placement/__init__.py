"""Where experts go, as training runs it: history, homes, replicas, split, policy, migration plans. Pure numpy."""
