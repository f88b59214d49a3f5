"""reports/run_figures.py: every method's own pictures are drawn, with and without a target."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest

from glua_bench.console import Progress
from glua_bench.reports.run_figures import draw_run
from glua_bench.runs import RunRequest, execute, plan

SMALL = ("segmenter.width=4", "segmenter.depth=3", "grid.size=32", "grid.spacing=7", "batch_size=2")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("source_only", {"cases.png"}),
        ("histogram_matching", {"cases.png", "restyled.png"}),
        ("mean_teacher", {"cases.png", "pictures.png"}),
        ("slaug", {"cases.png", "pictures.png"}),  # sees no target image
        ("local_only", {"cases.png", "gap.png"}),
    ],
)
@pytest.mark.parametrize("slices", [1, 3])
def test_what_a_method_shows_is_drawn(
    method: str, expected: set[str], slices: int, phantom_root: Path, tmp_path: Path
) -> None:
    request = RunRequest(
        method,
        "phantom",
        preset="quick",
        steps=2,
        assignments=[*SMALL, f"slices={slices}"],
        data_root=phantom_root,
        runs_root=tmp_path,
        device="cpu",
        mlflow=False,
    )
    planned = plan(request)
    execute(planned, Progress(enabled=False), draw_run)
    drawn = planned.directory.figures
    assert {file.name for file in drawn.iterdir()} == expected
    for name in expected:
        assert matplotlib.image.imread(drawn / name)[..., :3].std() > 0.05
