"""preparation.py: all that can be prepared is, once, however often and whatever stops it."""

import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from glua_bench.console import Progress
from glua_bench.data import cache as cache_module
from glua_bench.data import parallel, preparation
from glua_bench.data.cache import SliceCache
from glua_bench.data.preparation import prepare_cases
from glua_bench.errors import RunFailure
from glua_bench.task import Case, Dataset, Grid, Reading, Structure

GRID = Grid(32, 1.0)
COUNT = 3  # cases of a domain


class Small(Dataset):
    """A few small volumes; one training case of the second domain has no label."""

    name = "small"
    structures = (Structure("A", "a", (5,), "#000000"),)
    directions = ("ct-mr",)
    reading = Reading()
    grids = {"quick": GRID}

    def prepare(self, report=print):
        """Nothing to do."""

    def cases(self, domain):
        return cases_of(self.root, domain, COUNT)

    @classmethod
    def reading_of(cls, domain):
        return replace(cls.reading, flip=(1,)) if domain == "mr" else cls.reading

    @classmethod
    def structures_of(cls, domain):
        return (Structure("A", "a", (7 if domain == "mr" else 5,), "#000000"),)


def cases_of(root: Path, domain: str, count: int) -> tuple[Case, ...]:
    """One training case of the second domain has no label."""
    found = []
    for number in range(count):
        stem = root / f"{domain}{number}"
        label = Path(f"{stem}_label.nii.gz")
        bare = domain == "mr" and number == 0
        found.append(
            Case(f"{domain}_{number}", domain, Path(f"{stem}.nii.gz"),
                 None if bare else label, "train", stem.name)
        )  # fmt: skip
    return tuple(found)


@pytest.fixture
def small(tmp_path, monkeypatch) -> Small:
    """Its files, settled since long, and a cache of their own."""
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    for number, domain in enumerate(Small(tmp_path).domains()):
        for case in Small(tmp_path).cases(domain):
            rng = np.random.default_rng([number, int(case.id[-1])])
            raw = rng.choice([0, 5 if domain == "ct" else 7], (20, 22, 4)).astype(np.int16)
            nib.save(nib.Nifti1Image(rng.normal(0, 1, raw.shape), np.eye(4)), case.image)
            if case.label is not None:
                nib.save(nib.Nifti1Image(raw, np.eye(4)), case.label)
    now = time.time_ns()
    monkeypatch.setattr(cache_module.time, "time_ns", lambda: now + 10**11)
    return Small(tmp_path)


def entries(cache: SliceCache) -> dict[Path, bytes]:
    return {p.relative_to(cache.root): p.read_bytes() for p in cache.root.rglob("*.npy")}


def quiet() -> Progress:
    return Progress(enabled=False)


def test_every_case_is_there_whatever_the_number_of_processes(small, tmp_path, monkeypatch):
    assert prepare_cases(small, GRID, quiet(), jobs=2) == []
    found = entries(SliceCache())
    assert len(found) == 2 * COUNT + 2 * COUNT - 1
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "other"))
    assert prepare_cases(small, GRID, quiet(), jobs=1) == []
    assert entries(SliceCache()) == found
    cache = SliceCache()
    for domain in small.domains():
        for case in small.cases(domain):
            view = small.view(domain).on(GRID)
            cache.image(case.unlabelled(), view)
            if case.label is not None:
                cache.label(case, view)
    assert entries(cache) == found  # what a run asks for is what was prepared


def test_a_second_call_reads_nothing_and_starts_nothing(small, monkeypatch):
    prepare_cases(small, GRID, quiet(), jobs=1)

    def unexpected(*arguments, **settings):
        raise AssertionError("there was nothing to do")

    for module, name in (
        (cache_module, "load_image"),
        (cache_module, "load_label"),
        (cache_module, "sha256"),
        (preparation, "_prepare"),
        (parallel, "ProcessPoolExecutor"),
    ):
        monkeypatch.setattr(module, name, unexpected)
    stream = io.StringIO()
    assert prepare_cases(small, GRID, Progress(stream=stream), jobs=2) == []
    assert stream.getvalue() == ""


