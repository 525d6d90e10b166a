"""Tracking: the journal of a run (`journal.py`), and its mirror in MLflow (`mlflow.py`)."""
