"""Guesses from headers and labels: plane of the slices, and headers that contradict each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np

from glua_bench.data.formats import VolumeFile, open_volume
from glua_bench.data.geometry import ambiguities, frame
from glua_bench.datasets.folder.description import PLANES
from glua_bench.errors import DataError

# Minimum ratio of the slice distance to the median voxel side.
_THICK = 1.5
# Maximum ratio of labelled slices along an axis to those along others, if only some were annotated.
_FLAT = 0.5
# Minimum fraction of unannotated slices between annotated ones.
_SPARSE = 0.3
# Maximum relative spread of structures in stored arrays, relative to that by headers, for headers
# that contradict the arrays; and minimum spread by headers, as a fraction of the volume's side.
_AGREE, _SPREAD = 0.7, 0.05
_MOST = 12  # structures whose positions are compared

Three = tuple[float, float, float]


@dataclass(frozen=True)
class Anatomy:
    """Where the structures of a label lie, along the stored axes.

    Attributes:
        shape: voxels.
        centres: raw value → centre as a fraction of each side.
        slices: number of slices with any structure.
        gaps: number of slices without structures between others.
    """

    shape: tuple[int, ...]
    centres: Mapping[int, np.ndarray]
    slices: tuple[int, ...]
    gaps: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The geometry of an image file.

    Attributes:
        path: the file.
        shape: voxels along the stored axes.
        sides: mm along the stored axes.
        axes: canonical axis (right, front, up) of each stored axis; None if undefined.
        signs: 1 if a stored axis points along its canonical axis, else -1.
        codes: orientation in letters; "" if undefined.
        doubt: sentence on an ambiguity of the header, or "".
    """

    path: Path
    shape: tuple[int, ...]
    sides: Three
    axes: tuple[int, ...] | None
    signs: tuple[int, ...]
    codes: str
    doubt: str = ""


def anatomy(labels: np.ndarray, values: Sequence[int]) -> Anatomy:
    """Measure where the structures of a label volume lie.

    Args:
        labels: raw values as integers, 0 for background.
        values: those that occur, without 0.
    """
    found = labels != 0
    slices, gaps, box = [], [], []
    for axis in range(3):
        filled = np.flatnonzero(found.any(axis=tuple(a for a in range(3) if a != axis)))
        first, stop = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 0)
        box.append(slice(first, stop))
        slices.append(len(filled))
        gaps.append(stop - first - len(filled))
    inner = labels[tuple(box)]
    centres: dict[int, np.ndarray] = {}
    for value in values[:_MOST]:
        mask, centre = inner == value, []
        for axis in range(3):
            profile = mask.sum(axis=tuple(a for a in range(3) if a != axis))
            places = box[axis].start + np.arange(len(profile)) + 0.5
            centre.append((profile * places).sum() / profile.sum() / labels.shape[axis])
        centres[value] = np.array(centre)
    return Anatomy(labels.shape, centres, tuple(slices), tuple(gaps))


def header(file: VolumeFile) -> Header:
    """Return the geometry of an image file."""
    sides = tuple(float(side) for side in nib.affines.voxel_sizes(file.affine))
    made = Header(file.path, file.shape, (sides[0], sides[1], sides[2]), None, (1, 1, 1), "")
    with np.errstate(all="ignore"):
        try:
            found = nib.io_orientation(file.affine)
        except np.linalg.LinAlgError:
            found = np.full((3, 2), np.nan)
    if not np.isfinite(found).all():
        return replace(made, doubt=f"{file.path} has no usable orientation")
    made = replace(
        made,
        axes=tuple(int(axis) for axis in found[:, 0]),
        signs=tuple(int(sign) for sign in found[:, 1]),
        codes="".join(nib.orientations.ornt2axcodes(found)),
    )
    try:
        frame(file, PLANES["axial"])
    except DataError:
        return made  # reported by `data check`
    texts = [text for _, text in ambiguities(file, PLANES["axial"])]
    return replace(made, doubt=texts[0].rstrip(".") if texts else "")


