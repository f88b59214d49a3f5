"""Intensity windows: which structures one clips, and which window keeps them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from glua_bench.inspection.findings import Finding
from glua_bench.inspection.measurements import INSIDE, CaseMeasurements
from glua_bench.task import Dataset

# Minimum fraction of a structure's voxels outside a window for a warning.
CLIPPED = 0.05

Window = tuple[float, float]


def outward(low: float, high: float) -> Window:
    """Round a window outwards to two significant digits of its width, or to 25 if it is wide.

    Example:
        >>> outward(-63, 218)
        (-75.0, 225.0)
        >>> outward(-1.23, 4.41)
        (-1.3, 4.5)
    """
    width = max(high - low, 1e-6)
    step = 25.0 if 100 <= width < 5000 else 10.0 ** math.floor(math.log10(width) - 1)
    ends = math.floor(low / step) * step, math.ceil(high / step) * step
    lower, upper = (float(f"{end:.6g}") for end in ends)
    return lower, upper


def widened(window: Window, levels: Window) -> Window:
    """Return the window that also contains two intensities, rounded outwards where it grows."""
    low, high = outward(min(window[0], levels[0]), max(window[1], levels[1]))
    return (
        window[0] if levels[0] >= window[0] else low,
        window[1] if levels[1] <= window[1] else high,
    )


def clipping(
    domain: str, structure: str, share: float, window: Window, levels: Window | None
) -> str:
    """Describe a clipped structure in one sentence.

    Args:
        domain: name of the domain.
        structure: name of the structure.
        share: fraction of its voxels outside the window.
        window: the window.
        levels: range of its intensities without outliers; None proposes no window.
    """
    text = (
        f"The window [{window[0]:g}, {window[1]:g}] of {domain} clips {share:.0%} of the voxels of "
        f"{structure}"
    )
    if levels is None:
        return f"{text}: no training case has it, so no window is proposed."
    low, high = widened(window, levels)
    return f"{text}: the window [{low:g}, {high:g}] would contain them."


def clipped_structures(measured: Sequence[CaseMeasurements], dataset: Dataset) -> Iterator[Finding]:
    """Find structures of which the window of a domain clips a considerable part."""
    for domain in dataset.domains():
        view = dataset.view(domain)
        window = view.reading.channel(0).intensity_range  # of the measured voxels
        if window is None:
            continue
        own = [one for one in measured if one.case.domain == domain and one.label]
        for index, structure in enumerate(view.structures):
            known = [
                (one.case.split, found)
                for one in own
                if one.label and (found := one.label.structures[index]) is not None
                if math.isfinite(found.inside[0])
            ]
            total = sum(found.ml for _, found in known)
            if not total:
                continue
            share = sum(found.outside * found.ml for _, found in known) / total
            if share > CLIPPED:
                # A user may take the proposed window, so no test or validation label enters it.
                training = [found.inside for split, found in known if split == "train"]
                lows, highs = zip(*training, strict=True) if training else ((), ())
                levels = (min(lows), max(highs)) if training else None
                title = f"{structure.name} ({structure.title})"
                text = clipping(domain, title, share, window, levels)
                if levels and any(way.endswith(f"-{domain}") for way in dataset.directions):
                    text += (
                        " It is derived from labels of training cases: if you use it, state that "
                        "under 'protocol', because this domain can be a target."
                    )
                yield Finding("clipped structure", (), text)


def common_levels(samples: Mapping[str, np.ndarray]) -> Window | None:
    """Return the range of the intensities of all structures, each without outliers.

    Args:
        samples: structure → intensities of some of its voxels.
    """
    ends = [np.percentile(own, INSIDE) for own in samples.values() if own.size]
    if not ends:
        return None
    low, high = np.array(ends).T
    return float(low.min()), float(high.max())
