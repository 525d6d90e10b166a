"""What stands between a run and what could spoil it: batches, data, replicas, memory, storage,
machines that are taken away.
"""