# -- headers that contradict each other -----------------------------------------------------------


def contradiction(headers: Mapping[str, Header]) -> str:
    """Describe how the headers of a domain contradict each other or themselves; "" if not."""
    counts = Counter(own.codes or "none" for own in headers.values())
    if len(counts) > 1:
        listed = []
        for codes, count in counts.most_common():
            odd = next(own.path.name for own in headers.values() if (own.codes or "none") == codes)
            listed.append(f"{codes} ({f'{count} files' if count > 1 else odd})")
        return f"the headers give different orientations: {', '.join(listed)}"
    doubts = [own.doubt for own in headers.values() if own.doubt]
    if doubts:
        more = f", and {len(doubts) - 1} more" if len(doubts) > 1 else ""
        return f"{doubts[0].split(':')[0]}{more}"
    return ""


def usual(headers: Mapping[str, Header]) -> Header | None:
    """Return the first header with the most frequent orientation; None if there is none."""
    counts = Counter(own.codes for own in headers.values() if own.codes)
    if not counts:
        return None
    codes = counts.most_common(1)[0][0]
    return next(own for own in headers.values() if own.codes == codes)


def spreads(
    headers: Mapping[str, Header], anatomies: Mapping[str, Anatomy]
) -> tuple[float, float] | None:
    """Return how far apart a structure lies in different cases, in stored arrays and by headers.

    Returns:
        Mean standard deviations as fractions of the volumes' sides; None if undefined.
    """
    known = [(headers[case], own) for case, own in anatomies.items() if headers[case].axes]
    values = [set(own.centres) for _, own in known if own.centres]
    common = sorted(set.intersection(*values)) if values else []
    if len({one.codes for one, _ in known}) < 2 or not common:
        return None
    stored, turned = [], []
    for one, own in known:
        if not own.centres:
            continue
        stored.append([own.centres[value] for value in common])
        turned.append([_by_header(one, own.centres[value]) for value in common])
    return float(np.std(stored, axis=0).mean()), float(np.std(turned, axis=0).mean())


def _by_header(one: Header, centre: np.ndarray) -> np.ndarray:
    """Return fractions of the volume's sides along right, front and up."""
    made = np.zeros(3)
    for place, (axis, sign) in enumerate(zip(one.axes or (), one.signs, strict=True)):
        made[axis] = centre[place] if sign > 0 else 1 - centre[place]
    return made


def arrays_agree(found: tuple[float, float] | None) -> bool:
    """Return True if structures lie alike in stored arrays, but not by the headers."""
    return found is not None and found[1] > _SPREAD and found[0] < _AGREE * found[1]


def stored_axes(one: Header, plane: str) -> tuple[int, int, list[int]] | None:
    """Return slice axis, row axis and reversed axes of stored arrays with a header's orientation.

    Returns:
        The entries of `stored` in a description; None if the header defines no orientation.
    """
    if one.axes is None:
        return None
    try:
        _, _, axes, flips = frame(open_volume(one.path), PLANES[plane])
    except DataError:
        return None
    flipped = sorted(axis for axis, flip in zip(axes, flips, strict=True) if flip)
    return axes[0], axes[1], flipped


