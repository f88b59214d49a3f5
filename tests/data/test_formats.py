"""formats.py: one volume, whichever format it comes in, and a sentence for what is none."""

from __future__ import annotations

import gc
import gzip
import os
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import refused
from scipy.spatial.transform import Rotation

from glua_bench.data.cache import SliceCache, file_digest, fingerprint
from glua_bench.data.formats import files_of, open_volume
from glua_bench.data.geometry import same_place
from glua_bench.data.volumes import (
    load_image,
    load_label,
    read_label_volume,
    restore,
    save_labels,
    save_volume,
)
from glua_bench.errors import DataError
from glua_bench.task import Case, DomainView, Grid, Reading, Structure

OTHERS = ("v.nrrd", "v.nhdr", "v.mha", "v.mhd")
STRUCTURES = (Structure("A", "a", (205,), ""), Structure("B", "b", (500,), ""))
VIEW = DomainView("ct", Reading(), STRUCTURES)
PROPERTY = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))


def heart(kind: type = np.int16) -> tuple[np.ndarray, np.ndarray]:
    """An image without symmetry and its raw labels."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in (17, 22, 13)), indexing="ij")
    r = np.sqrt((x - 0.1) ** 2 + (y + 0.2) ** 2 + z**2)
    raw = np.select([r < 0.4, r < 0.7], [500, 205], 0).astype(np.int16)
    return (300 + 40 * x + 90 * y - 60 * z + raw / 4).astype(kind), raw


def itk(data: np.ndarray, affine: np.ndarray) -> sitk.Image:
    """An ITK image of an array in stored axes and its affine to RAS."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(data.T))
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


def write(path: Path, data: np.ndarray, affine: np.ndarray | None = None, pack=False) -> Path:
    """A volume in the format of the name."""
    affine = np.eye(4) if affine is None else affine
    if ".nii" in path.name:
        nib.save(nib.Nifti1Image(data, affine), path)
    else:
        sitk.WriteImage(itk(data, affine), str(path), pack)
    return path


AXES = [
    np.array(order)[:, None] == np.arange(3) for order in permutations(range(3))
]  # boolean permutation matrices
SIGNS = list(product((1, -1), repeat=3))


@PROPERTY
@given(
    name=st.sampled_from(OTHERS),
    pack=st.booleans(),
    axes=st.sampled_from(range(6)),
    signs=st.sampled_from(SIGNS),
    tilt=st.sampled_from([(0, 0, 0), (0.2, -0.1, 0.3)]),
    spacing=st.tuples(*[st.floats(0.5, 2.5)] * 3),
    canonical=st.booleans(),
    cut=st.permutations([0, 1, 2]),
    kind=st.sampled_from([np.int16, np.uint16, np.float32, np.float64, np.int32]),
)
def test_every_format_gives_the_same_grid_and_the_same_way_back(
    tmp_path, name, pack, axes, signs, tilt, spacing, canonical, cut, kind
):
    """The same volume as .nii.gz and in another format: arrays, placement and results agree."""
    turn = Rotation.from_euler("xyz", tilt).as_matrix() @ (AXES[axes] * np.array(signs))
    affine = nib.affines.from_matvec(turn * spacing, (12.5, -7.25, 101.1))
    image, raw = heart(kind)
    reading = Reading("canonical" if canonical else "stored", cut[0], cut[1], (0,))
    grid = Grid(24, 1.3, 1.7)
    found = []
    for number, suffix in enumerate((".nii.gz", name.removeprefix("v"))):
        first = write(tmp_path / f"image{number}{suffix}", image, affine, pack)
        second = write(tmp_path / f"label{number}{suffix}", raw, affine, pack)
        loaded = load_image(first, reading, grid)
        labels = load_label(second, first, DomainView("ct", reading, STRUCTURES), loaded.placement)
        classes = read_label_volume(second, first, DomainView("ct", reading, STRUCTURES))
        restored = restore(np.eye(3, dtype=np.float32)[labels].transpose(3, 0, 1, 2),
                           loaded.placement)  # fmt: skip
        save_labels(tmp_path / f"out{number}.nii.gz", restored, loaded.placement, [205, 500])
        saved = nib.load(tmp_path / f"out{number}.nii.gz")
        found.append((loaded, labels, classes, restored, np.asarray(saved.dataobj), saved.affine))
    (nifti, *others), (itks, *same) = found
    assert np.array_equal(nifti.voxels, itks.voxels) and nifti.voxels.std() > 0.1
    for one, other in zip(others, same, strict=True):
        assert np.array_equal(one, other)
    assert set(np.unique(others[0])) == {0, 1, 2}
    for key in ("file_shape", "affine", "spacing", "axes", "flips", "offset", "step", "shape"):
        assert getattr(nifti.placement, key) == getattr(itks.placement, key), key
    assert np.array_equal(others[1] == 1, raw == 205)  # in stored axes


