"""Shared fixtures; tests neither read nor write the user's files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from faults import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_terminal_summary,
    shared,
    tries,
)

# Set before torch is imported. Tests run in several processes, and one thread each gives the same
# sums on all machines.
os.environ["OMP_NUM_THREADS"] = "1"

# Background processes of a shell and their children ignore SIGINT, which some tests send.
if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    and threading.current_thread() is threading.main_thread()
):
    signal.signal(signal.SIGINT, signal.default_int_handler)


NOT_INHERITED = ("GLUA_BENCH_DEBUG", "GLUA_BENCH_TRACKER", "LOCAL_RANK")


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use a temporary cache and no tracker; GLUA_BENCH_DATA is kept for tests with real data."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("MLFLOW_") or name in NOT_INHERITED:
                patch.delenv(name)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("GLUA_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MPLBACKEND", "Agg")
        yield


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process; return exit code, stdout and stderr."""
    from glua_bench import cli

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["glua-bench", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generate a coarse phantom with one case per domain and split; copy it before changes."""
    from glua_bench.datasets.phantom.dataset import generate

    root = tmp_path_factory.mktemp("phantom") / "tiny"
    ids = {"ct": [1001, 1003, 1004], "mr": [1001, 1003, 1007]}
    generate(root, seed=0, ids=ids, voxel_scale=2.0, workers=1)
    return root


@pytest.fixture(scope="session")
def write_livers() -> Callable[[Path], None]:
    """Write the example files of docs/adding-data.md to a directory."""

    def write(root: Path) -> None:
        for domain in ("ct", "mr"):
            (root / domain).mkdir(parents=True)
            for number in range(1, 6):
                rng = np.random.default_rng([number, domain == "mr"])
                x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 44, 5)), indexing="ij")
                ball = (x - rng.uniform(-0.2, 0.2)) ** 2 + y**2 + z**2 / 4 < 0.2
                body = x**2 + y**2 < 0.9
                image = np.where(ball, 0.9 if domain == "ct" else 0.3, np.where(body, 0.6, 0.0))
                image = (image + rng.normal(0, 0.02, x.shape)).astype(np.float32)
                affine = np.diag([4.0, 4.0, 6.0, 1.0])
                name = root / domain / f"{number:03d}"
                nib.save(nib.Nifti1Image(image, affine), f"{name}_image.nii.gz")
                labels = ball.astype(np.int16)
                labels[0, 0, 0] = 9  # for `ignored_values`
                nib.save(nib.Nifti1Image(labels, affine), f"{name}_label.nii.gz")

    return write


@pytest.fixture(scope="session")
def dicom_slice() -> Callable[..., Any]:
    """Create a pydicom dataset from stored values and a position."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    def make(
        stored: np.ndarray,
        position: Sequence[float],
        plane: Sequence[Sequence[float]],
        spacing: tuple[float, float],
        slope: float = 1.0,
        intercept: float = 0.0,
    ) -> Any:
        """Create a slice; `plane` are the directions of columns and rows, `spacing` their mm."""
        one = Dataset()
        one.file_meta = FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        one.SOPClassUID, one.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", generate_uid()
        one.Modality, one.StudyInstanceUID, one.SeriesInstanceUID = "MR", "1.2.3", "1.2.3.4"
        one.ImagePositionPatient = [f"{value:.6f}" for value in position]
        one.ImageOrientationPatient = [f"{value:.9f}"[:16] for value in np.ravel(plane)]
        one.PixelSpacing = list(spacing)
        one.Rows, one.Columns = stored.shape
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 1
        one.RescaleSlope, one.RescaleIntercept = slope, intercept
        one.PixelData = np.rint(stored).astype("<i2").tobytes()
        one["PixelData"].VR = "OW"
        return one

    return make


# -- pages in a browser ---------------------------------------------------------------------------


def absent(what: str) -> None:
    """Skip a test, or fail it if GLUA_BENCH_BROWSER=required."""
    if os.environ.get("GLUA_BENCH_BROWSER") == "required":
        pytest.fail(f"GLUA_BENCH_BROWSER=required, but {what} is not on the PATH", pytrace=False)
    pytest.skip(f"needs {what}")


