"""The volume viewer of the HTML report: three planes, prediction and reference, offline.

NiiVue draws in the reader's browser. It is not part of this package: `bundle` fetches its script
once, verifies it and caches it, and `viewer` embeds it in the page.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import hashlib
import html
import importlib.resources
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from glua_bench.console import warn
from glua_bench.data.cache import cache_root
from glua_bench.errors import ConfigError, RunFailure
from glua_bench.files import Damaged, read_checked, write_checked
from glua_bench.reports.run_figures import most_visible_slice
from glua_bench.task import Structure

PACKAGE = "@niivue/niivue"
VERSION = "0.69.0"
# Of the package's archive, as npm states it; nothing else is ever embedded.
SHA512 = "YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA=="
# The file of the package that needs neither other files nor a module loader.
SCRIPT = "package/dist/niivue.umd.js"
TIMEOUT_S = 300.0  # for 7 MB

TEMPLATES = importlib.resources.files("glua_bench.reports").joinpath("templates")


@dataclass(frozen=True)
class ViewerCase:
    """One case with its reference and predictions, on one grid.

    Attributes:
        case: displayed name of the case.
        image: (Z, Y, X) in [-1, 1]; row 0 of a slice is at the top, column 0 at the left.
        spacing: mm along Z, Y and X.
        reference: (Z, Y, X), class indices; class i + 1 is `structures[i]`.
        predictions: entry → (Z, Y, X), class indices.
        structures: the classes.

    Raises:
        ValueError: a volume has another shape than the image, or a class has no structure.
    """

    case: str
    image: np.ndarray
    spacing: tuple[float, float, float]
    reference: np.ndarray
    predictions: Mapping[str, np.ndarray]
    structures: Sequence[Structure]

    def __post_init__(self) -> None:
        volumes = {"the reference": self.reference, **self.predictions}
        for name, volume in volumes.items():
            if self.image.ndim != 3 or volume.shape != self.image.shape:
                raise ValueError(
                    f"{self.case}: {name} has shape {volume.shape}, the image {self.image.shape}"
                )
            if volume.size and not 0 <= volume.min() <= volume.max() <= len(self.structures):
                raise ValueError(f"{self.case}: {name} has a class without a structure")


def bundle() -> str:
    """Return NiiVue's script (2.3 MB, defines `niivue`), from the cache or, once, from npm.

    Raises:
        ConfigError: it is not cached, and npm is missing, fails, or delivers another file.
    """
    kept = cache_root() / "viewer" / f"niivue-{VERSION}.umd.js"
    try:
        return read_checked(kept, kept.name).decode()
    except FileNotFoundError:
        pass
    except Damaged as error:
        warn(f"{error}; the script is fetched again.")
    except OSError as error:
        raise ConfigError(
            f"{kept}, which --viewer needs, cannot be read ({error}); remove it, or omit --viewer."
        ) from error
    script = _fetch()
    # If the cache cannot be written, the next report fetches again.
    with contextlib.suppress(RunFailure):
        write_checked(kept, script.encode(), kept.name)
    return script


def viewer(cases: Sequence[ViewerCase]) -> str:
    """Return a self-contained HTML fragment that shows volumes on request.

    It uses the page's CSS variables --ink, --paper and --line, if any, and sets
    `data-viewer="drawn"` on the document's root after drawing. A page can have one such fragment.

    Args:
        cases: in display order.

    Raises:
        ConfigError: NiiVue cannot be obtained, see `bundle`.
        ValueError: `cases` is empty, or a structure has an invalid colour.
    """
    if not cases:
        raise ValueError("a viewer needs at least one case")
    parts = {
        # Escape "<", which could end the script element.
        "data": json.dumps([_as_json(case) for case in cases]).replace("<", "\\u003c"),
        "niivue": _packed(bundle().encode()),
        "version": VERSION,
        "licence": html.escape(_template("niivue_licence.txt")),
        "count": f"{len(cases)} case{'' if len(cases) == 1 else 's'}",
    }
    # Substitute in one pass, so that marks inside a part are not replaced.
    return re.sub(r"@(\w+)@", lambda mark: parts[mark[1]], _template("viewer.html"))


def _template(name: str) -> str:
    return TEMPLATES.joinpath(name).read_text(encoding="utf-8")


def _fetch() -> str:
    """Fetch NiiVue's script with npm."""
    npm = shutil.which("npm")
    if npm is None:
        raise _unobtainable("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts"]
        try:
            done = subprocess.run(
                command,
                cwd=folder,  # ignore npm settings of the user's project
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise _unobtainable(f"npm did not answer within {TIMEOUT_S:.0f} s") from error
        except OSError as error:
            raise _unobtainable(f"npm cannot be started: {error.strerror}") from error
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            raise _unobtainable(f"npm failed{_reason(done.stderr)}")
        return _unpack(archives[0])


def _unpack(archive: Path) -> str:
    """Verify the package's archive and return its script."""
    content = archive.read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != SHA512:
        raise _unobtainable(f"npm delivered another file than {PACKAGE} {VERSION}")
    with tarfile.open(archive) as files:  # nothing is extracted to disk
        member = files.extractfile(SCRIPT)
        assert member is not None, SCRIPT
        return member.read().decode()


def _unobtainable(why: str) -> ConfigError:
    return ConfigError(
        f"--viewer needs NiiVue, which cannot be obtained ({why}); install Node.js's npm with "
        "access to its registry, or omit --viewer."
    )


def _reason(output: str) -> str:
    """Return npm's last error message, to be appended to "npm failed"."""
    lines = [line.partition("npm error ")[2].strip(" .") for line in output.splitlines()]
    lines = [line for line in lines if line and not line.startswith("A complete log")]
    return f": {lines[-1]}" if lines else ""


def _as_json(case: ViewerCase) -> dict:
    from matplotlib.colors import to_hex

    gray = np.rint((np.clip(case.image, -1, 1) + 1) * 127.5).astype(np.uint8)
    return {
        "case": case.case,
        "slices": len(case.image),
        "at": _start_voxel(case.reference),
        "image": _nifti(gray, case.spacing),
        "reference": _nifti(case.reference, case.spacing),
        "predictions": [
            {"entry": entry, "labels": _nifti(labels, case.spacing)}
            for entry, labels in case.predictions.items()
        ],
        "structures": [
            {"name": structure.name, "title": structure.title, "color": to_hex(structure.color)}
            for structure in case.structures
        ],
    }


def _start_voxel(reference: np.ndarray) -> list[int]:
    """Return the initial crosshair (z, y, x): amid the structures of the most visible slice."""
    if not reference.any():
        return [size // 2 for size in reference.shape]
    z = most_visible_slice(reference)
    places = np.argwhere(reference[z])
    nearest = np.linalg.norm(places - places.mean(0), axis=1).argmin()
    return [z, *(int(position) for position in places[nearest])]


def _nifti(volume: np.ndarray, spacing: tuple[float, float, float]) -> str:
    """Encode a (Z, Y, X) volume as compressed NIfTI in base64.

    NiiVue draws the second axis upwards, so rows are reversed. RAS+ only prevents reordering by
    NiiVue; it does not claim where the patient's right is.
    """
    array = np.ascontiguousarray(volume[:, ::-1].transpose(2, 1, 0), dtype=np.uint8)
    file = nib.Nifti1Image(array, np.diag([*spacing[::-1], 1.0]))
    file.header.set_xyzt_units("mm")
    return _packed(file.to_bytes())


def _packed(content: bytes) -> str:
    # Without a time stamp, so that equal volumes give equal pages.
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()
