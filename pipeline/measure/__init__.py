"""What training costs: memory, time, operations, spikes and energy."""
