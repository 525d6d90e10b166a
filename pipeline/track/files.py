"""Names of the artifacts of a run in MLflow, for whoever reads a store."""

from __future__ import annotations

from pipeline.core.run_folder import RunFolder

_RUN = RunFolder("")
JOURNAL = _RUN.journal.name
KNOWN = tuple(file.name for file in (*_RUN.early_artifacts, _RUN.journal, *_RUN.late_artifacts))
"""every artifact of a run"""
