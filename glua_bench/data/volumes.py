"""Volumes in and out: orientation, resampling, cropping, intensity, and the way back.

Three frames appear here, and a `Placement` ties them together:

- the *file* frame, the array axes as they are stored, in which results are saved and scored;
- the *oriented* frame, after the dataset's `Reading`, cut as (Z, Y, X);
- the *working* frame, the (Z, H, W) grid on which networks see slices.

File and oriented frames differ by a permutation and reversals of axes, which invert exactly.
Oriented and working frames differ by an offset and a scale per axis, so resampling in either
direction is one small sparse matrix an axis. Nothing here is computed from a label: the crop and
the intensity range come from the image alone.
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
    follows_other_form,
    frame,
    orient,
    orientation,
    quadruple,
    same_place,
    second_form,
    triple,
    voxel_ml,
)
from glua_bench.data.resampling import Map, Placement, apply, maps_to_file, maps_to_grid
from glua_bench.errors import DataError
from glua_bench.files import replacing
from glua_bench.task import UNANNOTATED, DomainView, Grid, Reading

# A working pixel within 0.1 % of the file's pixel is taken as equal: over 256 pixels the drift
# stays below a quarter of a pixel, and the image is not blurred by an interpolation.
_SAME_SPACING = 1e-3

# Percentiles and thresholds come from a regular subsample of at most this many voxels.
_SAMPLE = 2_000_000

# Voxels at a time for what looks at every one: a piece stays in the processor's cache.
_PIECE = 1 << 18

# Voxels of slices that are float32 at a time.
_SLAB = 1 << 21

_STRAY = 254  # a class index that stands for a label value that the dataset does not know

# Label values may be off by this much from the integers that they are: storage rounds.
_ROUNDED = 1e-3

# Intensities and ranges of them beyond which float32 overflows on the way to [-1, 1].
_LARGEST, _LEAST_RANGE = 1e18, 1e-18


@dataclass(frozen=True)
class GridImage:
    """An image volume on the working grid.

    Args:
        voxels: float32 (Z, H, W) in [-1, 1]; -1 also where the grid reaches beyond the volume.
        placement: the way back to the file's voxels.
    """

    voxels: np.ndarray
    placement: Placement


def load_image(path: Path | VolumeFile, reading: Reading, grid: Grid) -> GridImage:
    """Read an image volume onto the working grid, in [-1, 1].

    Every slice of the volume is kept. In the plane, the window of `grid.size` pixels is centred on
    the volume where it covers the whole of it; otherwise on the bounding box of the foreground,
    moved so that it does not leave the volume. The foreground is the largest component of what
    exceeds half of Otsu's threshold on a coarse, smoothed copy: a body without the air around it
    or the couch below it. Intensities are clipped before anything is interpolated: at the reading's
    `intensity_range`, or else at its percentiles, taken inside that bounding box over the voxels
    above the volume's minimum (scanners pad with a constant).

    Args:
        path: a NIfTI, NRRD or MetaImage file, 3-D (or with further axes of length 1), or what
            `open_volume` made of one.
        reading: how the dataset's arrays lie.
        grid: the working grid.

    Raises:
        DataError: as for `open_volume`, or the volume is constant or not finite.

    Example:
        >>> image = load_image(path, Reading(), Grid(256, 1.0))  # doctest: +SKIP
        >>> image.voxels.shape  # doctest: +SKIP
        (177, 256, 256)
    """
    file = path if isinstance(path, VolumeFile) else open_volume(path)
    affine, spacing, axes, flips = frame(file, reading)
    stored = file.voxels()
    ends = extremes(file, stored)
    volume = orient(stored, axes, flips)
    box = foreground(file, volume)
    low, high = _intensity_range(file, volume, box, ends, reading)

    offset: list[float] = []
    step: list[float] = []
    shape: list[int] = []
    for axis, (length, bounds) in enumerate(zip(volume.shape, box, strict=True)):
        first, scale, count = _window(length, spacing[axes[axis]], bounds, axis, grid)
        offset.append(first)
        step.append(scale)
        shape.append(count)
    placement = Placement(
        file_shape=file.shape,
        affine=tuple(quadruple(row) for row in affine),
        forms=file.forms,
        spacing=spacing,
        ml=voxel_ml(affine, spacing, reading),
        axes=axes,
        flips=flips,
        offset=triple(offset, float),
        step=triple(step, float),
        shape=triple(shape, int),
    )

    maps = maps_to_grid(placement)
    voxels = np.full(placement.shape, -1.0, np.float32)
    rows, columns = maps[1].window(), maps[2].window()
    for z, plane in _planes(file, volume, maps[0]):
        np.clip(plane, low, high, out=plane)
        resampled = apply(maps[1], maps[2], plane[None])[0, rows, columns]
        voxels[z, rows, columns] = (resampled - low) * (2 / (high - low)) - 1
    np.clip(voxels, -1.0, 1.0, out=voxels)
    return GridImage(voxels, placement)


def load_label(
    path: Path,
    image_path: Path,
    view: DomainView,
    placement: Placement,
) -> np.ndarray:
    """Read a label volume onto the working grid of its image.

    Each class is resampled like an image and the largest share wins (the lower index in a tie).
    Nearest neighbour would pick one of several voxels under a coarser grid and fray thin walls;
    this way a label volume and `restore` use the same interpolation in both directions.

    Args:
        path: the label file.
        image_path: the image that it belongs to, for messages.
        view: of the domain; class i + 1 is `structures[i]`, `ignored_values` count as background,
            and `unannotated_values` as a class of their own, `UNANNOTATED`.
        placement: what `load_image` gave for the image.

    Returns:
        uint8 (Z, H, W), class indices or `UNANNOTATED`, 0 where the grid reaches beyond the
        volume.

    Raises:
        DataError: as for `read_label_volume`.
    """
    classes = _read_classes(
        path,
        image_path,
        placement.file_shape,
        np.array(placement.affine),
        placement.forms,
        view,
    )
    volume = orient(classes, placement.axes, placement.flips)
    maps = maps_to_grid(placement)
    labels = np.zeros(placement.shape, np.uint8)
    # Most of a volume is background: shares are weighed where a structure reaches, nowhere else.
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


def read_label_volume(path: Path, image_path: Path, view: DomainView) -> np.ndarray:
    """Read a label volume on the file's own grid, as evaluation needs it.

    Args:
        path: the label file.
        image_path: the image that it belongs to; only its header is read.
        view: of the domain; class i + 1 is `structures[i]`, `ignored_values` count as background
            and `unannotated_values` as `UNANNOTATED`. Headers of the two files have to agree where
            the orientation is taken from them.

    Returns:
        uint8, class indices or `UNANNOTATED`, in the file's stored axes and shape.

    Raises:
        DataError: as for `open_volume`; or shapes or orientations of image and label differ, or a
            value is no integer or not in the dataset's table.
    """
    image = open_volume(image_path)
    return _read_classes(path, image_path, image.shape, image.affine, image.forms, view)


def restore(probabilities: np.ndarray, placement: Placement) -> np.ndarray:
    """Bring class probabilities from the working grid back to the file's voxels.

    Probabilities are interpolated linearly and the most probable class wins (the lower index in a
    tie). Every slice of the file receives a prediction; voxels outside the working grid's window
    are background.

    Args:
        probabilities: float (K, Z, H, W); logits or a one-hot volume serve as well.
        placement: what `load_image` gave for the image.

    Returns:
        uint8, class indices in the file's stored axes and shape.

    Raises:
        ValueError: the last three axes are not the placement's shape.
    """
    labels = np.zeros(placement.file_shape, np.uint8)
    volume = orient(labels, placement.axes, placement.flips)  # a view: writes reach `labels`
    for z, inside, mixed in _restored(probabilities, placement):
        volume[z][inside] = mixed.argmax(0)[inside]
    return labels


def restore_probabilities(probabilities: np.ndarray, placement: Placement) -> np.ndarray:
    """As `restore`, but the interpolated probabilities themselves.

    Args:
        probabilities: float (K, Z, H, W).
        placement: what `load_image` gave for the image.

    Returns:
        float32 (X, Y, Z of the file, K); outside the working grid's window, background has 1.

    Raises:
        ValueError: as for `restore`.
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
    """Oriented slice, its rows and columns within the window, and probabilities (K, Y, X)."""
    if probabilities.ndim != 4 or probabilities.shape[1:] != placement.shape:
        raise ValueError(
            f"Probabilities of shape {probabilities.shape} do not lie on the working grid "
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
    """Write class indices as a NIfTI label file that overlays the original image.

    The file carries the dataset's own label values and the image's geometry: both forms with their
    codes, the voxel size and the unit, number by number. So whatever a program makes of them, it
    makes of both files. It appears complete or not at all.

    Args:
        path: ends in .nii.gz (or .nii).
        labels: integer class indices in the file's stored axes and shape, from `restore`.
        placement: what `load_image` gave for the image.
        values: raw value of each structure: class i + 1 becomes `values[i]`, class 0 stays 0.

    Raises:
        ValueError: the shape is not the file's, or a class index has no value.
        RunFailure: the disk is full or the directory cannot be written.
    """
    if labels.shape != placement.file_shape:
        raise ValueError(f"Labels of shape {labels.shape} do not fit {placement.file_shape}.")
    table = np.array([0, *values], np.int64)
    if labels.size and int(labels.max()) >= len(table):
        raise ValueError(f"Class {int(labels.max())} has no raw value among {list(values)}.")
    kind = np.result_type(*(np.min_scalar_type(int(value)) for value in table))
    save_volume(path, table.astype(kind)[labels], placement.forms)


def save_maps(path: Path, maps: np.ndarray, placement: Placement) -> None:
    """Write class probabilities as a NIfTI file that overlays the original image.

    Args:
        path: ends in .nii.gz (or .nii).
        maps: float32 with the file's shape and a last axis for the classes, background first.
        placement: what `load_image` gave for the image.

    Raises:
        ValueError: the shape is not the file's.
        RunFailure: the disk is full or the directory cannot be written.
    """
    if maps.shape[:3] != placement.file_shape:
        raise ValueError(f"Maps of shape {maps.shape} do not fit {placement.file_shape}.")
    save_volume(path, maps, placement.forms)


def save_volume(path: Path, voxels: np.ndarray, forms: Forms) -> None:
    """Write voxels as NIfTI; the file appears complete or not at all.

    Args:
        path: ends in .nii.gz (or .nii).
        voxels: in the axes and the number type to store.
        forms: the header's geometry.

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
    """Distance of a file's own slices in mm; of the file, only the header is read.

    Args:
        path: the image file.
        reading: decides along which axis slices are cut.

    Raises:
        DataError: the file is missing, of an unknown format or not 3-D, or its header is unusable.
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
) -> np.ndarray:
    """Class indices in stored axes, after every check on the values."""
    reading = view.reading
    file = open_volume(path)
    if file.shape != shape:
        raise DataError(
            f"{path} has shape {file.shape} but its image {image_path} has {shape}: "
            "resample the label onto the image."
        )
    if reading.orientation == "canonical" and not same_place(file.affine, affine, shape):
        turns = [
            orientation(own, place) for own, place in ((file.affine, path), (affine, image_path))
        ]
        # Axis by axis, because names of axes change at 45°, where rounding decides on them.
        sides = [np.linalg.norm(own[:3, :3], axis=0) for own in (file.affine, affine)]
        between = np.eye(4)
        between[:3, :3] = (affine[:3, :3] / sides[1]).T @ (file.affine[:3, :3] / sides[0])
        if (orientation(between, path) != [[0, 1], [1, 1], [2, 1]]).any():
            names = ["".join(nib.orientations.ornt2axcodes(turn)) for turn in turns]
            what = f"lies as {names[0]} but its image {image_path} as {names[1]}"
            if names[0] == names[1]:
                what = f"lies more than 45° askew of its image {image_path}"
            second = second_form(file.forms, shape), second_form(forms, shape)
            other = follows_other_form((file.affine, second[0]), (affine, second[1]), shape)
            mend = f"{other}, so make the headers of both agree" if other else ""
            for place, own in ((path, file.forms), (image_path, forms)):
                if not any(own.codes):
                    mend = f"{place} has no geometry in its header, so write it there"
            raise DataError(f"{path} {what}: {mend or 'resample the label onto it'}.")
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
        raise DataError(
            f"{path} has label value(s) {shown} that the dataset does not know: relabel the file, "
            "or list them in the dataset's structures, ignored_values or unannotated_values."
        )
    return classes.reshape(shape, order="F")


