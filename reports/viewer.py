"""Volumes of cases in the HTML report: three planes, prediction and reference, without a network.

Drawn by NiiVue in the reader's browser. NiiVue is no part of this package: `bundle` gets its
script once, checks it and keeps it in the cache, and `viewer` writes it into the page.
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

from glua_bench.data.cache import cache_root
from glua_bench.errors import ConfigError, RunFailure
from glua_bench.files import write_text
from glua_bench.reports.run_figures import most_visible_slice
from glua_bench.task import Structure

PACKAGE = "@niivue/niivue"
VERSION = "0.69.0"
# Of the package's archive, as npm states it; what was not read by us is never embedded.
SHA512 = "YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA=="
# The one file of the package that needs no other file and no module loader.
SCRIPT = "package/dist/niivue.umd.js"
PATIENCE_S = 300.0  # for 7 MB

TEMPLATES = importlib.resources.files("glua_bench.reports").joinpath("templates")


@dataclass(frozen=True)
class ViewerCase:
    """One case, with what was predicted and what is right, on one grid.

    Args:
        case: what the reader is shown as the case's name.
        image: (Z, Y, X) in [-1, 1]; row 0 of a slice is shown on top, column 0 at the left.
        spacing: mm along Z, Y and X.
        reference: (Z, Y, X), class indices; class i + 1 is `structures[i]`.
        predictions: entry → (Z, Y, X), class indices.
        structures: the classes, with the colours that they have in every figure.

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
    """NiiVue's script, from the cache or, once, from the package registry that npm uses.

    Returns:
        A classic script of 2.3 million characters that defines `niivue`.

    Raises:
        ConfigError: the cache has none, and npm is missing, fails, or delivers something else.
    """
    kept = cache_root() / "viewer" / f"niivue-{VERSION}.umd.js"
    try:
        return kept.read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{kept}, which --viewer needs, cannot be read ({error}); remove it, or leave "
            "--viewer out."
        ) from error
    script = _fetch()
    # A cache that cannot be written costs the next report some seconds, never this one.
    with contextlib.suppress(RunFailure):
        write_text(kept, script)
    return script


def viewer(cases: Sequence[ViewerCase]) -> str:
    """An HTML fragment that shows volumes, with everything that it needs.

    Nothing is drawn before the reader asks for it. The fragment uses the page's CSS variables
    --ink, --paper and --line where there are any. Once the first volume is drawn, the document's
    root has `data-viewer="drawn"`. A page can hold one such fragment.

    Args:
        cases: in the order in which they are offered.

    Raises:
        ConfigError: NiiVue cannot be obtained, see `bundle`.
        ValueError: there is no case, or the colour of a structure is none.
    """
    if not cases:
        raise ValueError("a viewer needs at least one case")
    parts = {
        # In angle brackets an element could end, so that data must have none.
        "data": json.dumps([_as_json(case) for case in cases]).replace("<", "\\u003c"),
        "niivue": _packed(bundle().encode()),
        "version": VERSION,
        "licence": html.escape(_template("niivue_licence.txt")),
        "count": f"{len(cases)} case{'' if len(cases) == 1 else 's'}",
    }
    # One pass over the template, so that nothing inside a part is taken for a mark.
    return re.sub(r"@(\w+)@", lambda mark: parts[mark[1]], _template("viewer.html"))


def _template(name: str) -> str:
    return TEMPLATES.joinpath(name).read_text(encoding="utf-8")


def _fetch() -> str:
    """NiiVue's script from its package."""
    npm = shutil.which("npm")
    if npm is None:
        raise _unobtainable("npm is not installed")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts"]
        try:
            done = subprocess.run(
                command,
                cwd=folder,  # not the user's project, whose settings are not meant for this
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=PATIENCE_S,
            )
        except subprocess.TimeoutExpired as error:
            raise _unobtainable(f"npm did not answer within {PATIENCE_S:.0f} s") from error
        except OSError as error:
            raise _unobtainable(f"npm cannot be started: {error.strerror}") from error
        archives = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(archives) != 1:
            raise _unobtainable(f"npm failed{_reason(done.stderr)}")
        return _unpack(archives[0])


def _unpack(archive: Path) -> str:
    """The script in the package's archive, which must be the one that we know."""
    content = archive.read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != SHA512:
        raise _unobtainable(f"npm delivered another file than {PACKAGE} {VERSION}")
    with tarfile.open(archive) as files:  # read in place: no path of the archive is written to
        member = files.extractfile(SCRIPT)
        assert member is not None, SCRIPT
        return member.read().decode()


def _unobtainable(why: str) -> ConfigError:
    return ConfigError(
        f"--viewer needs NiiVue once, and it cannot be obtained ({why}); install Node.js's npm "
        "and give it access to its registry, or leave --viewer out."
    )


def _reason(output: str) -> str:
    """What npm said last about the error itself, to be put behind "npm failed"."""
    lines = [line.partition("npm error ")[2].strip(" .") for line in output.splitlines()]
    lines = [line for line in lines if line and not line.startswith("A complete log")]
    return f": {lines[-1]}" if lines else ""


def _as_json(case: ViewerCase) -> dict:
    # Figures take any colour that matplotlib knows, so it is asked here too.
    from matplotlib.colors import to_hex

    gray = np.rint((np.clip(case.image, -1, 1) + 1) * 127.5).astype(np.uint8)
    return {
        "case": case.case,
        "slices": len(case.image),
        "at": _telling_voxel(case.reference),
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


def _telling_voxel(reference: np.ndarray) -> list[int]:
    """Where the reader begins, (z, y, x): amid the structures of the slice that shows most."""
    if not reference.any():
        return [size // 2 for size in reference.shape]
    z = most_visible_slice(reference)
    places = np.argwhere(reference[z])
    nearest = np.linalg.norm(places - places.mean(0), axis=1).argmin()
    return [z, *(int(position) for position in places[nearest])]


def _nifti(volume: np.ndarray, spacing: tuple[float, float, float]) -> str:
    """A compressed NIfTI file of (Z, Y, X), as base64.

    NiiVue draws the second axis upwards, rows of ours run downwards. The file is written in RAS+
    so that NiiVue does not reorder it, which is about display alone: where a patient's right is
    depends on the data set and is not claimed.
    """
    array = np.ascontiguousarray(volume[:, ::-1].transpose(2, 1, 0), dtype=np.uint8)
    file = nib.Nifti1Image(array, np.diag([*spacing[::-1], 1.0]))
    file.header.set_xyzt_units("mm")
    return _packed(file.to_bytes())


def _packed(content: bytes) -> str:
    # Without the time, so that the same volumes give the same page.
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()
