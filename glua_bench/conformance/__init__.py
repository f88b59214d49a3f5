"""Checks that every method and dataset must pass.

A method is trained on a few small volumes by the functions that plan and build a real run; each
check tests one rule of the contract. In a plugin's tests:

    from glua_bench import conformance

    @conformance.parametrize(MyMethod)
    def test_conformance(check):
        check()

Without pytest: `run_checks(MyMethod)`. docs/conformance.md lists the rules.
"""

# Importing these registers their checks.
from glua_bench.conformance import dataset_checks, label_checks, method_checks  # noqa: F401
from glua_bench.conformance.bench import (
    STEPS,
    Bench,
    TinyDataset,
    flatten_slices,
    poison_labels,
    quiet_machine,
    small_settings,
)
from glua_bench.conformance.method_checks import FLAT_STEPS
from glua_bench.conformance.results import (
    DATASET_CHECKS,
    METHOD_CHECKS,
    CheckFailure,
    CheckResult,
    first_difference,
)
from glua_bench.conformance.run import (
    parametrize,
    parametrize_dataset,
    run_checks,
    run_dataset_checks,
)

__all__ = [
    "DATASET_CHECKS",
    "FLAT_STEPS",
    "METHOD_CHECKS",
    "STEPS",
    "Bench",
    "CheckFailure",
    "CheckResult",
    "TinyDataset",
    "first_difference",
    "flatten_slices",
    "parametrize",
    "parametrize_dataset",
    "poison_labels",
    "quiet_machine",
    "run_checks",
    "run_dataset_checks",
    "small_settings",
]