def label_integers(values: np.ndarray, path: Path) -> np.ndarray:
    """Label values as the integers that they are.

    Storage rounds: a slope of 0.1, or a resampling by nearest neighbour in single precision, leaves
    2.9999993 where 3 is meant. What is within a thousandth of an integer is that integer; every
    reader of label values asks here.

    Args:
        values: of any number type and shape, after scaling.
        path: their file, for messages.

    Returns:
        integers of the same shape; those that do not fit into 64 bits become some that do.

    Raises:
        DataError: a value is not finite, or no integer.

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
            f"{path} has label values that are no integers: "
            "save it without interpolation or scaling."
        )
    with np.errstate(invalid="ignore"):  # beyond 64 bits, and no known value in any case
        return whole.astype(np.int64)


def _look_up(part: np.ndarray, known: Mapping[int, int]) -> np.ndarray:
    """uint8 class of each integer of a vector, `_STRAY` where it is not known."""
    low, high = int(part.min()), int(part.max())
    if low == high:  # background, mostly
        return np.full(part.shape, known.get(low, _STRAY), np.uint8)
    if high - low < 65536:
        # A difference may leave the signed type, but never the unsigned one of its size.
        places = (part - part.dtype.type(low)).view(f"u{part.dtype.itemsize}")
        table = np.full(high - low + 1, _STRAY, np.uint8)
        for value in known.keys() & range(low, high + 1):
            table[value - low] = known[value]
    else:
        values, places = np.unique(part, return_inverse=True)
        table = np.array([known.get(value, _STRAY) for value in values.tolist()], np.uint8)
    return table.take(places, mode="clip")  # the fastest mode; no place is beyond the table


def intensities(file: VolumeFile, stored: np.ndarray) -> np.ndarray:
    """Intensities of (part of) a stored array, float32; too large ones become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return file.scaled(stored).astype(np.float32, copy=False)


