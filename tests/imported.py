"""What every rank of a test needs, imported once, by the process that forks them
(tests/processes.py).
"""

from __future__ import annotations

import pipeline.worker  # noqa: F401
from pipeline.backend.deepspeed import import_deepspeed

import_deepspeed()
