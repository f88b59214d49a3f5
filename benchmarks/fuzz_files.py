"""Damaged and forged volumes through `data check` and `data prepare`: what each of them does.

    python benchmarks/fuzz_files.py [--files 2000] [--seed 0] [--kind NAME] [--keep FOLDER]

Small volumes of every format and several number types are mutated: truncated, bits flipped in the
header and behind it, the other endianness, header fields with absurd values, archives that inflate
beyond all bounds, NaN. One mutated image or label at a time goes through the functions behind the
two commands, in a child process whose address space may grow by 1 GiB, with ten seconds for a file.
Every file has to end in one sentence that names it, or to be accepted by both. A defect is

- an exception that is no sentence, a process that dies or hangs, more memory than allowed;
- a sentence that is none, anything printed beside it, a warning of a library;
- a file that `prepare` refuses and `check` accepts;
- an entry of the cache that is unfinished, unreadable, or holds what no volume may hold.

The command prints a table by mutation, then every defect, and fails where there is one. The same
seed makes the same files. `tests/data/test_fuzz.py` runs a part of them.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

SHAPE = (20, 18, 8)
SECONDS = 10
GROWTH = 1 << 30  # bytes of address space that a file may take
CHUNK = 250  # files of one child process


# -- originals -----


@dataclass(frozen=True)
class Original:
    """A sound volume: its file, what lies beside it, and whether it is a label."""

    path: Path
    beside: tuple[Path, ...]
    label: bool


def originals(folder: Path) -> list[Original]:
    """Sound volumes of every format that is read, made once in a folder."""
    import SimpleITK as sitk

    rng = np.random.default_rng(7)
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    ball = sum(axis**2 for axis in grid) < 0.4
    body = (400 * ball + 200 + rng.normal(0, 30, SHAPE)).clip(1, 900)
    classes = ball.astype(np.uint8)
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    made = []

    def nifti(name: str, voxels: np.ndarray, slope: float = 1.0) -> None:
        image = nib.Nifti1Image(voxels, affine)
        image.header.set_slope_inter(slope, 0)
        nib.save(image, folder / name)
        made.append(Original(folder / name, (), "label" in name))

    for kind in ("i2", "f4", "u1", ">i2", "f8"):
        name = kind.replace(">", "big-")
        nifti(f"image-{name}.nii.gz", (body / 4 if kind == "u1" else body).astype(kind))
    nifti("image-scaled.nii.gz", body.astype("i2"), 0.5)
    nifti("image.nii", body.astype("i2"))
    nifti("label.nii.gz", classes)
    nifti("label-f4.nii", classes.astype("f4"))
    for suffix in (".nrrd", ".nhdr", ".mha", ".mhd"):
        for label in (False, True):
            own = folder / f"{suffix[1:]}-{label}"
            own.mkdir()
            path = own / f"{'label' if label else 'image'}{suffix}"
            image = sitk.GetImageFromArray((classes if label else body.astype("i2")).T)
            image.SetSpacing((2.0, 2.0, 3.0))
            image.SetDirection((1, 0, 0, 0, -1, 0, 0, 0, 1))  # as the affine, in LPS
            sitk.WriteImage(image, str(path), useCompression=suffix in (".nrrd", ".mha"))
            made.append(Original(path, tuple(sorted({*own.iterdir()} - {path})), label))
    return made


# -- mutations -----

Mutation = Callable[[np.random.Generator, bytes], bytes]
# Of the bytes of a NIfTI header or of an NRRD or MetaImage file.
HEADERS: dict[str, Mutation] = {}
# Of a whole file, packed as it is.
FILES: dict[str, Mutation] = {}
NIFTI, TEXT = "nifti", "text"
_ONLY: dict[str, str] = {}


def of_header(only: str = "") -> Callable[[Mutation], Mutation]:
    def add(function: Mutation) -> Mutation:
        name = function.__name__.replace("_", " ")
        HEADERS[name] = function
        if only:
            _ONLY[name] = only
        return function

    return add


def of_file(function: Mutation) -> Mutation:
    FILES[function.__name__.replace("_", " ")] = function
    return function


def _flip(rng: np.random.Generator, content: bytes, start: int, stop: int, most: int) -> bytes:
    changed = bytearray(content)
    stop = min(stop, len(changed))
    for _ in range(int(rng.integers(1, most + 1))):
        if stop > start:
            changed[int(rng.integers(start, stop))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


@of_file
def truncated(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: int(rng.integers(0, len(content)))]


@of_file
def truncated_at_the_end(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: -int(rng.integers(1, 12))]


@of_file
def bits_flipped_anywhere(rng: np.random.Generator, content: bytes) -> bytes:
    return _flip(rng, content, 0, len(content), 8)


@of_file
def a_piece_missing(rng: np.random.Generator, content: bytes) -> bytes:
    start = int(rng.integers(0, len(content)))
    return content[:start] + content[start + int(rng.integers(1, 200)) :]


@of_file
def something_appended(rng: np.random.Generator, content: bytes) -> bytes:
    return content + rng.bytes(int(rng.integers(1, 3000)))


@of_file
def twice(rng: np.random.Generator, content: bytes) -> bytes:
    return content + content


@of_file
def something_else(rng: np.random.Generator, content: bytes) -> bytes:
    other = (
        b"",
        b"\n",
        b"<html>404 Not Found</html>\n" * 40,
        rng.bytes(int(rng.integers(1, 4000))),
        gzip.compress(b"a text\n" * 500),
        bytes(len(content)),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        b"NRRD0005\n",
        b"ObjectType = Image\n",
    )
    return other[int(rng.integers(len(other)))]


@of_file
def packed_again(rng: np.random.Generator, content: bytes) -> bytes:
    return gzip.compress(content)


@of_file
def unpacked_or_packed(rng: np.random.Generator, content: bytes) -> bytes:
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else gzip.compress(content)


@of_header()
def header_bits_flipped(rng: np.random.Generator, content: bytes) -> bytes:
    return _flip(rng, content, 0, 352, 8)


@of_header()
def one_header_bit_flipped(rng: np.random.Generator, content: bytes) -> bytes:
    return _flip(rng, content, 0, 352, 1)


@of_header()
def voxels_flipped(rng: np.random.Generator, content: bytes) -> bytes:
    return _flip(rng, content, 352, len(content), 300)


def _fields(content: bytes) -> Any:
    """The header of a NIfTI file as a record that can be written to."""
    kind = nib.Nifti1Header.template_dtype
    if content[:4] == b"\x00\x00\x01\x5c":
        kind = kind.newbyteorder(">")
    return np.frombuffer(content[:348], kind).copy()


def _with(content: bytes, header: Any) -> bytes:
    return header.tobytes() + content[348:]


@of_header(NIFTI)
def other_endianness_of_the_header(rng: np.random.Generator, content: bytes) -> bytes:
    return _with(content, _fields(content).byteswap())


@of_header(NIFTI)
def other_endianness_of_the_voxels(rng: np.random.Generator, content: bytes) -> bytes:
    size = max(1, int(_fields(content)["bitpix"][0]) // 8)
    voxels = np.frombuffer(content[352:], np.uint8).reshape(-1, size)
    return content[:352] + voxels[:, ::-1].tobytes()


@of_header(NIFTI)
def absurd_dimensions(rng: np.random.Generator, content: bytes) -> bytes:
    header = _fields(content)
    dims = header["dim"][0]
    choice = int(rng.integers(6))
    if choice == 0:
        dims[0] = rng.choice([-1, 0, 1, 2, 4, 5, 7, 8, 100, 32767])
    elif choice == 1:
        dims[1:4] = 32767
    elif choice == 2:
        dims[int(rng.integers(1, 4))] = rng.choice([-32768, -1, 0, 1, 2, 1000, 32767])
    elif choice == 3:
        dims[:5] = 4, *SHAPE, int(rng.integers(2, 5))
    elif choice == 4:
        dims[1:4] = rng.integers(1, 2000, 3)
    else:
        dims[:] = rng.integers(-(2**15), 2**15, 8)
    return _with(content, header)


@of_header(NIFTI)
def absurd_voxel_sizes(rng: np.random.Generator, content: bytes) -> bytes:
    header, state = _fields(content), np.seterr(all="ignore")
    odd = [np.nan, np.inf, -np.inf, 0, -2, 1e-30, 1e-6, 1e-3, 1e3, 1e6, 1e30, 3e38]
    for axis in range(3):
        if rng.random() < 0.6:
            size = rng.choice(odd)
            header["pixdim"][0][axis + 1] = size
            header[f"srow_{'xyz'[axis]}"][0][:3] *= size / 2
    np.seterr(**state)
    if rng.random() < 0.3:
        header["sform_code"] = 0
    return _with(content, header)


@of_header(NIFTI)
def absurd_affine(rng: np.random.Generator, content: bytes) -> bytes:
    header = _fields(content)
    rows = rng.choice([0, 0, 1, -1, 2, 1e-20, 1e20, np.nan, np.inf], (3, 4))
    if rng.random() < 0.3:
        rows = np.zeros((3, 4))
    for axis, row in zip("xyz", rows, strict=True):
        header[f"srow_{axis}"] = row
    header["sform_code"] = rng.choice([1, 2, 99, -5])
    if rng.random() < 0.3:
        header["sform_code"], header["qform_code"] = 0, 1
        for name in ("quatern_b", "quatern_c", "quatern_d", "qoffset_x"):
            header[name] = rng.choice([0, 1, -1, 2, np.nan, np.inf, 1e20])
    return _with(content, header)


@of_header(NIFTI)
def another_unit(rng: np.random.Generator, content: bytes) -> bytes:
    """Codes that exist and codes that do not; in half of the files, numbers to go with them."""
    header = _fields(content)
    unit = int(rng.integers(0, 8))
    header["xyzt_units"] = unit | int(rng.choice([0, 8, 16, 24, 64]))
    if rng.random() < 0.5:
        factor = {1: 1e-3, 3: 1e3}.get(unit, 1.0)
        header["pixdim"][0][1:4] *= factor
        for name in ("srow_x", "srow_y", "srow_z", "qoffset_x", "qoffset_y", "qoffset_z"):
            header[name] *= np.float32(factor)
    return _with(content, header)


@of_header(NIFTI)
def two_forms_or_none(rng: np.random.Generator, content: bytes) -> bytes:
    """Any pair of codes, and a qform that lies as the sform does, beside it, or turned."""
    header = _fields(content)
    header["qform_code"], header["sform_code"] = rng.choice([0, 0, 1, 2, 4], 2)
    choice = int(rng.integers(4))
    header["pixdim"][0][0] = rng.choice([-1, 0, 1])
    if choice == 1:
        header["qoffset_x"] += np.float32(rng.normal(0, 30))
    elif choice == 2:
        turn = rng.normal(0, 1, 4)
        turn /= np.linalg.norm(turn)
        for name, value in zip(("quatern_b", "quatern_c", "quatern_d"), turn[1:], strict=True):
            header[name] = value
    elif choice == 3:
        header["pixdim"][0][1:4] *= rng.choice([1, 1.0001, 1.02, 3], 3)
    return _with(content, header)


@of_header(NIFTI)
def a_quaternion_of_another_length(rng: np.random.Generator, content: bytes) -> bytes:
    header = _fields(content)
    turn = rng.normal(0, 1, 3)
    turn *= (1 + rng.choice([-1e-6, 1e-7, 1e-6, 1e-5, 9e-5, 2e-4, 1, 1e19])) / np.linalg.norm(turn)
    for name, value in zip(("quatern_b", "quatern_c", "quatern_d"), turn, strict=True):
        header[name] = value
    header["qform_code"], header["sform_code"] = 1, rng.choice([0, 0, 1])
    return _with(content, header)


@of_header(NIFTI)
def axes_that_lean(rng: np.random.Generator, content: bytes) -> bytes:
    """A shear, from what rounding leaves to axes that nearly coincide."""
    header = _fields(content)
    lean = np.float32(10.0 ** rng.uniform(-5, 3))
    one, other = rng.permutation(3)[:2]
    header[f"srow_{'xyz'[one]}"][0][other] += lean
    return _with(content, header)


@of_header(NIFTI)
def absurd_scaling(rng: np.random.Generator, content: bytes) -> bytes:
    header = _fields(content)
    odd = [np.nan, np.inf, -np.inf, 0, 1, -1, 1e-38, 1e-45, 1e30, 3e38]
    header["scl_slope"], header["scl_inter"] = rng.choice(odd, 2)
    return _with(content, header)


@of_header(NIFTI)
def absurd_types_and_offsets(rng: np.random.Generator, content: bytes) -> bytes:
    header = _fields(content)
    choice = int(rng.integers(5))
    if choice == 0:
        known = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304]
        header["datatype"] = rng.choice([*known, 3, 5, 9999, -1])
    elif choice == 1:
        header["bitpix"] = rng.choice([0, 1, 7, 8, 16, 64, -8, 32767])
    elif choice == 2:
        header["vox_offset"] = rng.choice(
            [0, 1, 300, 348, 1e3, 1e5, 1e9, 1e30, -352, np.nan, np.inf]
        )
    elif choice == 3:
        header["sizeof_hdr"] = rng.choice([0, 347, 540, -1, 2**31 - 1])
    else:
        header["magic"] = rng.choice([b"n+1", b"ni1", b"n+2", b"abc", b""])
    return _with(content, header)


@of_header(NIFTI)
def every_field_random(rng: np.random.Generator, content: bytes) -> bytes:
    header = _fields(content)
    for name in rng.choice(header.dtype.names, int(rng.integers(1, 5)), replace=False):
        width = header[name].nbytes
        header[name] = np.frombuffer(rng.bytes(width), header[name].dtype).reshape(
            header[name].shape
        )
    return _with(content, header)


@of_header(NIFTI)
def not_a_number(rng: np.random.Generator, content: bytes) -> bytes:
    header = _fields(content)
    voxels = rng.normal(0, 100, SHAPE).astype("f4")
    for _ in range(int(rng.integers(1, 4))):
        voxels[tuple(rng.integers(0, SHAPE))] = rng.choice([np.nan, np.inf, -np.inf, 3e38, -3e38])
    header["datatype"], header["bitpix"] = 16, 32
    if header["dim"].dtype.byteorder == ">":
        voxels = voxels.astype(">f4")
    return _with(content[:352], header) + voxels.tobytes("F")


@of_header(NIFTI)
def one_value_everywhere(rng: np.random.Generator, content: bytes) -> bytes:
    return content[:352] + bytes([int(rng.integers(256))]) * (len(content) - 352)


@of_header(NIFTI)
def more_than_the_header_says(rng: np.random.Generator, content: bytes) -> bytes:
    """Behind the voxels, up to 256 MiB of zeros, which a packed file holds in 256 kB."""
    return content + bytes(int(rng.integers(1, 9)) << int(rng.integers(10, 26)))


@of_header(NIFTI)
def bomb(rng: np.random.Generator, content: bytes) -> bytes:
    """A header that claims many voxels, and zeros for some or all of them."""
    header = _fields(content)
    side = int(rng.integers(200, 900))
    header["dim"][0][1:4] = side, side, int(rng.integers(20, 300))
    claimed = int(np.prod(header["dim"][0][1:4].astype(int))) * int(header["bitpix"][0]) // 8
    held = min(claimed, 1 << 27) if rng.random() < 0.5 else int(rng.integers(1, 1 << 24))
    return _with(content[:352], header) + bytes(held)


_ODD_TEXT = (
    *("", "0", "-1", "1", "nan", "inf", "1e400", "99999", "4294967296", "18446744073709551616"),
    *("a", "none", "(1,0,0) (0,0,0) (0,0,1)", "1 1 1", "20 18", "20 18 8 2", "0 0 0", "-20 18 8"),
    *("100000 100000 100000", "1e9 1e9 1e9", "nan nan nan", "(nan,0,0) (0,nan,0) (0,0,nan)"),
    *("LOCAL", "LIST", "nothing.raw", "/dev/zero", ".", "../..", "%d.raw 1 3 1", "%s%s%s%n"),
    *("gzip", "bzip2", "hex", "raw", "ascii", "big", "little", "MET_FLOAT", "MET_OTHER", "block"),
    *("um", "cm", '"mm" "mm" "um"', "(1,0,0) (0,1,0) (0,0.5,1)", "1 0 0 0 1 0 0 0.5 1"),
    *("double", "int8", "unsigned char", "left-posterior-superior", "2", "3", "4", "7", "True"),
)


@of_header(TEXT)
def a_line_of_the_header_changed(rng: np.random.Generator, content: bytes) -> bytes:
    lines, rest = _lines(content)
    for _ in range(int(rng.integers(1, 3))):
        number = int(rng.integers(len(lines)))
        mark = b"=" if b"=" in lines[number] else b":"
        name = lines[number].split(mark)[0]
        value = _ODD_TEXT[int(rng.integers(len(_ODD_TEXT)))].encode()
        lines[number] = name + mark + b" " + value
    return b"\n".join(lines) + b"\n" + rest


@of_header(TEXT)
def a_unit_or_a_shear_stated(rng: np.random.Generator, content: bytes) -> bytes:
    lines, rest = _lines(content)
    unit = ("mm", "um", "\u00b5m", "cm", "m", "nm", "?", "", "inch", "%s")[int(rng.integers(10))]
    lean = f"{10.0 ** rng.uniform(-5, 1):.6g}"
    if content.startswith(b"NRRD"):
        mixed = "mm" if rng.random() < 0.2 else unit
        field = f'space units: "{unit}" "{unit}" "{mixed}"'
        # One zero of the directions, where there is one, becomes the shear.
        lines = [
            line.replace(b",0)", f",{lean})".encode(), 1)
            if line.startswith(b"space directions") and rng.random() < 0.5
            else line
            for line in lines
        ]
        lines.insert(int(rng.integers(1, len(lines))), field.encode("latin-1"))
        return b"\n".join(lines) + b"\n" + rest
    lines = [
        line.replace(b" 0 ", f" {lean} ".encode(), 1)
        if line.startswith(b"TransformMatrix") and rng.random() < 0.5
        else line
        for line in lines
    ]
    lines.insert(int(rng.integers(len(lines))), f"DistanceUnits = {unit}".encode())
    return b"\n".join(lines) + b"\n" + rest


@of_header(TEXT)
def a_line_of_the_header_missing(rng: np.random.Generator, content: bytes) -> bytes:
    lines, rest = _lines(content)
    del lines[int(rng.integers(len(lines)))]
    return b"\n".join(lines) + b"\n" + rest


@of_header(TEXT)
def a_line_of_the_header_twice(rng: np.random.Generator, content: bytes) -> bytes:
    lines, rest = _lines(content)
    lines.insert(int(rng.integers(len(lines))), lines[int(rng.integers(len(lines)))])
    return b"\n".join(lines) + b"\n" + rest


def _lines(content: bytes) -> tuple[list[bytes], bytes]:
    """The lines of a text header, and what follows it."""
    if content.startswith(b"NRRD"):
        head, mark, rest = content.partition(b"\n\n")
        return head.split(b"\n"), mark[1:] + rest
    head, mark, rest = content.partition(b"ElementDataFile")
    end = rest.find(b"\n") + 1
    return (head + mark + rest[:end]).rstrip(b"\n").split(b"\n"), rest[end:]


def mutate(rng: np.random.Generator, original: Original, folder: Path, name: str) -> Path:
    """Write a mutated copy of a volume, with what lies beside it."""
    path = folder / f"{'label' if original.label else 'image'}{''.join(original.path.suffixes)}"
    for file in original.beside:
        shutil.copy(file, folder / file.name)
    content = original.path.read_bytes()
    packed = content[:2] == b"\x1f\x8b"
    if name in FILES:
        target = path
        if original.beside and rng.random() < 0.5:  # the voxels rather than the header
            shutil.copy(original.path, path)
            target = folder / original.beside[0].name
            content = target.read_bytes()
        target.write_bytes(FILES[name](rng, content))
    elif packed:
        path.write_bytes(gzip.compress(HEADERS[name](rng, gzip.decompress(content)), 6, mtime=0))
    else:
        path.write_bytes(HEADERS[name](rng, content))
    return path


def plan(
    made: list[Original], count: int, seed: int, only: str
) -> Iterator[tuple[int, Original, str, int]]:
    """Number, original, mutation and seed of every file."""
    fitting = []
    for name in [*FILES, *HEADERS]:
        for original in made:
            text = original.path.suffix in (".nrrd", ".nhdr", ".mha", ".mhd")
            if _ONLY.get(name, TEXT if text else NIFTI) == (TEXT if text else NIFTI):
                fitting.append((name, original))
    fitting = [pair for pair in fitting if not only or pair[0] == only]
    order = np.random.default_rng(seed).permutation(len(fitting))
    for number in range(count):
        name, original = fitting[order[number % len(fitting)]]
        yield number, original, name, seed * 1_000_003 + number


# -- a child, which may die -----


class _Hang(BaseException):
    """A file took too long."""


def child(folder: Path, first: int, last: int, count: int, seed: int, only: str) -> None:
    """Try files, and print a line of JSON about each; memory is bounded."""
    from glua_bench.console import Progress
    from glua_bench.data.cache import SliceCache
    from glua_bench.data.preparation import prepare_cases
    from glua_bench.errors import RunFailure, UserError
    from glua_bench.inspection.integrity import check_dataset
    from glua_bench.task import Case, Dataset, Grid, Reading, Structure

    class Two(Dataset):
        """One case, of which one file is mutated."""

        name, reference, needs = "fuzz", "", ""
        structures = (Structure("BALL", "ball", (1,), "#0072b2"),)
        directions = ("a-b",)
        reading = Reading()
        grids: dict[str, Grid] = {}

        def prepare(self, report: Callable[[str], None] = lambda line: None) -> None: ...

        def cases(self, domain: str) -> tuple[Case, ...]:
            return (case,) if domain == "a" else ()

    def hang(number: int, frame: object) -> None:
        raise _Hang

    signal.signal(signal.SIGALRM, hang)
    made = originals(Path(tempfile.mkdtemp(dir=folder)))
    sound = {original.label: original.path for original in reversed(made)}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + GROWTH, used + GROWTH))
    caught = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  it lives as long as the process
    kept = os.dup(2)
    for number, original, name, own_seed in plan(made, count, seed, only):
        if not first <= number < last:
            continue
        place = Path(tempfile.mkdtemp(dir=folder))
        path = mutate(np.random.default_rng(own_seed), original, place, name)
        pair = {original.label: path, not original.label: sound[not original.label]}
        case = Case("a_1", "a", pair[False], pair[True], "train", "a_1")
        cache = SliceCache(place / "cache" / "slices")
        os.environ["GLUA_BENCH_CACHE"] = str(place / "cache")
        defects, sentences, prepared = [], [], []
        began = time.monotonic()
        caught.seek(0)
        caught.truncate()
        os.dup2(caught.fileno(), 2)
        try:
            signal.alarm(SECONDS)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                quiet, grid = Progress(enabled=False), Grid(32, 2.0, 2.0)
                _, findings = check_dataset(Two(place), quiet)
                # One case leaves roles empty, which says nothing about its files.
                findings = [found for found in findings if found.check != "empty role"]
                sentences = [found.text for found in findings if found.problem]
                seen = [found.text for found in findings]
                prepared = prepare_cases(Two(place), grid, quiet, 1)
            defects += [f"library warning: {w.message}" for w in told]
        except (UserError, RunFailure) as error:
            defects.append(f"ended by a sentence: {error}")
        except _Hang:
            defects.append(f"took more than {SECONDS} s")
        except BaseException as error:  # a defect, whatever it is
            where = traceback.extract_tb(error.__traceback__)[-1]
            spot = f"{Path(where.filename).name}:{where.lineno}"
            defects.append(f"{type(error).__name__} at {spot}: {error}"[:300])
        finally:
            signal.alarm(0)
            os.dup2(kept, 2)
        seconds = time.monotonic() - began
        caught.seek(0)
        defects += (
            [f"printed: {caught.read()[:200]!r}"] if os.fstat(caught.fileno()).st_size else []
        )
        if not defects:
            defects += [
                f"no sentence: {text!r}" for text in (*seen, *prepared) if not _good(text, place)
            ]
            if prepared and not sentences:
                defects.append(f"only prepare refuses it: {prepared[0]}")
        defects += _of_cache(cache, case, Two(place), Grid(32, 2.0, 2.0))
        result = {
            "number": number,
            "kind": name,
            "file": original.path.name,
            "outcome": "refused"
            if sentences
            else "warned"
            if defects == [] and seen
            else "accepted",
            "seconds": seconds,
            "defects": defects,
            "text": (sentences or prepared or [""])[0].replace(str(place), ""),
        }
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**result, "peak": peak}), flush=True)
        if not defects:
            shutil.rmtree(place)


def _good(text: str, place: Path) -> bool:
    """One sentence that names a file, and is no book."""
    named = str(place) in text or "image" in text or "label" in text
    body = text.replace(str(place), "")
    return (
        text.endswith(".") and "\n" not in body and ". " not in body and named and len(body) < 400
    )


def _of_cache(cache: Any, case: Any, data: Any, grid: Any) -> Iterator[str]:
    """What is wrong with the entries that were made."""
    if not cache.root.exists():
        return
    left = [file.name for file in cache.root.rglob(".writing-*")]
    if left:
        yield f"unfinished in the cache: {left}"
    arrays = [file for file in cache.root.rglob("*.npy") if file.name[0] != "."]
    for file in arrays:
        try:
            voxels = np.load(file)
        except (ValueError, OSError, EOFError) as error:
            yield f"unreadable entry: {error}"
            continue
        low, high = (0, 1) if voxels.dtype == np.uint8 else (-1, 1)
        if not np.isfinite(voxels).all() or voxels.min() < low or voxels.max() > high:
            yield f"an entry with values from {voxels.min()} to {voxels.max()}"
        if voxels.ndim != 3 or voxels.shape[1:] != (grid.size, grid.size):
            yield f"an entry of shape {voxels.shape}"


# -- the parent -----


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="only this mutation")
    parser.add_argument("--keep", type=Path, help="where files with defects are left")
    parser.add_argument("--child", nargs=3, metavar=("FOLDER", "FIRST", "LAST"))
    options = parser.parse_args()
    if options.child:
        folder, first, last = options.child
        child(Path(folder), int(first), int(last), options.files, options.seed, options.kind)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        results = list(_children(folder, options))
    _report(results)
    sys.exit(any(result["defects"] for result in results))


def _children(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Results of all files; a child that dies is followed by another, after the file it died of."""
    first = 0
    common = [f"--files={options.files}", f"--seed={options.seed}", f"--kind={options.kind}"]
    while first < options.files:
        last = min(first + CHUNK, options.files)
        arguments = ["--child", str(folder), str(first), str(last)]
        process = subprocess.Popen(
            [sys.executable, __file__, *common, *arguments], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        # Beyond its own alarm, a child that hangs in a library is ended from outside.
        for line in _until(process, SECONDS * 3):
            first += 1
            yield json.loads(line)
        if process.wait() or first < last:
            yield {
                "number": first,
                "kind": "?",
                "file": "?",
                "outcome": "died",
                "seconds": 0.0,
                "peak": 0.0,
                "text": "",
                "defects": [f"the process ended with {process.returncode} at file {first}"],
            }
            first += 1


def _until(process: subprocess.Popen, seconds: float) -> Iterator[str]:
    """Lines of a process, which is killed when none comes for so long."""
    from threading import Timer

    assert process.stdout is not None
    while True:
        timer = Timer(seconds, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            return
        yield line


def _report(results: list[dict[str, Any]]) -> None:
    print(f"{'mutation':34s} files  refused  warned  accepted  defects  slowest s")
    kinds = sorted({result["kind"] for result in results})
    for kind in [*kinds, "all"]:
        own = [result for result in results if kind in (result["kind"], "all")]
        counts = Counter(result["outcome"] for result in own)
        bad = sum(bool(result["defects"]) for result in own)
        slowest = max(result["seconds"] for result in own)
        print(
            f"{kind:34s} {len(own):5d}  {counts['refused']:7d}  {counts['warned']:6d}  "
            f"{counts['accepted']:8d}  {bad:7d}  {slowest:9.2f}"
        )
    print(f"peak memory of a process: {max(result['peak'] for result in results):.0f} MiB")
    for result in results:
        for defect in result["defects"]:
            print(f"DEFECT {result['number']} ({result['kind']}, {result['file']}): {defect}")


if __name__ == "__main__":
    main()