def _pieces(stored: np.ndarray) -> Iterator[slice]:
    """Consecutive pieces of a vector of voxels."""
    for start in range(0, len(stored), _PIECE):
        yield slice(start, start + _PIECE)


def extremes(file: VolumeFile, stored: np.ndarray) -> tuple[float, float]:
    """Lowest and highest intensity of a stored array.

    Raises:
        DataError: a voxel is NaN or infinite, the intensities are too large to be computed with,
            or they are all the same.
    """
    stored = stored.reshape(-1, order="F")
    found = []
    for piece in _pieces(stored):
        part = stored[piece]
        # Scaling keeps or turns the order, and both ends of a piece with a NaN are NaN.
        with np.errstate(invalid="ignore"):
            ends = intensities(file, np.array([part.min(), part.max()]))
        found += [ends.min(), ends.max()]
    if not np.isfinite(found).all():
        bad = sum(
            int(np.count_nonzero(~np.isfinite(intensities(file, stored[piece]))))
            for piece in _pieces(stored)
        )
        raise DataError(
            f"{file.path} has {bad} voxels that are NaN or infinite: replace them in the file."
        )
    low, high = float(min(found)), float(max(found))
    if max(-low, high) > _LARGEST:
        raise DataError(
            f"{file.path} has intensities from {low:.3g} to {high:.3g}: repair the header's slope "
            "and intercept, or the voxels."
        )
    if high - low < _LEAST_RANGE:
        raise DataError(f"{file.path} has the same value everywhere: give the file with the image.")
    return low, high


