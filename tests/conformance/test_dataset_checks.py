"""Sound datasets pass, and each kind of mistake is caught by its own check."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from glua_bench import conformance
from glua_bench.conformance import TinyDataset, run_dataset_checks
from glua_bench.conformance.bench import TwoChannels, rewrite_voxels
from glua_bench.datasets.phantom.dataset import Phantom, generate
from glua_bench.task import Case, Dataset, Grid


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Phantom:
    root = tmp_path_factory.mktemp("phantom") / "tiny"
    ids = {"ct": [1001, 1003, 1004], "mr": [1001, 1003, 1007]}
    generate(root, seed=0, ids=ids, voxel_scale=2.0, workers=1)
    return Phantom(root)


@conformance.parametrize_dataset()
def test_phantom(check: Callable[[Dataset], None], phantom: Phantom) -> None:
    check(phantom)


@conformance.parametrize_dataset()
def test_the_tiny_dataset(check: Callable[[Dataset], None], tmp_path: Path) -> None:
    check(TinyDataset(tmp_path))


def test_a_dataset_with_two_channels(tmp_path: Path) -> None:
    results = run_dataset_checks(TwoChannels(tmp_path))
    assert [result for result in results if not result.passed] == []
    second = TwoChannels(tmp_path).cases("plain")[0].further[0]
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.float32), np.eye(4)), second)
    (failed,) = [r for r in run_dataset_checks(TwoChannels(tmp_path)) if r.check == "files"]
    assert not failed.passed and "the channels of plain_0 are invalid" in failed.message


@pytest.mark.realdata
def test_mscmr() -> None:
    if not os.environ.get("GLUA_BENCH_DATA"):
        pytest.skip("needs GLUA_BENCH_DATA with the directory 'mscmr'")
    results = conformance.run_dataset_checks("mscmr")
    assert all(r.passed for r in results), [r for r in results if not r.passed]


def changed(**attributes: Any) -> type[TinyDataset]:
    return type("Changed", (TinyDataset,), attributes)


def with_cases(change: Callable[[Case], Case | None]) -> type[TinyDataset]:
    def cases(self: TinyDataset, domain: str) -> tuple[Case, ...]:
        found = (change(case) for case in TinyDataset.cases(self, domain))
        return tuple(case for case in found if case is not None)

    return changed(cases=cases)


def with_files(change: Callable[[Case, Any], Any]) -> type[TinyDataset]:
    """Return a dataset whose label files are modified by `change`."""

    def prepare(self: TinyDataset, report: Any = print) -> None:
        if self.root.exists():
            return
        TinyDataset.prepare(self, lambda line: None)
        for case in (case for domain in self.domains() for case in self.cases(domain)):
            rewrite_voxels(case.label, functools.partial(change, case))

    return changed(prepare=prepare)


def rewritten(self: TinyDataset, report: Any = print) -> None:
    TinyDataset.prepare(self, lambda line: None)
    for path in self.root.rglob("*.nii.gz"):
        path.write_bytes(path.read_bytes() + b"\0")


DISC, RING = TinyDataset.structures
FIRST = {"plain_0", "inverted_0"}


@pytest.mark.parametrize(
    ("check", "kind"),
    [
        ("structures", changed(structures=(DISC, replace(RING, color=DISC.color)))),
        ("structures", changed(structures=(DISC, replace(RING, values=(20, 21, 10))))),
        ("structures", changed(structures=(DISC, replace(RING, values=(20, 21, 30))))),
        ("structures", changed(structures=(DISC, replace(RING, name="DISC")))),
        ("grids", changed(grids={"quick": Grid(32, 1.0)})),
        ("grids", changed(grids={**TinyDataset.grids, "paper": Grid(40, 1.0)})),
        ("prepare", changed(prepare=rewritten)),
        ("splits", with_cases(lambda c: None if c.split == "test" else c)),
        ("splits", with_cases(lambda c: replace(c, id="x"))),
        ("splits", with_cases(lambda c: replace(c, split="training"))),
        ("splits", with_cases(lambda c: replace(c, domain="other"))),
        ("subjects", with_cases(lambda c: replace(c, subject=f"{c.domain} somebody"))),
        ("subjects", with_cases(lambda c: replace(c, subject=c.id.rpartition("_")[2]))),
        ("files", with_files(lambda c, v: np.where(v == 10, 11, v).astype(np.int16))),
        ("files", with_files(lambda c, v: v[:-1])),
        ("slices", with_files(lambda c, v: v * (v != 10))),
    ],
    ids=str,
)
def test_each_mistake_of_a_dataset_is_caught_by_its_check_alone(
    check: str, kind: type[TinyDataset], tmp_path: Path
) -> None:
    results = conformance.run_dataset_checks(kind(tmp_path / "data"))
    assert {r.check for r in results if r.status == "failed"} - {"card"} == {check}


def test_the_card_is_checked(tmp_path: Path) -> None:
    (result,) = conformance.run_dataset_checks(changed()(tmp_path), only=["card"])
    assert result.status == "failed"


def test_poisoned_labels_stay_in_the_table(tmp_path: Path) -> None:
    dataset = TinyDataset(tmp_path)
    dataset.prepare()
    before = {c.id: c.label.read_bytes() for d in dataset.domains() for c in dataset.cases(d)}
    conformance.poison_labels(dataset, dataset.cases("inverted"))
    for domain in dataset.domains():
        for case in dataset.cases(domain):
            changed = case.label.read_bytes() != before[case.id]
            assert changed == (domain == "inverted")
            values = np.unique(np.asarray(nib.load(case.label).dataobj))
            assert set(values.tolist()) == {0, 10, 20, 21, 30}
    files = conformance.run_dataset_checks(dataset, only=["files"])
    assert files[0].passed
