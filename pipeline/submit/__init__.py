"""Orders of a training, written for what runs a cluster."""
