"""What every rank of a test needs, imported once, by the process that forks them
(tests/helpers/processes.py).
"""

import pipeline.train.worker  # noqa: F401
from pipeline.train.backend.deepspeed import import_deepspeed

import_deepspeed()
