"""What a run cost: memory, time, energy."""