# -- the plane of the slices ----------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """Medians over the cases of a domain, along right, front and up.

    Attributes:
        spacing: mm.
        extent: side of the volume in mm.
        voxels: side of the volume in voxels.
        slices: slices with structures; 0 without labels.
        gaps: slices without structures between others.
        last: canonical axis of the last stored axis; None if cases differ.
    """

    spacing: np.ndarray
    extent: np.ndarray
    voxels: np.ndarray
    slices: np.ndarray
    gaps: np.ndarray
    last: int | None


def body(headers: Mapping[str, Header], anatomies: Mapping[str, Anatomy], stored: bool) -> Body:
    """Summarise the cases of a domain along the axes of the body.

    Args:
        headers: of all images.
        anatomies: of the labelled cases.
        stored: True if arrays are used as stored, with the usual orientation.
    """
    common = usual(headers)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("spacing", "voxels")}
    counts: dict[str, list[np.ndarray]] = {name: [] for name in ("slices", "gaps")}
    last = set()
    for case, own in headers.items():
        axes = common.axes if stored and common else own.axes
        if axes is None:
            continue
        order = list(np.argsort(axes))
        rows["spacing"].append(np.array(own.sides)[order])
        rows["voxels"].append(np.array(own.shape)[order])
        last.add(axes[2])
        if case in anatomies and max(anatomies[case].slices):
            counts["slices"].append(np.array(anatomies[case].slices)[order])
            counts["gaps"].append(np.array(anatomies[case].gaps)[order])
    zeros = np.zeros((1, 3))
    spacing, voxels = (np.array(rows[name] or zeros, float) for name in ("spacing", "voxels"))
    slices, gaps = (np.median(counts[name] or zeros, axis=0) for name in ("slices", "gaps"))
    return Body(
        np.median(spacing, axis=0),
        np.median(spacing * voxels, axis=0),
        np.median(voxels, axis=0),
        slices,
        gaps,
        last.pop() if len(last) == 1 else None,
    )


def guess_plane(bodies: Mapping[str, Body]) -> tuple[str, str]:
    """Guess the plane that the slices of all domains were acquired or annotated in.

    Evidence in this order: one voxel side that is much larger than the others, unless it lies along
    the axis with most voxels; slices annotated at intervals along one axis; structures annotated in
    few slices along one axis; and, for isotropic voxels, the order in which arrays are stored. The
    strongest evidence of any domain decides.

    Returns:
        Name of the plane, and the reason in words.
    """
    votes = [_vote(own) for own in bodies.values()]
    same: dict[str, list[str]] = {}
    for name, (_, _, text) in zip(bodies, votes, strict=True):
        same.setdefault(text, []).append(name)
    reasons = [f"{', '.join(names)}: {text}" for text, names in same.items()]
    _, axis = max(((strength, a) for strength, a, _ in votes), key=lambda vote: vote[0])
    return _name(axis), "; ".join(reasons)


def _vote(own: Body) -> tuple[float, int, str]:
    """Return the strength of a domain's evidence, the axis, and the evidence in words."""
    ratios = own.spacing / max(float(np.median(own.spacing)), 1e-9)
    thick = int(np.argmax(ratios))
    others = np.delete(own.voxels, thick)
    seen = _counted(own)
    if ratios[thick] >= _THICK and own.voxels[thick] <= 2 * others.max():
        text = f"slices of {own.spacing[thick]:.3g} mm are {_name(thick)}"
        return 2 + float(ratios[thick]), thick, text
    what = "voxels are about isotropic"
    if ratios[thick] >= _THICK:
        what = (
            f"voxels are largest ({own.spacing[thick]:.3g} mm) across {_name(thick)} slices, of "
            f"which there are most ({own.voxels[thick]:.0f}): check the header"
        )
    if own.slices.any():
        sparse = [a for a in range(3) if own.gaps[a] >= _SPARSE * own.slices[a]]
        if len(sparse) == 1:
            return 2, sparse[0], f"{what}, and labels are drawn on some {_name(sparse[0])} slices"
        flat = int(np.argmin(own.slices))
        if own.slices[flat] < _FLAT * np.delete(own.slices, flat).min():
            return 1.5, flat, f"{what}, {seen}"
    what += "" if own.last is None else f", arrays are stored as {_name(own.last)} slices"
    what += f", {seen}" if seen else ""
    return (0, PLANES["axial"].slice_axis, what) if own.last is None else (1, own.last, what)


def _counted(own: Body) -> str:
    """Describe the number of labelled slices in each plane; "" without labels."""
    if not own.slices.any():
        return ""
    counts = [f"{own.slices[r.slice_axis]:.0f} {name}" for name, r in PLANES.items()]
    return f"labels in {counts[0]}, {counts[1]} and {counts[2]} slices"


def _name(axis: int) -> str:
    return next(name for name, reading in PLANES.items() if reading.slice_axis == axis)
