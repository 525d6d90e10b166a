"""Tracking: the journal a run writes (`jsonl`), and its mirror in MLflow (`mlflow`)."""
