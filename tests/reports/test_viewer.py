"""reports/viewer.py: fetching NiiVue, the HTML fragment, and its use in a browser."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from faults import damaged
from matplotlib.image import imread

from glua_bench.data.cache import cache_root
from glua_bench.errors import ConfigError
from glua_bench.reports import viewer as module
from glua_bench.reports.viewer import ViewerCase, bundle, viewer
from glua_bench.task import Structure

STRUCTURES = (
    Structure("LVC", "left ventricular cavity", (1,), "#009e73"),
    Structure("MYO", "left ventricular myocardium", (2,), "#e69f00"),
)
HOSTILE = "<img src=x onerror=alert(1)></script><!--<script>"
SCRIPT = "var niivue = {};"


def make_case(case: str = "ct_1001", seed: int = 0, **more: object) -> ViewerCase:
    """Return a ring around a ball on a gradient, with a shifted and an empty prediction."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (12, 20, 24)), indexing="ij")
    rng = np.random.default_rng(seed)
    distance = np.sqrt((x - 0.2 * seed) ** 2 + y**2 + z**2)
    reference = np.where(distance < 0.4, 1, np.where(distance < 0.6, 2, 0)).astype(np.uint8)
    image = (y - 0.3 * (reference == 1) + rng.normal(0, 0.05, y.shape)).astype(np.float32)
    shifted, empty = np.roll(reference, 4, axis=2), np.zeros_like(reference)
    given = {
        "case": case,
        "image": image,
        "spacing": (4.0, 2.0, 1.5),
        "reference": reference,
        "predictions": {"glua": shifted, "source_only": empty},
        "structures": STRUCTURES,
    }
    return ViewerCase(**{**given, **more})  # type: ignore[arg-type]


def data_of(page: str) -> list[dict]:
    found = re.search(r'<script type="application/json" id="viewer-data">(.*?)</script>', page)
    assert found is not None
    return json.loads(found[1])


def volume_of(text: str) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(text)))


