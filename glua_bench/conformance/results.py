"""The registry of checks, their results, and the assertions that they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from glua_bench.errors import PluginError


class CheckFailure(AssertionError):
    """A plugin breaks the rule of a check; the message says how to fix it."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        subject: name of the method or dataset.
        check: name of the check.
        status: "passed", "failed", or "undecided" if a check that it needs did not pass.
        message: why the check failed or is undecided; if it passed, what did not apply.
        error: the exception behind a failure.
    """

    subject: str
    check: str
    status: str
    message: str = ""
    error: BaseException | None = field(default=None, repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether the rule was checked and holds."""
        return self.status == "passed"


CheckFunction = Callable[[Any], str | None]


@dataclass(frozen=True)
class Check:
    """One rule.

    Attributes:
        name: name in results and test ids.
        rule: the rule in one sentence.
        needs: checks that must pass before this one can be decided.
        run: raises if the rule is broken; may return a remark.
    """

    name: str
    rule: str
    needs: tuple[str, ...]
    run: CheckFunction


METHOD_CHECKS: dict[str, Check] = {}
DATASET_CHECKS: dict[str, Check] = {}


def register(table: dict[str, Check], *needs: str) -> Callable[[CheckFunction], CheckFunction]:
    """Add a function to a table of checks; its docstring is the rule.

    Args:
        table: `METHOD_CHECKS` or `DATASET_CHECKS`.
        needs: checks that must pass before this one can be decided.
    """

    def add(run: CheckFunction) -> CheckFunction:
        name = run.__name__.removeprefix("_")
        table[name] = Check(name, run.__doc__ or "", needs, run)
        return run

    return add


def select_checks(table: Mapping[str, Check], only: Iterable[str] | None) -> list[str]:
    """Return the given names of checks; for None, all names of the table.

    Raises:
        PluginError: a name is unknown.
    """
    wanted = list(table if only is None else only)
    for name in wanted:
        if name not in table:
            raise PluginError(f"There is no check '{name}'; choose from {', '.join(table)}.")
    return wanted


class Checklist:
    """The checks of one plugin; each runs once.

    Args:
        table: `METHOD_CHECKS` or `DATASET_CHECKS`.
        subject: name of the method or dataset.
        material: argument of the checks: a `Bench` or the dataset.
    """

    def __init__(self, table: Mapping[str, Check], subject: str, material: Any) -> None:
        self.table, self.subject, self.material = table, subject, material
        self._results: dict[str, CheckResult] = {}

    def result(self, name: str) -> CheckResult:
        """Return the result of a check; run it, and the checks that it needs, if not yet done."""
        if name not in self._results:
            self._results[name] = CheckResult(self.subject, name, *self._outcome(self.table[name]))
        return self._results[name]

    def run(
        self, only: Iterable[str] | None, report: Callable[[CheckResult], None]
    ) -> list[CheckResult]:
        """Run the given checks, or all for None, and report each result at once."""
        results = []
        for name in select_checks(self.table, only):
            results.append(self.result(name))
            report(results[-1])
        return results

    def _outcome(self, check: Check) -> tuple[str, str, Exception | None]:
        for need in check.needs:
            if not self.result(need).passed:
                why = f"{self.subject}: '{check.name}' is undecided because '{need}' did not pass"
                return "undecided", why, None
        try:
            return "passed", check.run(self.material) or "", None
        except CheckFailure as failure:
            return "failed", str(failure), failure
        except Exception as error:  # a plugin may raise anything
            return "failed", f"{type(error).__name__}: {error}", error


def demand(condition: bool, message: str) -> None:
    """Fail the check with a message unless the condition holds."""
    if not condition:
        raise CheckFailure(message)


def demand_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> None:
    """Fail the check if two sets of weights differ."""
    name = first_difference(a, b)
    demand(name is None, f"{what}: the weights differ, first in '{name}'")


def demand_other(a: Mapping[str, Tensor], b: Mapping[str, Tensor], message: str) -> None:
    """Fail the check if two sets of weights are equal."""
    demand(first_difference(a, b) is not None, message)


def demand_finite(value: Tensor, message: str) -> None:
    """Fail the check if a tensor contains NaN or infinity."""
    demand(bool(torch.isfinite(value).all()), message)


@contextmanager
def failing(what: str, advice: str = "") -> Iterator[None]:
    """Turn any exception of a plugin into a failure of the check, with advice in parentheses."""
    try:
        yield
    except CheckFailure:
        raise
    except Exception as error:  # a plugin may raise anything
        # Drop the trainer's advice after a stopped run: it is for users, not for authors.
        why = f"{type(error).__name__}: {error}".partition(", so the run was stopped")[0]
        raise CheckFailure(f"{what}: {why}" + (f" ({advice})" if advice else "")) from error


def first_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> str | None:
    """Return the first name whose tensors differ in any bit or are missing on one side, or None."""
    for name in {**a, **b}:
        if name not in a or name not in b or not torch.equal(a[name], b[name]):
            return name
    return None


def copy_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy that further training does not change."""
    return {name: value.detach().clone() for name, value in weights.items()}
