"""Simulation of the phantom's CT and MR acquisitions.

CT: Hounsfield units with one contrast phase per subject, blur, correlated noise and streaks.

MR: magnitude images of balanced SSFP at 1.5 T. The signal is the steady-state equation

    S = ρ · sin α (1 − E1) / (1 − (E1 − E2) cos α − E1 E2) · exp(−TE / T2),   E = exp(−TR / T)

with TE = TR/2, after an optional T2 preparation exp(−TP / T2) as used in whole-heart protocols.
Fat and water have opposite phase between the bands of the sequence (Hargreaves et al., Magn Reson
Med 2003;50:210-213), so fat enters with a negative sign and mixed voxels cancel to a dark line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from glua_bench.datasets.phantom.anatomy import TISSUES, Subject, draw_thorax
from glua_bench.datasets.phantom.shapes import Canvas, Lattice, smooth_field, turn

Spread = tuple[float, float]  # mean and standard deviation of the texture


@dataclass(frozen=True)
class Volume:
    """One acquisition in its stored form.

    Attributes:
        image: int16, stored axes.
        label: int16, stored axes, raw label values.
        affine: voxel to RAS+ world, mm.
    """

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray


# -- tissue tables --------------------------------------------------------------------------------

# T1 and T2 in ms at 1.5 T, relative proton density, and the source of the times:
#   S  Stanisz et al., Magn Reson Med 2005;54:507-512
#   B  de Bazelaire et al., Radiology 2004;230:652-659
#   ~  our approximation; no single published value is claimed
# The numbers were entered from knowledge of these papers' 1.5 T columns; docs/phantom.md states
# which have been checked against the text. Proton densities are approximate throughout (water
# content relative to pure water).
RELAXATION: dict[str, tuple[float, float, float, str]] = {
    "blood": (1441.0, 290.0, 0.90, "S"),
    "myocardium": (1030.0, 40.0, 0.80, "S"),
    "muscle": (1008.0, 44.0, 0.78, "S"),
    "liver": (576.0, 46.0, 0.75, "S"),
    "spleen": (1057.0, 79.0, 0.80, "B"),
    "marrow": (549.0, 49.0, 0.70, "B"),
    "fat": (343.0, 58.0, 1.00, "B"),
    "cord": (745.0, 74.0, 0.75, "S"),
    "cartilage": (1024.0, 30.0, 0.60, "S"),
    "disc": (1000.0, 90.0, 0.75, "~"),
    "wall": (1000.0, 50.0, 0.70, "~"),
    "skin": (900.0, 35.0, 0.65, "~"),
    "lung": (1200.0, 40.0, 0.18, "~"),
    "fluid": (2500.0, 600.0, 0.90, "~"),
    "cortical_bone": (500.0, 1.0, 0.15, "~"),
}

_RELAXES_LIKE = {
    "lv_blood": "blood", "la_blood": "blood", "aorta_blood": "blood", "descending_blood": "blood",
    "vein_blood": "blood", "rv_blood": "blood", "ra_blood": "blood", "pa_blood": "blood",
    "svc_blood": "blood", "ivc_blood": "blood", "coronary_blood": "blood", "liver_vein": "blood",
    "lung_vessel": "blood", "mediastinal_fat": "fat", "epicardial_fat": "fat",
    "oesophagus": "muscle", "vessel_wall": "wall", "stomach": "fluid",
}  # fmt: skip
_OFF_CENTRE = np.array([20.0, 8.0, 16.0])  # maximum shift of the field of view along x, y, z, mm
_FATTY = ("fat", "mediastinal_fat", "epicardial_fat")
_EMPTY = ("air", "airway", "bowel_gas")


def bssfp_signal(
    t1: float, t2: float, density: float, tr: float, flip: float, preparation: float = 0.0
) -> float:
    """Return the steady-state signal of balanced SSFP on resonance, TE = TR/2, in units of ρ M0.

    Args:
        t1: longitudinal relaxation time, ms.
        t2: transverse relaxation time, ms.
        density: relative proton density ρ.
        tr: repetition time, ms.
        flip: flip angle, degrees.
        preparation: duration of a T2 preparation, ms.
    """
    e1, e2 = np.exp(-tr / t1), np.exp(-tr / t2)
    alpha = np.radians(flip)
    steady = np.sin(alpha) * (1 - e1) / (1 - (e1 - e2) * np.cos(alpha) - e1 * e2)
    return float(density * steady * np.exp(-(0.5 * tr + preparation) / t2))


# -- CT -------------------------------------------------------------------------------------------


def draw_hounsfield(rng: np.random.Generator) -> dict[str, Spread]:
    """Draw the Hounsfield units of every tissue in one subject's contrast phase.

    The left heart is in its arterial phase. The right heart is equally bright, washed out by a
    saline chaser, or in between, because protocols and circulation times differ.
    """
    arterial = rng.uniform(250, 450)
    phase = rng.random()
    if phase < 0.35:
        right = arterial * rng.uniform(0.85, 1.15)
    elif phase < 0.70:
        right = rng.uniform(60, 150)
    else:
        right = rng.uniform(150, 0.85 * arterial)
    right = float(np.clip(right, 60, 450))
    lungs = rng.uniform(-880, -780)
    mixed = 0.06 * right  # contrast and blood are not fully mixed
    table: dict[str, Spread] = {
        "air": (-1000, 0),
        "skin": (20, 10),
        "fat": (rng.uniform(-115, -90), 8),
        "muscle": (rng.uniform(45, 70), 9),
        "cortical_bone": (rng.uniform(450, 800), 90),
        "marrow": (rng.uniform(160, 300), 45),
        "cartilage": (rng.uniform(90, 160), 25),
        "disc": (rng.uniform(70, 110), 10),
        "cord": (35, 5),
        "lung": (lungs, 35),
        "lung_vessel": (rng.uniform(0, 150), 0),
        "airway": (-980, 0),
        "mediastinal_fat": (rng.uniform(-100, -70), 25),
        "epicardial_fat": (rng.uniform(-105, -75), 15),
        "oesophagus": (rng.uniform(35, 55), 8),
        "liver": (rng.uniform(60, 110), 8),
        "spleen": (rng.uniform(90, 160), 12),
        "stomach": (rng.uniform(5, 60), 25),
        "bowel_gas": (-950, 0),
        "myocardium": (rng.uniform(80, 130), 9),
        "vessel_wall": (rng.uniform(40, 70), 0),
        "lv_blood": (arterial, 6),
        "la_blood": (arterial * rng.uniform(0.94, 1.10), 6),
        "aorta_blood": (arterial * rng.uniform(0.90, 1.02), 6),
        "descending_blood": (arterial * rng.uniform(0.86, 1.02), 6),
        "coronary_blood": (arterial * 0.9, 0),
        "rv_blood": (right, mixed),
        "ra_blood": (right * rng.uniform(0.85, 1.10), 2 * mixed),
        "pa_blood": (float(np.clip(right * rng.uniform(0.9, 1.15), 60, 480)), mixed),
        "svc_blood": (rng.uniform(150, 900) if rng.random() < 0.6 else right, 60),
        "ivc_blood": (rng.uniform(60, 130), 10),
    }
    table["vein_blood"] = table["la_blood"]
    table["liver_vein"] = (table["liver"][0] + rng.uniform(-10, 40), 0)
    return table


def acquire_ct(subject: Subject, rng: np.random.Generator, voxel_scale: float) -> Volume:
    """Simulate a contrast-enhanced CT volume, stored as axial slices in LPS order.

    Args:
        subject: the subject.
        rng: random generator for contrast phase, field of view, textures and noise.
        voxel_scale: factor on the voxel size at constant field of view.
    """
    values = draw_hounsfield(rng)
    sizes, sides = ((1.95, 2.2), (1.9, 2.2)), ((222, 240), (196, 214), (196, 214))
    shape, spacing, centre = _field_of_view(rng, subject, voxel_scale, sizes, sides)
    steps = np.diag([-1, -1, 1] * spacing)  # towards left, back and head
    lattice = Lattice(shape, steps, centre - steps @ (np.array(shape) - 1) / 2)
    canvas = Canvas(lattice, subject.warp, values, _fields(rng, lattice))
    draw_thorax(canvas, subject)
    image = canvas.image

    # Blur of the reconstruction kernel in mm, from soft to sharp.
    image = ndimage.gaussian_filter(image, rng.uniform(0.8, 1.4) / spacing, truncate=3)
    image += _streaks(rng, lattice, subject, values)
    noise = rng.standard_normal(shape, np.float32)
    noise = ndimage.gaussian_filter(noise, rng.uniform(0.5, 0.9), truncate=3)
    noise *= rng.uniform(12, 32) / noise.std()
    image += noise
    np.clip(np.rint(image), -1024, 3071, out=image)
    return Volume(image.astype(np.int16), canvas.labels, _affine(lattice))


def _streaks(
    rng: np.random.Generator, lattice: Lattice, subject: Subject, values: dict[str, Spread]
) -> np.ndarray:
    """Simulate streaks around undiluted contrast in the superior vena cava, per axial slice."""
    dense = max(0.0, values["svc_blood"][0] - 250) / 650
    x, y, z = lattice.points()
    x -= np.float32(32 + subject.shift[0])
    y -= np.float32(4 + subject.shift[1])
    radius = np.sqrt(x * x + y * y)
    angle = np.arctan2(y, x)
    drift = 0.012 * z
    rays = np.zeros(lattice.shape, np.float32)
    for order in (2, 5, 9, 14):
        rays += np.cos(order * angle + drift * order + rng.uniform(0, 2 * np.pi)).astype(np.float32)
    # Below the atrium's roof the contrast is diluted.
    present = 1 / (1 + np.exp(-(z - 8) / 8))
    strength = rng.uniform(25, 60) * dense
    rays *= np.float32(strength) * present / (1 + (radius / 26) ** 2)
    # Photon starvation along the shoulders: faint horizontal stripes.
    stripes = np.cos(y * rng.uniform(0.25, 0.4) + 0.05 * z + rng.uniform(0, 6))
    rays += np.float32(rng.uniform(0, 8)) * stripes.astype(np.float32)
    return rays


# -- MR -------------------------------------------------------------------------------------------


def draw_signals(rng: np.random.Generator) -> dict[str, Spread]:
    """Draw the signed bSSFP signal of every tissue for one subject's protocol and tissues."""
    tr = rng.uniform(3.0, 4.6)
    flip = rng.uniform(45, 80)
    preparation = rng.uniform(15, 40) if rng.random() < 0.4 else 0.0
    base = {}
    for name, (t1, t2, density, _) in RELAXATION.items():
        vary = np.exp(rng.normal(0, [0.05, 0.07, 0.04]))
        base[name] = bssfp_signal(
            t1 * vary[0], t2 * vary[1], density * vary[2], tr, flip, preparation
        )
    # ~ The brightness of fat depends on shim and sequence; it is often brighter than blood.
    base["fat"] *= rng.uniform(1.0, 1.7)
    table: dict[str, Spread] = {}
    for tissue in TISSUES:
        if tissue in _EMPTY:
            table[tissue] = (0.0, 0.0)
            continue
        signal = base[_RELAXES_LIKE.get(tissue, tissue)]
        texture = 0.06
        if tissue.endswith("blood"):
            # Inflow of fresh spins brightens, turbulence and flow off resonance darken.
            signal *= rng.uniform(0.85, 1.15)
            texture = 0.07
        if tissue == "stomach":
            signal, texture = signal * rng.uniform(0.25, 1.0), 0.15  # from food to water
        if tissue in ("lung", "lung_vessel"):
            signal *= 0.5  # air-tissue interfaces dephase
        if tissue in _FATTY:
            signal, texture = -signal, 0.05
        table[tissue] = (signal, texture * abs(signal))
    return table