def archive(name: str = module.SCRIPT, content: bytes = SCRIPT.encode()) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as files:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        files.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def npm(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A fake npm that delivers `content` or runs `act`, and counts its calls."""
    fake = SimpleNamespace(content=archive(), act=None, calls=0)

    def run(command: list[str], cwd: str, **options: object) -> subprocess.CompletedProcess[str]:
        assert command[:3] == ["/somewhere/npm", "pack", "@niivue/niivue@0.69.0"]
        fake.calls += 1
        if fake.act is not None:
            return fake.act(command)
        Path(cwd, "niivue-niivue-0.69.0.tgz").write_bytes(fake.content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.shutil, "which", lambda name: f"/somewhere/{name}")
    monkeypatch.setattr(module.subprocess, "run", run)
    digest = module.hashlib.sha512(fake.content).digest()
    monkeypatch.setattr(module, "SHA512", base64.b64encode(digest).decode())
    return fake


# -- the script -----------------------------------------------------------------------------------


def test_bundle_is_obtained_once(npm, empty_cache, monkeypatch):
    assert bundle() == SCRIPT
    monkeypatch.setattr(module.shutil, "which", lambda name: None)  # without npm from now on
    assert bundle() == SCRIPT
    assert npm.calls == 1
    assert [path.name for path in (empty_cache / "viewer").iterdir()] == ["niivue-0.69.0.umd.js"]


def test_another_file_is_refused(npm, empty_cache):
    npm.content = archive(content=b"alert(1)")
    with pytest.raises(ConfigError, match="delivered another file than @niivue/niivue 0.69.0"):
        bundle()
    assert not (empty_cache / "viewer").exists()


def test_missing_npm_is_said(empty_cache, monkeypatch):
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        bundle()
    assert str(caught.value) == (
        "--viewer needs NiiVue, which cannot be obtained (npm is not installed); install "
        "Node.js's npm with access to its registry, or omit --viewer."
    )


def test_failures_of_npm_are_said(npm):
    lines = "npm error code E404\nnpm error 404 Not Found - no such package.\n"
    lines += "npm error A complete log of this run can be found in: somewhere\n"
    npm.act = lambda command: subprocess.CompletedProcess(command, 1, "", lines)
    with pytest.raises(ConfigError, match=r"\(npm failed: 404 Not Found - no such package\);"):
        bundle()
    npm.act = lambda command: subprocess.CompletedProcess(command, 1, "", "")
    with pytest.raises(ConfigError, match=r"\(npm failed\);"):
        bundle()

    def late(command: list[str]) -> None:
        raise subprocess.TimeoutExpired(command, 300)

    npm.act = late
    with pytest.raises(ConfigError, match="did not answer within 300 s"):
        bundle()


def test_a_cache_that_cannot_be_written_does_no_harm(npm, empty_cache):
    empty_cache.write_text("a file where the directory should be")
    with pytest.raises(ConfigError, match="cannot be read .*; remove it, or omit --viewer"):
        bundle()
    empty_cache.unlink()
    empty_cache.mkdir()
    (empty_cache / "viewer").symlink_to(empty_cache / "nowhere" / "at all")
    assert bundle() == SCRIPT


def test_bundle_of_npm(niivue):
    assert len(niivue) > 1_000_000 and "niivue={}" in niivue[:500]
    assert "</script" not in niivue.lower()
    assert (cache_root() / "viewer" / "niivue-0.69.0.umd.js").is_file()


# -- the page -------------------------------------------------------------------------------------


def test_page_holds_everything(npm):
    page = viewer([make_case(), make_case("ct_1002", 1)])
    assert not re.search(r"@\w+@", page.replace("@niivue/niivue", "")), "a mark was left"
    # Nothing is loaded: no element of the page has an address.
    assert not re.search(r"<link|<iframe|\ssrc=|\shref=|url\(|@import", page)
    packed = re.search(r'id="viewer-niivue">([^<]*)</script>', page)
    assert packed is not None
    assert gzip.decompress(base64.b64decode(packed[1])).decode() == SCRIPT
    assert "NiiVue 0.69.0" in page and "Copyright (c) 2021, Niivue" in page
    assert "2 cases, " in page and "1 case, " in viewer([make_case()])
    assert page == viewer([make_case(), make_case("ct_1002", 1)])


def test_volumes_are_as_given(npm):
    case = make_case()
    (data,) = data_of(viewer([case]))
    assert [one["entry"] for one in data["predictions"]] == ["glua", "source_only"]
    assert data["structures"][1] == {
        "name": "MYO",
        "title": "left ventricular myocardium",
        "color": "#e69f00",
    }
    pairs = [(data["reference"], case.reference)]
    pairs += [(one["labels"], case.predictions[one["entry"]]) for one in data["predictions"]]
    for text, expected in pairs:
        file = volume_of(text)
        assert file.header.get_zooms() == (1.5, 2.0, 4.0)
        assert nib.aff2axcodes(file.affine) == ("R", "A", "S")
        # The second axis of the file grows upwards, rows grow downwards.
        back = np.asarray(file.dataobj).transpose(2, 1, 0)[:, ::-1]
        assert back.dtype == np.uint8
        np.testing.assert_array_equal(back, expected)
    gray = np.asarray(volume_of(data["image"]).dataobj).transpose(2, 1, 0)[:, ::-1]
    np.testing.assert_allclose(gray / 127.5 - 1, np.clip(case.image, -1, 1), atol=1 / 255)


def test_reader_begins_in_the_structures(npm):
    (data,) = data_of(viewer([make_case()]))
    assert data["slices"] == 12
    assert make_case().reference[tuple(data["at"])] > 0
    empty = make_case(reference=np.zeros((12, 20, 24), np.uint8))
    (data,) = data_of(viewer([empty]))
    assert data["at"] == [6, 10, 12]


def test_names_do_not_end_the_script(npm):
    page = viewer([make_case(HOSTILE, predictions={HOSTILE: make_case().reference})])
    assert HOSTILE not in page and "<img" not in page
    (data,) = data_of(page)
    assert data["case"] == data["predictions"][0]["entry"] == HOSTILE
    # A case that is named like a mark of the template stays what it is.
    assert data_of(viewer([make_case("@niivue@")]))[0]["case"] == "@niivue@"


def test_what_cannot_be_shown_is_refused(npm):
    with pytest.raises(ValueError, match="at least one case"):
        viewer([])
    with pytest.raises(ValueError, match="ct_1001: glua has shape"):
        make_case(predictions={"glua": np.zeros((12, 20, 23), np.uint8)})
    with pytest.raises(ValueError, match="the reference has a class without a structure"):
        make_case(structures=STRUCTURES[:1])
    with pytest.raises(ValueError, match="red;}"):
        viewer([make_case(structures=[Structure("A", "a", (1,), "red;}"), STRUCTURES[1]])])


# -- in a browser ---------------------------------------------------------------------------------


@pytest.fixture
def page(browser, niivue, tmp_path) -> Callable[[str], None]:
    """Return a function that opens a page with two cases, the second with a hostile name."""

    def show(head: str = "") -> None:
        cases = [make_case(), make_case(HOSTILE, 1)]
        text = f'<!doctype html><html lang="en"><meta charset="utf-8">{head}{viewer(cases)}</html>'
        file = tmp_path / "report.html"
        file.write_text(text, encoding="utf-8")
        browser.open(file)

    return show


STATE = "document.documentElement.dataset.viewer || null"


def picture(browser) -> np.ndarray:
    """Return the canvas, (H, W, 3) in [0, 1]."""
    browser.wait(STATE, "drawn")
    png = browser.driver.find_element("id", "viewer-canvas").screenshot_as_png
    return imread(io.BytesIO(png))[..., :3]


def choose(browser, name: str, option: int) -> None:
    from selenium.webdriver.support.ui import Select

    Select(browser.driver.find_element("id", f"viewer-{name}")).select_by_index(option)


def show_only(browser, overlay: str) -> None:
    browser.driver.find_element("css selector", f"[value={overlay}]").click()


def start(browser) -> None:
    browser.driver.find_element("id", "viewer-start").click()


def colourful(shown: np.ndarray) -> int:
    """Count the pixels that are not gray."""
    return int((np.ptp(shown, axis=-1) > 0.15).sum())


def test_the_browser_notices_errors_and_requests(browser, tmp_path):
    file = tmp_path / "bad.html"
    file.write_text('<img src="http://elsewhere.example/a.png"><script>throw Error("no")</script>')
    browser.open(file)
    assert any("Error: no" in message for message in browser.errors())
    assert browser.requests() == ["http://elsewhere.example/a.png"]


def test_nothing_is_drawn_before_it_is_asked_for(browser, page):
    page()
    assert browser.driver.execute_script(f"return {STATE}") is None
    assert browser.driver.execute_script("return typeof niivue") == "undefined"
    assert not browser.driver.find_element("id", "viewer-canvas").is_displayed()
    start(browser)
    shown = picture(browser)
    assert shown.std() > 0.05 and colourful(shown) > 1000
    assert not browser.driver.find_element("id", "viewer-start").is_displayed()
    assert not browser.driver.find_element("id", "viewer-message").is_displayed()
    assert browser.errors() == []
    assert browser.requests() == []


def test_every_choice_changes_the_picture(browser, page):
    page()
    start(browser)
    both = picture(browser)
    pictures = {"both": both}
    for overlay in ("prediction", "reference"):
        show_only(browser, overlay)
        pictures[overlay] = picture(browser)
    show_only(browser, "prediction")
    choose(browser, "entry", 1)  # the empty prediction
    pictures["empty"] = picture(browser)
    choose(browser, "case", 1)
    pictures["case"] = picture(browser)
    names = list(pictures)
    for index, name in enumerate(names):
        for other in names[:index]:
            assert (np.abs(pictures[name] - pictures[other]) > 0.1).sum() > 300, (name, other)
    assert colourful(pictures["empty"]) == colourful(pictures["case"]) == 0
    # A choice persists in another case, and the first picture can be restored.
    entry = browser.driver.find_element("id", "viewer-entry")
    assert entry.get_attribute("value") == "source_only"
    choose(browser, "case", 0)
    choose(browser, "entry", 0)
    show_only(browser, "both")
    np.testing.assert_allclose(picture(browser), both, atol=0.02)
    assert browser.errors() == []


def test_areas_are_where_the_prediction_is(browser, page):
    """Row 0 is on top and column 0 at the left; glua is the reference shifted to the right."""
    page()
    start(browser)
    centres = {}
    for overlay in ("reference", "prediction"):
        show_only(browser, overlay)
        shown = picture(browser)
        slice_ = shown[:, : int(0.66 * shown.shape[1])]  # the large plane
        gray = slice_.mean(-1)
        centres[overlay] = np.argwhere(np.ptp(slice_, axis=-1) > 0.15).mean(0)
    (row, column), (moved_row, moved_column) = centres["reference"], centres["prediction"]
    assert moved_column - column > 20 and abs(moved_row - row) < 6
    lit = np.flatnonzero(gray.max(1) > 0.05)  # the image grows brighter downwards
    top, bottom = gray[lit[: len(lit) // 4]], gray[lit[-len(lit) // 4 :]]
    assert top.mean() + 0.2 < bottom.mean()


def test_slices_can_be_gone_through(browser, page):
    page()
    start(browser)
    first = picture(browser)
    position = browser.driver.find_element("id", "viewer-position")
    z = int(data_of(viewer([make_case()]))[0]["at"][0])
    assert position.text == f"{z + 1} of 12"
    browser.driver.find_element("id", "viewer-slice").send_keys("\ue012")  # one to the left
    assert position.text == f"{z} of 12"
    assert np.abs(picture(browser) - first).max() > 0.1


def test_names_are_shown_as_text(browser, page):
    page()
    start(browser)
    browser.wait(STATE, "drawn")
    choose(browser, "case", 1)
    browser.wait(STATE, "drawn")
    option = browser.driver.find_element("css selector", "#viewer-case option:checked")
    assert option.text == HOSTILE
    assert browser.driver.find_elements("css selector", ".viewer img") == []
    legend = browser.driver.find_element("id", "viewer-legend").text
    assert legend.splitlines() == [f"{one.name}: {one.title}" for one in STRUCTURES]
    assert browser.errors() == []


@pytest.mark.parametrize(
    ("script", "state", "message"),
    [
        (
            "HTMLCanvasElement.prototype.getContext = () => null",
            "unsupported",
            "The volumes cannot be shown, because this browser has no WebGL 2.",
        ),
        ("window.DecompressionStream = undefined", "failed", "The volumes cannot be shown ("),
    ],
)
def test_what_cannot_be_drawn_is_said(browser, page, script, state, message):
    page(f"<script>{script}</script>")
    start(browser)
    browser.wait(STATE, state)
    said = browser.driver.find_element("id", "viewer-message").text
    assert said.startswith(message)
    if state == "unsupported":
        assert said == message and browser.errors() == []


@pytest.mark.fault("silent damage", "the viewer's script in the cache")
def test_a_damaged_bundle_is_fetched_again(npm, empty_cache, tries, capsys):
    bundle()
    file = empty_cache / "viewer" / "niivue-0.69.0.umd.js"
    good = file.read_bytes()
    for seed in tries(20):
        file.write_bytes(damaged(good, seed))
        assert bundle() == SCRIPT and file.read_bytes() == good and npm.calls == seed + 2
        assert "; the script is fetched again." in capsys.readouterr().err