def _window(
    length: int, spacing: float, bounds: tuple[float, float], axis: int, grid: Grid
) -> tuple[float, float, int]:
    """Offset, step and count of working voxels along one oriented axis."""
    wanted = grid.slice_spacing if axis == 0 else grid.spacing
    step = 1.0 if wanted is None else wanted / spacing
    if abs(step - 1) < _SAME_SPACING:
        step = 1.0
    middle = (length - 1) / 2
    if axis == 0:
        count = max(1, round(length / step))
        return middle - step * (count - 1) / 2, step, count
    reach = step * grid.size  # of the window, in voxels
    centre = middle
    if reach < length:
        centre = min(max(sum(bounds) / 2, (reach - 1) / 2), length - 1 - (reach - 1) / 2)
    first = centre - step * (grid.size - 1) / 2
    # Whole voxels are taken over as they are instead of being blended by half a voxel.
    return (float(np.floor(first + 0.5)) if step == 1.0 else first), step, grid.size


def foreground(file: VolumeFile, volume: np.ndarray) -> list[tuple[float, float]]:
    """Bounding box of the body in an oriented volume: first and last index per axis."""
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
    # A slice-wise opening cuts off a couch that touches the back; slices may be few, so never
    # along them.
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


def inside(volume: np.ndarray, box: Sequence[tuple[float, float]] | np.ndarray) -> np.ndarray:
    """The part of a volume in a box of first and last index per axis, as `foreground` gives it."""
    return volume[tuple(slice(int(first), int(last) + 1) for first, last in box)]


