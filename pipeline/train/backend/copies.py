"""Copies of a state that changes: on the CPU for a checkpoint, on its device for a batch that may
be undone.
"""

import copy
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, TypeVar

import torch
from torch import Tensor

T_ = TypeVar("T_")


def copied(value: Any) -> Any:
    """A deep copy of `value` on the CPU. A tensor that occurs twice is copied once."""
    return _copied(value, {})


def cloned(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor copied on its own device. One kernel copies all tensors of a dtype."""
    clones = {name: torch.empty_like(value) for name, value in values.items()}
    for names in alike(values):
        torch._foreach_copy_(
            [clones[name] for name in names], [values[name].detach() for name in names]
        )
    return clones


def alike(values: Mapping[T_, Tensor]) -> Iterable[list[T_]]:
    """The keys of `values`, in one list for each dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[T_]] = {}
    for key, value in values.items():
        groups.setdefault((value.dtype, value.device), []).append(key)
    return groups.values()


def _copied(value: Any, seen: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in seen:  # ids stay unique while `value` lives
            seen[id(value)] = value.detach().to("cpu", copy=True)
        return seen[id(value)]
    if isinstance(value, MutableMapping):
        copied_mapping = copy.copy(value)  # keeps attributes, such as the versions of a state_dict
        for key, inside in value.items():
            copied_mapping[key] = _copied(inside, seen)
        return copied_mapping
    if type(value) in (list, tuple):
        return type(value)(_copied(inside, seen) for inside in value)
    if isinstance(value, (str, bytes, int, float, bool, type(None), torch.Size, torch.dtype)):
        return value
    return copy.deepcopy(value)
