"""Search the objects that a method can reach for unsaved state and for target labels."""

from __future__ import annotations

import functools
import hashlib
import os
import types
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glua_bench.method import Method
from glua_bench.task import Dataset

# Attributes that torch keeps in every module; state in parameters and buffers is saved.
_MODULE_ATTRIBUTES = set(vars(torch.nn.Module()))


def unsaved_state(method: Method, skip: tuple[type, ...]) -> dict[str, Any]:
    """Return values that a method holds outside parameters and buffers, name → comparable value.

    Modules that save their attributes themselves, by `get_extra_state`, are left out.

    Args:
        method: the method.
        skip: types of objects to skip, besides modules.
    """
    state: dict[str, Any] = {}
    for module_name, module in method.named_modules():
        if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
            continue
        roots = {k: v for k, v in vars(module).items() if k not in _MODULE_ATTRIBUTES}
        for path, value in reachable(roots, (torch.nn.Module, *skip)):
            name = f"{module_name}.{path}".lstrip(".")
            if isinstance(value, Tensor):
                value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            if isinstance(value, np.ndarray):
                state[name] = hashlib.sha256(value.tobytes()).hexdigest()
            elif isinstance(value, (str, bytes, int, float, complex)):
                state[name] = value
    return state


def slice_digest(labels: np.ndarray) -> str:
    """Return a digest of a slice of labels, (H, W)."""
    return hashlib.sha256(labels.astype(np.uint8).tobytes()).hexdigest()


def label_leaks(
    roots: Mapping[str, Any], names: set[str], slices: set[str], skip: tuple[type, ...]
) -> Iterator[str]:
    """Yield access paths from objects to label files' names or to the labels themselves.

    Args:
        roots: name → object to start from.
        names: substrings of the label files' names.
        slices: digests of slices of labels.
        skip: types of objects to skip.
    """
    for path, value in reachable(roots, skip):
        if isinstance(value, Dataset):
            yield f"{path} is the dataset"
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        if isinstance(value, (str, os.PathLike)):
            text = str(value)
            if any(name in text for name in names):
                yield f"{path} = {text}"
            continue
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy() if value.dtype != torch.bfloat16 else None
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim > 1:
            planes = value.reshape(-1, *value.shape[-2:])
            if any(slice_digest(plane) in slices for plane in planes):
                yield f"{path} holds a target label"


def reachable(
    roots: Mapping[str, Any], skip: tuple[type, ...], limit: int = 50_000
) -> Iterator[tuple[str, Any]]:
    """Yield objects reachable by attributes, items, bound methods and closures, nearest first.

    Modules, classes and functions' globals are skipped, because everything can be reached through
    them.

    Args:
        roots: name → object to start from.
        skip: types of objects to skip, such as those between trainer and method that know the
            labels.
        limit: maximum number of objects.

    Yields:
        Access path and object.
    """
    skipped: tuple[type, ...] = (type, types.ModuleType, type(None), *skip)
    waiting = deque(roots.items())
    seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is reused
    while waiting and len(seen) < limit:
        path, value = waiting.popleft()
        if id(value) in seen or isinstance(value, skipped):
            continue
        seen[id(value)] = value
        yield path, value
        if not isinstance(value, (str, bytes, int, float, complex, np.ndarray, Tensor)):
            waiting.extend((f"{path}{step}", child) for step, child in _children(value))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield f"[{key!r}]", item
            yield ".key", key
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        for index, item in enumerate(list(value)):
            yield f"[{index}]", item
    names: list[str] = []
    if isinstance(value, functools.partial):
        names += ["func", "args", "keywords"]
    if isinstance(value, types.MethodType):
        names += ["__self__", "__func__"]
    if isinstance(value, types.FunctionType):
        names += ["__defaults__", "__kwdefaults__"]
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f".<{name}>", cell.cell_contents
            except ValueError:  # the variable has no value yet
                continue
    for name, item in list(getattr(value, "__dict__", {}).items()):
        yield f".{name}", item
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        names += [slots] if isinstance(slots, str) else slots
    for name in names:
        if hasattr(value, name):
            yield f".{name}", getattr(value, name)
