"""A copy on the CPU of a state that goes on changing: what training waits for while a checkpoint is made."""

from __future__ import annotations

import copy
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor


def copied(value: Any) -> Any:
    """`value` with every tensor and everything else that can change copied; a tensor that is in it twice is copied once."""
    return _copied(value, {})


def _copied(value: Any, seen: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in seen:  # which lives for as long as the whole that is copied
            seen[id(value)] = value.detach().to("cpu", copy=True)
        return seen[id(value)]
    if isinstance(value, MutableMapping):
        made = copy.copy(value)  # with its attributes: a module's state_dict carries versions
        for key, inside in value.items():
            made[key] = _copied(inside, seen)
        return made
    if type(value) in (list, tuple):
        return type(value)(_copied(inside, seen) for inside in value)
    if isinstance(value, (str, bytes, int, float, bool, type(None), torch.Size, torch.dtype)):
        return value
    return copy.deepcopy(value)
