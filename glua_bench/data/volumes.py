"""Load volumes onto the working grid, and map predictions back to the file's voxels.

A `Placement` connects three frames:

- the *file* frame: stored array axes, in which results are saved and scored;
- the *oriented* frame: (Z, Y, X) after the dataset's `Reading`, a permutation and reversal of axes;
- the *working* frame: the (Z, H, W) grid of the networks, an offset and a scale per axis.

The crop and the intensity range are computed from the image alone, never from a label.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from glua_bench.data.formats import Forms, VolumeFile, open_volume
from glua_bench.data.geometry import (
    axis_codes,
    follows_other_form,
    frame,
    max_displacement,
    orient,
    orientation,
    rows_of,
    same_place,
    second_form,
    voxel_ml,
)
from glua_bench.data.resampling import Map, Placement, apply, maps_to_file, maps_to_grid
from glua_bench.errors import DataError
from glua_bench.files import replacing
from glua_bench.task import UNANNOTATED, DomainView, Grid, Reading

# Relative tolerance for equal pixel sizes, which need no interpolation: over 256 pixels, the drift
# is below a quarter of a pixel.
_SAME_SPACING = 1e-3

# Maximum size of the regular subsample for percentiles.
_SAMPLE = 2_000_000
# Voxels per block of a pass over a volume, chosen to fit into the processor's cache.
_PIECE = 1 << 18
# Voxels per block of slices in float32.
_SLAB = 1 << 21
_STRAY = 254  # class index of unknown label values
# Tolerance for rounding errors of label values.
_ROUNDED = 1e-3
# Limits of intensities and of their range, beyond which float32 overflows on scaling to [-1, 1].
_LARGEST, _LEAST_RANGE = 1e18, 1e-18


@dataclass(frozen=True)
class GridImage:
    """An image volume on the working grid.

    Attributes:
        voxels: float32 (Z, H, W) in [-1, 1]; -1 where the grid extends beyond the volume.
        placement: maps the grid to the file's voxels.
    """

    voxels: np.ndarray
    placement: Placement


@dataclass(frozen=True)
class Names:
    """What messages about a label file say.

    Attributes:
        image: what the file that defines its grid is, e.g. "reference".
        unknown: what unknown label values are, and what to do about them.
    """

    image: str = "image"
    unknown: str = (
        "unknown to the dataset: relabel the file, or list them in the dataset's structures, "
        "ignored_values or unannotated_values"
    )


def load_image(path: Path | VolumeFile, reading: Reading, grid: Grid) -> GridImage:
    """Load an image onto the working grid, scaled to [-1, 1].

    All slices are kept. In plane, the window of `grid.size` pixels is centred on the volume if it
    covers the volume, otherwise on the bounding box of the foreground, shifted to stay within the
    volume. The foreground is the largest component above half of Otsu's threshold on a coarse,
    smoothed copy, which excludes air and couch. Intensities are clipped before interpolation to the
    reading's `intensity_range`, or to its percentiles inside the bounding box over voxels above the
    volume's minimum (scanners pad with a constant).

    Args:
        path: a 3-D volume file, or the result of `open_volume`.
        reading: orientation, spacing and intensities of the dataset.
        grid: the working grid.

    Raises:
        DataError: as for `open_volume`, or the volume is constant or not finite.
    """
    file = path if isinstance(path, VolumeFile) else open_volume(path)
    reading = reading.channel(0)
    affine, spacing, axes, flips = frame(file, reading)
    stored = file.voxels()
    ends = extremes(file, stored)
    volume = orient(stored, axes, flips)
    box = foreground(file, volume)
    low, high = _intensity_range(file, volume, box, ends, reading)

    windows = [
        _window(length, spacing[axes[axis]], bounds, axis, grid)
        for axis, (length, bounds) in enumerate(zip(volume.shape, box, strict=True))
    ]
    offset, step, shape = zip(*windows, strict=True)
    placement = Placement(
        file_shape=file.shape,
        affine=rows_of(affine),
        forms=file.forms,
        spacing=spacing,
        ml=voxel_ml(affine, spacing, reading),
        axes=axes,
        flips=flips,
        offset=offset,
        step=step,
        shape=shape,
    )
    return GridImage(_on_grid(file, volume, placement, low, high), placement)


def load_channel(
    path: Path | VolumeFile, reading: Reading, index: int, placement: Placement, first: Path
) -> np.ndarray:
    """Load the second or a later channel of an image onto the grid of the first.

    Intensities are scaled by the channel's own window or percentiles, as in `load_image`.

    Args:
        path: the channel's file, or the result of `open_volume`.
        reading: of the domain.
        index: of the channel, from 1.
        placement: of the first channel.
        first: the first channel's file, for messages.

    Returns:
        float32 (Z, H, W) in [-1, 1].

    Raises:
        DataError: as for `load_image`, or the channel is not on the first channel's grid.
    """
    file = path if isinstance(path, VolumeFile) else open_volume(path)
    name, own = reading.channels[index].name, reading.channel(index)
    check_same_grid(file, name, own, placement.file_shape, np.array(placement.affine), first)
    stored = file.voxels()
    ends = extremes(file, stored)
    volume = orient(stored, placement.axes, placement.flips)
    low, high = _intensity_range(file, volume, foreground(file, volume), ends, own)
    return _on_grid(file, volume, placement, low, high)


def check_same_grid(
    file: VolumeFile,
    channel: str,
    reading: Reading,
    shape: tuple[int, int, int],
    affine: np.ndarray,
    first: Path,
) -> None:
    """Refuse a channel that is not on the grid of the first channel.

    Args:
        file: the channel.
        channel: its name.
        reading: a stored orientation compares only shapes.
        shape: of the first channel's file.
        affine: of the first channel's file.
        first: the first channel's file.

    Raises:
        DataError: shape or (canonical) geometry differ.
    """
    if file.shape != shape:
        what = f"has shape {file.shape} but the first channel {first} has {shape}"
    elif reading.orientation == "canonical" and not same_place(file.affine, affine, shape):
        far = max_displacement(file.affine, affine, shape)
        what = f"is displaced by up to {far:.3g} mm from the first channel {first}"
    else:
        return
    raise DataError(
        f"{file.path}, channel {channel}, {what}: resample all channels of a case onto one grid."
    )


def _on_grid(
    file: VolumeFile, volume: np.ndarray, placement: Placement, low: float, high: float
) -> np.ndarray:
    """Resample an oriented volume and map intensities from low to high to -1 to 1."""
    maps = maps_to_grid(placement)
    voxels = np.full(placement.shape, -1.0, np.float32)
    rows, columns = maps[1].window(), maps[2].window()
    for z, plane in _planes(file, volume, maps[0]):
        np.clip(plane, low, high, out=plane)
        resampled = apply(maps[1], maps[2], plane[None])[0, rows, columns]
        voxels[z, rows, columns] = (resampled - low) * (2 / (high - low)) - 1
    np.clip(voxels, -1.0, 1.0, out=voxels)
    return voxels


def load_label(path: Path, image_path: Path, view: DomainView, placement: Placement) -> np.ndarray:
    """Load a label volume onto the working grid of its image.

    Each class is interpolated linearly and the class with the largest weight wins (in a tie, the
    lower index), as in `restore`. Nearest-neighbour interpolation would fray thin walls.

    Args:
        path: the label file.
        image_path: its image, for messages.
        view: of the domain; class i + 1 is `structures[i]`, `ignored_values` are background and
            `unannotated_values` become `UNANNOTATED`.
        placement: of the image.

    Returns:
        uint8 (Z, H, W), class indices or `UNANNOTATED`; 0 where the grid extends beyond the volume.

    Raises:
        DataError: as for `read_label_volume`.
    """
    shape, affine = placement.file_shape, np.array(placement.affine)
    classes = _read_classes(path, image_path, shape, affine, placement.forms, view)
    volume = orient(classes, placement.axes, placement.flips)
    maps = maps_to_grid(placement)
    labels = np.zeros(placement.shape, np.uint8)
    # Restricted to the extent of the structures, since most of a volume is background.
    rows, columns = volume.max(axis=2) > 0, volume.max(axis=1) > 0
    for z in range(placement.shape[0]):
        taps, weights = maps[0].row(z)
        if not rows[taps].any():
            continue
        down, across = maps[1].reached(rows[taps].any(0)), maps[2].reached(columns[taps].any(0))
        if down is None or across is None:
            continue
        slab = np.stack([volume[tap, down[1], across[1]] for tap in taps])
        present = np.flatnonzero(np.bincount(slab.ravel()))
        shares = np.zeros((len(present), *slab.shape[1:]), np.float32)
        for plane, weight in zip(slab, weights, strict=True):
            shares += weight * (plane == present[:, None, None])
        labels[z, down[0], across[0]] = present[apply(down[2], across[2], shares).argmax(0)]
    return labels


def read_label_volume(
    path: Path, image_path: Path, view: DomainView, names: Names = Names()
) -> np.ndarray:
    """Read a label volume on the file's own grid.

    Args:
        path: the label file.
        image_path: its image, of which only the header is read.
        view: of the domain, as for `load_label`.
        names: what messages call the image and recommend.

    Returns:
        uint8, class indices or `UNANNOTATED`, in the file's stored axes and shape.

    Raises:
        DataError: as for `open_volume`; or shape or (canonical) orientation differ from the image,
            or a value is not an integer or not known to the dataset.
    """
    image = open_volume(image_path)
    return _read_classes(path, image_path, image.shape, image.affine, image.forms, view, names)


def restore(probabilities: np.ndarray, placement: Placement) -> np.ndarray:
    """Map class probabilities to labels on the file's voxels.

    Probabilities are interpolated linearly and the most probable class wins (in a tie, the lower
    index). Voxels outside the in-plane window of the working grid are background.

    Args:
        probabilities: float (K, Z, H, W), or logits or a one-hot volume.
        placement: of the image.

    Returns:
        uint8, class indices in the file's stored axes and shape.

    Raises:
        ValueError: the shape is not that of the working grid.
    """
    labels = np.zeros(placement.file_shape, np.uint8)
    volume = orient(labels, placement.axes, placement.flips)  # a view: writes reach `labels`
    for z, inside, mixed in _restored(probabilities, placement):
        volume[z][inside] = mixed.argmax(0)[inside]
    return labels


def restore_probabilities(probabilities: np.ndarray, placement: Placement) -> np.ndarray:
    """Map class probabilities to the file's voxels, as `restore` does before the argmax.

    Returns:
        float32 (X, Y, Z of the file, K); background outside the window of the working grid.

    Raises:
        ValueError: the shape is not that of the working grid.
    """
    maps = np.zeros((*placement.file_shape, len(probabilities)), np.float32)
    maps[..., 0] = 1
    views = [
        orient(maps[..., k], placement.axes, placement.flips) for k in range(len(probabilities))
    ]
    for z, inside, mixed in _restored(probabilities, placement):
        for view, plane in zip(views, mixed, strict=True):
            view[z][inside] = plane[inside]
    return maps


def _restored(
    probabilities: np.ndarray, placement: Placement
) -> Iterator[tuple[int, Any, np.ndarray]]:
    """Yield index, in-window rows and columns and probabilities (K, Y, X) of oriented slices."""
    if probabilities.ndim != 4 or probabilities.shape[1:] != placement.shape:
        raise ValueError(
            f"Probabilities have shape {probabilities.shape}, but the working grid is "
            f"(K, {', '.join(map(str, placement.shape))})."
        )
    maps = maps_to_file(placement)
    assert maps[0].inside.all(), "every slice is predicted"
    inside = np.ix_(maps[1].inside, maps[2].inside)
    for z in range(placement.oriented_shape[0]):
        taps, weights = maps[0].row(z)
        mixed = np.zeros((probabilities.shape[0], *placement.shape[1:]), np.float32)
        for tap, weight in zip(taps, weights, strict=True):
            mixed += weight * probabilities[:, tap]
        yield z, inside, apply(maps[1], maps[2], mixed)


def save_labels(
    path: Path, labels: np.ndarray, placement: Placement, values: Sequence[int]
) -> None:
    """Write class indices as a NIfTI file with the dataset's label values.

    qform, sform, voxel size and unit are copied from the image, so that all programs overlay both.

    Args:
        path: ends in .nii.gz or .nii.
        labels: integer class indices in the file's stored axes and shape.
        placement: of the image.
        values: label values; class i + 1 becomes `values[i]`, class 0 stays 0.

    Raises:
        ValueError: the shape is not the file's, or a class index has no value.
        RunFailure: the disk is full or the directory cannot be written.
    """
    if labels.shape != placement.file_shape:
        raise ValueError(f"Labels have shape {labels.shape}, not {placement.file_shape}.")
    save_volume(path, label_values(labels, values), placement.forms)


def label_values(labels: np.ndarray, values: Sequence[int]) -> np.ndarray:
    """Convert class indices to label values, in the smallest integer type.

    Raises:
        ValueError: a class index has no value.
    """
    table = np.array([0, *values], np.int64)
    if labels.size and int(labels.max()) >= len(table):
        raise ValueError(f"Class {int(labels.max())} has no label value in {list(values)}.")
    kind = np.result_type(*(np.min_scalar_type(int(value)) for value in table))
    return table.astype(kind)[labels]


def save_maps(path: Path, maps: np.ndarray, placement: Placement) -> None:
    """Write class probabilities as a NIfTI file with the geometry of the image.

    Args:
        path: ends in .nii.gz or .nii.
        maps: float32, the file's shape and a last axis for the classes, background first.
        placement: of the image.

    Raises:
        ValueError: the shape is not the file's.
        RunFailure: the disk is full or the directory cannot be written.
    """
    if maps.shape[:3] != placement.file_shape:
        raise ValueError(f"Maps have shape {maps.shape}, not {placement.file_shape}.")
    save_volume(path, maps, placement.forms)


def save_volume(path: Path, voxels: np.ndarray, forms: Forms) -> None:
    """Write voxels as NIfTI, atomically.

    Args:
        path: ends in .nii.gz or .nii.
        voxels: in stored axes and data type.
        forms: geometry of the header.

    Raises:
        RunFailure: the disk is full or the directory cannot be written.
    """
    header = nib.Nifti1Header()
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    forms.write(header)
    image = nib.Nifti1Image(voxels, None, header)
    with replacing(path) as temporary:
        nib.save(image, temporary)


def slice_distance(path: Path, reading: Reading) -> float:
    """Return the slice distance of an image file in mm, from its header.

    Raises:
        DataError: as for `open_volume`, or the header has no usable geometry.
    """
    _, spacing, axes, _ = frame(open_volume(path), reading)
    return spacing[axes[0]]


def _read_classes(
    path: Path,
    image_path: Path,
    shape: tuple[int, int, int],
    affine: np.ndarray,
    forms: Forms,
    view: DomainView,
    names: Names = Names(),
) -> np.ndarray:
    """Read and check a label; return class indices in stored axes."""
    beside = names.image
    reading = view.reading
    file = open_volume(path)
    if file.shape != shape:
        raise DataError(
            f"{path} has shape {file.shape} but its {beside} {image_path} has {shape}: "
            f"resample the label onto the {beside}."
        )
    if reading.orientation == "canonical" and not same_place(file.affine, affine, shape):
        codes = [axis_codes(file.affine, path), axis_codes(affine, image_path)]
        # Compared axis by axis, because at 45° the names of axes depend on rounding.
        sides = [np.linalg.norm(own[:3, :3], axis=0) for own in (file.affine, affine)]
        between = np.eye(4)
        between[:3, :3] = (affine[:3, :3] / sides[1]).T @ (file.affine[:3, :3] / sides[0])
        if (orientation(between, path) != [[0, 1], [1, 1], [2, 1]]).any():
            what = f"has orientation {codes[0]} but its {beside} {image_path} has {codes[1]}"
            if codes[0] == codes[1]:
                what = f"is rotated by more than 45° relative to its {beside} {image_path}"
            second = second_form(file.forms, shape), second_form(forms, shape)
            other = follows_other_form((file.affine, second[0]), (affine, second[1]), shape)
            fix = f"{other}, so make both headers agree" if other else "resample the label onto it"
            for place, own in ((path, file.forms), (image_path, forms)):
                if not any(own.codes):
                    fix = f"{place} has no geometry in its header, so add it"
            raise DataError(f"{path} {what}: {fix}.")
    known = {0: 0}
    known.update(dict.fromkeys(reading.ignored_values, 0))
    known.update(dict.fromkeys(reading.unannotated_values, UNANNOTATED))
    for index, structure in enumerate(view.structures, start=1):
        known.update(dict.fromkeys(structure.values, index))
    stored = file.voxels().reshape(-1, order="F")
    classes = np.zeros(stored.shape, np.uint8)
    strays: list[int] = []
    for piece in _pieces(stored):
        part = label_integers(file.scaled(stored[piece]), path)
        classes[piece] = found = _look_up(part, known)
        strange = found == _STRAY
        if strange.any():
            strays = sorted({*strays, *np.unique(part[strange]).tolist()})[:6]
    if strays:
        shown = ", ".join(map(str, strays[:5])) + (", …" if len(strays) > 5 else "")
        raise DataError(f"{path} has label value(s) {shown} {names.unknown}.")
    return classes.reshape(shape, order="F")


def values_of(path: Path) -> set[int]:
    """Return the label values of a file.

    Raises:
        DataError: as for `open_volume`, or a value is not an integer.
    """
    file = open_volume(path)
    return set(label_integers(np.unique(file.scaled(file.voxels())), path).tolist())


def label_integers(values: np.ndarray, path: Path) -> np.ndarray:
    """Convert label values to integers, correcting rounding errors up to 0.001.

    Args:
        values: of any data type and shape, after scaling.
        path: their file, for messages.

    Returns:
        Integers of the same shape; values beyond 64 bits are arbitrary.

    Raises:
        DataError: a value is not finite or not an integer.

    Example:
        >>> label_integers(np.array([0.0, 0.99998, 2.9999993]), Path("label.nii")).tolist()
        [0, 1, 3]
    """
    if values.dtype.kind in "iu":
        return values
    if values.dtype.kind == "b":
        return values.astype(np.uint8)
    whole = np.rint(values)
    if not np.isfinite(values).all() or (values.size and np.abs(values - whole).max() > _ROUNDED):
        raise DataError(
            f"{path} has label values that are not integers: save it without interpolation or "
            "scaling."
        )
    with np.errstate(invalid="ignore"):  # values beyond 64 bits are unknown labels anyway
        return whole.astype(np.int64)


def _look_up(part: np.ndarray, known: Mapping[int, int]) -> np.ndarray:
    """Return the uint8 class of each label value, `_STRAY` if unknown."""
    low, high = int(part.min()), int(part.max())
    if low == high:  # background, mostly
        return np.full(part.shape, known.get(low, _STRAY), np.uint8)
    if high - low < 65536:
        # The difference may overflow the signed type, but not the unsigned type of its size.
        places = (part - part.dtype.type(low)).view(f"u{part.dtype.itemsize}")
        table = np.full(high - low + 1, _STRAY, np.uint8)
        for value in known.keys() & range(low, high + 1):
            table[value - low] = known[value]
    else:
        values, places = np.unique(part, return_inverse=True)
        table = np.array([known.get(value, _STRAY) for value in values.tolist()], np.uint8)
    return table.take(places, mode="clip")  # the fastest mode; all indices are valid


def intensities(file: VolumeFile, stored: np.ndarray) -> np.ndarray:
    """Return float32 intensities of (part of) a stored array; too large values become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return file.scaled(stored).astype(np.float32, copy=False)