@PROPERTY
@given(
    name=st.sampled_from(OTHERS),
    angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3),
    spacing=st.tuples(*[st.floats(0.5, 3)] * 3),
    origin=st.tuples(*[st.floats(-300, 300)] * 3),
    mirrored=st.booleans(),
)
def test_affines_are_those_that_itk_writes_for_nifti(
    tmp_path, name, angles, spacing, origin, mirrored
):
    """ITK converts LPS to NIfTI's RAS itself; the same image gives the same affine here."""
    image = sitk.GetImageFromArray(heart()[0])
    turn = Rotation.from_euler("xyz", angles).as_matrix() @ np.diag([1, 1, -1 if mirrored else 1])
    image.SetSpacing(spacing)
    image.SetDirection(turn.ravel().tolist())
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(tmp_path / name))
    sitk.WriteImage(image, str(tmp_path / "v.nii.gz"))
    ours, theirs = open_volume(tmp_path / name), open_volume(tmp_path / "v.nii.gz")
    np.testing.assert_allclose(ours.affine, theirs.affine, atol=2e-4)
    np.testing.assert_allclose(ours.spacing, spacing, rtol=1e-6)
    assert np.array_equal(ours.voxels(), theirs.voxels())


NRRD = """NRRD0004
type: {kind}
dimension: 3
sizes: 2 3 4
{space}
encoding: {encoding}
endian: {endian}
{file}
"""
VALUES = np.arange(-10, 14, dtype=np.int16).reshape(2, 3, 4, order="F")
DIRECTIONS = "space directions: (0,2,0) (3,0,0) (0,0,-4)\nspace origin: (5,6,7)"


@pytest.mark.parametrize(
    "space, affine",
    [
        (f"space: right-anterior-superior\n{DIRECTIONS}",
         [[0, 3, 0, 5], [2, 0, 0, 6], [0, 0, -4, 7]]),
        (f"space: left-posterior-superior\n{DIRECTIONS}",
         [[0, -3, 0, -5], [-2, 0, 0, -6], [0, 0, -4, 7]]),
        (f"space: LAS\n{DIRECTIONS}", [[0, -3, 0, -5], [2, 0, 0, 6], [0, 0, -4, 7]]),
        ("spacings: 2 3 4", [[-2, 0, 0, 0], [0, -3, 0, 0], [0, 0, 4, 0]]),
    ],
)  # fmt: skip
def test_nrrd_spaces_are_brought_to_ras(tmp_path, space, affine):
    text = NRRD.format(kind="short", space=space, encoding="raw", endian="big", file="")
    (tmp_path / "v.nrrd").write_bytes(text.encode() + VALUES.astype(">i2").tobytes("F"))
    volume = open_volume(tmp_path / "v.nrrd")
    assert np.array_equal(volume.affine[:3], affine)
    assert np.array_equal(volume.voxels(), VALUES)


META = """ObjectType = Image
NDims = 3
TransformMatrix = 0 -1 0 1 0 0 0 0 1
Offset = 5 6 7
ElementSpacing = 2 3 4
DimSize = 2 3 4
ElementType = MET_SHORT
ElementByteOrderMSB = False
ElementDataFile = """
PARTS = [f"part{i}.raw" for i in range(4)]


@pytest.mark.parametrize(
    "suffix, style",
    [*product((".nhdr", ".nrrd"), ("one", "list", "pattern")), (".mhd", "one"), (".mha", "one")],
)
def test_voxels_beside_the_header_count(tmp_path, style, suffix):
    """They are read, a change of them changes digest and entry, and the loss of one is told."""
    (tmp_path / "d").mkdir()
    pieces = [VALUES[..., z].astype("<i2").tobytes("F") for z in range(4)]
    names = ["all voxels.raw"] if style == "one" else PARTS
    for name, piece in zip(names, [b"".join(pieces)] if style == "one" else pieces, strict=True):
        (tmp_path / "d" / name).write_bytes(piece)
    if suffix in (".nhdr", ".nrrd"):
        told = {
            "one": "data file: d/all voxels.raw",
            "list": "data file: LIST\n" + "\n".join(f"d/{name}" for name in names),
            "pattern": "data file: d/part%d.raw 0 3 1",
        }[style]
        text = NRRD.format(
            kind="int16", space=f"space: RAS\n{DIRECTIONS}", encoding="raw", endian="little",
            file=told,
        )  # fmt: skip
    else:
        text = f"{META}d/all voxels.raw"
    header = tmp_path / f"v{suffix}"
    header.write_text(text)
    case = Case("c", "mr", header, write(tmp_path / "l.nii.gz", VALUES * 0), "train", "s")

    assert np.array_equal(open_volume(header).voxels(), VALUES)
    assert files_of(header) == (header, *(tmp_path / "d" / name for name in names))
    before = file_digest(header), fingerprint([case])
    entry = SliceCache().image(case.unlabelled(), DomainView("ct", Reading(), ()).on(Grid(32, 1.0)))
    last = tmp_path / "d" / names[-1]
    content = bytearray(last.read_bytes())
    content[-2] ^= 64
    last.write_bytes(content)
    assert file_digest(header) != before[0] and fingerprint([case]) != before[1]
    again = SliceCache().image(case.unlabelled(), DomainView("ct", Reading(), ()).on(Grid(32, 1.0)))
    assert again.path != entry.path

    last.unlink()
    for look in (open_volume, file_digest):
        with refused(header) as caught:
            look(header)
        assert str(last) in str(caught.value)


