"""A second tracker for tests: one file that copies runs to a directory, as another would to W&B."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from glua_bench.records.naming import Comparison, RunRecord
from glua_bench.records.run_directory import RunDirectory
from glua_bench.records.tracker import SyncCounts, copied_files, run_state, sync_runs


class FolderTracker:
    """Shows runs as folders in `$FOLDER_TRACKER`; with `DOWN` in it, it takes nothing."""

    def __init__(self, runs_root: Path, warn: Callable[[str], None]) -> None:
        self.runs_root, self.warn = runs_root, warn
        self.folder = Path(os.environ["FOLDER_TRACKER"])
        self.place, self.browse = str(self.folder), f"ls {self.folder}"
        self.remedy = "check FOLDER_TRACKER"

    def check(self) -> None:
        if (self.folder / "DOWN").exists():
            raise OSError("it is down")

    def mirror(self, run: RunDirectory) -> bool:
        return self._upload(run) is not None

    def sync(self) -> SyncCounts:
        return sync_runs(self.runs_root, self._upload, self.check, self.warn)

    def nest(
        self,
        comparison: Comparison,
        metrics: Mapping[str, float],
        files: Sequence[Path] = (),
        note: str = "",
    ) -> bool:
        members = {run.id: entry for entry, run in comparison.members}
        if None in [self._upload(run) for _, run in comparison.members]:
            return False
        shown = {
            "name": comparison.name,
            "status": comparison.status,
            "members": members,
            "tags": comparison.tags(),
            "params": comparison.parameters(),
            "metrics": dict(metrics),
            "note": note,
            "files": sorted(f.name for f in files),
        }
        path = self.folder / f"group-{comparison.id}.json"
        path.write_text(json.dumps(shown, default=str), encoding="utf-8")
        return True

    def _upload(self, run: RunDirectory) -> bool | None:
        copy, state = self.folder / run.id, run_state(run)
        record = copy / "record.json"
        try:
            self.check()
            if record.is_file() and json.loads(record.read_text())["state"] == state:
                return False
            for file in copied_files(run):
                target = copy / file.relative_to(run.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
            shown = {**vars(RunRecord.of(run)), "state": state}
            record.write_text(json.dumps(shown, default=str), encoding="utf-8")
            return True
        except OSError as error:
            self.warn(f"{self.place} did not take run {run.id} ({error}).")
            return None
