"""cache.py: entries are right, whole, shared, and labels stay out of reach."""

import errno
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from faults import another_user, damaged

from glua_bench import files, identity
from glua_bench.data import cache as cache_module
from glua_bench.data.cache import SliceCache, file_digest, fingerprint, generating, intact
from glua_bench.data.neighbours import Neighbourhood
from glua_bench.data.stores import (
    IMAGE_TYPE,
    LABEL_TYPE,
    OPEN_MAPS,
    CachedImage,
    ImageStore,
    LabelledStore,
)
from glua_bench.data.volumes import load_image, load_label
from glua_bench.errors import DataError, RunFailure
from glua_bench.files import UNFINISHED
from glua_bench.task import Case, DomainView, Grid, Reading, Structure

READING, GRID = Reading(), Grid(24, 1.0)
STRUCTURES = (Structure("A", "a", (5,), "#000000"), Structure("B", "b", (7,), "#000000"))
VIEW = DomainView("mr", READING, STRUCTURES).on(GRID)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))


def make_case(folder: Path, number: int = 0, depth: int = 4) -> Case:
    """Files of one small subject."""
    rng = np.random.default_rng(number)
    raw = rng.choice([0, 5, 7], (20, 22, depth)).astype(np.int16)
    image, label = folder / f"p{number}.nii.gz", folder / f"p{number}_secret.nii.gz"
    nib.save(nib.Nifti1Image(rng.normal(0, 1, raw.shape).astype(np.float32), np.eye(4)), image)
    nib.save(nib.Nifti1Image(raw, np.eye(4)), label)
    return Case(f"case_{number}", "mr", image, label, "train", f"subject_{number}")


@pytest.fixture
def case(tmp_path) -> Case:
    return make_case(tmp_path)