class Browser:
    """A headless Chromium without network, driven by Selenium."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path) -> None:
        """Open a file and clear the logs."""
        self.driver.get("about:blank")
        self.errors(), self.requests()
        self.driver.get(page.resolve().as_uri())

    def wait(self, script: str, value: object, seconds: float = 60) -> None:
        """Wait until an expression in the page has a value."""
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, seconds, poll_frequency=0.05)
        waiting.until(lambda driver: driver.execute_script(f"return {script}") == value)

    def errors(self) -> list[str]:
        """Return warnings and errors of the console since the last call."""
        quiet = ("DEBUG", "INFO")
        log = self.driver.get_log("browser")
        return [entry["message"] for entry in log if entry["level"] not in quiet]

    def requests(self) -> list[str]:
        """Return requests to the network since the last call."""
        found = []
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                found.append(event["params"]["request"]["url"])
        local = ("file:", "data:", "blob:", "about:", "chrome:")
        return [url for url in found if not url.startswith(local)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Start Chromium from the PATH with a temporary profile and software WebGL."""
    webdriver = pytest.importorskip("selenium.webdriver")
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        absent("chromium with chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for option in (
        "headless=new",
        "window-size=1000,800",
        "no-sandbox",  # which root cannot have
        "disable-dev-shm-usage",  # small in containers
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        "use-angle=swiftshader",
        "enable-unsafe-swiftshader",
        "ignore-gpu-blocklist",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{option}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With both paths given, Selenium does not look for a driver to download.
    service = webdriver.ChromeService(executable_path=driver)
    started = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(started)
    finally:
        started.quit()


@pytest.fixture(scope="session")
def niivue() -> str:
    """Return NiiVue's script from npm, cached for the session."""
    from glua_bench.errors import ConfigError
    from glua_bench.reports.viewer import bundle

    if shutil.which("npm") is None:
        absent("npm")
    try:
        return bundle()
    except ConfigError as error:  # e.g. npm without a network
        if os.environ.get("GLUA_BENCH_BROWSER") == "required":
            raise
        pytest.skip(str(error))


# -- servers of a cluster -------------------------------------------------------------------------


def no_server(what: str) -> None:
    """Skip a test, or fail it if GLUA_BENCH_CLUSTER=required."""
    if os.environ.get("GLUA_BENCH_CLUSTER") == "required":
        pytest.fail(f"GLUA_BENCH_CLUSTER=required, but {what}", pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    """Create a database per module on the server GLUA_BENCH_TEST_POSTGRES; return its URL."""
    server = os.environ.get("GLUA_BENCH_TEST_POSTGRES")
    if not server:
        no_server("GLUA_BENCH_TEST_POSTGRES names no PostgreSQL; .ci/postgres starts one")
    sqlalchemy = pytest.importorskip("sqlalchemy")
    url = sqlalchemy.make_url(server)
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    name = f"glua_bench_{uuid.uuid4().hex[:12]}"
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    yield url.set(database=name).render_as_string(hide_password=False)
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Use the SLURM configured by GLUA_BENCH_TEST_SLURM, and cancel all jobs of the test."""
    configuration = os.environ.get("GLUA_BENCH_TEST_SLURM")
    if not configuration:
        no_server("GLUA_BENCH_TEST_SLURM names no slurm.conf; .ci/slurm starts a SLURM")
    monkeypatch.setenv("SLURM_CONF", str(configuration))
    monkeypatch.setenv("SUBMITIT_LOGGING_LEVEL", "WARNING")
    yield
    asking = ["squeue", "--noheader", "--user", str(os.getuid()), "--format=%i %Z"]
    jobs = subprocess.run(asking, check=True, capture_output=True, text=True).stdout
    for line in jobs.splitlines():
        number, folder = line.strip().split(maxsplit=1)
        if Path(folder).is_relative_to(tmp_path):  # not a job of other tests
            subprocess.run(["scancel", number], check=True)


# -- finished runs without training ---------------------------------------------------------------


class MadeRuns:
    """Write finished run directories with given scores, without training."""

    structures = ("MYO", "LAC")
    cases = ("case_1", "case_2", "case_3")

    def __init__(self, root: Path) -> None:
        self.root = root
        self.count = 0

    def add(
        self,
        method: str = "source_only",
        dice: float = 0.5,
        seed: int = 0,
        direction: str = "mr-ct",
        settings: dict[str, Any] | None = None,
        selectors: dict[str, float] | None = None,
        environment: dict[str, Any] | None = None,
        size: float = 100.0,
        **changes: Any,
    ) -> Any:
        """Write one run, in which structure and case shift the Dice by known steps.

        Args:
            method: name; installed methods have their real settings.
            dice: mean over structures and cases with the selector `last`.
            seed: random seed.
            direction: "source-target".
            settings: settings of the method that differ from its defaults.
            selectors: further selector → its mean Dice.
            environment: changes of `environment.json`.
            size: volume of each reference in ml.
            changes: changes of the configuration.
        """
        from dataclasses import asdict, replace

        import pandas as pd

        from glua_bench import config as configuration
        from glua_bench.errors import UserError
        from glua_bench.records.run_directory import RunDirectory
        from glua_bench.registry import Registry
        from glua_bench.task import Grid

        quick = {
            **configuration.PRESETS["quick"],
            "segmenter": configuration.SegmenterSpec(width=8, depth=4),
        }
        try:
            loaded: Any = Registry("method").load(method)
            values = {**loaded.presets.get("quick", {}), **(settings or {})}
            method_config = asdict(configuration.build_settings(loaded.Config, values, "method"))
        except UserError:
            loaded, method_config = None, dict(settings or {})
        config = configuration.RunConfig(
            method, "phantom", direction, Grid(64, 3.5, 4.0), method_config, seed=seed, **quick
        )
        config = replace(config, **changes)
        self.count += 1
        run = RunDirectory(self.root, config, f"{self.count:012x}")
        chosen = {"last": dice, **(selectors or {})}
        rows = [
            {
                "selector": selector,
                "case": case,
                "structure": structure,
                "dice": mean + 0.1 * (i - 0.5) + 0.05 * (j - 1),
                "assd": 10 * (1 - mean),
                "hd95": 20 * (1 - mean),
                "missed": False,
                "reference_ml": size + i + 10 * j,
                "prediction_ml": size,
                "step": 500,
            }
            for selector, mean in chosen.items()
            for j, case in enumerate(self.cases)
            for i, structure in enumerate(self.structures)
        ]
        facts = {"code": "c1", "device": "cpu", "threads": 1, "data": {"train": "t", "test": "t"}}
        if loaded is not None:
            facts["changed"] = configuration.changed_settings(config, loaded)
            facts["variant"] = configuration.variant_name(config, loaded)
        run.start({**facts, **(environment or {})}, [("train", 500)])
        run.write_cases(pd.DataFrame(rows))
        run.finish(
            {
                "stage_seconds": {"train": 100.0},
                "reused_stages": [],
                "peak_memory_mib": 900.0,
                "selector_scores": {
                    name: {"250": 0.9 * mean, "500": mean} for name, mean in chosen.items()
                },
            }
        )
        return run

    def comparison(self, seeds: int = 3, methods: tuple[str, ...] = ("glua", "slaug")) -> None:
        """Write bounds and methods over seeds; the first method is better than the second."""
        for seed in range(seeds):
            shift = 0.02 * seed
            self.add("source_only", 0.2 + shift, seed)
            self.add("source_only", 0.8 + shift / 2, seed, scenario="supervised")
            for place, method in enumerate(methods):
                self.add(method, 0.6 - 0.1 * place + shift, seed)


@pytest.fixture(scope="session")
def made_runs_in() -> type[MadeRuns]:
    """Return `MadeRuns`, for fixtures with a wider scope."""
    return MadeRuns


@pytest.fixture
def made_runs(tmp_path: Path) -> MadeRuns:
    """Return an empty `MadeRuns`."""
    return MadeRuns(tmp_path / "runs")


# -- sweeps without a study -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def made_sweep() -> Callable[..., Any]:
    """Create a `Sweep` with given values, without a study."""

    def make(
        settings: dict[str, list[Any]],
        quality: list[float],
        dice: list[list[float]] | None = None,
        states: list[str] | None = None,
        costs: list[float] | None = None,
        scales: dict[str, bool | None] | None = None,
        directions: tuple[str, ...] = ("mr-ct",),
        seen: list[tuple[int, int, float]] = (),  # type: ignore[assignment]
        importances: dict[str, float] | None = None,
        counted: list[bool] | None = None,
        objective: str = "im",
        budget: int | None = None,
    ) -> Any:
        """Create one trial per value of `quality`; `dice` has one number per seed."""
        import math

        import pandas as pd

        from glua_bench.reports.sweep_report import Sweep

        count = len(quality)
        states = states or ["done"] * count
        dice = dice or [[value] for value in quality]
        began = pd.Timestamp("2024-01-01 10:00")
        trials = pd.DataFrame(
            {
                "number": range(count),
                "state": states,
                "counted": counted or [True] * count,
                "attempt": 1,
                "worker": [f"worker {1 + i % 2}" for i in range(count)],
                "began": [began + pd.Timedelta(minutes=i) for i in range(count)],
                "ended": [began + pd.Timedelta(minutes=i + 1.8) for i in range(count)],
                "reason": ["the data are gone" if s == "failed" else "" for s in states],
                **{f"method.{name}": values for name, values in settings.items()},
                objective: [
                    q if s == "done" else math.nan for q, s in zip(quality, states, strict=True)
                ],
            }
        )
        if costs is not None:
            trials["seconds"] = costs
        runs = [
            {
                "trial": number,
                "run": f"{number:04d}{direction[0]}{seed}",
                "direction": direction,
                "seed": seed,
                "quality": quality[number] + 0.01 * seed,
                "dice": own,
                "assd": 10 * (1 - own),
                "hd95": 20 * (1 - own),
            }
            for number in range(count)
            if states[number] == "done"
            for seed, own in enumerate(dice[number])
            for direction in directions
        ]
        columns = ["trial", "run", "direction", "seed", "quality", "dice", "assd", "hd95"]
        return Sweep(
            name="ratio",
            title="How much of it?",
            facts={"method": "glua", "objective": objective},
            parameters=scales or dict.fromkeys(settings, False),
            objectives=(objective, *(("seconds",) if costs else ())),
            oracle=objective == "oracle",
            budget=budget or count,
            trials=trials,
            runs=pd.DataFrame(runs, columns=columns),
            seen=pd.DataFrame(seen, columns=["trial", "step", "value"]),
            importances=None if importances is None else pd.Series(importances),
            importances_note="A note.",
        )

    return make
