"""Solids, and the canvas that draws them into label volumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

Box = tuple[slice, slice, slice]

EVERYWHERE: Box = (slice(None), slice(None), slice(None))


@dataclass(frozen=True)
class Warp:
    """Smooth invertible deformation: q = p + Σ_k a_k sin(k·p + φ_k).

    The displacement's Lipschitz constant is at most L = Σ |a_k| |k_k|. With L < 1, the map differs
    from the identity by a contraction and is a bijection, and det(∂q/∂p) ≥ (1 − L)³ > 0.

    Attributes:
        amplitudes: (K, 3) in mm.
        waves: (K, 3) in rad/mm.
        phases: (K,) in rad.
    """

    amplitudes: np.ndarray
    waves: np.ndarray
    phases: np.ndarray

    LIMIT = 0.40  # upper bound of the Lipschitz constant

    @classmethod
    def draw(cls, rng: np.random.Generator, count: int = 7) -> Warp:
        """Draw waves of 110 to 260 mm in random directions, scaled to stay below the limit."""
        directions = unit(rng.standard_normal((count, 3)))
        waves = directions * (2 * np.pi / rng.uniform(110, 260, (count, 1)))
        amplitudes = unit(rng.standard_normal((count, 3))) * rng.uniform(0.4, 1.0, (count, 1))
        bound = float((np.linalg.norm(amplitudes, axis=1) * np.linalg.norm(waves, axis=1)).sum())
        amplitudes *= rng.uniform(0.5, 1.0) * cls.LIMIT / bound
        return cls(amplitudes, waves, rng.uniform(0, 2 * np.pi, count))

    @property
    def lipschitz(self) -> float:
        """Upper bound of the displacement's change per mm."""
        norms = np.linalg.norm(self.amplitudes, axis=1) * np.linalg.norm(self.waves, axis=1)
        return float(norms.sum())

    @property
    def reach(self) -> float:
        """Upper bound of the displacement in mm."""
        return float(np.linalg.norm(self.amplitudes, axis=1).sum())

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Map points (..., 3) in mm; `on_lattice` is faster for grids."""
        angles = points @ self.waves.T + self.phases
        return points + np.sin(angles) @ self.amplitudes

    def on_lattice(self, lattice: Lattice) -> np.ndarray:
        """Return the mapped centre of every voxel, float32 (3, *lattice.shape).

        Each wave is a product of one factor per axis, which avoids a sine per voxel.
        """
        grid = lattice.points()
        steps = self.waves @ lattice.steps  # phase per voxel along each axis
        starts = self.waves @ lattice.origin + self.phases
        for amplitude, step, start in zip(self.amplitudes, steps, starts, strict=True):
            x, y, z = (
                np.exp(1j * s * np.arange(n)) for s, n in zip(step, lattice.shape, strict=True)
            )
            plane = (np.exp(1j * start) * x[:, None] * y[None, :]).astype(np.complex64)
            z = z.astype(np.complex64)
            # Im(plane · z) without the real part.
            wave = plane.real[..., None] * z.imag + plane.imag[..., None] * z.real
            for axis in range(3):
                grid[axis] += np.float32(amplitude[axis]) * wave
        return grid


@dataclass(frozen=True)
class Lattice:
    """A regular voxel grid in the world.

    Attributes:
        shape: voxels per axis.
        steps: (3, 3), column i is the world vector in mm from one voxel to the next on axis i.
        origin: world position of voxel (0, 0, 0).
    """

    shape: tuple[int, int, int]
    steps: np.ndarray
    origin: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size in mm along each axis."""
        return np.linalg.norm(self.steps, axis=0)

    def points(self) -> np.ndarray:
        """Return the world position of every voxel, float32 (3, *shape)."""
        i, j, k = (np.arange(n) for n in self.shape)
        made = np.empty((3, *self.shape), np.float32)
        for axis in range(3):
            a, b, c = self.steps[axis]
            made[axis] = (
                (self.origin[axis] + a * i)[:, None, None]
                + (b * j)[None, :, None]
                + (c * k)[None, None, :]
            )
        return made


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid.

    Attributes:
        centre: in mm.
        radii: along its own axes, mm.
        axes: rows are its own axes, orthonormal.
    """

    centre: np.ndarray
    radii: np.ndarray
    axes: np.ndarray

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return lower and upper corner of the bounding box."""
        half = np.sqrt(((self.axes * self.radii[:, None]) ** 2).sum(0))
        return self.centre - half, self.centre + half

    def distance(self, q: np.ndarray) -> np.ndarray:
        """Return the approximate (first-order) distance in mm to the surface, negative inside."""
        near = np.zeros(q.shape[1:], np.float32)
        far = np.zeros(q.shape[1:], np.float32)
        for axis, radius in zip(self.axes, self.radii, strict=True):
            along = project(q, axis, self.centre)
            along *= np.float32(1 / radius)
            near += along * along
            along *= np.float32(1 / radius)
            far += along * along
        np.sqrt(near, out=near)
        np.sqrt(far, out=far)
        return near * (near - 1) / np.maximum(far, np.float32(1e-6))