OUTSIDE = [
    "{secret}", "../secret.raw", "d/../../secret.raw", "link.raw", "far/secret.raw",
    "a\0b.raw", "file://{secret}", "http://host/secret.raw", "..\\secret.raw", "C:\\secret.raw",
]  # fmt: skip


@pytest.mark.fault("hostile files", "a header that names voxels outside its directory")
@pytest.mark.parametrize("name", [*OUTSIDE, "LIST\n{secret}", "../secret%d.raw 0 1 1"])
@pytest.mark.parametrize("suffix", [".nhdr", ".nrrd", ".mhd", ".mha"])
def test_a_header_names_voxels_only_beside_itself(tmp_path, name, suffix):
    folder, secret = tmp_path / "cases", tmp_path / "secret.raw"
    (folder / "d").mkdir(parents=True)
    for number in ("", 0, 1):
        (tmp_path / f"secret{number}.raw").write_bytes(VALUES.astype("<i2").tobytes("F"))
    (folder / "link.raw").symlink_to(secret)
    (folder / "far").symlink_to(tmp_path)
    several = "LIST" in name or "%d" in name
    name = name.format(secret=secret)
    text = f"{META}{name}"
    if suffix in (".nhdr", ".nrrd"):
        text = NRRD.format(
            kind="int16", space=f"space: RAS\n{DIRECTIONS}", encoding="raw", endian="little",
            file=f"data file: {name}",
        )  # fmt: skip
    header = folder / f"v{suffix}"
    header.write_text(text)
    meta = suffix in (".mhd", ".mha")
    words = "several files" if several and meta else "lies outside"
    with refused(header, words):
        open_volume(header)


def test_a_header_that_is_a_link_may_name_a_link(tmp_path):
    """As in directories of git-annex, where each file is a link to its content."""
    (tmp_path / "content").mkdir()
    (tmp_path / "case").mkdir()
    (tmp_path / "content" / "1").write_text(f"{META}v.raw")
    (tmp_path / "content" / "2").write_bytes(VALUES.astype("<i2").tobytes("F"))
    (tmp_path / "case" / "v.mhd").symlink_to(tmp_path / "content" / "1")
    (tmp_path / "case" / "v.raw").symlink_to(tmp_path / "content" / "2")
    assert np.array_equal(open_volume(tmp_path / "case" / "v.mhd").voxels(), VALUES)


@pytest.mark.fault("hostile files", "a MetaImage that lists several files")
@pytest.mark.parametrize("names", ["LIST\npart0.raw\npart1.raw", "part%d.raw 0 1 1"])
def test_metaimages_of_several_files_are_refused(tmp_path, names):
    """ITK gives what the memory held for slices whose file is not in the list."""
    for number in range(2):
        (tmp_path / f"part{number}.raw").write_bytes(VALUES[..., :2].tobytes("F"))
    (tmp_path / "v.mhd").write_text(META + names)
    with refused(tmp_path / "v.mhd", "several files"):
        open_volume(tmp_path / "v.mhd")


def test_both_files_of_a_nifti_pair_count(tmp_path):
    nib.save(nib.Nifti1Pair(VALUES, np.eye(4)), tmp_path / "v.hdr")
    before = file_digest(tmp_path / "v.hdr")
    content = bytearray((tmp_path / "v.img").read_bytes())
    content[-1] ^= 1
    (tmp_path / "v.img").write_bytes(content)
    assert file_digest(tmp_path / "v.hdr") != before
    assert open_volume(tmp_path / "v.hdr").voxels().shape == VALUES.shape


@pytest.mark.parametrize("name", ["v.nii.gz", *OTHERS])
def test_axes_of_length_one_may_follow(tmp_path, name):
    if ".nii" in name:
        write(tmp_path / name, VALUES[..., None])
    else:
        sitk.WriteImage(sitk.JoinSeries([itk(VALUES, np.eye(4))]), str(tmp_path / name))
    assert np.array_equal(open_volume(tmp_path / name).voxels(), VALUES)


def test_arrays_outlive_the_file_that_gave_them(tmp_path):
    """ITK's own views point to freed memory once the image is gone."""
    data = np.random.default_rng(0).integers(0, 1000, (64, 64, 64)).astype(np.int16)
    part = open_volume(write(tmp_path / "v.mha", data)).voxels()[10:20]
    gc.collect()
    others = [np.full(data.shape, 7, np.int16) for _ in range(8)]  # which take freed memory
    assert np.array_equal(part, data[10:20]) and others


