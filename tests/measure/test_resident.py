"""Saved bytes against what the kernel counts: resident memory grows with T as they do, under BPTT
and not under SLTT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

GROWTH = """
import json
import torch
from pipeline.measure.memory import peak_rss_bytes
from pipeline.measure.tensor_bytes import SavedBytes
from pipeline.models.mlp import mlp
from pipeline.rules.bptt import BPTT
from pipeline.rules.sltt import SLTT
from tests.helpers.rule_networks import cross_entropy, learn

FEW, MANY = 2, 10  # time steps; each tensor of the hidden layer, 512 samples by 4096, takes 8 MB
model, target_B = mlp(in_features=16, hidden=(4096,)), torch.arange(512) % 10

def peaks(rule, steps):
    rule.attach(model)
    with SavedBytes(model) as saved:
        learn(rule.loss_terms(model, torch.rand(steps, 512, 16), cross_entropy(target_B), step=0))
    rule.release()
    return saved.peak, peak_rss_bytes()

peaks(SLTT(), FEW)  # what is loaded and allocated once
# The rule with the smaller peak comes first, as the peak of a process never falls. BPTT goes step
# by step: a forward over all steps at once needs more beside what it saves.
rules = SLTT(), BPTT(chunk=1)
found = {rule.label: [peaks(rule, steps) for steps in (FEW, MANY)] for rule in rules}
print(json.dumps({rule: [many - few for few, many in zip(*each)] for rule, each in found.items()}))
"""


def test_resident_memory_grows_with_time_steps_as_saved_bytes_do() -> None:
    at_once = {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 20)
    }  # glibc gives back what was freed, rather than keep it for the next
    words = [sys.executable, "-c", GROWTH]
    ran = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env={**os.environ, **at_once},
    )
    grown = json.loads(ran.stdout)
    (of_sltt, resident_of_sltt), (of_bptt, resident_of_bptt) = grown["SLTT"], grown["BPTT-chunk-1"]
    assert of_sltt == 0 and of_bptt > 1e8
    assert resident_of_bptt == pytest.approx(of_bptt, rel=0.1)
    assert resident_of_sltt < 0.1 * of_bptt