def _otsu(values: np.ndarray) -> float:
    """The threshold that best separates two groups of intensities."""
    counts, edges = np.histogram(values, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    total = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = total / below - (total[-1] - total) / above
        between = np.nan_to_num(below * above * gap**2, nan=-1.0, posinf=-1.0)
    return float(edges[int(between.argmax()) + 1])


def _intensity_range(
    file: VolumeFile,
    volume: np.ndarray,
    box: list[tuple[float, float]],
    extremes: tuple[float, float],
    reading: Reading,
) -> tuple[float, float]:
    """The intensities that become -1 and 1."""
    minimum, maximum = extremes
    if reading.intensity_range is not None:
        return reading.intensity_range
    body = inside(volume, box)
    stride = max(1, int(np.ceil((body.size / _SAMPLE) ** (1 / 3))))
    sample = intensities(file, body[::stride, ::stride, ::stride])
    sample = sample[sample > minimum]
    low, high = np.percentile(sample, reading.percentiles) if sample.size else (minimum, maximum)
    if high - low < _LEAST_RANGE:  # almost everything has one value, as in a drawn test image
        low, high = minimum, maximum
    return float(low), float(high)


def _planes(file: VolumeFile, volume: np.ndarray, along: Map) -> Iterator[tuple[int, np.ndarray]]:
    """Working slices of an oriented volume, still with the file's pixels, in one float32 buffer."""
    step = max(1, _SLAB // (volume.shape[1] * volume.shape[2]))
    plane, share = np.empty((2, *volume.shape[1:]), np.float32)
    slab, start, stop = plane[None], 0, 0
    for z in range(along.matrix.shape[0]):
        taps, weights = along.row(z)
        if taps[-1] >= stop:
            start, stop = int(taps[0]), max(int(taps[-1]) + 1, int(taps[0]) + step)
            del slab  # before the next one is made
            slab = intensities(file, np.ascontiguousarray(volume[start:stop]))
        plane.fill(0)
        for tap, weight in zip(taps, weights, strict=True):
            np.multiply(slab[tap - start], weight, out=share)
            plane += share
        yield z, plane