def _broken(kind: str, folder: Path) -> Path:
    """A file that cannot be used."""
    image = itk(heart()[0], np.eye(4))
    suffix = "." + kind.split()[-1]
    path = folder / f"broken{suffix}"
    if kind.startswith("vector"):
        image = sitk.Compose(image, image)
    elif kind.startswith("colour"):
        image = sitk.Compose(*[sitk.Cast(image, sitk.sitkUInt8)] * 3)
    elif kind.startswith("series"):
        image = sitk.JoinSeries([image, image])
    elif kind.startswith("flat"):
        image = image[:, :, 3]
    elif kind.startswith("constant"):
        image = image * 0 + 7
    elif kind.startswith("nan"):
        data = heart(np.float32)[0]
        data[3, 4, 5] = np.nan
        image = itk(data, np.eye(4))
    if kind.startswith(("text", "empty")):
        path.write_text("this is no image" if kind.startswith("text") else "")
    else:
        sitk.WriteImage(image, str(path), kind.startswith("packed"))
    content = path.read_bytes()
    if kind.startswith(("truncated", "packed")):
        path.write_bytes(content[: len(content) // 2])
    elif kind.startswith("cut header"):
        path.write_bytes(content[:60])
    elif kind.startswith("huge"):
        for size in (b"17 22 13", b"90000 90000 90000"):
            content = content.replace(b"17 22 13", size)
        path.write_bytes(content)
    elif kind.startswith("absurd"):
        path.write_bytes(content.replace(b"17 22 13", b"-17 0 1e9"))
    return path


@pytest.mark.parametrize("suffix", ["nrrd", "mha"])
@pytest.mark.parametrize(
    "kind",
    ["missing", "vector", "colour", "series", "flat", "constant", "nan", "text", "empty",
     "truncated", "packed", "cut header", "huge", "absurd"],
)  # fmt: skip
def test_what_is_no_volume_is_one_sentence(tmp_path, capfd, kind, suffix):
    path = _broken(f"{kind} {suffix}", tmp_path)
    if kind == "missing":
        path.unlink()
    capfd.readouterr()
    with refused(path):
        load_image(path, Reading(), Grid(16, 1.0))
    assert capfd.readouterr() == ("", "")  # what ITK's libraries would say


@pytest.mark.parametrize("suffix", ["nhdr", "mhd"])
def test_a_header_may_end_at_any_place_of_its_last_line(tmp_path, suffix):
    """That line names the file of the voxels; one cut there names another file, or none."""
    path = tmp_path / f"v.{suffix}"
    sitk.WriteImage(itk(heart(np.float32)[0], np.eye(4)), str(path))
    whole = path.read_bytes().rstrip(b"\n")
    begins = whole.rindex(b"\n") + 1
    for end in range(begins, len(whole)):
        for rest in (b"", b" ", b"\n"):
            path.write_bytes(whole[:end] + rest)
            with refused(path):
                load_image(path, Reading(), Grid(16, 1.0))


def test_complex_nrrd_is_one_sentence(tmp_path):
    path = tmp_path / "v.nrrd"
    data = itk(heart(np.float32)[0], np.eye(4))
    sitk.WriteImage(sitk.RealAndImaginaryToComplex(data, data), str(path))
    with refused(path, "one real number"):
        open_volume(path)


@pytest.mark.filterwarnings("error")
def test_nan_in_an_affine_is_a_sentence_without_a_warning(tmp_path):
    """Of the kind that processors report when they convert it."""
    content = bytearray(nib.Nifti1Image(VALUES, np.eye(4)).to_bytes())
    content[296:300] = np.array([0x7FA00000], "<u4").tobytes()  # srow_y
    (tmp_path / "v.nii").write_bytes(content)
    with refused(tmp_path / "v.nii"):
        load_image(tmp_path / "v.nii", Reading(), Grid(16, 1.0))


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
def test_a_header_that_claims_too_much_is_told_before_memory_is_taken(tmp_path, suffix):
    content = bytearray(nib.Nifti1Image(VALUES, np.eye(4)).to_bytes())
    content[42:48] = np.array([30_000] * 3, "<i2").tobytes()
    packed = gzip.compress(content) if suffix == "nii.gz" else bytes(content)
    (tmp_path / f"v.{suffix}").write_bytes(packed)
    with refused(tmp_path / f"v.{suffix}", "30000×30000×30000"):
        open_volume(tmp_path / f"v.{suffix}")


def test_the_terminal_is_given_back(tmp_path, capfd):
    """What Python itself writes to the error stream, and ITK's next reader, work as before."""
    with pytest.raises(DataError):
        open_volume(_broken("truncated mha", tmp_path)).voxels()
    capfd.readouterr()
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"
    assert np.array_equal(open_volume(write(tmp_path / "v.mha", VALUES)).voxels(), VALUES)


def test_itk_is_imported_for_its_own_formats_only(tmp_path):
    write(tmp_path / "v.nii.gz", heart()[0])
    write(tmp_path / "v.mha", heart()[0])
    program = (
        "import sys; from pathlib import Path; from glua_bench.data.volumes import load_image\n"
        "from glua_bench.task import Grid, Reading\n"
        "for name in sys.argv[1:]:\n"
        "    load_image(Path(name), Reading(), Grid(32, 1.0))\n"
        "    print('SimpleITK' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "v.nii.gz", tmp_path / "v.mha"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["False", "True"]


@pytest.mark.fault("silent damage", "packed voxels of NRRD and MetaImage files")
@pytest.mark.parametrize("name", OTHERS)
def test_damaged_bytes_of_packed_voxels_are_never_taken_for_voxels(tmp_path, name):
    """ITK compares no checksum of MetaImage, and not that of every damaged NRRD."""
    data = np.random.default_rng(0).integers(0, 200, (14, 12, 10)).astype(np.int16)
    path = write(tmp_path / name, data, pack=True)
    held = files_of(path)[-1]
    content = held.read_bytes()
    start = 0 if held != path else len(content) * 2 // 3
    np.testing.assert_array_equal(open_volume(path).voxels(), data)
    rng = np.random.default_rng(1)
    for place in rng.integers(start + 12, len(content), 25).tolist():
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        held.write_bytes(damaged)
        with refused(path, "damaged or truncated"):
            open_volume(path).voxels()
    held.write_bytes(content[:-3])
    with pytest.raises(DataError, match="damaged or truncated"):
        open_volume(path).voxels()


@pytest.mark.parametrize("said", ["4294967296", "11", "-3", "x"])
def test_a_number_of_axes_that_would_overrun_itk_is_a_sentence(tmp_path, said):
    path = write(tmp_path / "v.mhd", VALUES)
    path.write_text(path.read_text().replace("NDims = 3", f"NDims = {said}"))
    with refused(path, f"NDims = {said}"):
        open_volume(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_no_file_is_a_sentence(tmp_path):
    os.mkfifo(tmp_path / "v.nii.gz")
    (tmp_path / "v.nrrd").mkdir()
    for name in ("v.nii.gz", "v.nrrd"):
        with refused(tmp_path / name, "is not a file"):
            open_volume(tmp_path / name)


def _header(path: Path, **fields: float) -> Path:
    """A NIfTI file with other header fields."""
    content = nib.Nifti1Image(VALUES, np.diag([2.0, 2.0, 3.0, 1.0])).to_bytes()
    header = np.frombuffer(content[:348], nib.Nifti1Header.template_dtype).copy()
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.tobytes() + content[348:])
    return path


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sform_code": 99}, "sform_code 99 not valid"),
        ({"qform_code": -3}, "qform_code -3 not valid"),
        ({"pixdim": 0, "sform_code": 0}, "pixdim"),
        ({"vox_offset": np.inf}, "cannot be read"),
        ({"vox_offset": 1e30}, "damaged or truncated"),
        ({"scl_slope": 1, "scl_inter": np.nan}, "cannot be read"),
    ],
)
def test_a_header_that_has_to_be_guessed_is_a_sentence(tmp_path, capfd, fields, words):
    path = _header(tmp_path / "v.nii", **fields)
    with refused(path, words):
        open_volume(path).voxels()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fields", [{"sizeof_hdr": 347}, {"pixdim": 0}, {"vox_offset": 360}])
def test_harmless_repairs_of_a_header_are_quiet(tmp_path, capfd, fields):
    """Where the sform says how voxels lie, pixdim does not matter."""
    path = _header(tmp_path / "v.nii", **fields)
    if "vox_offset" in fields:
        content = path.read_bytes()
        path.write_bytes(content[:352] + bytes(8) + content[352:])
    found = open_volume(path)
    np.testing.assert_array_equal(found.voxels(), VALUES)
    np.testing.assert_array_equal(found.affine, np.diag([2.0, 2.0, 3.0, 1.0]))
    assert capfd.readouterr() == ("", "")


# -- what a header means --------------------------------------------------------------------------


def same(one: sitk.Image, other: sitk.Image) -> bool:
    """Whether SimpleITK puts both at one place, to the last digit."""
    return all(
        getattr(one, read)() == getattr(other, read)()
        for read in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection")
    )


# A turn by 0.3 about the first axis, voxels of 2 × 2 × 4 mm.
AFFINE = nib.affines.from_matvec(
    Rotation.from_euler("x", 0.3).as_matrix() @ np.diag([2.0, 2.0, 4.0]), (8.0, -16.0, 32.0)
)


def nifti_in(path: Path, data: np.ndarray, affine: np.ndarray, unit: int) -> Path:
    """NIfTI with an affine in mm, written in another unit."""
    length = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}[unit]
    own = affine.copy()
    own[:3] /= length
    image = nib.Nifti1Image(data, own)
    image.set_qform(own, 1)
    image.set_sform(own, 1)
    image.header["xyzt_units"] = unit | 16  # and milliseconds
    nib.save(image, path)
    return path