def acquire_mr(subject: Subject, rng: np.random.Generator, voxel_scale: float) -> Volume:
    """Simulate a bSSFP volume of thick coronal slices, slightly oblique, stored in LIA order.

    Args:
        subject: the subject.
        rng: random generator for protocol, field of view, coil, textures and noise.
        voxel_scale: factor on the voxel size at constant field of view.
    """
    values = draw_signals(rng)
    sizes, sides = ((1.8, 2.15), (3.4, 4.4)), ((225, 262), (225, 262), (150, 175))
    shape, spacing, centre = _field_of_view(rng, subject, voxel_scale, sizes, sides)
    # Columns run to the left, rows to the feet, slices to the front.
    directions = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
    steps = turn(rng.uniform(-5, 5, 3)) @ directions * spacing
    origin = centre - steps @ (np.array(shape) - 1) / 2
    lattice = Lattice(shape, steps, origin)

    # A slice averages over its thickness: sample its middle and both faces.
    fine_steps = steps * np.array([1, 1, 0.5])
    fine_shape = (shape[0], shape[1], 2 * shape[2] + 1)
    fine = Lattice(fine_shape, fine_steps, origin - fine_steps[:, 2])
    canvas = Canvas(fine, subject.warp, values, _fields(rng, fine))
    draw_thorax(canvas, subject)
    p = canvas.image
    signal = 0.25 * p[..., 0:-1:2] + 0.5 * p[..., 1::2] + 0.25 * p[..., 2::2]
    labels = np.ascontiguousarray(canvas.labels[..., 1::2])

    # Breathing blurs along the body axis, the second array axis.
    signal = ndimage.gaussian_filter1d(
        signal, rng.uniform(0.4, 1.4) / spacing[0], axis=1, truncate=3
    )
    bias = _coil(rng, lattice, centre)
    signal *= bias
    blood = values["lv_blood"][0]
    sigma = blood / rng.uniform(16, 36)
    real = signal + np.float32(sigma) * rng.standard_normal(shape, np.float32)
    imaginary = np.float32(sigma) * rng.standard_normal(shape, np.float32)
    image = np.hypot(real, imaginary)
    image *= np.float32(rng.uniform(300, 1200) / blood)
    np.clip(np.rint(image), 0, 32767, out=image)
    return Volume(image.astype(np.int16), labels, _affine(lattice))


