"""What protects a run: against bad batches, replicas that differ, hangs, storage that is away."""
