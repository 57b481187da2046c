"""What things cost: one model of a MoE layer's time for planner, trainer and simulator. Pure numpy."""