def _coil(rng: np.random.Generator, lattice: Lattice, centre: np.ndarray) -> np.ndarray:
    """Simulate a smooth, partly corrected sensitivity of chest and back coils, with mean 1."""
    x, y, z = lattice.points()
    total = np.zeros(lattice.shape, np.float32)
    for front in (1.0, -1.0):
        for side in (-1.0, 1.0):
            place = np.array([side * 60, front * 125, 0]) + rng.uniform(-30, 30, 3) + centre
            square = (x - place[0]) ** 2 + (y - place[1]) ** 2 + (z - place[2]) ** 2
            total += np.float32(rng.uniform(0.6, 1.2)) / (1 + square / np.float32(90**2))
    total **= np.float32(rng.uniform(0.25, 0.75))
    drift = smooth_field(rng, lattice, 130.0)
    total *= np.exp(np.float32(rng.uniform(0.03, 0.10)) * drift)
    return total / np.float32(total.mean(dtype=np.float64))


# -- shared ---------------------------------------------------------------------------------------

ACQUIRE: dict[str, Callable[[Subject, np.random.Generator, float], Volume]] = {
    "ct": acquire_ct,
    "mr": acquire_mr,
}


def _field_of_view(
    rng: np.random.Generator,
    subject: Subject,
    voxel_scale: float,
    sizes: Sequence[tuple[float, float]],
    sides: Sequence[tuple[float, float]],
) -> tuple[tuple[int, int, int], np.ndarray, np.ndarray]:
    """Draw shape, spacing and centre of a volume from ranges of voxel sizes and sides in mm."""
    in_plane, thickness = (rng.uniform(*size) * voxel_scale for size in sizes)
    spacing = np.array([in_plane, in_plane, thickness])
    extent = [rng.uniform(*side) for side in sides]
    # Near the heart, towards the midline.
    centre = np.array([-16.0, 12.0, 12.0]) + 0.8 * np.array(subject.shift)
    centre = centre + rng.uniform(-1, 1, 3) * _OFF_CENTRE
    a, b, c = (max(8, round(float(e / s))) for e, s in zip(extent, spacing, strict=True))
    return (a, b, c), spacing, centre


def _fields(rng: np.random.Generator, lattice: Lattice) -> dict[str, np.ndarray]:
    """Draw the random fields used for textures."""
    lengths = {"fine": 5.0, "rough": 5.5, "tree_a": 16.0, "tree_b": 16.0}
    return {name: smooth_field(rng, lattice, length) for name, length in lengths.items()}


def _affine(lattice: Lattice) -> np.ndarray:
    """Return the lattice as a NIfTI affine."""
    made = np.eye(4)
    made[:3, :3] = lattice.steps
    made[:3, 3] = lattice.origin
    return made
