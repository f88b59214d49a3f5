"""Run checks from Python or as pytest tests."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from glua_bench.conformance.bench import Bench
from glua_bench.conformance.results import (
    DATASET_CHECKS,
    METHOD_CHECKS,
    CheckFailure,
    Checklist,
    CheckResult,
    select_checks,
)
from glua_bench.method import Method
from glua_bench.registry import Registry, load_dataset
from glua_bench.task import Dataset


def run_checks(
    method: type[Method] | str,
    plugins: Sequence[Path] = (),
    config: Mapping[str, Any] | None = None,
    only: Iterable[str] | None = None,
    report: Callable[[CheckResult], None] = lambda result: None,
) -> list[CheckResult]:
    """Run the checks of a method.

    Args:
        method: class or registered name.
        plugins: plugin files to search for the name.
        config: settings that make the method small; default: the preset "quick", with integers
            reduced towards the lower end of their range.
        only: names of checks; None runs all.
        report: called with each result as soon as it is available.

    Returns:
        The results, in the order of `METHOD_CHECKS` or `only`.

    Raises:
        PluginError: the method or a check is unknown.
    """
    with closing(Bench(_method_class(method, plugins), config)) as bench:
        return bench.checks.run(only, report)


def run_dataset_checks(
    dataset: Dataset | str,
    plugins: Sequence[Path] = (),
    data_root: Path | None = None,
    only: Iterable[str] | None = None,
    report: Callable[[CheckResult], None] = lambda result: None,
) -> list[CheckResult]:
    """Run the checks of a dataset, whose files must exist or be made by `prepare`.

    Args:
        dataset: dataset or registered name.
        plugins: plugin files to search for the name.
        data_root: directory of a dataset given by name; None takes its default.
        only: names of checks; None runs all.
        report: called with each result as soon as it is available.

    Raises:
        PluginError: the dataset or a check is unknown.
    """
    found = load_dataset(dataset, data_root, plugins) if isinstance(dataset, str) else dataset
    return Checklist(DATASET_CHECKS, found.name, found).run(only, report)


def parametrize(
    *methods: type[Method] | str,
    config: Mapping[str, Any] | Callable[[type[Method]], Mapping[str, Any]] | None = None,
    plugins: Sequence[Path] = (),
    only: Iterable[str] | None = None,
) -> Any:
    """Return a pytest decorator: one test per method and check, passed as the argument `check`.

    Args:
        methods: classes or registered names.
        config: as in `run_checks`, or a function from a method's class to its settings.
        plugins: as in `run_checks`.
        only: names of checks; None runs all.

    Raises:
        PluginError: a check is unknown.
    """
    import pytest  # optional, and only needed for tests

    @functools.cache
    def bench(method: type[Method] | str) -> Bench:
        """Return one bench for all tests of a method, so that they share its trainings."""
        found = _method_class(method, plugins)
        return Bench(found, config(found) if callable(config) else config)

    def run(method: type[Method] | str, name: str) -> None:
        _raise_unless_passed(bench(method).checks.result(name))

    cases = []
    names = select_checks(METHOD_CHECKS, only)
    for method in methods:
        label = method if isinstance(method, str) else getattr(method, "name", method.__name__)
        for name in names:
            cases.append(pytest.param(functools.partial(run, method, name), id=f"{label}-{name}"))
    return pytest.mark.parametrize("check", cases)


def parametrize_dataset(only: Iterable[str] | None = None) -> Any:
    """Return a pytest decorator: one test per check of a dataset, called as `check(dataset)`.

    Args:
        only: names of checks; None runs all.

    Raises:
        PluginError: a check is unknown.
    """
    import pytest  # optional, and only needed for tests

    def run(name: str, dataset: Dataset) -> None:
        _raise_unless_passed(Checklist(DATASET_CHECKS, dataset.name, dataset).result(name))

    names = select_checks(DATASET_CHECKS, only)
    cases = [pytest.param(functools.partial(run, name), id=name) for name in names]
    return pytest.mark.parametrize("check", cases)


def _raise_unless_passed(result: CheckResult) -> None:
    if result.status == "undecided":
        import pytest

        pytest.skip(result.message)
    if result.status == "failed":
        raise CheckFailure(result.message) from result.error


def _method_class(method: type[Method] | str, plugins: Sequence[Path]) -> type[Method]:
    return Registry("method", plugins).load(method) if isinstance(method, str) else method
