"""The settings of the SmartMoE paper's figures with this project's planner and placement."""