@pytest.mark.parametrize("suffix", ["nii", "nii.gz"])
@pytest.mark.parametrize("unit", [0, 1, 3])
def test_nifti_is_in_mm_whatever_its_unit(tmp_path, unit, suffix):
    """The same slices, places and volumes as in mm; written in the unit and numbers of the image.

    SimpleITK applies the unit and nibabel does not, and by both the labels lie on their image.
    """
    data, raw = heart()
    found = []
    for name, own in (("mm", 2), ("other", unit)):
        image = nifti_in(tmp_path / f"{name}.{suffix}", data, AFFINE, own)
        label = nifti_in(tmp_path / f"{name}_label.{suffix}", raw, AFFINE, own)
        loaded = load_image(image, Reading(), Grid(24, 2.0, 4.0))
        labels = load_label(label, image, VIEW, loaded.placement)
        np.testing.assert_allclose(loaded.placement.affine, AFFINE, atol=1e-5)
        np.testing.assert_allclose(open_volume(image).spacing, (2, 2, 4), rtol=1e-6)
        np.testing.assert_allclose(sitk.ReadImage(str(image)).GetSpacing(), (2, 2, 4), rtol=1e-6)
        out = tmp_path / f"{name}_out.nii.gz"
        save_labels(out, np.zeros(raw.shape, np.uint8), loaded.placement, [205, 500])
        assert np.array_equal(nib.load(out).affine, nib.load(image).affine)
        assert int(nib.load(out).header["xyzt_units"]) == own
        assert same(sitk.ReadImage(str(out)), sitk.ReadImage(str(image)))
        found.append((loaded.voxels, labels, loaded.placement.ml))
    np.testing.assert_allclose(found[0][0], found[1][0], atol=1e-4)
    assert np.array_equal(found[0][1], found[1][1]) and found[0][1].any()
    assert found[0][2] == pytest.approx(0.016) and found[1][2] == pytest.approx(0.016)