def files_under(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def test_entries_hold_what_volumes_gives(case):
    cache = SliceCache()
    image = cache.image(case.unlabelled(), VIEW)
    label = cache.label(case, VIEW)
    loaded = load_image(case.image, READING, GRID)
    expected = load_label(case.label, case.image, VIEW, loaded.placement)
    assert image.placement == loaded.placement
    assert image.shape == label.shape == image.open().shape == (4, 24, 24)
    np.testing.assert_allclose(image.open(), loaded.voxels, atol=2.5e-4)
    assert np.array_equal(label.open(), expected)
    with pytest.raises(ValueError):
        image.open()[0] = 0


def test_second_call_reads_no_volume(case, monkeypatch):
    first = SliceCache().image(case.unlabelled(), VIEW)
    SliceCache().label(case, VIEW)

    def unexpected(*arguments):
        raise AssertionError("the volume was read again")

    monkeypatch.setattr(cache_module, "load_image", unexpected)
    monkeypatch.setattr(cache_module, "load_label", unexpected)
    assert SliceCache().image(case.unlabelled(), VIEW) == first
    SliceCache().label(case, VIEW)


def test_every_input_has_its_own_entry(tmp_path, case):
    """Content, reading, grid and class table each make another entry; names do not."""
    cache = SliceCache()
    images = [
        cache.image(case.unlabelled(), DomainView("mr", reading, ()).on(grid)).path
        for reading, grid in (
            (READING, GRID),
            (replace(READING, flip=(1,)), GRID),
            (replace(READING, percentiles=(1, 99)), GRID),
            (READING, Grid(24, 1.1)),
            (READING, Grid(24, 1.0, 2.0)),
        )
    ]
    images.append(cache.image(make_case(tmp_path, 1).unlabelled(), VIEW).path)
    assert len(set(images)) == 6
    merged = (Structure("A", "a", (5, 7), "#000000"),)
    renamed = (replace(STRUCTURES[0], name="C"), STRUCTURES[1])
    paths = [
        cache.label(case, replace(VIEW, structures=s)).path for s in (STRUCTURES, merged, renamed)
    ]
    assert paths[0] == paths[2] != paths[1]
    same = replace(case, id="other", subject="other")
    assert cache.image(same.unlabelled(), VIEW).path == images[0]


def test_other_code_makes_other_entries(case, monkeypatch):
    """Voxels that an earlier version read otherwise are not taken for those of this one."""
    before = SliceCache().image(case.unlabelled(), VIEW).path
    label = SliceCache().label(case, VIEW).path
    known = fingerprint([case])
    monkeypatch.setattr(cache_module, "code_digest", lambda harness: f"other {harness}")
    assert not SliceCache().holds(case, VIEW)
    assert SliceCache().image(case.unlabelled(), VIEW).path != before
    assert SliceCache().label(case, VIEW).path != label
    assert fingerprint([case]) == known


def test_changed_label_changes_no_image_entry(tmp_path, case):
    """Poisoned labels reach label entries and nothing else."""
    cache = SliceCache()
    image = cache.image(case.unlabelled(), VIEW)
    before = cache.label(case, VIEW)
    nib.save(nib.Nifti1Image(np.full((20, 22, 4), 7, np.int16), np.eye(4)), case.label)
    after = cache.label(case, VIEW)
    assert cache.image(case.unlabelled(), VIEW) == image
    assert after.path != before.path and (after.open()[:, 4:20, 4:20] == 2).all()


def test_changed_image_changes_its_labels_entry(case):
    """The crop comes from the image, so a label on another image's grid is another entry."""
    cache = SliceCache()
    before = cache.label(case, VIEW)
    image = np.random.default_rng(9).normal(0, 1, (20, 22, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(image, np.eye(4)), case.image)
    assert cache.label(case, VIEW).path != before.path


@pytest.mark.fault("labels", "a pickled store of images, searched for labels")
def test_no_way_leads_from_images_to_labels(tmp_path, case):
    """Neither the image entry nor the store names the label's file, directory or key."""
    cache = SliceCache()
    label = cache.label(case, VIEW)
    image = cache.image(case.unlabelled(), VIEW)
    store = ImageStore([image], in_memory=False)
    store.images([0, 1])
    dump = pickle.dumps([image, store]) + image.path.read_bytes()
    for secret in (case.label.name, "secret", label.path.stem, "labels", file_digest(case.label)):
        assert secret.encode() not in dump
    assert case.image.name.encode() not in dump  # a label is often named after its image
    assert not hasattr(store, "labels")
    assert label.path.stem != image.path.stem
    assert not isinstance(store, LabelledStore)


def _build(folder: str, barrier: object) -> None:
    """One of several processes that want the same entries at once."""
    case = Case(
        "c", "mr", Path(folder, "p0.nii.gz"), Path(folder, "p0_secret.nii.gz"), "train", "s"
    )
    barrier.wait(60)  # type: ignore[attr-defined]
    cache = SliceCache()
    image = cache.image(case.unlabelled(), VIEW).open()
    label = cache.label(case, VIEW).open()
    if not (np.isfinite(image).all() and label.max() == 2):
        raise AssertionError("wrong entry")


@pytest.mark.fault("processes", "four processes prepare the same volume at once")
def test_processes_build_the_same_entry_at_once(tmp_path, case):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=_build, args=(str(tmp_path), barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    kinds = sorted((path.parts[0], path.suffix) for path in files_under(SliceCache().root))
    assert kinds == [("images", ".npy"), ("labels", ".npy")]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from glua_bench.data.cache import SliceCache
from glua_bench.task import DomainView, Grid, Reading, UnlabelledCase
where = sys.argv[2]
if where == "array":
    def save(stream, array):
        stream.write_bytes(b"half an array")
        os.kill(os.getpid(), signal.SIGKILL)
    np.save = save
else:
    replace = os.replace
    def killing(*paths):
        if "slices" in str(paths[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
    os.replace = killing
view = DomainView("mr", Reading(), ()).on(Grid(24, 1.0))
SliceCache().image(UnlabelledCase("c", "mr", Path(sys.argv[1])), view)
"""


@pytest.mark.fault("killed", "while an entry of prepared slices is written")
@pytest.mark.parametrize("where", ["array", "before"])
def test_killed_writer_leaves_no_entry(case, where):
    """Killed while the array is written, or before it is moved."""
    died = subprocess.run([sys.executable, "-c", KILLED, str(case.image), where])
    assert died.returncode == -signal.SIGKILL
    assert not [p for p in SliceCache().root.rglob("*.npy") if p.name[0] != "."]
    image = SliceCache().image(case.unlabelled(), VIEW)
    expected = load_image(case.image, READING, GRID).voxels
    np.testing.assert_allclose(image.open(), expected, atol=2.5e-4)


@pytest.mark.fault("killed", "leftovers of killed writers in the slice cache")
def test_leftovers_of_killed_writers_are_swept(case):
    for where in ("array", "before"):
        subprocess.run([sys.executable, "-c", KILLED, str(case.image), where])
        assert len(list(SliceCache().root.rglob(f"{UNFINISHED}*"))) == 1
    entry = SliceCache().image(case.unlabelled(), VIEW).path
    assert [path.name for path in entry.parent.iterdir()] == [entry.name]


@pytest.mark.fault("silent damage", "bits, ends and blocks of prepared slices")
def test_damaged_entry_is_rebuilt(case, tries, capsys):
    """Whatever happens to it, an entry is prepared again, and the user is told once."""
    paths = [SliceCache().image(case.unlabelled(), VIEW).path, SliceCache().label(case, VIEW).path]
    contents = [path.read_bytes() for path in paths]
    for seed in tries(200):
        path = paths[seed % 2]
        path.write_bytes(damaged(contents[seed % 2], seed))
        assert not SliceCache().holds(case, VIEW)
        image, label = SliceCache().image(case.unlabelled(), VIEW), SliceCache().label(case, VIEW)
        assert [image.path, label.path] == paths
        assert [path.read_bytes() for path in paths] == contents
        image.open(), label.open()
        told = capsys.readouterr().err
        assert re.fullmatch(
            rf"warning: {path} is damaged \([^.]*\); its slices are prepared again\.\n", told
        )


@pytest.mark.fault("silent damage", "prepared slices of two cases exchanged")
def test_exchanged_entries_are_rebuilt(tmp_path, case):
    """Each of them is intact, but not what its name says."""
    other = make_case(tmp_path, 1)
    a, b = (SliceCache().image(c.unlabelled(), VIEW).path for c in (case, other))
    before = a.read_bytes(), b.read_bytes()
    a.write_bytes(before[1]), b.write_bytes(before[0])
    for one in (case, other):
        SliceCache().image(one.unlabelled(), VIEW)
    assert (a.read_bytes(), b.read_bytes()) == before


@pytest.mark.fault("silent damage", "prepared slices lost, or damaged while a process reads them")
def test_lost_entry_is_rebuilt_and_one_damaged_meanwhile_refused(case):
    entry = SliceCache().image(case.unlabelled(), VIEW)
    good = entry.path.read_bytes()
    entry.path.unlink()
    assert SliceCache().image(case.unlabelled(), VIEW) == entry
    assert entry.path.read_bytes() == good
    entry.path.write_bytes(good[:-200] + bytes(10) + good[-190:])
    with pytest.raises(DataError, match="run the command again to rebuild it"):
        entry.open()


def test_an_entry_is_hashed_once_per_process_also_by_forked_ones(case, monkeypatch):
    entry = SliceCache().image(case.unlabelled(), VIEW)
    entry.open()
    monkeypatch.setattr(files, "_compare", lambda *_: pytest.fail("hashed again"))
    assert SliceCache().image(case.unlabelled(), VIEW) == entry
    entry.open()
    pickle.loads(pickle.dumps(entry)).open()
    if hasattr(os, "fork"):
        child = multiprocessing.get_context("fork").Process(target=entry.open)
        child.start()
        child.join(60)
        assert child.exitcode == 0


@pytest.mark.fault("silent damage", "stored digests of files, from which run ids are made")
def test_damaged_digest_is_computed_again(case, tries, monkeypatch, capsys):
    """A wrong digest would give the same data another run id."""
    _later(monkeypatch, 10)
    known = fingerprint([case])
    stored = sorted((Path(os.environ["GLUA_BENCH_CACHE"]) / "digests").iterdir())
    contents = [path.read_bytes() for path in stored]
    assert len(stored) == 2
    for seed in tries(100):
        stored[0].write_bytes(damaged(contents[0], seed))
        assert fingerprint([case]) == known
        assert stored[0].read_bytes() == contents[0]
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "is computed again." in told
    stored[0].write_bytes(contents[1]), stored[1].write_bytes(contents[0])
    assert fingerprint([case]) == known
    assert [path.read_bytes() for path in stored] == contents


@pytest.mark.fault("silent damage", "a data file changed under its time stamp")
def test_data_that_rots_is_not_prepared(case, monkeypatch):
    """The stored digest says what the file held; slices of anything else would have its name."""
    _later(monkeypatch, 10)
    fingerprint([case])
    for file, prepare in (
        (case.image, lambda: SliceCache().image(case.unlabelled(), VIEW)),
        (case.label, lambda: SliceCache().label(case, VIEW)),
    ):
        good, stat = file.read_bytes(), Path.stat
        before = stat(file)
        file.write_bytes(damaged(good, 3))
        with monkeypatch.context() as patch:  # ctime cannot be set
            same = lambda path, **k: before if path == file else stat(path, **k)  # noqa: B023, E731
            patch.setattr(Path, "stat", same)
            with pytest.raises(DataError, match=rf"{file.name} no longer has the content.*\.$"):
                prepare()
        file.write_bytes(good)
        prepare()


def test_vanished_entry_is_a_sentence(case):
    entry = SliceCache().image(case.unlabelled(), VIEW)
    entry.path.unlink()
    with pytest.raises(DataError, match="run the command again"):
        entry.open()


@pytest.mark.fault("full disk", "while prepared slices are written")
def test_full_disk_is_a_failure_of_the_run(case, monkeypatch):
    def full(path, array):
        path.write_bytes(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(RunFailure, match=r"full.*GLUA_BENCH_CACHE.*\.$"):
        SliceCache().image(case.unlabelled(), VIEW)
    assert not files_under(SliceCache().root)


def test_unwritable_cache_names_the_variable(case, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunFailure, match=r"GLUA_BENCH_CACHE.*\.$"):
        SliceCache().image(case.unlabelled(), VIEW)


def test_missing_image_is_a_sentence(case):
    case.image.unlink()
    with pytest.raises(DataError, match=r"p0\.nii\.gz cannot be read.*\.$"):
        SliceCache().image(case.unlabelled(), VIEW)


def _later(monkeypatch, seconds: float) -> None:
    """Let files written just now look settled."""
    now = cache_module.time.time_ns()
    monkeypatch.setattr(cache_module.time, "time_ns", lambda: now + int(seconds * 1e9))


def test_digests_are_remembered_until_the_file_changes(case, monkeypatch):
    _later(monkeypatch, 10)
    first = file_digest(case.image)
    hashed = []
    original = cache_module.sha256
    monkeypatch.setattr(cache_module, "sha256", lambda path: hashed.append(path) or original(path))
    assert file_digest(case.image) == first and hashed == []
    assert file_digest(Path(os.path.relpath(case.image))) == first and hashed == []
    status = case.image.stat()
    content = bytearray(case.image.read_bytes())
    content[-1] ^= 1
    case.image.write_bytes(bytes(content))
    os.utime(case.image, ns=(status.st_atime_ns, status.st_mtime_ns))  # as rsync or cp -p would
    assert file_digest(case.image) != first and len(hashed) == 1


def test_fresh_files_are_not_remembered(case):
    """Written again within the clock's resolution, a file may keep its time stamp."""
    file_digest(case.image)
    assert not list((Path(os.environ["GLUA_BENCH_CACHE"]) / "digests").glob("*"))


@pytest.mark.fault("two users", "digests where the cache cannot be written")
def test_digest_works_without_a_writable_memory(case, tmp_path, monkeypatch):
    _later(monkeypatch, 10)
    expected = file_digest(case.image)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "file"))
    assert file_digest(case.image) == expected


def test_fingerprint_sees_content_and_no_order(tmp_path):
    cases = [make_case(tmp_path, number) for number in range(3)]
    hidden = [case.unlabelled() for case in cases]
    labelled, unlabelled = fingerprint(cases), fingerprint(hidden)
    assert fingerprint(reversed(cases)) == labelled != unlabelled
    assert fingerprint(cases[:2]) != labelled
    assert fingerprint([replace(cases[0], id="x"), *cases[1:]]) != labelled
    nib.save(nib.Nifti1Image(np.zeros((20, 22, 4), np.int16), np.eye(4)), cases[1].label)
    assert fingerprint(cases) != labelled and fingerprint(hidden) == unlabelled


@pytest.fixture
def many(tmp_path) -> tuple[list[CachedImage], list]:
    """More volumes than may be open at once, of different depth."""
    cache = SliceCache()
    cases = [make_case(tmp_path, number, 1 + number % 4) for number in range(20)]
    return (
        [cache.image(case.unlabelled(), VIEW) for case in cases],
        [cache.label(case, VIEW) for case in cases],
    )


def test_stores_serve_slices_in_the_order_asked(many):
    images, labels = many
    everything = np.concatenate([image.open() for image in images]).astype(np.float32)
    classes = np.concatenate([label.open() for label in labels])
    asked = np.random.default_rng(0).integers(0, len(everything), 64)
    for in_memory in (True, False, None):
        store = LabelledStore(images, labels, in_memory)
        assert len(store) == len(everything) and store.size == (24, 24)
        found, wanted = store.images(asked), store.labels(asked)
        assert found.dtype == np.float32 and found.shape == (64, 1, 24, 24)
        assert wanted.dtype == np.int64 and wanted.shape == (64, 24, 24)
        assert np.array_equal(found[:, 0], everything[asked])
        assert np.array_equal(wanted, classes[asked])
        stored = store.images(asked, IMAGE_TYPE), store.labels(asked, LABEL_TYPE)
        assert [array.dtype for array in stored] == [np.float16, np.uint8]
        assert np.array_equal(stored[0], found) and np.array_equal(stored[1], wanted)
        assert store.images([]).shape == (0, 1, 24, 24)
    where = list(zip(store.volumes, store.positions, strict=True))
    assert where[:6] == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    copy = pickle.loads(pickle.dumps(LabelledStore(images, labels, False)))
    assert np.array_equal(copy.images(asked), found)


@pytest.mark.parametrize("in_memory", [True, False])
def test_stores_serve_each_slice_amid_its_neighbours_of_one_volume(tmp_path, in_memory):
    """In order, the outermost slice repeated, and no slice of the volume before or after."""
    cache, depths = SliceCache(), (1, 5, 2, 9)
    cases = [make_case(tmp_path, number, depth) for number, depth in enumerate(depths)]
    images = [cache.image(case.unlabelled(), VIEW) for case in cases]
    labels = [cache.label(case, VIEW) for case in cases]
    store = LabelledStore(images, labels, in_memory, Neighbourhood(5, 2.0))  # slices of 1 mm
    asked = np.random.default_rng(0).permutation(np.repeat(np.arange(len(store)), 2))
    found = store.images(asked)
    assert found.shape == (2 * sum(depths), 5, 24, 24) and found.dtype == np.float32
    for number, stack in zip(asked, found, strict=True):
        volume, z = images[store.volumes[number]].open(), store.positions[number]
        expected = [
            volume[min(max(z + beside, 0), len(volume) - 1)] for beside in (-4, -2, 0, 2, 4)
        ]
        assert np.array_equal(stack, np.stack(expected).astype(np.float32))
    alone = LabelledStore(images, labels, in_memory)
    assert np.array_equal(found[:, 2:3], alone.images(asked))
    assert np.array_equal(store.labels(asked), alone.labels(asked))  # of the middle slices
    assert store.images([]).shape == (0, 5, 24, 24)
    for number in (-1, len(store)):
        with pytest.raises(IndexError):
            store.images([number])


def test_neighbours_are_as_far_in_volumes_of_other_slices(tmp_path):
    """And they are gathered, not stored: the cache is the same for every number of slices."""
    cache, images = SliceCache(), []
    for number, thickness in enumerate((1.0, 3.0, 8.0)):
        case = make_case(tmp_path, number, 12)
        voxels = np.asarray(nib.load(case.image).dataobj)
        nib.save(nib.Nifti1Image(voxels, np.diag([1, 1, thickness, 1])), case.image)
        images.append(cache.image(case.unlabelled(), VIEW))
    before = files_under(cache.root)
    store = ImageStore(images, neighbourhood=Neighbourhood(3, 6.0))
    for index, step in enumerate((6, 2, 1)):
        z = np.arange(12)
        volume = images[index].open().astype(np.float32)
        found = store.images(12 * index + z)
        assert np.array_equal(found[:, 0], volume[np.maximum(z - step, 0)])
        assert np.array_equal(found[:, 2], volume[np.minimum(z + step, 11)])
    assert files_under(cache.root) == before


def test_stores_keep_few_maps_open(many):
    """The kernel's own list of maps stays short, however many volumes there are."""
    images, _ = many
    store = ImageStore(images, in_memory=False)
    store.images(np.arange(len(store)))
    store.images(np.arange(len(store))[::-1])
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc/self/maps")
    assert 0 < maps.read_text().count("slices/images") <= OPEN_MAPS


def test_stores_refuse_what_does_not_fit(many, case):
    images, labels = many
    with pytest.raises(IndexError):
        ImageStore(images).images([len(ImageStore(images))])
    with pytest.raises(IndexError):
        ImageStore(images, in_memory=False).images([-1])
    with pytest.raises(ValueError, match="at least one"):
        ImageStore([])
    with pytest.raises(ValueError, match="differ in size"):
        other = SliceCache().image(case.unlabelled(), replace(VIEW, grid=Grid(16, 1.0)))
        ImageStore([images[0], other])
    with pytest.raises(ValueError, match="differ in number or shape"):
        LabelledStore(images, labels[::-1])


# -- two versions ---------------------------------------------------------------------------------

SHAPING = ("cache", "formats", "geometry", "resampling", "stores", "volumes")


@pytest.mark.fault("two versions", "another version's code behind the same cache")
@pytest.mark.parametrize("name", [*(f"data.{name}" for name in SHAPING), "task"])
def test_code_that_shapes_slices_is_in_their_names_and_words_are_not(case, monkeypatch, name):
    """Nobody has to raise a number: any change of any module on the way makes other entries."""
    module = Path(identity.module_spec(f"glua_bench.{name}").origin).resolve()
    read = identity._read
    added = ""

    def edited(path: Path) -> identity._Read:
        if path != module:
            return read(path)
        text, imports = identity.normal_form(path.read_bytes() + added.encode())
        return identity._Read(text, imports)

    monkeypatch.setattr(identity, "_read", edited)
    monkeypatch.setattr(cache_module, "code_digest", identity.code_digest.__wrapped__)

    def names() -> tuple[Path, Path]:
        cache = SliceCache()
        return cache._image_name("a", VIEW), cache._label_name("b", "a", VIEW)

    before = names()
    added = "\n# a comment\n'and a string'\n"
    assert names() == before
    added = "\nEXTRA = 1\n"
    assert not set(names()) & set(before)


# -- two users ------------------------------------------------------------------------------------


@pytest.fixture
def theirs(shared, case, monkeypatch) -> tuple[Path, Case, Path]:
    """Return a cache with a case, that case, and the cache's path, as another user left them."""
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(shared / "cache"))
    _later(monkeypatch, 10)
    own = make_case(shared)
    SliceCache().image(own.unlabelled(), VIEW), SliceCache().label(own, VIEW)
    fingerprint([own])
    yield shared / "cache", own, make_case(shared, 1)
    for private in cache_module._private:
        private.cleanup()
    cache_module._private.clear()


@pytest.mark.fault("two users", "prepared slices read without permission to write")
def test_finished_entries_need_no_permission_to_write(theirs, capsys):
    root, case, _ = theirs
    before = files_under(root)
    with another_user(root):
        assert SliceCache().holds(case, VIEW)
        image, label = SliceCache().image(case.unlabelled(), VIEW), SliceCache().label(case, VIEW)
        assert LabelledStore([image], [label]).images([0]).shape == (1, 1, 24, 24)
    assert image.path.is_relative_to(root) and label.path.is_relative_to(root)
    assert files_under(root) == before and capsys.readouterr().err == ""


@pytest.mark.fault("two users", "slices prepared where the cache is read-only, private or damaged")
@pytest.mark.parametrize("what", ["read-only", "private", "damaged"])
def test_what_another_users_cache_lacks_is_prepared_for_this_process(theirs, what, capsys):
    """Once told; the results are the same, and nothing of the other user's changes."""
    root, case, missing = theirs
    case = missing if what == "read-only" else case
    theirs_path = root / "slices" / SliceCache()._image_name(file_digest(case.image), VIEW)
    if what == "damaged":
        theirs_path.write_bytes(theirs_path.read_bytes()[:-1])
    before = files_under(root)
    with another_user(root, 0o077 if what == "private" else 0o022):
        image, label = SliceCache().image(case.unlabelled(), VIEW), SliceCache().label(case, VIEW)
        assert SliceCache().image(case.unlabelled(), VIEW) == image
        voxels, labels = np.array(image.open()), np.array(label.open())
        with pytest.raises(RunFailure, match="GLUA_BENCH_CACHE"):  # whose purpose is to fill it
            SliceCache(private=False).image(replace(missing, image=missing.label), VIEW)
    told = capsys.readouterr().err
    assert told.count("keeps its slices in") == 1 and "set GLUA_BENCH_CACHE to a" in told
    assert not image.path.is_relative_to(root) and files_under(root) == before
    if what == "damaged":
        theirs_path.unlink()
    assert np.array_equal(SliceCache(root / "new").image(case.unlabelled(), VIEW).open(), voxels)
    assert np.array_equal(SliceCache(root / "new").label(case, VIEW).open(), labels)


# -- files that datasets generate or convert ------------------------------------------------------


@pytest.mark.fault("silent damage", "volumes that datasets generate or convert into the cache")
def test_generated_files_are_intact_or_told(tmp_path, tries, capsys):
    first, second = tmp_path / "a.nii", tmp_path / "b.nii"
    for path in (first, second):
        assert not intact(path)
        with generating(path) as temporary, temporary.open("wb") as file:
            file.write(path.name.encode() * 500)
    record = tmp_path / ".a.nii.sha256"
    good = {path: path.read_bytes() for path in (first, record)}
    for seed in tries(200):
        path = (first, record)[seed % 2]
        path.write_bytes(damaged(good[path], seed))
        assert intact(second) and not intact(first, second)
        told = capsys.readouterr().err
        assert re.fullmatch(rf"warning: {path} is damaged \([^.]*\); it is written again\.\n", told)
        path.write_bytes(good[path])
    assert intact(first, second)
    for name in ("{}.nii", ".{}.nii.sha256"):  # both are intact, each in another's place
        a, b = (tmp_path / name.format(which) for which in "ab")
        contents = a.read_bytes(), b.read_bytes()
        a.write_bytes(contents[1]), b.write_bytes(contents[0])
        assert not intact(first) and not intact(second)
        a.write_bytes(contents[0]), b.write_bytes(contents[1])
    record.unlink()
    assert not intact(first)
