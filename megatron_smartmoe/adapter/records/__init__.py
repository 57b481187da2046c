"""What a run records: metrics, routing trace, summary; and the replay of a recorded trace."""
