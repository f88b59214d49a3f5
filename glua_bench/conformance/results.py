"""What a check is, what it reports, and the lists of checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glua_bench.errors import PluginError


class CheckFailure(AssertionError):
    """A plugin breaks the rule of a check; the message says how."""


@dataclass(frozen=True)
class CheckResult:
    """What one check found.

    Attributes:
        subject: name of the method or dataset.
        check: name of the check.
        status: "passed", "failed", or "undecided" where a check that it needs failed.
        message: why it failed or is undecided; for a passed one, what did not apply.
        seconds: how long it took.
        error: the exception behind a failure.
    """

    subject: str
    check: str
    status: str
    message: str = ""
    seconds: float = 0.0
    error: BaseException | None = field(default=None, repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether the rule was checked and holds."""
        return self.status == "passed"


@dataclass(frozen=True)
class Check:
    """One rule.

    Attributes:
        name: what results and test ids call it.
        rule: the rule in a sentence.
        needs: checks that must pass before this one can be decided.
        run: raises where the rule is broken; may return a remark.
    """

    name: str
    rule: str
    needs: tuple[str, ...]
    run: Callable[[Any], str | None]


METHOD_CHECKS: dict[str, Check] = {}

DATASET_CHECKS: dict[str, Check] = {}


def register(
    table: dict[str, Check], *needs: str
) -> Callable[[Callable[[Any], str | None]], Callable[[Any], str | None]]:
    """Add a function to a table of checks; its docstring is the rule.

    Args:
        table: `METHOD_CHECKS` or `DATASET_CHECKS`.
        needs: checks that must pass before this one can be decided.
    """

    def add(run: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        name = run.__name__.removeprefix("_dataset_").removeprefix("_")
        table[name] = Check(name, " ".join((run.__doc__ or "").split()), needs, run)
        return run

    return add


def demand(condition: bool, message: str) -> None:
    """Fail the check with a message unless a condition holds."""
    if not condition:
        raise CheckFailure(message)


@contextmanager
def explained(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a plugin raises into a failure of the check."""
    try:
        yield
    except CheckFailure:
        raise
    except Exception as error:  # a plugin may raise anything
        # What the trainer advises after it stopped a run is for users, not for authors.
        why = f"{type(error).__name__}: {error}".partition(", so the run was stopped")[0]
        raise CheckFailure(f"{what}: {why}" + (f" ({advice})" if advice else "")) from error


def select_checks(table: Mapping[str, Check], only: Iterable[str] | None) -> list[str]:
    """Names of checks; all of the table for None.

    Raises:
        PluginError: no check has one of the names.
    """
    wanted = list(table if only is None else only)
    for name in wanted:
        if name not in table:
            raise PluginError(f"There is no check '{name}'; known: {', '.join(table)}.")
    return wanted


class Checklist:
    """The checks of one plugin; each runs once.

    Args:
        table: `METHOD_CHECKS` or `DATASET_CHECKS`.
        subject: name of the method or dataset.
        material: what the checks are given: a `Bench` or the dataset.
    """

    def __init__(self, table: Mapping[str, Check], subject: str, material: Any) -> None:
        self.table, self.subject, self.material = table, subject, material
        self._results: dict[str, CheckResult] = {}

    def result(self, name: str) -> CheckResult:
        """Run a check, and first those that it needs."""
        if name not in self._results:
            began = time.perf_counter()
            status, message, error = self._outcome(self.table[name])
            seconds = time.perf_counter() - began
            self._results[name] = CheckResult(self.subject, name, status, message, seconds, error)
        return self._results[name]

    def run(
        self, only: Iterable[str] | None, report: Callable[[CheckResult], None]
    ) -> list[CheckResult]:
        """Run several checks, and report each result as soon as it is there."""
        results = []
        for name in select_checks(self.table, only):
            results.append(self.result(name))
            report(results[-1])
        return results

    def _outcome(self, check: Check) -> tuple[str, str, Exception | None]:
        unmet = next((need for need in check.needs if not self.result(need).passed), None)
        if unmet is not None:
            why = f"{self.subject}: '{check.name}' cannot be decided, as '{unmet}' did not pass"
            return "undecided", why, None
        try:
            return "passed", check.run(self.material) or "", None
        except CheckFailure as failure:
            return "failed", str(failure), failure
        except Exception as error:  # a plugin may raise anything
            return "failed", f"{type(error).__name__}: {error}", error


def first_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str | None:
    """The first name under which two sets of weights differ in any bit; None where none does."""
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in a or name not in b or not torch.equal(a[name], b[name]):
            return name
    return None


def copy_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that further training leaves alone."""
    return {name: value.detach().clone() for name, value in weights.items()}


def demand_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> None:
    """Fail the check where two sets of weights differ."""
    name = first_difference(a, b)
    demand(name is None, f"{what}: the weights differ, first in '{name}'")


def demand_other(a: Mapping[str, Tensor], b: Mapping[str, Tensor], message: str) -> None:
    """Fail the check where two sets of weights are the same."""
    demand(first_difference(a, b) is not None, message)


def demand_finite(value: Tensor, message: str) -> None:
    """Fail the check where a tensor holds NaN or an infinity."""
    demand(bool(torch.isfinite(value).all()), message)
