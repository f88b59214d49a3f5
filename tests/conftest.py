"""What every test stands on: nothing of the user's is read or written, and one small phantom."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

# Read when torch is imported, so it is said before any test imports it. Tests run in several
# processes, and one thread each gives the same sums everywhere.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own, and no tracker. GLUA_BENCH_DATA stays: real-data tests ask it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("MLFLOW_") or name in ("GLUA_BENCH_DEBUG", "LOCAL_RANK"):
                patch.delenv(name)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("GLUA_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MPLBACKEND", "Agg")
        yield


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated cohort with one case per domain and split, as coarse as still shows a heart.

    Tests that change a file copy the directory first.
    """
    from glua_bench.datasets.phantom import generate

    root = tmp_path_factory.mktemp("phantom") / "tiny"
    ids = {"ct": [1001, 1003, 1004], "mr": [1001, 1003, 1007]}
    generate(root, seed=0, ids=ids, voxel_scale=2.0, workers=1)
    return root


@pytest.fixture
def write_livers() -> Callable[[Path], None]:
    """Writes files as docs/adding-data.md describes them below a directory."""

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
                labels[0, 0, 0] = 9  # a value that a dataset may ignore
                nib.save(nib.Nifti1Image(labels, affine), f"{name}_label.nii.gz")

    return write


# -- pages in a browser ---------------------------------------------------------------------------


def absent(what: str) -> None:
    """Skips a test that needs what is not there, or fails it where GLUA_BENCH_BROWSER=required."""
    if os.environ.get("GLUA_BENCH_BROWSER") == "required":
        pytest.fail(f"GLUA_BENCH_BROWSER=required, but {what} is not on the PATH", pytrace=False)
    pytest.skip(f"needs {what}")


class Browser:
    """A headless Chromium that can reach no network; `driver` is Selenium's.

    Args:
        driver: of a browser that logs its console and its requests.
    """

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, page: Path) -> None:
        """Open a file as a reader does, and forget what was logged before."""
        self.driver.get("about:blank")
        self.errors(), self.requests()
        self.driver.get(page.resolve().as_uri())

    def wait(self, script: str, value: object, seconds: float = 60) -> None:
        """Wait until an expression in the page has a value."""
        from selenium.webdriver.support.ui import WebDriverWait

        waiting = WebDriverWait(self.driver, seconds, poll_frequency=0.05)
        waiting.until(lambda driver: driver.execute_script(f"return {script}") == value)

    def errors(self) -> list[str]:
        """What the console has said since the last call, besides debugging and information."""
        quiet = ("DEBUG", "INFO")
        log = self.driver.get_log("browser")
        return [entry["message"] for entry in log if entry["level"] not in quiet]

    def requests(self) -> list[str]:
        """What pages have asked of anything but files and themselves, since the last call."""
        found = []
        for entry in self.driver.get_log("performance"):
            event = json.loads(entry["message"])["message"]
            if event["method"] == "Network.requestWillBeSent":
                found.append(event["params"]["request"]["url"])
        local = ("file:", "data:", "blob:", "about:", "chrome:")
        return [url for url in found if not url.startswith(local)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium from the PATH with a profile of its own; it draws WebGL in software."""
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
        "host-resolver-rules=MAP * ~NOTFOUND",
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
    """NiiVue's script, as npm gives it once to the tests' own cache."""
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
