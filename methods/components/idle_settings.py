"""Settings that other settings disable; a component of methods that name them in `check`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glua_bench.method import Adjustment


def idle_settings(config: Any, disabled: Mapping[str, str]) -> dict[str, Adjustment]:
    """Return the disabled settings that differ from their defaults, for `Method.check`.

    Args:
        config: settings of a method.
        disabled: setting → what disables it.
    """
    default = type(config)()
    return {
        name: Adjustment(getattr(config, name), reason)
        for name, reason in disabled.items()
        if getattr(config, name) != getattr(default, name)
    }
