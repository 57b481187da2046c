"""Where experts go: history, replicas, homes, split, policy, and the simulator that replays them. Pure numpy."""
