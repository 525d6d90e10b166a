"""What every test process must have about it before numba, DeepSpeed, Ray or MLflow is imported."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("NUMBA_NUM_THREADS", "4")  # FFCV refuses more loader threads than this, also on a machine with fewer cores
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")  # Ray 2.60 polls its workers every 2 s by default
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever tests under nohup hands on, to all that tests start, that it is ignored
