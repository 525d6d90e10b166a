"""What a run cost: memory and time."""
