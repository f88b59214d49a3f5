"""Unsupervised domain adaptation for segmentation, measured so that it can be trusted.

The functions in `__all__` are the Python interface, see docs/python.md. They are imported when they
are first used, so that `import glua_bench` stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "load_results", "predict", "run", "score"]

if TYPE_CHECKING:
    from glua_bench.cli.api import compare, load_results, predict, run, score
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from glua_bench.cli import api

        return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
