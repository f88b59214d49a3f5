"""folder/description.py: valid descriptions, and one sentence for invalid ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from glua_bench.datasets.folder.description import describe
from glua_bench.errors import ConfigError, UserError
from glua_bench.task import Grid, Reading

TEXT = """\
name: own
plane: axial
field_of_view: 320
slice_spacing: 3
classes:
  LIV: {title: liver, values: 1}
  SPL: {title: spleen, values: [4, 5], color: "#112233"}
domains:
  ct:
    images: ct/*_image.nii.gz
    labels: ct/*_label.nii.gz
    window: [-125, 275]
  mr:
    table: mr.csv
    percentiles: [1, 99]
    values: {LIV: 63}
    background: [7]
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "own.yaml"
    file.write_text(text)
    return file


def test_everything_that_may_be_said_is_taken(tmp_path: Path) -> None:
    own = describe(write(tmp_path, TEXT))
    assert own.name == "own" and own.directions == ("ct-mr", "mr-ct") and own.root == tmp_path
    assert own.grids["quick"] == Grid(64, 5.0, 3.0) and own.grids["paper"] == Grid(256, 1.25, 3.0)
    ct, mr = own.domains["ct"], own.domains["mr"]
    assert [s.values for s in ct.structures] == [(1,), (4, 5)]
    assert [s.values for s in mr.structures] == [(63,), (4, 5)]
    assert [(s.name, s.title, s.color) for s in own.structures] == [
        ("LIV", "liver", "#e69f00"),
        ("SPL", "spleen", "#112233"),
    ]
    assert ct.reading == Reading(flip=(0, 1), intensity_range=(-125.0, 275.0))
    assert mr.reading == Reading(flip=(0, 1), percentiles=(1.0, 99.0), ignored_values=(7,))


def test_planes_grids_and_stored_arrays(tmp_path: Path) -> None:
    text = TEXT.replace("plane: axial", "plane: coronal").replace(
        "field_of_view: 320", "grids:\n  quick: {size: 96, spacing: 2}"
    )
    text = text.replace(
        "    window",
        "    stored: {slices: 0, rows: 2, flip: [1]}\n    spacing: [0, 1, 1]\n    window",
    )
    own = describe(write(tmp_path, text))
    assert own.grids == {"quick": Grid(96, 2.0, 3.0)}
    assert own.domains["mr"].reading.slice_axis == 1
    ct = own.domains["ct"].reading
    assert (ct.orientation, ct.slice_axis, ct.row_axis, ct.flip) == ("stored", 0, 2, (1,))
    assert ct.stated_spacing == (0.0, 1.0, 1.0)


def test_labels_of_nnunet_are_taken_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset001_MR"
    folder.mkdir()
    labels = {"background": 0, "Liver": 3, "spleen": 1, "pancreas": 9}
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    text = TEXT[: TEXT.index("    table:")] + "    nnunet: Dataset001_MR\n    fold: 0\n"
    mr = describe(write(tmp_path, text)).domains["mr"]
    assert [s.values for s in mr.structures] == [(3,), (1,)]
    assert mr.reading.ignored_values == (9,)  # a label that the folder names and nobody asks for


def nnunet_text(tmp_path: Path, labels: dict[str, Any], classes: str = "", own: str = "") -> str:
    """Return a description whose second domain is an nnU-Net folder with the given labels."""
    folder = tmp_path / "Dataset001_MR"
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    text = TEXT[: TEXT.index("    table:")] + f"    nnunet: Dataset001_MR\n{own}"
    start, stop = text.index("  LIV:"), text.index("domains:")
    return text[:start] + classes + text[stop:] if classes else text


def test_ignore_of_nnunet_is_unannotated_and_not_background(tmp_path: Path) -> None:
    labels = {"background": 0, "liver": 1, "spleen": 2, "pancreas": 3, "ignore": 4}
    mr = describe(write(tmp_path, nnunet_text(tmp_path, labels))).domains["mr"]
    assert mr.reading.unannotated_values == (4,) and mr.reading.ignored_values == (3,)
    by_hand = "    values: {LIV: 1, SPL: [2, 3]}\n"
    mr = describe(write(tmp_path, nnunet_text(tmp_path, labels, own=by_hand))).domains["mr"]
    assert mr.reading.unannotated_values == (4,) and mr.reading.ignored_values == ()
    for said in ("    values: {LIV: 1, SPL: 4}\n", "    background: [4]\n"):
        with pytest.raises(ConfigError, match="4 is used for both .* and 'unannotated'; give"):
            describe(write(tmp_path, nnunet_text(tmp_path, labels, own=said)))


def test_what_nobody_annotated_is_listed(tmp_path: Path) -> None:
    text = TEXT.replace("background: [7]", "background: [7]\n    unannotated: [255]")
    own = describe(write(tmp_path, text))
    reading = own.domains["mr"].reading
    assert (reading.ignored_values, reading.unannotated_values) == ((7,), (255,))
    assert own.domains["ct"].reading.unannotated_values == ()
    assert not any(domain.notes for domain in own.domains.values())


REGIONS = {"background": 0, "whole tumour": [1, 2, 3], "core": [2, 3], "enhancing": 3}
WHOLE = "  WT: {title: whole tumour, values: 1}\n"


def test_a_region_of_nnunet_is_the_union_of_its_values(tmp_path: Path) -> None:
    mr = describe(write(tmp_path, nnunet_text(tmp_path, REGIONS, WHOLE))).domains["mr"]
    assert [s.values for s in mr.structures] == [(1, 2, 3)] and mr.reading.ignored_values == ()
    core = WHOLE.replace("whole tumour", "core")
    mr = describe(write(tmp_path, nnunet_text(tmp_path, REGIONS, core))).domains["mr"]
    assert [s.values for s in mr.structures] == [(2, 3)] and mr.reading.ignored_values == (1,)


def test_regions_that_overlap_are_no_classes(tmp_path: Path) -> None:
    both = WHOLE + "  TC: {title: core, values: 2}\n"
    with pytest.raises(ConfigError, match=r"value 2 is used for both WT and TC; .* under 'values'"):
        describe(write(tmp_path, nnunet_text(tmp_path, REGIONS, both)))
    apart = "    values: {WT: 1, TC: [2, 3]}\n"
    mr = describe(write(tmp_path, nnunet_text(tmp_path, REGIONS, both, apart))).domains["mr"]
    assert [s.values for s in mr.structures] == [(1,), (2, 3)]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("  LIV:", "  mean:", "structure name 'mean' is reserved for the average over structures"),
        ("name: own", "name: Own data", "line 1: 'Own data' is not a valid dataset name; use"),
        ("plane: axial", "plane: axal", "line 2: 'plane' cannot be 'axal'; did you mean 'axial'?"),
        ("plane: axial", "plain: axial", "line 2: unknown 'plain'; did you mean 'plane'?"),
        ("field_of_view: 320", "", "'field_of_view' is missing; add the side of the window in mm"),
        ("field_of_view: 320", "field_of_view: -1", "line 3: grids.quick.spacing = -0.015625 is"),
        ("values: 1}", "value: 1}", "line 6: unknown 'value' in 'LIV' in 'classes'; did you mean"),
        ("values: 1}", "values: 0}", "'values' must be a nonzero integer or a list of them (0"),
        ("values: 1}", "values: true}", "or a list of them (0 is background), not True."),
        ("values: 1}", "values: [1, x]}", "(0 is background), not [1, 'x']."),
        (
            "  LIV:",
            "  Background:",
            "structure name 'Background' is reserved for the class of voxels",
        ),
        ("  LIV:", "  ignore:", "structure name 'ignore' is reserved for nnU-Net's name"),
        ("values: 1}", "values: one}", "or a list of them (0 is background), not 'one'."),
        ("values: 1}", "values: 4}", "label value 4 is used for both LIV and SPL; give each"),
        ("  LIV: {title: liver, values: 1}", "  LIV:", "'LIV' in 'classes' must be a mapping of"),
        ('"#112233"', '"red"', "'red' is not a colour; write \"#rrggbb\", quoted."),
        ('"#112233"', "#112233", "expected ',' or '}'"),
        ("window: [-125, 275]", "window: [275, -125]", "'window' must be increasing, such as"),
        ("window: [-125, 275]", "window: [-125]", "'window' must be a list of 2 numbers"),
        ("[1, 99]", "[1, 199]", "'percentiles' must increase from 0 to 100"),
        ("[1, 99]", "[1, 99]\n    window: [0, 1]", "give either 'window' or 'percentiles', not"),
        (
            "table: mr.csv",
            "",
            "domain 'mr' needs exactly one of 'images' (a pattern), 'table' (a CSV file)",
        ),
        ("table: mr.csv", "table: mr.csv\n    images: '*.nii'", "but has images and table."),
        ("LIV: 63", "LVI: 63", "line 16: 'LVI' is not a class; did you mean 'LIV'?"),
        ("LIV: 63", "LIV: 7", "label value 7 is used for both LIV and 'background'; give"),
        ("background: [7]", "background: [x]", "'background' must be a list of label values."),
        ("background: [7]", "ignore: [x]", "'ignore' must be a list of label values."),
        ("  mr:", "  m-r:", "'m-r' is not a domain name; use lower-case letters"),
        ("  mr:", "  ct:", "line 13: 'ct' is given twice; keep one."),
        ("name: own", "name: own\ndirections: [mr-pet]", "'mr-pet' is not a direction; did you"),
        ("background: [7]", "val: [1]\n    test: [2, 1]", "1 is in both 'val' and 'test'; remove"),
        (
            "background: [7]",
            "spacing: [1, 1, -1]",
            "'spacing' must be three lengths in mm, 0 to keep",
        ),
        (
            "background: [7]",
            "stored: {slices: 1, rows: 1}",
            "'slices' and 'rows' must be different axes",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, old: str, new: str, said: str) -> None:
    assert TEXT.count(old) == 1
    with pytest.raises(UserError) as error:
        describe(write(tmp_path, TEXT.replace(old, new)))
    message = str(error.value)
    assert said in message and "own.yaml, line " in message, message
    assert message.endswith(".") and "\n" not in message


def test_a_domain_alone_is_no_task(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 8: 'domains' needs at least two, a source and a t"):
        describe(write(tmp_path, TEXT[: TEXT.index("  mr:")]))


def test_a_class_without_a_value_is_told_with_its_domain(tmp_path: Path) -> None:
    text = TEXT.replace("title: liver, values: 1", "title: liver")
    with pytest.raises(ConfigError, match="LIV has no label value; add it under 'values', here"):
        describe(write(tmp_path, text))


def test_ignore_still_means_background_and_says_so(tmp_path: Path) -> None:
    file = write(tmp_path, TEXT.replace("background: [7]", "ignore: [7]"))
    own = describe(file).domains["mr"]
    assert own.reading == describe(write(tmp_path, TEXT)).domains["mr"].reading
    line = 1 + TEXT[: TEXT.index("background: [7]")].count("\n")
    (note,) = own.notes
    assert note.startswith(
        f"{file}, line {line}: 'ignore' is deprecated; rename it to 'background'"
    )