def test_forty_micrometres_are_forty_micrometres(tmp_path):
    image = nib.Nifti1Image(VALUES, np.diag([40.0, 40.0, 50.0, 1.0]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "v.nii")
    assert open_volume(tmp_path / "v.nii").spacing == pytest.approx((0.04, 0.04, 0.05))
    assert sitk.ReadImage(str(tmp_path / "v.nii")).GetSpacing() == pytest.approx((0.04, 0.04, 0.05))


@pytest.mark.parametrize(("first", "second"), [(2, 3), (3, 2), (0, 1), (1, 3)])
def test_image_and_label_may_state_different_units(tmp_path, first, second):
    """Places are compared in mm; numbers that are equal in different units are not."""
    data, raw = heart()
    image = nifti_in(tmp_path / "i.nii", data, AFFINE, first)
    label = nifti_in(tmp_path / "l.nii", raw, AFFINE, second)
    assert same_place(open_volume(label).affine, open_volume(image).affine, data.shape)
    assert np.array_equal(read_label_volume(label, image, VIEW) == 1, raw == 205)
    wrong = nib.load(label)
    wrong.header["xyzt_units"] = first
    nib.save(wrong, tmp_path / "w.nii")
    assert not same_place(
        open_volume(tmp_path / "w.nii").affine, open_volume(image).affine, data.shape
    )


@pytest.mark.parametrize(("unit", "code", "length"), [("um", 3, 1.0), ("m", 1, 1.0), ("cm", 2, 10)])
def test_results_for_nrrd_state_its_unit_where_nifti_has_it(tmp_path, unit, code, length):
    """With the numbers of the image, or in mm where NIfTI has no word for its unit."""
    directions = "space directions: (0,0.2,0) (0.3,0,0) (0,0,-0.4)\nspace origin: (0.5,0.6,0.7)"
    units = f'space units: "{unit}" "{unit}" "{unit}"'
    path = nrrd_in(tmp_path / "v.nrrd", f"space: RAS\n{directions}\n{units}")
    volume = open_volume(path)
    save_volume(tmp_path / "o.nii", np.zeros(VALUES.shape, np.uint8), volume.forms)
    written = nib.load(tmp_path / "o.nii")
    own = np.array([[0, 0.3, 0, 0.5], [0.2, 0, 0, 0.6], [0, 0, -0.4, 0.7]]) * length
    np.testing.assert_allclose(written.affine[:3], own, rtol=1e-6)
    np.testing.assert_allclose(written.get_qform()[:3], own, atol=1e-5)
    assert int(written.header["xyzt_units"]) == code
    again = open_volume(tmp_path / "o.nii")
    np.testing.assert_allclose(again.affine, volume.affine, rtol=1e-6)


def nrrd_in(path: Path, fields: str) -> Path:
    text = NRRD.format(kind="short", space=fields, encoding="raw", endian="little", file="")
    path.write_bytes(text.replace("\n\n\n", "\n\n").encode("latin-1") + VALUES.tobytes("F"))
    return path


def meta_in(path: Path, *changes: tuple[str, str]) -> Path:
    """A MetaImage whose header is `META` with replaced texts."""
    text = META
    for old, new in changes:
        text = text.replace(old, new)
    path.write_bytes(text.encode() + b"LOCAL\n" + VALUES.tobytes("F"))
    return path


UNITS = {"mm": 1.0, "um": 1e-3, "\u00b5m": 1e-3, "micron": 1e-3, "cm": 10.0, "m": 1000.0, "": 1.0}


@pytest.mark.parametrize("unit", UNITS)
def test_nrrd_is_in_mm_whatever_its_unit(tmp_path, unit):
    """`space units` of a space, and `units` of axes without one."""
    directions = f"space: RAS\n{DIRECTIONS}\nspace units: " + f'"{unit}" ' * 3
    first = open_volume(nrrd_in(tmp_path / "a.nrrd", directions.strip()))
    expected = np.array([[0, 3, 0, 5], [2, 0, 0, 6], [0, 0, -4, 7]]) * UNITS[unit]
    np.testing.assert_allclose(first.affine[:3], expected, rtol=1e-6)
    assert first.spacing == pytest.approx(np.array([2, 3, 4]) * UNITS[unit])
    second = open_volume(
        nrrd_in(tmp_path / "b.nrrd", f'spacings: 2 3 4\nunits: "{unit}" "{unit}" "{unit}"')
    )
    assert second.spacing == pytest.approx(np.array([2, 3, 4]) * UNITS[unit])
    assert first.oriented and not second.oriented
    assert np.array_equal(first.voxels(), VALUES)


@pytest.mark.parametrize("unit", ["mm", "um", "cm", "?", None])
def test_metaimage_is_in_mm_whatever_its_unit(tmp_path, unit):
    """MetaIO's field, which ITK keeps and does not apply."""
    line = f"DistanceUnits = {unit}\n" if unit else ""
    found = open_volume(meta_in(tmp_path / "v.mha", ("DimSize", f"{line}DimSize")))
    length = {"um": 1e-3, "cm": 10.0}.get(unit, 1.0)
    assert found.spacing == pytest.approx(np.array([2, 3, 4]) * length)
    expected = np.array([[0, 3, 0, -5], [-2, 0, 0, -6], [0, 0, 4, 7]])
    np.testing.assert_allclose(np.abs(found.affine[:3]), np.abs(expected) * length, rtol=1e-6)
    assert found.oriented


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("v.nrrd", f'space: RAS\n{DIRECTIONS}\nspace units: "mm" "mm" "um"'),
        ("v.nrrd", f'space: RAS\n{DIRECTIONS}\nspace units: "furlong" "furlong" "furlong"'),
        ("v.mha", "DistanceUnits = inch\n"),
        ("v.nii", 5),
        ("v.nii", 7 | 8),
    ],
)
def test_a_unit_that_is_none_is_a_sentence(tmp_path, name, content):
    path = tmp_path / name
    if name == "v.nrrd":
        nrrd_in(path, content)
    elif name == "v.mha":
        meta_in(path, ("DimSize", f"{content}DimSize"))
    else:
        _header(path, xyzt_units=content)
    with refused(path, "unit"):
        open_volume(path)