@dataclass(frozen=True)
class Tube:
    """A bent tube with round ends: segments between points, each with a radius.

    Attributes:
        points: (N, 3) in mm.
        radii: (N,) in mm.
    """

    points: np.ndarray
    radii: np.ndarray

    @classmethod
    def through(cls, points: list, radii: list[float], parts: int = 4) -> Tube:
        """Return a smooth Catmull-Rom tube with `parts` segments between control points."""
        p = np.asarray(points, float)
        r = np.asarray(radii, float)
        ends = np.vstack([2 * p[0] - p[1], p, 2 * p[-1] - p[-2]])
        t = np.arange(parts)[:, None] / parts
        made = []
        for a, b, c, d in zip(ends, ends[1:], ends[2:], ends[3:], strict=False):
            made.append(
                b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
            )
        made.append(p[-1:])
        where = np.arange((len(p) - 1) * parts + 1) / parts
        return cls(np.vstack(made), np.interp(where, np.arange(len(p)), r))

    def grown(self, by: float) -> Tube:
        """Return the same tube with larger radii."""
        return Tube(self.points, self.radii + by)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return lower and upper corner of the bounding box."""
        radii = self.radii[:, None]
        return (self.points - radii).min(0), (self.points + radii).max(0)

    def cut(self, first: int, last: int) -> Tube:
        """Return the part between two points."""
        return Tube(self.points[first : last + 1], self.radii[first : last + 1])


class Canvas:
    """A voxel grid on which shapes are drawn, later ones over earlier ones.

    Args:
        lattice: the voxel grid.
        warp: the subject's deformation.
        values: mean and texture's standard deviation of each tissue.
        fields: smooth random fields over the grid, for textures.
    """

    def __init__(
        self,
        lattice: Lattice,
        warp: Warp,
        values: Mapping[str, tuple[float, float]],
        fields: Mapping[str, np.ndarray],
    ) -> None:
        self.lattice = lattice
        self.q = warp.on_lattice(lattice)
        self.image = np.full(lattice.shape, values["air"][0], np.float32)
        self.labels = np.zeros(lattice.shape, np.int16)
        self.fields = fields
        self._values = values
        self._reach = warp.reach
        self._inverse = np.linalg.inv(lattice.steps)
        self._softness = np.float32(1 / float(lattice.spacing.mean()))

    def box(self, low: np.ndarray, high: np.ndarray, margin: float = 6.0) -> Box:
        """Return the voxels that a box in the subject's coordinates may reach."""
        grow = self._reach + margin
        ends = np.stack([np.asarray(low) - grow, np.asarray(high) + grow], 1)
        corners = np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, 3)
        indices = (corners - self.lattice.origin) @ self._inverse.T
        first = np.clip(np.floor(indices.min(0)).astype(int), 0, self.lattice.shape)
        last = np.clip(np.ceil(indices.max(0)).astype(int) + 1, 0, self.lattice.shape)
        a, b, c = (slice(int(f), int(n)) for f, n in zip(first, last, strict=True))
        return a, b, c

    def around(self, shape: Ellipsoid | Tube, margin: float = 6.0) -> Box:
        """Return the voxels that a shape may reach."""
        return self.box(*shape.bounds(), margin)

    def distance(self, shape: Ellipsoid | Tube, box: Box, margin: float = 6.0) -> np.ndarray:
        """Return the approximate distance in mm to a shape's surface; far from it, a constant."""
        if isinstance(shape, Ellipsoid):
            return shape.distance(self.q[(slice(None), *box)])
        made = np.full(self.image[box].shape, 50.0, np.float32)
        outer = _explicit(box, self.lattice.shape)
        segments = zip(shape.points, shape.points[1:], shape.radii, shape.radii[1:], strict=False)
        for a, b, ra, rb in segments:
            r = max(ra, rb)
            near = _overlap(self.box(np.minimum(a, b) - r, np.maximum(a, b) + r, margin), outer)
            if any(s.stop <= s.start for s in near):
                continue
            pairs = zip(near, outer, strict=True)
            part = made[tuple(slice(s.start - o.start, s.stop - o.start) for s, o in pairs)]
            np.minimum(part, _capsule(self.q[(slice(None), *near)], a, b, ra, rb), out=part)
        return made

    def paint(
        self,
        tissue: str,
        distance: np.ndarray,
        box: Box = EVERYWHERE,
        label: int | None = None,
        strength: float | np.ndarray = 1.0,
        label_distance: np.ndarray | None = None,
    ) -> None:
        """Draw a tissue where the distance is negative.

        Args:
            tissue: one of TISSUES.
            distance: in mm, on the voxels of `box`.
            box: region to draw in.
            label: raw value to write where the distance is negative; None keeps the labels.
            strength: opacity, 0 to 1.
            label_distance: smoother surface for the label than for the image.
        """
        if not distance.size:
            return
        share = np.float32(0.5) - distance * self._softness
        np.clip(share, 0, 1, out=share)
        if not (np.isscalar(strength) and strength == 1.0):
            share *= strength
        mean, spread = self._values[tissue]
        below = self.image[box]
        if spread:
            texture = np.float32(spread) * self.fields["fine"][box]
            below += share * (np.float32(mean) + texture - below)
        else:
            below += share * (np.float32(mean) - below)
        if label is not None:
            edge = distance if label_distance is None else label_distance
            self.labels[box][edge < 0] = label

    def draw(self, tissue: str, shape: Ellipsoid | Tube, label: int | None = None) -> None:
        """Draw a shape."""
        box = self.around(shape)
        self.paint(tissue, self.distance(shape, box), box, label)


