"""task.py: readings and structures per domain reach training, scores and saved predictions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from glua_bench.conformance import TinyDataset, run_dataset_checks
from glua_bench.conformance.bench import TwoChannels
from glua_bench.console import Progress
from glua_bench.data.cache import SliceCache
from glua_bench.errors import ConfigError, DataError
from glua_bench.inspection.integrity import check_cases, check_dataset, refuse_problems
from glua_bench.reports.run_figures import draw_dataset
from glua_bench.runs import execution
from glua_bench.runs import plan as planning
from glua_bench.runs.plan import PlannedRun, plan
from glua_bench.runs.request import RunRequest
from glua_bench.task import (
    Case,
    Channel,
    DomainView,
    Reading,
    Structure,
    check_channels,
    common_channels,
    parse_direction,
)

GRID = TinyDataset.grids["quick"]
OTHER_VALUES = {10: 20, 20: 10, 21: 11, 30: 7, 0: 0}  # disc and ring swapped, another stray
DISC, RING = TinyDataset.structures


class TwoTables(TinyDataset):
    """The tiny task with other label values and another window in the inverted domain."""

    name: ClassVar[str] = "two_tables"

    def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
        """Write the volumes, with other label values in one domain."""
        if self.cases("plain")[0].image.is_file():
            return
        super().prepare(report)
        for case in self.cases("inverted"):
            label = nib.load(case.label)
            table = np.vectorize(OTHER_VALUES.get)(np.asarray(label.dataobj)).astype(np.int16)
            nib.save(nib.Nifti1Image(table, label.affine), case.label)

    @classmethod
    def reading_of(cls, domain: str) -> Reading:
        """Use a fixed window and another ignored value in the inverted domain."""
        if domain == "inverted":
            return replace(cls.reading, ignored_values=(7,), intensity_range=(0.2, 0.9))
        return cls.reading

    @classmethod
    def structures_of(cls, domain: str) -> tuple[Structure, ...]:
        """Swap the values of disc and ring in the inverted domain."""
        if domain == "inverted":
            return replace(DISC, values=(20,)), replace(RING, values=(10, 11))
        return cls.structures


@pytest.fixture
def both(tmp_path: Path) -> tuple[TinyDataset, TwoTables]:
    """Return the same volumes with one label table, and with two."""
    one, two = TinyDataset(tmp_path / "one"), TwoTables(tmp_path / "two")
    one.prepare()
    two.prepare()
    return one, two


def test_each_domain_is_read_by_its_own_table(both: tuple[TinyDataset, TwoTables]) -> None:
    one, two = both
    cache = SliceCache()
    for domain in one.domains():
        for case, other in zip(one.cases(domain), two.cases(domain), strict=True):
            expected = cache.label(case, one.view(case.domain).on(GRID)).open()
            found = cache.label(other, two.view(domain).on(GRID)).open()
            assert expected.any()
            np.testing.assert_array_equal(found, expected)


def test_a_table_of_the_other_domain_is_refused(both: tuple[TinyDataset, TwoTables]) -> None:
    _, two = both
    with pytest.raises(DataError, match=r"label value\(s\) 7, 11 unknown to the dataset"):
        SliceCache().label(two.cases("inverted")[0], two.view("plain").on(GRID))


def test_a_view_is_what_the_author_s_hooks_say_of_a_domain() -> None:
    view = TwoTables.view("inverted")
    assert view.name == "inverted"
    assert view.reading == TwoTables.reading_of("inverted") != TwoTables.view("plain").reading
    assert view.structures == TwoTables.structures_of("inverted")
    on_grid = view.on(GRID)
    assert on_grid.grid == GRID and (on_grid.reading, on_grid.structures) == (
        view.reading,
        view.structures,
    )


def test_a_view_of_predictions_leaves_no_voxel_open() -> None:
    view = DomainView("ct", Reading(unannotated_values=(9,)), ())
    assert view.of_predictions() == DomainView("ct", Reading(), ())


@pytest.mark.parametrize("direction", TwoTables.directions)
def test_a_run_scores_and_saves_in_the_target_s_own_values(
    both: tuple[TinyDataset, TwoTables],
    direction: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, two = both
    options = {"method": "source_only", "steps": 8, "runs_root": tmp_path / "runs"}
    run = planned(two, monkeypatch, direction=direction, **options)
    execution.execute(run, Progress(enabled=False))
    target = run.config.target
    (case,) = two.split(target, "test")
    reference = np.asarray(nib.load(case.label).dataobj)
    saved = np.asarray(nib.load(run.directory.predictions / f"{case.id}.nii.gz").dataobj)
    rows = pd.read_parquet(run.directory.path / "cases.parquet")
    rows = rows[rows["selector"] == "last"].set_index("structure")
    for structure in two.structures_of(target):
        truth, found = np.isin(reference, structure.values), saved == structure.values[0]
        dice = 2 * (truth & found).sum() / (truth.sum() + found.sum())
        assert rows.loc[structure.name, "dice"] == pytest.approx(dice)
        assert rows.loc[structure.name, "reference_ml"] == pytest.approx(truth.sum() / 1000)
    assert set(np.unique(saved)) - {0} <= {s.values[0] for s in two.structures_of(target)}
    assert (saved > 0).any()


def test_a_domain_s_table_changes_the_run_s_identity(
    both: tuple[TinyDataset, TwoTables], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, two = both
    options = {"direction": "plain-inverted", "runs_root": tmp_path}
    before = planned(two, monkeypatch, **options).id
    assert planned(two, monkeypatch, **options).id == before
    narrower = replace(two.reading_of("inverted"), intensity_range=(0.3, 0.8))
    own = TwoTables.reading_of
    monkeypatch.setattr(
        TwoTables, "reading_of", lambda domain: narrower if domain == "inverted" else own(domain)
    )
    assert planned(two, monkeypatch, **options).id != before


def test_a_direction_is_one_of_the_dataset_s() -> None:
    assert parse_direction(TinyDataset, None) == ("plain", "inverted")
    assert parse_direction(TinyDataset, "inverted-plain") == ("inverted", "plain")
    with pytest.raises(ConfigError, match="no direction 'plain-plain'; use --direction with one"):
        parse_direction(TinyDataset, "plain-plain")


def test_missing_files_are_told_with_the_two_ways_to_name_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from glua_bench.datasets.mscmr import MSCMR

    monkeypatch.delenv("GLUA_BENCH_DATA", raising=False)
    with pytest.raises(DataError, match="--data-root, or set GLUA_BENCH_DATA"):
        MSCMR()


def unlabelled(root: Path, domain: str, split: str) -> TinyDataset:
    """Return the tiny task without labels in one split of a domain."""
    TinyDataset(root).prepare()

    class Unlabelled(TinyDataset):
        def prepare(self, report: Callable[[str], None] = lambda line: None) -> None:
            """Do nothing, since the files exist."""

        def cases(self, name: str) -> tuple[Case, ...]:
            return tuple(
                replace(case, label=None) if name == domain and case.split == split else case
                for case in super().cases(name)
            )

    return Unlabelled(root)


def failed_checks(data: TinyDataset) -> set[str]:
    return {r.check for r in run_dataset_checks(data) if r.status == "failed"} - {"card"}


def planned(data: TinyDataset, monkeypatch: pytest.MonkeyPatch, **options: Any) -> PlannedRun:
    """Plan a small run on a dataset object."""
    monkeypatch.setattr(planning, "load_dataset", lambda *request: data)
    small = {
        "method": "advent",
        "preset": "quick",
        "steps": 2,
        "device": "cpu",
        "mlflow": False,
        "assignments": ["segmenter.width=8", "segmenter.depth=3", "candidates=1"],
    }
    return plan(RunRequest(dataset=data.name, **{**small, **options}))


def test_a_target_is_trained_on_without_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = unlabelled(tmp_path / "data", "inverted", "train")
    bare, full = (
        planned(d, monkeypatch, direction="plain-inverted", runs_root=tmp_path / str(n))
        for n, d in enumerate((data, TinyDataset(tmp_path / "data")))
    )
    # Labels of target training cases do not affect the run id.
    assert bare.id == full.id
    execution.execute(bare, Progress(enabled=False))
    assert bare.directory.done


def test_a_source_without_labels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = unlabelled(tmp_path / "data", "inverted", "train")
    with pytest.raises(
        ConfigError, match="has no labelled training case of 'inverted', which inverted-"
    ):
        planned(data, monkeypatch, direction="inverted-plain", runs_root=tmp_path / "runs")


@pytest.mark.parametrize(
    ("gone", "said", "runs_left"),
    [
        ({"plain": "train"}, "no labelled training case of 'plain', which .* add one to the", 0),
        ({"inverted": "test"}, "has no test case of 'inverted'", 1),
        ({"inverted": "test", "plain": "test"}, "has no test case of 'inverted'", 0),
        ({"plain": "val"}, "'plain' of dataset .* has no labelled validation case", 2),
    ],
)
def test_a_role_without_cases_is_found_and_refused_in_the_same_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gone: dict[str, str],
    said: str,
    runs_left: int,
) -> None:
    class Fewer(TinyDataset):
        def cases(self, name: str) -> tuple[Case, ...]:
            return tuple(c for c in super().cases(name) if gone.get(name) != c.split)

    data = Fewer(tmp_path / "data")
    TinyDataset(tmp_path / "data").prepare()
    _, findings = check_dataset(data, Progress(enabled=False))
    found = [f for f in findings if f.check == "empty role"]
    assert any(re.search(said, f.text) for f in found)
    assert [f.problem for f in found] == [runs_left == 0] * len(found)
    if runs_left == 0:
        with pytest.raises(DataError, match="The splits of here cannot be used"):
            refuse_problems(findings, 8, "here")
    refused = 0
    for direction in data.directions:
        try:
            planned(data, monkeypatch, direction=direction, runs_root=tmp_path / "runs")
        except ConfigError as error:
            assert str(error) in [f.text for f in found]
            refused += 1
    assert len(data.directions) - refused == runs_left


@pytest.mark.parametrize("name", ["../out", "a/b", "x" * 200])
def test_an_id_that_leaves_its_directory_is_found_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class Renamed(TinyDataset):
        def cases(self, domain: str) -> tuple[Case, ...]:
            return tuple(
                replace(c, id=name) if c.id == "inverted_3" else c for c in super().cases(domain)
            )

    data = Renamed(tmp_path / "data")
    TinyDataset(tmp_path / "data").prepare()
    with pytest.raises(ConfigError, match="so it cannot name the file of its prediction"):
        planned(data, monkeypatch, direction="plain-inverted", runs_root=tmp_path / "runs")
    _, findings = check_dataset(data, Progress(enabled=False))
    assert [(f.check, f.cases) for f in findings if f.problem] == [("id", (name,))]


def test_a_test_case_without_a_label_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = unlabelled(tmp_path / "data", "inverted", "test")
    with pytest.raises(ConfigError, match="Test case inverted_3 .* has no label, so it cannot be"):
        planned(data, monkeypatch, direction="plain-inverted", runs_root=tmp_path / "runs")
    assert failed_checks(data) == {"splits"}


def test_unlabelled_cases_are_checked_prepared_and_drawn(tmp_path: Path) -> None:
    data = unlabelled(tmp_path / "data", "inverted", "train")
    facts, findings = check_dataset(data, Progress(enabled=False))
    assert not [f.text for f in findings if f.problem]
    (empty,) = [f.text for f in findings if f.check == "empty role"]
    assert "no labelled training case of 'inverted'" in empty and "remove inverted-plain" in empty
    assert "add its label file to the split train" in empty
    assert [f.case.id for f in facts if f.label is None] == ["inverted_0", "inverted_1"]
    assert len(draw_dataset(data, GRID, tmp_path / "figures")) == 2
    assert not failed_checks(data)


def test_a_fold_is_one_that_the_dataset_has(tmp_path: Path) -> None:
    class Folded(TinyDataset):
        """The tiny task with three folds."""

        name: ClassVar[str] = "folded"
        folds: ClassVar[int] = 3

    assert [Folded(tmp_path, n).fold_name for n in (1, 3)] == ["folded", "folded_fold3"]
    for fold in (0, 4):
        with pytest.raises(ConfigError, match=f"no fold {fold}; it has folds 1 to 3"):
            Folded(tmp_path, fold)
    with pytest.raises(ConfigError, match="no fold 2; it has one split: omit --fold"):
        TinyDataset(tmp_path, 2)


class OneOfTwo(TwoChannels):
    """Two channels in one domain only."""

    name: ClassVar[str] = "one_of_two"

    @classmethod
    def reading_of(cls, domain: str) -> Reading:
        return cls.reading if domain == "plain" else TinyDataset.reading


def test_domains_need_equal_numbers_of_channels_and_cases_all_of_them(tmp_path: Path) -> None:
    sentence = (
        "Dataset 'one_of_two' has 2 input channels (first, second) of 'plain' but 1 input channel "
        "of 'inverted'; both domains need the same number of channels."
    )
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        common_channels(OneOfTwo, "plain-inverted")
    dataset = OneOfTwo(tmp_path)
    found = [one for one in check_cases(dataset) if one.check == "channels"]
    assert [(one.text, one.problem) for one in found] == [(sentence, True)]
    assert common_channels(TwoChannels, None) == 2 and common_channels(TinyDataset, None) == 1
    case = replace(dataset.cases("plain")[0], further=())
    for kind in (case, case.unlabelled()):
        with pytest.raises(DataError, match="plain_0 has 1 image file.* one image per channel"):
            check_channels(kind, OneOfTwo.view("plain").reading)
    with pytest.raises(ConfigError, match="remove one"):
        Channel("T1", (1, 99), (0, 5))


def test_a_channel_has_its_own_intensities_or_those_of_the_domain() -> None:
    channels = Channel("T1"), Channel("T2", (1, 99)), Channel("T3", intensity_range=(0, 9))
    reading = Reading(intensity_range=(-5, 5), channels=channels)
    own = [reading.channel(index) for index in range(3)]
    assert [one.intensity_range for one in own] == [(-5, 5), None, (0, 9)]
    assert own[1].percentiles == (1, 99) and not any(one.channels for one in own)
    assert reading.inputs == 3 and Reading().inputs == 1
    # Cache keys and run ids of a single channel are those of versions without channels.
    assert Reading().channel(0) == Reading() and "channels" not in Reading().identity()
