"""Guards of a run: against bad batches, replicas that differ, hangs, and storage that is away."""
