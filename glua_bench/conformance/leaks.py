"""Search a method's objects for a way to target labels."""

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

# Attributes that torch itself keeps in every module; state in parameters and buffers is saved.
_MODULE_ATTRIBUTES = set(vars(torch.nn.Module()))


def held_elsewhere(method: Method, leave: tuple[type, ...]) -> dict[str, Any]:
    """What a method holds elsewhere than in parameters and buffers, name → comparable value.

    Args:
        method: is searched.
        leave: types of objects to pass over, besides modules.
    """
    held: dict[str, Any] = {}
    for module_name, module in method.named_modules():
        roots = {k: v for k, v in vars(module).items() if k not in _MODULE_ATTRIBUTES}
        for way, value in reachable(roots, (torch.nn.Module, *leave)):
            name = f"{module_name}.{way}".lstrip(".")
            if isinstance(value, Tensor):
                held[name] = hashlib.sha256(
                    value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
                    if value.ndim
                    else str(value.item()).encode()
                ).hexdigest()
            elif isinstance(value, np.ndarray):
                held[name] = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
            elif isinstance(value, (str, bytes, int, float, complex)):
                held[name] = value
    return held


def plane_digest(plane: np.ndarray) -> str:
    """Digest of a slice of labels, (H, W)."""
    return hashlib.sha256(np.ascontiguousarray(plane, np.uint8).tobytes()).hexdigest()


def ways_to_labels(
    roots: Mapping[str, Any], names: set[str], slices: set[str], leave: tuple[type, ...]
) -> Iterator[str]:
    """Ways from objects to label files' names, or to the labels themselves.

    Args:
        roots: name → object to start from.
        names: parts of the label files' names.
        slices: digests of slices of labels.
        leave: types of objects to pass over.
    """
    for way, value in reachable(roots, leave):
        if isinstance(value, Dataset):
            yield f"{way} is the dataset"
        if isinstance(value, bytes):
            value = value.decode(errors="replace")
        if isinstance(value, (str, os.PathLike)):
            text = str(value)
            if any(name in text for name in names):
                yield f"{way} = {text}"
            continue
        if isinstance(value, Tensor):
            value = value.detach().cpu().numpy() if value.dtype != torch.bfloat16 else None
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and value.ndim > 1:
            planes = value.reshape(-1, *value.shape[-2:])
            if any(plane_digest(plane) in slices for plane in planes):
                yield f"{way} holds a target label"


def reachable(
    roots: Mapping[str, Any], leave: tuple[type, ...], limit: int = 50_000
) -> Iterator[tuple[str, Any]]:
    """Everything that attributes, items, bound methods and closures lead to, near things first.

    Modules, classes and a function's globals are left out: through them everything can be
    reached from everywhere.

    Args:
        roots: name → object to start from.
        leave: types of objects to pass over, e.g. of what stands between trainer and method and
            knows the labels.
        limit: number of objects to look at.
    """
    left_out: tuple[type, ...] = (type, types.ModuleType, type(None), *leave)
    waiting = deque(roots.items())
    seen: dict[int, Any] = {}  # keeps the objects alive, so that no id is given out twice
    while waiting and len(seen) < limit:
        way, value = waiting.popleft()
        if id(value) in seen or isinstance(value, left_out):
            continue
        seen[id(value)] = value
        yield way, value
        if isinstance(value, (str, bytes, int, float, complex, np.ndarray, Tensor)):
            continue
        waiting.extend((f"{way}{step}", child) for step, child in _children(value))


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield f"[{key!r}]", item
            yield ".key", key
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        for index, item in enumerate(list(value)):
            yield f"[{index}]", item
    if isinstance(value, functools.partial):
        yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
    if isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    if isinstance(value, types.FunctionType):
        yield from ((".defaults", value.__defaults__), (".defaults", value.__kwdefaults__))
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                yield f".<{name}>", cell.cell_contents
            except ValueError:  # a variable that has no value yet
                continue
    for name, item in list(getattr(value, "__dict__", {}).items()):
        yield f".{name}", item
    for cls in type(value).__mro__:
        slots = vars(cls).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if hasattr(value, name):
                yield f".{name}", getattr(value, name)
