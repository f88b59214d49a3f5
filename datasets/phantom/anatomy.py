"""The phantom's anatomy: a thorax with a heart as implicit shapes in millimetres.

World coordinates are RAS+ (x to the patient's right, y forward, z up) in mm, with the origin in
the middle of the chest at the height of the valves. Every shape is a function that is negative
inside and approximately a distance near its surface, so a subject can be drawn on any voxel grid:
the fraction of a voxel that a shape covers follows from its distance.

Subjects differ in their measures (`Subject`) and in a smooth, invertible deformation (`Warp`). CT
and MR draw their subjects from the same distribution.

The ranges are built around normal measures: left ventricular diameter 45-55 mm and wall
8-12 mm, left atrium 35-50 mm, ascending aorta 28-36 mm (adult reference ranges as in the chamber
quantification recommendations of Lang et al., J Am Soc Echocardiogr 2015;28:1-39). Positions in the
thorax are schematic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glua_bench.datasets.mmwhs_layout import (
    ASCENDING_AORTA,
    LA_BLOOD,
    LV_BLOOD,
    LV_MYOCARDIUM,
    PULMONARY_ARTERY,
    RA_BLOOD,
    RV_BLOOD,
)
from glua_bench.datasets.phantom.shapes import (
    Canvas,
    Ellipsoid,
    Tube,
    Warp,
    blend,
    project,
    turn,
    unit,
)

# Tissues; an acquisition defines a value for each.
TISSUES = (
    "air", "skin", "fat", "muscle", "cortical_bone", "marrow", "cartilage", "disc", "cord",
    "lung", "lung_vessel", "airway", "mediastinal_fat", "epicardial_fat", "oesophagus",
    "liver", "liver_vein", "spleen", "stomach", "bowel_gas", "myocardium", "vessel_wall",
    "lv_blood", "la_blood", "aorta_blood", "descending_blood", "vein_blood",
    "rv_blood", "ra_blood", "pa_blood", "svc_blood", "ivc_blood", "coronary_blood",
)  # fmt: skip

# Axes of the heart before tilting: along the left ventricle to the apex (left, forward, down),
# towards the septum, and upwards, perpendicular to both.
_APEX = np.array([-0.63, 0.55, -0.55])
_APEX /= np.linalg.norm(_APEX)
_SEPTUM = np.array([0.66, 0.74, 0.06])
_SEPTUM -= _APEX * (_APEX @ _SEPTUM)
_SEPTUM /= np.linalg.norm(_SEPTUM)
_UP = np.cross(_SEPTUM, _APEX)
HEART_AXES = np.stack([_APEX, _SEPTUM, _UP * np.sign(_UP[2])])
HEART_CENTRE = np.array([-26.0, 20.0, -4.0])
_BASE = np.array([-22.0, 12.0, 9.0])  # centre of the left ventricle's valve plane
_DEPTH = 86.0  # half of the chest's inner depth, mm


@dataclass(frozen=True)
class Subject:
    """Measures of one person.

    Attributes:
        heart_scale: scale of the whole heart.
        tilt: rotations of the heart about x, y, z in degrees.
        shift: shift of the heart in mm.
        lv_radius: largest radius of the left ventricular cavity, mm.
        lv_length: length of the cavity from valve plane to apex, mm.
        wall: thickness of the left ventricular wall at the base, mm; thinner at the apex.
        oval: ratio of the ventricle's two short axes.
        la, rv, ra: scale factors of the chambers.
        aorta: radius of the ascending aorta, mm.
        arch: bulge of the aortic arch to the right, mm.
        pulmonary: radius of the pulmonary trunk, mm.
        sac_fat: thickness of the epicardial fat, mm.
        breath: height of the diaphragm in mm, positive in expiration.
        chest: scale of the chest's width and depth.
        subcutaneous: thickness of the subcutaneous fat, mm.
        muscle: scale of the chest's muscles.
        trabeculae: roughness of the ventricles' inner surface, mm.
        gas: fraction of the stomach that holds gas.
        warp: deformation.
    """

    heart_scale: float
    tilt: tuple[float, float, float]
    shift: tuple[float, float, float]
    lv_radius: float
    lv_length: float
    wall: float
    oval: float
    la: float
    rv: float
    ra: float
    aorta: float
    arch: float
    pulmonary: float
    sac_fat: float
    breath: float
    chest: tuple[float, float]
    subcutaneous: float
    muscle: float
    trabeculae: float
    gas: float
    warp: Warp


def draw_subject(rng: np.random.Generator) -> Subject:
    """Draw a subject; CT and MR use the same distribution."""

    def near(middle: float, spread: float, limit: float = 2.0) -> float:
        """Return a normal number clipped at `limit` standard deviations."""
        return middle + spread * float(np.clip(rng.standard_normal(), -limit, limit))

    breath = rng.uniform(-14, 14)
    return Subject(
        heart_scale=near(1.0, 0.06),
        tilt=(near(0, 9), near(0, 9), near(0, 11)),
        # A higher diaphragm lifts the heart with it.
        shift=(near(0, 6), near(0, 4), near(0, 4) + 0.4 * breath),
        lv_radius=near(25.0, 2.3),
        lv_length=near(80.0, 5.0),
        wall=near(10.2, 1.2),
        oval=near(1.0, 0.06),
        la=near(1.0, 0.10),
        rv=near(1.0, 0.08),
        ra=near(1.0, 0.10),
        aorta=near(15.5, 1.4),
        arch=near(0, 7),
        pulmonary=near(13.0, 1.2),
        sac_fat=rng.uniform(3.0, 9.0),
        breath=breath,
        chest=(near(1.0, 0.05), near(1.0, 0.06)),
        subcutaneous=rng.uniform(6, 30),
        muscle=rng.uniform(0.7, 1.4),
        trabeculae=rng.uniform(0.8, 2.0),
        gas=rng.uniform(0.0, 0.5),
        warp=Warp.draw(rng),
    )


def draw_thorax(canvas: Canvas, subject: Subject) -> None:
    """Draw a subject from the outside in."""
    body = _Body(canvas, subject)
    body.wall()
    body.lungs()
    body.abdomen()
    body.spine()
    heart = _Heart(canvas, subject, body)
    heart.vessels_behind()
    heart.sac()
    heart.right_side()
    heart.left_side()


class _Body:
    """Chest wall, lungs, abdomen and spine."""

    def __init__(self, canvas: Canvas, subject: Subject) -> None:
        self.canvas = canvas
        self.subject = subject
        self.x, self.y, self.z = canvas.q
        self.width, self.depth = 126 * subject.chest[0], _DEPTH * subject.chest[1]
        # The chest narrows towards the neck.
        taper = 1 - 0.35 * np.clip((self.z + 10) / 160, 0, 1) ** 2
        u = self.x / (self.width * taper)
        v = (self.y - 4) / (self.depth * taper)
        # A rounded box rather than an ellipse: |u|^2.5 + |v|^2.5.
        self.level = (np.abs(u) ** 2.5 + np.abs(v) ** 2.5) ** np.float32(1 / 2.5)
        slope = np.sqrt((u / self.width) ** 2 + (v / self.depth) ** 2) / np.maximum(
            self.level, np.float32(0.05)
        )
        self.inner = (self.level - 1) / np.maximum(slope / taper, np.float32(1e-4))
        self.spine_y = -self.depth + 18 - 0.0010 * (self.z - 10) ** 2

    def wall(self) -> None:
        """Draw skin, fat, muscles, ribs and sternum."""
        s = self.subject
        front = np.clip(self.y / 80, -1, 1)
        pectoral = np.exp(-(((np.abs(self.x) - 65) / 38) ** 2) - ((self.z - 45) / 45) ** 2)
        muscle = s.muscle * (9 + 13 * pectoral * (front > 0) + 12 * np.clip(-front, 0, 1))
        outer = 12 + muscle
        fat = s.subcutaneous * (0.75 + 0.35 * front - 0.15 * np.clip(self.z / 100, -1, 1))
        c = self.canvas
        c.paint("skin", self.inner - outer - fat - 2.5)
        c.paint("fat", self.inner - outer - fat)
        c.paint("muscle", self.inner - outer)
        # Fat between the layers of muscle.
        c.paint("fat", np.abs(self.inner - 12.5) - 1.2, strength=0.7)
        self.ribs()

    def ribs(self) -> None:
        """Draw ribs that descend to the front, cartilage near the sternum, and the sternum."""
        c = self.canvas
        along = (self.z + 0.5 * self.y + 6) / 27
        off = (along - np.round(along)) * 27 * 0.9
        section = np.sqrt((off / 6.5) ** 2 + ((self.inner - 6) / 4.2) ** 2) - 1
        soft = (self.y > 0) & (np.abs(self.x) < 62 + 0.35 * np.abs(self.z - 40))
        apart = np.where(soft, np.float32(40), np.float32(0))
        distance = section * 4.5
        c.paint("cartilage", distance + 40 - apart)
        c.paint("cortical_bone", distance + apart)
        c.paint("marrow", distance + 2.0 + apart)
        plate = np.maximum(np.abs(self.x) - 17, np.abs(self.inner - 6) - 5.5)
        plate = np.maximum(plate, np.where(self.y > 0, np.float32(-9), np.float32(40)))
        plate = np.maximum(plate, -48 - self.z)
        c.paint("cortical_bone", plate)
        c.paint("marrow", plate + 2.2)

    def lungs(self) -> None:
        """Draw lungs with vessels, and the fat between them."""
        c = self.canvas
        c.paint("mediastinal_fat", self.inner)
        self.diaphragm = self._diaphragm()
        # Mediastinum: behind the sternum, along the great vessels, at the spine.
        middle = self.x - 2 + 8 * np.clip(-self.z / 60, 0, 1)
        front = np.clip((self.y - 30) / 45, 0, 1)
        column = np.sqrt((middle / 34) ** 2 + ((self.y + 6) / 38) ** 2) - 1
        column = column * 34 + 26 * np.clip((-self.z - 10) / 60, 0, 1)
        septum = np.abs(middle) - 4 - 7 * front * np.clip((self.z + 20) / 60, 0, 1)
        back = np.sqrt((self.x + 6) ** 2 + (self.y - self.spine_y - 18) ** 2) - 24
        between = np.minimum(np.minimum(column, septum), back)
        # Lymph nodes, remnants of the thymus and small vessels in that fat.
        nodes = np.clip(2.2 * c.fields["tree_b"] - 1.2, 0, 0.9)
        c.paint("muscle", np.maximum(self.inner + 2, between + 1), strength=nodes)
        lung = np.maximum(np.maximum(self.inner + 1, -between), self.diaphragm)
        c.paint("lung", lung)
        # Common zeros of two random fields are curves, which look like branching vessels.
        thick = np.float32(0.13) + np.float32(0.22) * np.exp(
            -(((np.abs(self.x + 6) - 45) / 35) ** 2) - ((self.y + 15) / 45) ** 2
        ).astype(np.float32)
        self.curves = np.sqrt(c.fields["tree_a"] ** 2 + c.fields["tree_b"] ** 2)
        vessel = np.clip(1.4 - self.curves / thick, 0, 1)
        c.paint("lung_vessel", lung + 2, strength=vessel)
        # Trachea and main bronchi.
        wall_y = -6.0
        for tissue, more in (("muscle", 1.8), ("airway", 0.0)):
            for points, radius in (
                ([(3, wall_y, 140), (3, wall_y - 4, 84), (2, wall_y - 8, 62)], 8.0),
                ([(2, wall_y - 8, 62), (26, wall_y - 14, 48), (44, wall_y - 18, 38)], 6.0),
                ([(2, wall_y - 8, 62), (-26, wall_y - 18, 46), (-46, wall_y - 24, 36)], 5.5),
            ):
                c.draw(tissue, Tube.through(points, [radius + more] * 3, 3))

    def _diaphragm(self) -> np.ndarray:
        """Return a distance in mm, positive below the domes of the diaphragm."""
        s = self.subject
        right = np.exp(-(((self.x - 62) / 62) ** 2) - ((self.y + 2) / 62) ** 2)
        left = np.exp(-(((self.x + 66) / 52) ** 2) - ((self.y + 8) / 58) ** 2)
        edge = np.clip(self.level - 0.55, 0, None) ** 2
        height = -66 + s.breath + 40 * right + 30 * left - 130 * edge
        return (height - self.z) * np.float32(0.8)

    def abdomen(self) -> None:
        """Draw diaphragm, liver, spleen, stomach and fat below the lungs."""
        c, s = self.canvas, self.subject
        inside = np.maximum(self.inner, -self.diaphragm - 3)
        c.paint("muscle", np.maximum(inside, -50 - self.inner))
        below = np.maximum(self.inner + 2, -self.diaphragm + 0.5)
        c.paint("fat", below)
        top = -66 + s.breath
        level = Ellipsoid(np.array([52.0, 2, top - 22]), np.array([98.0, 76, 66]), turn((0, 12, 0)))
        liver = np.maximum(level.distance(c.q), below + 1)
        c.paint("liver", liver)
        c.paint("liver_vein", liver + 4, strength=0.8 * np.clip(1.3 - self.curves / 0.18, 0, 1))
        stomach = Ellipsoid(
            np.array([-58.0, 8, top - 12]), np.array([34.0, 40, 40]), turn((10, -20, 10))
        )
        distance = np.maximum(stomach.distance(c.q), below + 1)
        c.paint("muscle", distance)
        c.paint("stomach", distance + 4)
        # Gas rises to the front of a supine subject.
        c.paint("bowel_gas", np.maximum(distance + 4, 40 * (1 - 2 * s.gas) - self.y))
        spleen = Ellipsoid(
            np.array([-88.0, -36, top - 8]), np.array([22.0, 36, 44]), turn((0, 15, 20))
        )
        c.paint("spleen", np.maximum(spleen.distance(c.q), below + 1))

    def spine(self) -> None:
        """Draw vertebrae with discs, canal and processes, and the muscles beside them."""
        c = self.canvas
        y = self.y - self.spine_y
        for side in (-1, 1):
            beside = np.sqrt(((self.x - side * 27) / 21) ** 2 + ((y + 34) / 17) ** 2) - 1
            c.paint("muscle", beside * 17)
        period = (self.z + 4) / 26
        # 0 in the middle of a vertebra, 13 in the middle of a disc.
        phase = np.abs(period - np.round(period)) * 26
        waist = 1 - 0.08 * (1 - phase / 13)
        vertebra = (np.sqrt((self.x / (18 * waist)) ** 2 + (y / (15 * waist)) ** 2) - 1) * 15
        ring = np.sqrt(self.x**2 + (y + 24) ** 2)
        arch = np.maximum(ring - 15, phase - 9)
        spinous = np.maximum(np.abs(self.x) - 3.5, np.abs(y + 46) - 16)
        spinous = np.maximum(spinous, phase - 8)
        wings = np.maximum(np.abs(y + 26) - 5, np.maximum(np.abs(self.x) - 36, phase - 7))
        bone = np.minimum(np.minimum(arch, spinous), wings)
        c.paint("cortical_bone", bone)
        c.paint("marrow", bone + 2.2)
        c.paint("cortical_bone", vertebra)
        c.paint("marrow", np.maximum(vertebra + 1.8, phase - 9.5))
        c.paint("disc", np.maximum(vertebra + 0.5, 10.8 - phase))
        c.paint("cord", ring - 8)


class _Heart:
    """Chambers, great vessels and the fat around them."""

    def __init__(self, canvas: Canvas, subject: Subject, body: _Body) -> None:
        self.canvas = canvas
        self.subject = s = subject
        self.body = body
        self.turn = turn(s.tilt)
        self.axes = HEART_AXES @ self.turn.T
        self.offset = np.array(s.shift) + [0, 0.35 * (body.depth - _DEPTH), 0]
        self.base = base = self.place(_BASE)
        apex, septum, up = self.axes
        k = s.heart_scale
        radius, wall = s.lv_radius * k, s.wall * np.sqrt(k)
        length = s.lv_length * k
        # The cavity is widest a fifth of its length below the valves.
        widest = 0.2 * length
        lv_axes = np.stack([apex, septum, up])
        self.lv = Ellipsoid(
            base + apex * widest,
            np.array([length - widest, radius / np.sqrt(s.oval), radius * np.sqrt(s.oval)]),
            lv_axes,
        )
        self.epi = Ellipsoid(
            self.lv.centre, self.lv.radii + np.array([0.7 * wall, wall, wall]), lv_axes
        )
        self.valve_normal = unit(apex + 0.10 * up + 0.05 * septum)

        r = 25.0 * s.la * k
        self.la = Ellipsoid(
            base - apex * (0.66 * r) - up * (0.10 * r) - septum * (0.30 * r) + [0, -0.12 * r, 0],
            np.array([1.12, 0.92, 1.02]) * r,
            turn((10, 0, 20)),
        )
        self.appendage = Ellipsoid(
            self.la.centre + self.turn @ np.array([-0.95, 0.62, 0.45]) * r,
            np.array([0.50, 0.36, 0.38]) * r,
            self.turn @ turn((0, 20, 35)),
        )
        self.rv = Ellipsoid(
            base + apex * (33 * k) + septum * (radius + wall + 6 * s.rv) - up * (5 * k),
            np.array([50.0 * k, 23.0 * s.rv * k, 38.0 * s.rv * k]),
            lv_axes,
        )
        self.ra = Ellipsoid(
            self.place(np.array([30.0, 19, 3])) + [2 * (s.ra - 1) * 10, 0, 0],
            np.array([22.0, 25, 29]) * s.ra * k,
            self.turn,
        )
        annulus = base + (0.80 * septum + 0.50 * up) * (13.5 * k) - apex * 1.0
        a = s.aorta
        self.aorta = Tube.through(
            [
                annulus,
                annulus + [5, 2, 12],
                0.6 * self.place(np.array([0.0, 21, 45]))
                + 0.4 * np.array([0, 21, 45])
                + [0.5 * s.arch, 0, 0],
                np.array([10 + s.arch, 14, 68]) + 0.3 * self.offset,
                np.array([6 + 0.6 * s.arch, -2, 88]),
                np.array([-8.0, -20, 93]),
                np.array([-20.0, -38, 80]),
                np.array([-22.0, -body.depth + 40, 55]),
                np.array([-20.0, -body.depth + 42, 20]),
                np.array([-17.0, -body.depth + 41, -25]),
                np.array([-13.0, -body.depth + 38, -70]),
                np.array([-10.0, -body.depth + 36, -130]),
            ],
            [0.84 * a, 1.12 * a, a, a, 0.93 * a, 0.85 * a, 0.80 * a, 0.78 * a]
            + [0.75 * a, 0.73 * a, 0.71 * a, 0.70 * a],
        )
        valve = self.place(np.array([-30.0, 43, 27]))
        p = s.pulmonary
        trunk = valve + [0, -19, 22]
        fork = trunk + np.array([4, -20, 10])
        self.pulmonary = Tube.through([valve, trunk, fork], [p, 1.05 * p, p])
        self.pulmonary_branches = [
            Tube.through(
                [fork, fork + [18, -8, -5], fork + [42, -14, -8], fork + [64, -18, -16]],
                [0.9 * p, 0.78 * p, 0.75 * p, 0.5 * p],
                3,
            ),
            Tube.through(
                [fork, fork + [-16, -12, 2], fork + [-34, -26, -3], fork + [-46, -34, -18]],
                [0.9 * p, 0.8 * p, 0.72 * p, 0.5 * p],
                3,
            ),
        ]
        inflow = base + apex * (14 * k) + septum * (radius + wall + 10 * s.rv) + up * (16 * k)
        self.outflow = Tube.through(
            [inflow, 0.5 * (inflow + valve) + [0, 4, 2], valve], [18 * s.rv * k, 1.1 * p, p]
        )

    def place(self, point: np.ndarray) -> np.ndarray:
        """Apply the heart's scale, rotation and shift to a rest position."""
        moved = self.turn @ (np.asarray(point) - HEART_CENTRE) * self.subject.heart_scale
        return HEART_CENTRE + moved + self.offset

    def vessels_behind(self) -> None:
        """Draw oesophagus, descending aorta, caval and pulmonary veins, pulmonary branches."""
        c = self.canvas
        back = -self.body.depth
        gullet = Tube.through(
            [
                (4, back + 58, 140),
                (2, back + 50, 60),
                (-2, back + 46, 0),
                (-12, back + 52, -60),
                (-24, back + 62, -90),
            ],
            [8.0, 8, 7.5, 8, 8],
        )
        c.draw("oesophagus", gullet)
        c.draw("airway", gullet.cut(0, 6).grown(-6.0))
        right = self.ra.centre
        for tissue, shape in (
            (
                "svc_blood",
                Tube.through(
                    [right + [3, -12, 10], right + [4, -14, 45], (30, 4, 90), (26, 4, 140)],
                    [10.0, 9, 8.5, 8.5],
                ),
            ),
            (
                "ivc_blood",
                Tube.through(
                    [
                        right + [-3, -12, -14],
                        right + [-4, -20, -42],
                        (24, -22, -90),
                        (20, -30, -140),
                    ],
                    [11.0, 11.5, 11, 11],
                ),
            ),
        ):
            c.draw("vessel_wall", shape.grown(1.2))
            c.draw(tissue, shape)
        la, r = self.la.centre, self.la.radii
        for direction, outwards in (
            ((0.80, -0.30, 0.38), (34, -6, 12)),
            ((0.78, -0.45, -0.25), (34, -12, -10)),
            ((-0.78, -0.30, 0.42), (-32, -8, 14)),
            ((-0.74, -0.50, -0.25), (-32, -16, -10)),
        ):
            start = la + r * np.array(direction)
            vein = Tube.through(
                [
                    start - 0.2 * r * np.array(direction),
                    start + 0.4 * np.array(outwards),
                    start + np.array(outwards),
                ],
                [8.0, 7.0, 5.0],
                3,
            )
            c.draw("vessel_wall", vein.grown(1.0))
            c.draw("vein_blood", vein)
        for branch in self.pulmonary_branches:
            c.draw("vessel_wall", branch.grown(1.2))
            c.draw("pa_blood", branch, PULMONARY_ARTERY)
        c.draw("vessel_wall", self.aorta.grown(1.6))
        c.draw("descending_blood", self.aorta.cut(16, len(self.aorta.points) - 1))

    def sac(self) -> None:
        """Draw the fat that fills the grooves between the chambers."""
        c, s = self.canvas, self.subject
        shapes = [self.epi, self.rv, self.ra, self.la]
        low = np.min([shape.bounds()[0] for shape in shapes], 0) - s.sac_fat
        high = np.max([shape.bounds()[1] for shape in shapes], 0) + s.sac_fat
        high[2] += 20
        self.box = box = c.box(low, high, 14)
        self.q = c.q[(slice(None), *box)]
        self.height = project(self.q, self.valve_normal, self.base)
        self.epi_distance = self.epi.distance(self.q)
        self.rv_distance = self.rv.distance(self.q)
        self.ra_distance = self.ra.distance(self.q)
        self.la_distance = self.la.distance(self.q)
        outflow = c.distance(self.outflow, box, 14)
        self.rv_distance = blend(self.rv_distance, outflow, 10)
        hull = blend(np.maximum(self.epi_distance, -self.height - 6), self.rv_distance - 3, 24)
        hull = blend(hull, self.ra_distance - 2, 24)
        hull = blend(hull, self.la_distance, 16)
        hull = blend(hull, c.distance(self.aorta.cut(0, 9), box, 14) - 2, 16)
        hull = blend(hull, c.distance(self.pulmonary, box, 14) - 2, 16)
        # Thicker over the right side and the grooves than over the free wall of the left.
        right = np.clip(project(self.q, self.axes[1], self.base) / 40, 0, 1)
        # The sac holds the heart within the ribs.
        hull = np.maximum(hull - s.sac_fat * (0.5 + 0.8 * right), self.body.inner[box] + 2)
        c.paint("vessel_wall", hull - 1.0, box)
        c.paint("epicardial_fat", hull, box)

    def right_side(self) -> None:
        """Draw right atrium and ventricle, and pulmonary trunk."""
        c, s, box = self.canvas, self.subject, self.box
        keep = self.body.inner[box] + 4
        side = self.height + 3  # the tricuspid valve lies a little above the mitral
        ra = np.maximum(self.ra_distance, keep)
        c.paint("myocardium", ra - 2.0, box)
        wall = np.maximum(np.maximum(self.rv_distance - 3.5, -side - 3), keep - 3)
        c.paint("myocardium", wall, box)
        c.paint("ra_blood", ra, box, RA_BLOOD)
        rv = np.maximum(np.maximum(self.rv_distance, -side), keep)
        rough = rv + np.float32(1.6 * s.trabeculae) * c.fields["rough"][box]
        c.paint("rv_blood", rough, box, RV_BLOOD, label_distance=rv)
        trunk = c.distance(self.pulmonary, box)
        c.paint("vessel_wall", trunk - 1.2, box)
        c.paint("pa_blood", trunk, box, PULMONARY_ARTERY)

    def left_side(self) -> None:
        """Draw left atrium and ventricle, ascending aorta and coronary arteries."""
        c, s, box = self.canvas, self.subject, self.box
        appendage = self.appendage.distance(self.q)
        la = blend(self.la_distance, appendage, 6)
        c.paint("myocardium", np.maximum(la - 1.8, self.height - 2), box)
        # Myocardium ends in an open ring at the valve plane.
        shell = np.maximum(self.epi_distance, -self.height)
        c.paint("myocardium", shell, box, LV_MYOCARDIUM)
        cavity = np.maximum(self.lv.distance(self.q), -self.height - 0.5)
        rough = cavity + np.float32(s.trabeculae) * c.fields["rough"][box] * np.clip(
            self.height / 30, 0, 1
        )
        c.paint("lv_blood", rough, box, LV_BLOOD, label_distance=cavity)
        apex, septum, up = self.axes
        radius = s.lv_radius * s.heart_scale
        for angle in (-0.55, 1.0):
            # Two papillary muscles stand on the free wall; labels count them as blood.
            outwards = -np.cos(angle) * septum - np.sin(angle) * up
            muscle = Ellipsoid(
                self.base + apex * (0.52 * s.lv_length) + outwards * (0.62 * radius),
                np.array([13.0, 4.2, 4.2]),
                self.axes,
            )
            near = c.around(muscle)
            c.paint("myocardium", c.distance(muscle, near), near, strength=0.9)
        # The atrium ends at the valve plane.
        c.paint("la_blood", np.maximum(la, self.height), box, LA_BLOOD)
        rising = self.aorta.cut(0, 16)
        near = c.around(rising)
        tube = c.distance(rising, near)
        height = project(c.q[(slice(None), *near)], self.valve_normal, self.base)
        c.paint("vessel_wall", np.maximum(tube - 1.5, height), near)
        c.paint("aorta_blood", np.maximum(tube, height - 1.5), near, ASCENDING_AORTA)
        self.coronaries()

    def coronaries(self) -> None:
        """Draw three arteries in the grooves, thinner than a voxel."""
        c, s = self.canvas, self.subject
        apex, septum, up = self.axes
        root = self.aorta.points[4]
        k = s.heart_scale
        out = s.lv_radius * k + s.wall + 3
        for path in (
            [
                root,
                self.base + 10 * apex + out * (0.5 * septum + 0.87 * up),
                self.base + 50 * k * apex + 0.93 * out * (0.62 * septum + 0.78 * up),
                self.base + 0.95 * s.lv_length * k * apex + 0.6 * out * (0.6 * septum + 0.6 * up),
            ],
            [
                root,
                self.base - 4 * apex + out * (0.2 * septum + 0.95 * up),
                self.base - 2 * apex - out * (0.9 * septum - 0.3 * up),
                self.base + 4 * apex - out * (0.6 * septum + 0.75 * up),
            ],
            [
                root,
                self.ra.centre + [-6, 20, 18],
                self.ra.centre + [2, 24, -6],
                self.ra.centre + [-10, 8, -26],
            ],
        ):
            c.draw("coronary_blood", Tube.through(path, [2.2, 2.0, 1.7, 1.3], 5))
