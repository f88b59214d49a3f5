"""Run checks: from Python, and as tests of pytest."""

from __future__ import annotations

import functools
import json
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
    """Run all checks of a method.

    Args:
        method: the class, or a registered name.
        plugins: plugin files in which a name may be found.
        config: settings that make the method small; what is not given comes from the preset
            "quick", with whole numbers shrunk towards the low end of their range.
        only: names of checks; None runs all of them.
        report: receives each result as soon as it is there.

    Returns:
        One result a check, in the order of `METHOD_CHECKS`.

    Raises:
        PluginError: no method has the name, or no check has one of the names.
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
    """Run all checks of a dataset; its files must be there, or `prepare` makes them.

    Args:
        dataset: the dataset, or a registered name.
        plugins: plugin files in which a name may be found.
        data_root: where the files of a dataset given by name lie; None is its default.
        only: names of checks; None runs all of them.
        report: receives each result as soon as it is there.

    Raises:
        PluginError: no dataset has the name, or no check has one of the names.
    """
    found = load_dataset(dataset, data_root, plugins) if isinstance(dataset, str) else dataset
    return Checklist(DATASET_CHECKS, found.name, found).run(only, report)


def parametrize(
    *methods: type[Method] | str,
    config: Mapping[str, Any] | Callable[[type[Method]], Mapping[str, Any]] | None = None,
    plugins: Sequence[Path] = (),
    only: Iterable[str] | None = None,
) -> Any:
    """A pytest decorator: one test for each method and check, given as the argument `check`.

    Args:
        methods: classes or registered names.
        config: as in `run_checks`, for all the methods; or a function that gives it for one.
        plugins: as in `run_checks`.
        only: names of checks; None takes all of them.

    Raises:
        PluginError: no check has one of the names.
    """
    import pytest  # the kit works without it

    names = select_checks(METHOD_CHECKS, only)
    cases = []
    for method in methods:
        label = method if isinstance(method, str) else getattr(method, "name", method.__name__)
        for name in names:
            run = functools.partial(_run_in_pytest, method, config, tuple(plugins), name)
            cases.append(pytest.param(run, id=f"{label}-{name}"))
    return pytest.mark.parametrize("check", cases)


def parametrize_dataset(only: Iterable[str] | None = None) -> Any:
    """A pytest decorator: one test for each check of a dataset, called as `check(dataset)`.

    Args:
        only: names of checks; None takes all of them.

    Raises:
        PluginError: no check has one of the names.
    """
    import pytest  # the kit works without it

    def run(name: str, dataset: Dataset) -> None:
        _raise(Checklist(DATASET_CHECKS, dataset.name, dataset).result(name))

    names = select_checks(DATASET_CHECKS, only)
    cases = [pytest.param(functools.partial(run, name), id=name) for name in names]
    return pytest.mark.parametrize("check", cases)


@functools.cache
def _shared_bench(method: type[Method], config: str) -> Bench:
    """The checks of one method share its trainings, also when each is a test of its own."""
    return Bench(method, json.loads(config))


def _run_in_pytest(
    method: type[Method] | str,
    config: Mapping[str, Any] | Callable[[type[Method]], Mapping[str, Any]] | None,
    plugins: tuple[Path, ...],
    name: str,
) -> None:
    found = _method_class(method, plugins)
    given = config(found) if callable(config) else config or {}
    _raise(_shared_bench(found, json.dumps(dict(given), sort_keys=True)).outcome(name))


def _raise(result: CheckResult) -> None:
    """Turn a result into what pytest understands."""
    if result.status == "undecided":
        import pytest

        pytest.skip(result.message)
    if result.status == "failed":
        raise CheckFailure(result.message) from result.error


def _method_class(method: type[Method] | str, plugins: Sequence[Path]) -> type[Method]:
    return Registry("method", plugins).load(method) if isinstance(method, str) else method
