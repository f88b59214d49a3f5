"""environment.py: versions are recorded, names are not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glua_bench.records.environment import environment, git_state


def test_the_environment_names_versions_but_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home" / "somebody"))
    monkeypatch.setattr(sys, "argv", ["glua-bench", str(tmp_path / "home" / "somebody" / "data")])
    found = environment()
    text = json.dumps(found)
    assert found["libraries"]["torch"] and found["libraries"]["medpy"] != "missing"
    assert found["command"] == ["glua-bench", "~/data"]
    assert "somebody" not in text


def test_git_state_sees_commits_and_changes(tmp_path: Path) -> None:
    if shutil.which("git") is None:
        pytest.skip("needs git")
    assert git_state(tmp_path) is None

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "--quiet", "-m", "first")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": True}


@pytest.mark.fault("stray code", "programs that the git configuration of a directory names")
def test_a_checkout_starts_no_program(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *name, "-C", str(tmp_path), *words], check=True, capture_output=True)

    git("init")
    for file in ("a.txt", ".gitattributes"):
        (tmp_path / file).write_text("* filter=evil\n")
    git("add", ".")
    git("commit", "-m", "first")
    known = git_state(tmp_path)
    assert known is not None and not known["dirty"]
    marker = tmp_path / ".git" / "marker"
    for key in ("core.fsmonitor", "filter.evil.clean", "filter.evil.process", "core.sshCommand"):
        git("config", key, f"touch {marker}; cat; false")
    git("config", "filter.evil.required", "true")
    (tmp_path / "a.txt").write_text("changed, of another length\n")
    assert git_state(tmp_path) == {"commit": known["commit"], "dirty": True}
    assert not marker.exists()
    git("config", "--unset", "core.fsmonitor")
    subprocess.run(["git", "-C", str(tmp_path), "status"], capture_output=True)
    (tmp_path / "a.txt").write_text("* filter=evil\n")
    subprocess.run(["git", "-C", str(tmp_path), "status"], capture_output=True)
    assert marker.exists()  # the attack works