def _pieces(stored: np.ndarray) -> Iterator[slice]:
    """Split a vector of voxels into consecutive blocks."""
    for start in range(0, len(stored), _PIECE):
        yield slice(start, start + _PIECE)


def extremes(file: VolumeFile, stored: np.ndarray) -> tuple[float, float]:
    """Return the lowest and highest intensity of a stored array.

    Raises:
        DataError: a voxel is NaN or infinite, or the intensities are constant or too large.
    """
    stored = stored.reshape(-1, order="F")
    found = []
    for piece in _pieces(stored):
        part = stored[piece]
        # Scaling is monotonic, and NaN propagates to both extremes.
        with np.errstate(invalid="ignore"):
            ends = intensities(file, np.array([part.min(), part.max()]))
        found += [ends.min(), ends.max()]
    if not np.isfinite(found).all():
        bad = sum(
            int(np.count_nonzero(~np.isfinite(intensities(file, stored[piece]))))
            for piece in _pieces(stored)
        )
        raise DataError(f"{file.path} has {bad} NaN or infinite voxels: replace them in the file.")
    low, high = float(min(found)), float(max(found))
    if max(-low, high) > _LARGEST:
        raise DataError(
            f"{file.path} has intensities from {low:.3g} to {high:.3g}: repair the header's slope "
            "and intercept, or the voxels."
        )
    if high - low < _LEAST_RANGE:
        raise DataError(f"{file.path} is constant: give the file that contains the image.")
    return low, high