@pytest.mark.parametrize(
    ("fields", "oriented"),
    [
        (f"space: RAS\n{DIRECTIONS}", True),
        (f"space: left-posterior-superior\n{DIRECTIONS}", True),
        ("spacings: 2 3 4", False),
        (f"space dimension: 3\n{DIRECTIONS}", False),
        (f"space: scanner-xyz\n{DIRECTIONS}", False),
    ],
)
def test_nrrd_without_a_space_of_the_body_is_known(tmp_path, fields, oriented):
    assert open_volume(nrrd_in(tmp_path / "v.nrrd", fields)).oriented is oriented


def test_nifti_and_metaimage_without_directions_are_known(tmp_path):
    assert not open_volume(_header(tmp_path / "v.nii", sform_code=0, qform_code=0)).oriented
    assert open_volume(_header(tmp_path / "w.nii", sform_code=0, qform_code=1)).oriented
    bare = meta_in(tmp_path / "v.mha", ("TransformMatrix = 0 -1 0 1 0 0 0 0 1\n", ""))
    assert not open_volume(bare).oriented


def quaternion(path: Path, length: float, sform_code: int = 0) -> Path:
    """A NIfTI file with a qform whose b, c and d have this length together."""
    b, c, d = np.array([2.0, 3.0, 6.0]) / 7 * length
    return _header(path, qform_code=1, sform_code=sform_code, quatern_b=b, quatern_c=c, quatern_d=d)