def test_only_what_changed_is_prepared_again(small, monkeypatch):
    """A changed image, its label with it; a changed label alone; another label table."""
    prepare_cases(small, GRID, quiet(), jobs=1)
    done = []
    prepare = preparation._prepare
    monkeypatch.setattr(
        preparation, "_prepare", lambda job: done.append(job.case.id) or prepare(job)
    )
    image, label = small.cases("ct")[1].image, small.cases("mr")[2].label
    image.write_bytes(small.cases("ct")[0].image.read_bytes())
    label.write_bytes(small.cases("mr")[1].label.read_bytes())
    assert prepare_cases(small, GRID, quiet(), jobs=1) == []
    assert done == ["ct_1", "mr_2"]
    done.clear()
    SliceCache().image(small.cases("ct")[2].unlabelled(), small.view("ct").on(GRID)).path.unlink()
    assert prepare_cases(small, GRID, quiet(), jobs=1) == []
    assert done == ["ct_2"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_bad_files_are_named_and_the_others_prepared(small, jobs):
    small.cases("ct")[0].image.write_text("no image")
    small.cases("ct")[2].label.unlink()
    wrong = small.cases("mr")[1].label
    wrong.write_bytes(small.cases("ct")[1].label.read_bytes())
    problems = prepare_cases(small, GRID, quiet(), jobs)
    bad = [small.cases("ct")[0].image, small.cases("ct")[2].label, wrong]
    assert len(problems) == 3
    for problem, path in zip(problems, bad, strict=True):
        assert str(path) in problem and re.fullmatch(r"[^\n]*[^.]\.", problem)
    kinds = [path.parts[0] for path in entries(SliceCache())]
    assert (kinds.count("images"), kinds.count("labels")) == (5, 2)


def test_a_cache_that_cannot_be_written_is_one_sentence(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunFailure, match=r"^[^\n]*GLUA_BENCH_CACHE\.$"):
        prepare_cases(small, GRID, quiet(), jobs=1)


PROGRAM = """
import sys
from glua_bench import cli
if __name__ == "__main__":
    sys.argv = ["glua-bench", *sys.argv[1:]]
    cli.main()
"""
PLUGIN = """
from pathlib import Path
from glua_bench.task import Case, Dataset, Grid, Reading, Structure

class Small(Dataset):
    '''A few small volumes.'''
    name = "small"
    reference = needs = "none"
    structures = (Structure("A", "a", (5,), "#000000"),)
    directions = ("ct-mr",)
    reading = Reading()
    grids = {"quick": Grid(32, 1.0)}

    def prepare(self, report=print):
        '''Nothing to do.'''

    def cases(self, domain):
        return tuple(
            Case(f"{domain}_{n}", domain, self.root / f"{domain}{n}.nii.gz",
                 self.root / f"ct{n}_label.nii.gz", "train", f"{domain}_{n}")
            for n in (range(3) if domain == "ct" else ())
        )
"""


@pytest.mark.fault("killed", "data prepare and its worker processes")
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("end", ["Ctrl-C", "killed worker", "killed"])
def test_what_is_finished_is_kept_whatever_ends_it(small, tmp_path, end):
    """A file that never ends holds one worker up, and the work is stopped there."""
    blocked = small.cases("ct")[1].image
    content = blocked.read_bytes()
    blocked.unlink()
    os.mkfifo(blocked)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "small.py").write_text(PLUGIN)
    command = [sys.executable, tmp_path / "program.py", "data", "prepare", "small", "--jobs=2",
               "--plugin", tmp_path / "small.py", "--data-root", tmp_path]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        images = SliceCache().root
        limit = time.monotonic() + 60
        while len(list(images.rglob("[!.]*.npy"))) < 4:  # image and label of two cases
            assert time.monotonic() < limit and process.poll() is None
            time.sleep(0.05)
        workers = _children(process.pid)
        if end == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
        elif end == "killed":
            process.kill()
        else:
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
        out, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    code, words = {
        "Ctrl-C": (130, "the same command resumes."),
        "killed worker": (1, "A process was killed"),
        "killed": (-signal.SIGKILL, ""),
    }[end]
    assert process.returncode == code and words in err and "Traceback" not in err
    if end != "killed":  # then Python itself complains of semaphores
        assert err.count("\n") == 1
    found = entries(SliceCache())
    assert len(found) == 4 and not [path for path in found if path.name.startswith(".")]

    blocked.unlink()
    blocked.write_bytes(content)
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert found.items() <= entries(SliceCache()).items() and len(entries(SliceCache())) == 6


def _children(pid: int) -> list[int]:
    """Workers that a process has begun (and not what counts its semaphores)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            worker = b"spawn_main" in (stat.parent / "cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if worker and int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


# -- memory ---------------------------------------------------------------------------------------

PEAK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_preparation as module
module.COUNT = {count}
module.prepare_cases(module.Small(Path({root!r})), module.GRID, module.quiet(), jobs=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_number_of_volumes(tmp_path):
    """The peak of a process that prepares 2 volumes, and of one that prepares 8."""
    megabytes, (few, many) = 16, (1, 4)
    rng = np.random.default_rng(0)
    raw = rng.integers(-1000, 1000, (256, 256, megabytes * 8), np.int16)
    peaks = []
    for count in (few, many):
        root = tmp_path / str(count)
        root.mkdir()
        for case in (c for d in ("ct", "mr") for c in cases_of(root, d, count)):
            number = int(case.id[-1]) + 10 * (case.domain == "mr")
            nib.save(nib.Nifti1Image(np.roll(raw, number), np.eye(4)), case.image)
            if case.label is not None:
                value = 5 if case.domain == "ct" else 7
                label = np.where(raw > 900, value, 0).astype(np.uint8)
                nib.save(nib.Nifti1Image(label, np.eye(4)), case.label)
        code = PEAK.format(tests=str(Path(__file__).parent), count=count, root=str(root))
        environment = {**os.environ, "GLUA_BENCH_CACHE": str(root / "cache")}
        told = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        peaks.append(int(told.stdout) / 1024)
    # Six volumes more, of which not even two stay.
    assert peaks[1] - peaks[0] < 2 * megabytes, peaks
