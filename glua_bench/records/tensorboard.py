"""Write runs and comparisons as event files for TensorBoard.

`GLUA_BENCH_TRACKER=glua_bench.records.tensorboard:TensorBoard` selects it instead of MLflow.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glua_bench.console import next_command, warn
from glua_bench.documents import load_json
from glua_bench.errors import ConfigError
from glua_bench.files import new_folder, write_json
from glua_bench.paths import distinct, entries
from glua_bench.records.naming import Comparison, RunRecord, headline, tracker_key
from glua_bench.records.run_directory import RunDirectory
from glua_bench.records.tracker import UploadingTracker, run_state

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

STATE = "glua_bench.json"  # written last: which state of the run a folder shows


class TensorBoard(UploadingTracker):
    """Write one folder of event files per run, and one per comparison, to `RUNS/tensorboard`.

    A run has its training curves, figures, settings and tags; its settings and results (`dice`,
    `assd`, `hd95`) form a row of the tab *HParams*. A comparison has its numbers, its description
    and its tables. A folder that is incomplete or shows an earlier state is replaced.

    Args:
        runs_root: the directory of all runs.
        warn: receives one sentence if the files cannot be written.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    lock = ".tensorboard.lock"

    def __init__(self, runs_root: Path, warn: Callable[[str], None] = warn) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "GLUA_BENCH_TRACKER names TensorBoard, which is not installed; use pip install "
                "'glua-bench[tensorboard]', or unset it to use MLflow."
            )
        super().__init__(runs_root, warn)
        self.folder = self.runs_root.resolve() / "tensorboard"
        self.place, self.remedy = str(self.folder), f"check that {self.folder} can be written"
        self.browse = next_command("tensorboard", "--logdir", self.folder)

    def check(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file")

    def nest(
        self,
        comparison: Comparison,
        metrics: Mapping[str, float],
        files: Sequence[Path] = (),
        note: str = "",
    ) -> bool:
        for _, run in comparison.members:
            if (run.done or run.failed is not None) and self.upload(run) is None:
                return False
        shown = self._show(
            lambda: self._write_comparison(comparison, metrics, files, note), "this comparison"
        )
        return shown is not None

    def upload(self, run: RunDirectory) -> bool | None:
        return self._show(lambda: self._write_run(run), f"run {run.id}")

    def _show(self, write: Callable[[], bool], what: str) -> bool | None:
        return self.attempt(
            write,
            f"TensorBoard's files in {self.place} do not show {what}",
            f"its directory is complete, so repeat with `glua-bench sync --runs {self.runs_root}`",
        )

    def _write_comparison(
        self, comparison: Comparison, metrics: Mapping[str, float], files: Sequence[Path], note: str
    ) -> bool:
        entries_of = {run.id: entry for entry, run in comparison.members}
        tables = {file.name: file.read_text(encoding="utf-8") for file in files if _is_text(file)}
        shown = {
            "name": comparison.name,
            "status": comparison.status,
            "members": entries_of,
            "tags": comparison.tags(),
            "settings": comparison.parameters(),
            "metrics": dict(metrics),
            "note": note,
            "tables": tables,
        }
        state = json.dumps(shown, sort_keys=True, default=str)

        def write(writer: SummaryWriter) -> None:
            names = distinct(metrics, tracker_key)
            for name, value in metrics.items():
                if math.isfinite(value):
                    writer.add_scalar(names[name], value, 0, walltime=comparison.began)
            writer.add_text("description", note)
            about = {"name": comparison.name, "status": comparison.status, **comparison.tags()}
            writer.add_text("comparison", _table({**about, **comparison.parameters()}))
            writer.add_text("runs", _table(entries_of))
            for name, text in tables.items():
                writer.add_text(f"tables/{name}", _fenced(text))

        name = f"{comparison.dataset}/comparison_{comparison.id}"
        return self._write(name, state, write)

    def _write_run(self, run: RunDirectory) -> bool:
        def write(writer: SummaryWriter) -> None:
            from torch.utils.tensorboard.summary import hparams

            record = RunRecord.of(run)
            names = distinct((name for name, *_ in record.metrics), tracker_key)
            for name, value, seconds, step in record.metrics:
                writer.add_scalar(names[name], value, step, walltime=seconds)
            settings = {
                name: value if isinstance(value, (bool, int, float, str)) else str(value)
                for name, value in record.params.items()
            }
            if run.done:
                _, scores = headline(run.read_summary())
                events: Any = writer.file_writer  # `add_hparams` would write another folder
                for summary in hparams(settings, scores):
                    events.add_summary(summary)
            about = {"name": record.name, "results": record.note, **record.tags}
            writer.add_text("run", _table(about))
            writer.add_text("settings", _table(settings))
            for file in sorted(entries(run.figures)):
                if file.suffix == ".png":
                    writer.add_image(f"figures/{file.stem}", _pixels(file), dataformats="HWC")

        config = run.config
        own = f"{config.method}_{config.direction}_seed{config.seed}_{run.id}"
        return self._write(f"{config.fold_name}/{own}", run_state(run), write)

    def _write(self, name: str, state: str, write: Callable[[SummaryWriter], None]) -> bool:
        """Write a folder; return False if it shows this state already."""
        folder = self.folder / name
        if _state(folder) == state:
            return False
        shutil.rmtree(folder, ignore_errors=True)
        with new_folder(folder) as made, _opened(made) as writer:
            write(writer)
            write_json(made / STATE, {"state": state})
        return True


@contextmanager
def _opened(folder: Path) -> Iterator[SummaryWriter]:
    from torch.utils.tensorboard import SummaryWriter

    with closing(SummaryWriter(str(folder))) as writer:
        yield writer


def _state(folder: Path) -> str | None:
    try:
        return str(load_json((folder / STATE).read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _pixels(file: Path) -> object:
    """Return a PNG as uint8 of shape (H, W, 3)."""
    import numpy as np
    from PIL import Image

    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"))


def _is_text(file: Path) -> bool:
    return file.suffix in (".csv", ".md", ".txt")


def _fenced(text: str) -> str:
    """Return text as a Markdown code block."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _table(values: Mapping[str, object]) -> str:
    """Return a Markdown table of names and values."""
    rows = [
        f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in values.items()
    ]
    return "\n".join(["| | |", "|---|---|", *rows])