def smooth_field(rng: np.random.Generator, lattice: Lattice, length: float) -> np.ndarray:
    """Return a Gaussian random field of unit variance, float32 on the lattice.

    Nodes of white noise lie `length` mm apart over the lattice's extent in mm, so a coarser lattice
    of the same extent shows the same field; cubic B-splines interpolate them.

    Args:
        rng: random generator of the nodes.
        lattice: grid of the field.
        length: distance of nodes in mm.
    """
    maps = []
    for count, spacing in zip(lattice.shape, lattice.spacing, strict=True):
        extent = round(count * spacing, 3)
        nodes = int(np.ceil(extent / length)) + 4
        where = (np.arange(count) + 0.5) * spacing / length + 1
        maps.append(_spline_weights(where, nodes))
    field = rng.standard_normal([m.shape[1] for m in maps], np.float32)
    # Sparse products sum in an order that does not depend on the number of threads.
    for axis, weights in enumerate(maps):
        moved = np.moveaxis(field, axis, 0)
        flat = np.ascontiguousarray(moved).reshape(moved.shape[0], -1)
        field = np.moveaxis((weights @ flat).reshape(-1, *moved.shape[1:]), 0, axis)
    # Divide by the variance that remains: the mean of a spline's squared weights.
    return np.ascontiguousarray(field) * np.float32((151 / 315) ** -1.5)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Normalise vectors to length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def turn(degrees: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the rotation about x, then y, then z."""
    (ca, cb, cc), (sa, sb, sc) = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    about_x = np.array([[1, 0, 0], [0, ca, -sa], [0, sa, ca]])
    about_y = np.array([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]])
    about_z = np.array([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def project(q: np.ndarray, axis: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Return (q − origin)·axis, float32, without BLAS, which may sum in any order."""
    made = q[0] * np.float32(axis[0])
    made += q[1] * np.float32(axis[1])
    made += q[2] * np.float32(axis[2])
    made -= np.float32(axis[0] * origin[0] + axis[1] * origin[1] + axis[2] * origin[2])
    return made


def _capsule(q: np.ndarray, a: np.ndarray, b: np.ndarray, ra: float, rb: float) -> np.ndarray:
    """Return the distance to the segment a-b minus its linearly interpolated radius."""
    along = b - a
    t = project(q, along / (along @ along), a)
    np.clip(t, 0, 1, out=t)
    square = np.zeros_like(t)
    for axis in range(3):
        d = q[axis] - np.float32(a[axis]) - t * np.float32(along[axis])
        square += d * d
    np.sqrt(square, out=square)
    square -= np.float32(ra) + t * np.float32(rb - ra)
    return square


def blend(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """Return the union of two shapes with a rounded groove of about `width` mm."""
    h = np.maximum(np.float32(width) - np.abs(a - b), 0)
    return np.minimum(a, b) - h * h * np.float32(0.25 / width)


def _explicit(box: Box, shape: tuple[int, int, int]) -> Box:
    """Return the box with explicit ends."""
    a, b, c = (slice(*s.indices(n)[:2]) for s, n in zip(box, shape, strict=True))
    return a, b, c


def _overlap(one: Box, other: Box) -> Box:
    """Return the intersection of two boxes."""
    a, b, c = (
        slice(max(s.start, t.start), min(s.stop, t.stop)) for s, t in zip(one, other, strict=True)
    )
    return a, b, c


def _spline_weights(where: np.ndarray, nodes: int) -> sparse.csr_array:
    """Return cubic B-spline weights of `nodes` values at positions, one row per position."""
    first = np.floor(where).astype(int)
    t = where - first
    weights = (
        np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3], 1)
        / 6
    )
    columns = np.clip(first[:, None] + np.arange(-1, 3), 0, nodes - 1)
    rows = np.repeat(np.arange(len(where)), 4)
    return sparse.csr_array(
        (weights.astype(np.float32).ravel(), (rows, columns.ravel())), shape=(len(where), nodes)
    )