@pytest.mark.parametrize("over", [-1e-6, 0.0, 1e-6, 3e-5])
def test_quaternions_within_rounding_are_read_as_itk_reads_them(tmp_path, over):
    """nibabel refuses them from 2e-7 on; what is written for the file, it opens."""
    path = quaternion(tmp_path / "v.nii", 1 + over)
    found, theirs = open_volume(path), sitk.ReadImage(str(path))
    lps = np.reshape(theirs.GetDirection(), (3, 3)) * theirs.GetSpacing()
    np.testing.assert_allclose(found.affine[:3, :3], np.diag([-1, -1, 1]) @ lps, atol=5e-3)
    placement = load_image(path, Reading(), Grid(8, 2.0)).placement
    save_labels(tmp_path / "o.nii", np.zeros(VALUES.shape, np.uint8), placement, [205, 500])
    np.testing.assert_allclose(nib.load(tmp_path / "o.nii").affine, found.affine, atol=1e-5)
    written = sitk.ReadImage(str(tmp_path / "o.nii"))
    np.testing.assert_allclose(written.GetDirection(), theirs.GetDirection(), atol=2e-3)


@pytest.mark.parametrize("length", [1.01, 2.0, np.inf, np.nan])
def test_a_quaternion_that_is_no_rotation_is_a_sentence_of_ours(tmp_path, length):
    path = quaternion(tmp_path / "v.nii", length)
    with refused(path, "correct the qform, or set the sform") as caught:
        open_volume(path)
    assert "w2" not in str(caught.value)
    # Beside an sform it is not asked.
    beside = open_volume(quaternion(tmp_path / "w.nii", length, sform_code=1))
    np.testing.assert_array_equal(beside.affine, np.diag([2.0, 2.0, 3.0, 1.0]))


def test_a_handedness_of_zero_is_one(tmp_path):
    """The standard says so; nibabel takes it for a guess."""
    path = _header(tmp_path / "v.nii", sform_code=0, qform_code=1, pixdim=[0, 2, 2, 3, 0, 0, 0, 0])
    np.testing.assert_array_equal(open_volume(path).affine, np.diag([2.0, 2.0, 3.0, 1.0]))
    assert sitk.ReadImage(str(path)).GetSpacing() == (2, 2, 3)


def sheared(path: Path, degrees: float) -> Path:
    """A volume whose third axis leans by an angle."""
    lean = np.tan(np.radians(degrees))
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    affine[1, 2] = 3 * lean
    if path.suffix == ".nii":
        image = nib.Nifti1Image(VALUES, affine)
        image.set_sform(affine, 1)
        nib.save(image, path)
    elif path.suffix == ".nrrd":
        directions = f"(2,0,0) (0,2,0) (0,{3 * lean},3)"
        nrrd_in(path, f"space: RAS\nspace directions: {directions}\nspace origin: (0,0,0)")
    else:
        # As many digits as writers give it; the third direction has length 1.
        y, z = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
        directions = ("0 -1 0 1 0 0 0 0 1", f"1 0 0 0 1 0 0 {y:.9f} {z:.9f}")
        meta_in(path, directions, ("2 3 4\nDimSize", f"2 2 {3 / z:.9f}\nDimSize"))
    return path


@pytest.mark.parametrize("name", ["v.nii", "v.nrrd", "v.mha"])
def test_a_shear_is_a_sentence_that_names_the_way_out(tmp_path, name):
    path = sheared(tmp_path / name, 30)
    with refused(path, "60.0° instead of 90°.*resample_to_output"):
        load_image(path, Reading(), Grid(8, 2.0))
    # Where the header is known to be wrong, nothing is asked of it.
    load_image(path, Reading("stored", stated_spacing=(2.0, 2.0, 3.0)), Grid(8, 2.0))


@pytest.mark.parametrize("name", ["v.nii", "v.nrrd", "v.mha"])
def test_what_rounding_leaves_of_a_shear_is_read_with_the_right_volume(tmp_path, name):
    placement = load_image(sheared(tmp_path / name, 0.5), Reading(), Grid(8, 2.0)).placement
    exact = 2 * 2 * 3 / 1000  # whatever the third axis leans
    assert placement.ml == pytest.approx(exact, rel=1e-7)
    assert np.prod(placement.spacing) / 1000 > exact * (1 + 3e-5)
    assert placement.grid_ml == pytest.approx(exact * np.prod(placement.step))


def test_a_stated_spacing_gives_the_volume(tmp_path):
    path = write(tmp_path / "v.nii", VALUES, np.diag([1.25, 1.25, 8.0, 1.0]))
    for reading in (
        Reading("stored", stated_spacing=(0.74, 0.74, 0.0)),
        Reading("canonical", stated_spacing=(0.74, 0.74, 0.0)),
    ):
        placement = load_image(path, reading, Grid(8, 1.0)).placement
        assert placement.ml == pytest.approx(0.74 * 0.74 * 8 / 1000, rel=1e-6)


def test_resampling_as_the_sentence_says_mends_a_shear(tmp_path):
    from nibabel.processing import resample_to_output

    resampled = resample_to_output(nib.load(sheared(tmp_path / "v.nii", 30)), order=0)
    nib.save(resampled, tmp_path / "w.nii")
    load_image(tmp_path / "w.nii", Reading(), Grid(8, 2.0))