def _window(
    length: int, spacing: float, bounds: tuple[float, float], axis: int, grid: Grid
) -> tuple[float, float, int]:
    """Return offset, step and number of working voxels along one oriented axis."""
    wanted = grid.slice_spacing if axis == 0 else grid.spacing
    step = 1.0 if wanted is None else wanted / spacing
    if abs(step - 1) < _SAME_SPACING:
        step = 1.0
    middle = (length - 1) / 2
    if axis == 0:
        count = max(1, round(length / step))
        return middle - step * (count - 1) / 2, step, count
    extent = step * grid.size  # in voxels
    centre = middle
    if extent < length:
        centre = min(max(sum(bounds) / 2, (extent - 1) / 2), length - 1 - (extent - 1) / 2)
    first = centre - step * (grid.size - 1) / 2
    # Aligned to whole voxels if pixels are equal, to avoid interpolation.
    return (float(np.floor(first + 0.5)) if step == 1.0 else first), step, grid.size


def foreground(file: VolumeFile, volume: np.ndarray) -> list[tuple[float, float]]:
    """Return the body's bounding box in an oriented volume: first and last index per axis."""
    strides = [max(1, length // 64) for length in volume.shape]
    coarse = intensities(file, volume[tuple(slice(None, None, s) for s in strides)])
    whole = [(0.0, length - 1.0) for length in volume.shape]
    scene = coarse[coarse > coarse.min()]
    if not scene.size:
        return whole
    low, high = np.percentile(scene, (0.5, 99.5))
    if not high > low:
        return whole
    smooth = ndimage.gaussian_filter(np.clip(coarse, low, high), 1.0, mode="nearest")
    # Half the threshold keeps the darker half of a body in MR, and skin and muscle in CT.
    mask = smooth > low + (_otsu(smooth) - low) / 2
    # A slice-wise opening separates a couch that touches the back.
    cross = ndimage.generate_binary_structure(2, 1)[None]
    core = ndimage.binary_erosion(mask, cross, border_value=1)
    mask = ndimage.binary_dilation(core, cross, mask=mask)
    components, count = ndimage.label(mask)
    if not count:
        return whole
    sizes = np.bincount(components.ravel())[1:]
    kept = components == 1 + int(sizes.argmax())
    box = []
    for axis, (stride, length) in enumerate(zip(strides, volume.shape, strict=True)):
        hit = np.flatnonzero(kept.any(axis=tuple(other for other in range(3) if other != axis)))
        last = length - 1 if hit[-1] == kept.shape[axis] - 1 else hit[-1] * stride
        box.append((float(hit[0] * stride), float(last)))
    return box


def crop(volume: np.ndarray, box: Sequence[tuple[float, float]] | np.ndarray) -> np.ndarray:
    """Crop a volume to a box of first and last index per axis."""
    return volume[tuple(slice(int(first), int(last) + 1) for first, last in box)]


def _otsu(values: np.ndarray) -> float:
    """Return Otsu's threshold."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = total / below - (total[-1] - total) / above
        between = np.nan_to_num(below * above * gap**2, nan=-1.0, posinf=-1.0)
    return float(edges[int(between.argmax()) + 1])


def sample_step(size: int) -> int:
    """Return the step along each axis for a sample of at most `_SAMPLE` voxels."""
    return max(1, int(np.ceil((size / _SAMPLE) ** (1 / 3))))


def _intensity_range(
    file: VolumeFile,
    volume: np.ndarray,
    box: list[tuple[float, float]],
    extremes: tuple[float, float],
    reading: Reading,
) -> tuple[float, float]:
    """Return the intensities that are mapped to -1 and 1."""
    minimum, maximum = extremes
    if reading.intensity_range is not None:
        return reading.intensity_range
    body = crop(volume, box)
    step = sample_step(body.size)
    sample = intensities(file, body[::step, ::step, ::step])
    sample = sample[sample > minimum]
    low, high = np.percentile(sample, reading.percentiles) if sample.size else (minimum, maximum)
    if high - low < _LEAST_RANGE:  # almost all voxels have one value
        low, high = minimum, maximum
    return float(low), float(high)


def _planes(file: VolumeFile, volume: np.ndarray, along: Map) -> Iterator[tuple[int, np.ndarray]]:
    """Yield working slices with the file's pixels; all use the same float32 buffer."""
    step = max(1, _SLAB // (volume.shape[1] * volume.shape[2]))
    plane, share = np.empty((2, *volume.shape[1:]), np.float32)
    slab, start, stop = plane[None], 0, 0
    for z in range(along.matrix.shape[0]):
        taps, weights = along.row(z)
        if taps[-1] >= stop:
            start, stop = int(taps[0]), max(int(taps[-1]) + 1, int(taps[0]) + step)
            del slab  # free memory first
            slab = intensities(file, np.ascontiguousarray(volume[start:stop]))
        plane.fill(0)
        for tap, weight in zip(taps, weights, strict=True):
            np.multiply(slab[tap - start], weight, out=share)
            plane += share
        yield z, plane
