"""identity.py: which code is part of ids and stage keys, and how it is hashed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from glua_bench import config, identity
from glua_bench.config import RunConfig
from glua_bench.conformance import Bench
from glua_bench.data.cache import READING
from glua_bench.identity import (
    NO_RESULT,
    SCORING,
    TRAINING,
    normal_form,
    reached,
    stage_key,
)
from glua_bench.method import Method, Stage
from glua_bench.methods.cycle_translate import CycleTranslate
from glua_bench.methods.global_only import GlobalOnly
from glua_bench.methods.glua import GLUA
from glua_bench.registry import Registry
from glua_bench.runs import execution, matrix
from glua_bench.task import Grid

ALL = TRAINING + SCORING
PLUGIN = """
from glua_bench.methods.source_only import SourceOnly

class Plugged(SourceOnly):
    name = "plugged"
    reference = "none"
    needs = "nothing"
"""
# Imports its neighbour as plugin files can: only when it runs, by a path that it adds itself.
WITH_NEIGHBOUR = f"""
import sys
from pathlib import Path
{PLUGIN}
    def step(self, batch, context):
        sys.path.insert(0, str(Path(__file__).parent))
        from helper import scaled
        return {{name: scaled(loss) for name, loss in super().step(batch, context).items()}}
"""
NEIGHBOUR = """
FACTOR = 2

def scaled(loss):
    return loss * FACTOR
"""


def homes(method: type[Method]) -> list[str]:
    return [base.__module__ for base in method.__mro__]


# -- hashes ---------------------------------------------------------------------------------------


def test_run_ids_stage_keys_and_code_are_hashed_by_one_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Changing the hash function or length touches identity.py only."""
    run = RunConfig("m", "d", "a-b", Grid(64, 2.0))
    monkeypatch.setattr(identity, "_sha256", lambda content: "f" * 64)
    monkeypatch.setattr(identity, "_read", identity._read.__wrapped__)  # caches no such digest
    assert identity.identity(run, "data", "code") == "f" * 12
    assert identity.code_digest.__wrapped__(ALL) == "f" * 10
    for module in (config, matrix, execution):
        assert getattr(module, "digest", identity.digest) is identity.digest
        assert not hasattr(module, "hashlib")


# -- the text of code -----------------------------------------------------------------------------


def form(source: str) -> str:
    return normal_form(source.encode())[0]


BEFORE = '''
"""A module."""
import math

class A:
    """A class."""

    size: int = 3

    def area(self, side=2):
        """A function."""
        # A comment.
        return math.pi * side ** 2 + len(f"{side:>{self.size}} of {'x'!r}")
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# A comment.", "# Another one."),
        ('"""A module."""', ""),
        ('"""A class."""', '"""Another\n\n    text."""'),
        ('        """A function."""\n', ""),
        ("size: int = 3\n", 'size: int = 3\n    """Of a side."""\n'),
        ("side=2):", "side = (2),\n    ):"),
        ("math.pi * side ** 2", "(math.pi * (side**2))"),
        ("side=2", "side=0x2"),
        ("        return", "        pass\n        return"),
    ],
)
def test_words_and_layout_are_no_code(old: str, new: str) -> None:
    assert old in BEFORE
    assert form(BEFORE.replace(old, new)) == form(BEFORE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("side=2", "side=3"),
        ("side=2", "side=2.0"),
        ("side=2", "side=None"),
        ("* side", "/ side"),
        ("size: int", "size: float"),
        (" of ", " in "),
        ("'x'!r", "'x'!s"),
        ("'x'!r", "b'x'!r"),
        (":>{", ":<{"),
        ("math.pi", "math.tau"),
        ("class A", "class B"),
        ("def area", "async def area"),
        ("return math", "math"),
        ("self, side", "self, *, side"),
        ("def area", "@staticmethod\n    def area"),
        ("import math", "import cmath as math"),
    ],
)
def test_code_is(old: str, new: str) -> None:
    assert old in BEFORE
    assert form(BEFORE.replace(old, new)) != form(BEFORE)


TEXTS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False, min_value=0)
    | TEXTS
    | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(TEXTS, inner, max_size=3)
    ),
)


@given(VALUES, VALUES)
def test_constants_count_by_type_and_value(a: Any, b: Any) -> None:
    assert (form(f"x = {a!r}") == form(f"x = {b!r}")) == (repr(a) == repr(b))


def test_files_written_anew_are_the_same_code() -> None:
    """`ast.unparse` drops comments and layout only."""
    files = [path for _, path in reached(ALL)]
    for path in [*files, Path(__file__)]:
        source = path.read_bytes()
        again = ast.unparse(ast.parse(source)).encode()
        assert normal_form(again) == normal_form(source), path
    assert len(files) > 15


def test_the_text_is_the_same_on_every_python() -> None:
    """Versions differ in f-strings, empty fields, None and printable characters."""
    source = r'''
from __future__ import annotations
from . import near
@near.cached
async def g(a, /, b=None, *c, d: int = 1_000, **e) -> None:
    """Text."""
    global h
    x = f"a" "b" f"{a}{b!r:>{d}}" f"{'c'}" "" f"{a = }{{}}" rf"\d{d:02}" u"u" "\U0001fae8"
    match x:
        case None | True | {"k": [1, *_], **rest} if rest: return -1.5e300 + 2j
        case near.Point(x=0) as p: del p
    async with a as b, (c): await x
    try: assert a[1:2, ..., None], b"\xff"
    except (A, B) as e: raise X from None
    else: (y := lambda *, k=0xffff_ffff_ffff_ffff: {**e, k: {a for a in b if a}})
'''
    found = sha256(form(source).encode()).hexdigest()
    assert found == "8d46ab8403c9c6cf40c7f618e723eeade92d8e47a1286438543c58d432ad84f7"


# -- which modules count --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [entry.name for entry in Registry("method").entries()])
def test_what_counts_is_the_harness_and_the_methods_own(name: str) -> None:
    method = Registry("method").load(name)
    training, scored = dict(reached(TRAINING, homes(method))), dict(reached(ALL, homes(method)))
    assert set(scored) - set(training) == set(SCORING)
    assert method.__module__ in training and not set(NO_RESULT) & set(scored)
    for part in ("cli", "conformance", "datasets", "runs.matrix", "reports", "sweeps"):
        assert not [m for m in scored if m.startswith(f"glua_bench.{part}")]
    own = {module for module in training if module.startswith("glua_bench.methods.")}
    if name in ("glua", "sifa"):
        written = {
            "glua": "glua global_only local_only source_only components components.alignment"
            " components.style components.adgan components.style_codes components.image_pool"
            " components.style_code_networks components.host_count components.thin_convolution"
            " components.idle_settings",
            "sifa": "sifa components components.sifa_networks components.image_pool"
            " components.host_count components.thin_convolution",
        }[name]
        assert own == {f"glua_bench.methods.{module}" for module in written.split()}


def test_what_is_left_out_would_count_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = set(NO_RESULT)
    monkeypatch.setattr(identity, "NO_RESULT", {})
    assert left_out <= {name for name, _ in reached(TRAINING)}


def test_slices_are_those_of_the_code_that_reads_files() -> None:
    read = {name for name, _ in reached(READING)}
    assert {f"glua_bench.{name}" for name in ("data.formats", "task", "data.volumes")} <= read
    assert not [name for name in read if name.startswith("glua_bench.methods")]
    assert read < {name for name, _ in reached(TRAINING)}


USED = """
import json, sys, threading
from pathlib import Path

from glua_bench.console import Progress
from glua_bench.identity import SCORING, TRAINING, reached
from glua_bench.runs.execution import execute
from glua_bench.runs.plan import plan
from glua_bench.runs.request import RunRequest

phantom, plugin, found = sys.argv[1:]
seen = set()

def look(frame, event, argument):
    if event == "call" and frame.f_code.co_name != "<module>":
        seen.add(frame.f_code.co_filename)

used = {}
small = ["segmenter.name=unet", "segmenter.width=4", "segmenter.depth=3", "grid.size=32"]
small += ["grid.spacing=7", "grid.slice_spacing=8", "batch_size=2", "candidates=2"]
for name, more in {
    "plugged": [],
    "glua": ["method.style_share=1", "method.adgan_width=4", "slices=3"],
    "sifa": ["method.width_generator=4", "method.width_encoder=4", "method.width_discriminator=4"],
    "mean_teacher": [],
}.items():
    request = RunRequest(
        name, "phantom", preset="quick", steps=2, augmentation="photometric", mlflow=False,
        assignments=small + more, plugins=[Path(plugin)], data_root=Path(phantom), device="cpu",
        runs_root=Path("runs"), oracle=True,
    )
    seen.clear()
    threading.setprofile(look)
    sys.setprofile(look)
    planned = plan(request)
    execute(planned, Progress(enabled=False), apart=False)
    sys.setprofile(None)
    threading.setprofile(None)
    names = {getattr(m, "__file__", None): n for n, m in list(sys.modules.items())}
    ours = {f for f, n in names.items() if n.startswith("glua_bench")} | {
        str(path) for path in Path(plugin).parent.iterdir()
    }
    counted = [path for _, path in reached(TRAINING + SCORING, [planned.method_class.__module__])]
    ran = ours & seen - set(map(str, counted))
    used[name] = len(ours & seen), sorted(names[file] for file in ran)
Path(found).write_text(json.dumps(used))
"""


def test_every_module_that_a_training_runs_counts_or_is_left_out(
    phantom_root: Path, tmp_path: Path
) -> None:
    """Python's profiler reports the files of all called functions."""
    plugin = tmp_path / "folder" / "plugged.py"
    plugin.parent.mkdir()
    plugin.write_text(WITH_NEIGHBOUR)
    (plugin.parent / "helper.py").write_text(NEIGHBOUR)
    python(tmp_path, USED, phantom_root, plugin, tmp_path / "used.json")
    for method, (ran, uncounted) in json.loads((tmp_path / "used.json").read_text()).items():
        # A dataset's code counts by what it hands over.
        rest = {name for name in uncounted if not name.startswith("glua_bench.datasets.")}
        assert ran > 20 and rest <= set(NO_RESULT), method


# -- plugins --------------------------------------------------------------------------------------

VERSION = """
import sys
from pathlib import Path
from glua_bench.identity import code_version
from glua_bench.registry import Registry
for file in sys.argv[1:]:
    print(code_version(Registry("method", [Path(file)]).load("plugged"), scoring=True))
"""


def python(folder: Path, code: str, *arguments: Any, seed: int = 0) -> list[str]:
    """Run code in a new process; return the printed words."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONHASHSEED": str(seed),
            "GLUA_BENCH_CACHE": str(folder / "cache"),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def write(folder: Path, files: dict[str, str]) -> Path:
    """Write files to a directory; return the path of the first."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / next(iter(files))


def test_files_of_one_name_give_one_id_in_every_process(tmp_path: Path) -> None:
    """File names may equal those of the harness or of other neighbours."""
    by_path = """
import importlib.util
def load(name):
    spec = importlib.util.spec_from_file_location("helper", Path(__file__).parent / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
first, second = load("a/helper.py"), load("b/helper.py")
"""
    files = [
        write(tmp_path / "a", {"networks.py": WITH_NEIGHBOUR, "helper.py": NEIGHBOUR}),
        write(tmp_path / "b", {"networks.py": PLUGIN.replace("none", "some")}),
        write(
            tmp_path / "c",
            {
                "helper.py": WITH_NEIGHBOUR + by_path,
                "a/helper.py": NEIGHBOUR,
                "b/helper.py": NEIGHBOUR.replace("2", "3"),
            },
        ),
    ]
    found = {tuple(python(tmp_path, VERSION, *files, seed=seed)) for seed in range(3)}
    assert len(found) == 1 and len(set(found.pop())) == 3


def test_an_id_tells_what_is_written_not_where(tmp_path: Path) -> None:
    """Neighbours count if imported in a function, by path or through a package."""
    held = f"""
import importlib.util
from pathlib import Path
spec = importlib.util.spec_from_file_location("far", Path(__file__).parent / "deep" / "far.py")
far = importlib.util.module_from_spec(spec)
spec.loader.exec_module(far)
{WITH_NEIGHBOUR}
"""
    through = "from parts import rest\n" + NEIGHBOUR
    plain = {
        "plugged.py": held,
        "helper.py": through,
        "deep/far.py": "far = 1\n",
        "parts/__init__.py": "from . import inner\n",
        "parts/inner.py": "inner = 1\n",
        "parts/rest.py": "rest = 1\n",
        "other.py": "other = 1\n",
    }
    changes = [
        {},
        {"helper.py": '"""Words."""\n# More.\n' + through.replace("(", "( ")},
        {"other.py": "other = 2\n"},
        {"helper.py": through.replace("2", "3")},
        {"helper.py": through.replace("*", "/")},
        {"deep/far.py": "far = 2\n"},
        {"parts/inner.py": "inner = 2\n"},
        {"parts/rest.py": "rest = 2\n"},
    ]
    files = [write(tmp_path / str(n), {**plain, **own}) for n, own in enumerate(changes)]
    ids = python(tmp_path, VERSION, *files)
    assert len(set(ids[:3])) == 1 and len(set(ids[2:])) == 6
    assert python(tmp_path, VERSION, *files[:1:-1], seed=1) == ids[:1:-1]


def test_a_plugin_package_counts_and_libraries_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, installed = tmp_path / "lab", tmp_path / "site-packages"
    text = "import scipy, tool, common, registered\nfrom .near import near\n" + PLUGIN
    files = {
        "labmethods/__init__.py": "",
        "labmethods/method.py": text,
        "labmethods/near.py": "from .far import far as near\n",
        "labmethods/far.py": "far = 1\n",
        "common.py": "common = 1\n",
    }
    write(lab, files)
    write(installed, {"tool.py": "tool = 1\n", "registered.py": "registered = 1\n"})
    monkeypatch.syspath_prepend(lab)
    monkeypatch.syspath_prepend(installed)
    monkeypatch.setattr(identity, "_plugin_packages", lambda: {"registered"})
    found = {name for name, _ in reached(TRAINING, ["labmethods.method"])} - {
        name for name, _ in reached(TRAINING)
    }
    assert {name for name in found if not name.startswith("glua_bench")} == {
        "labmethods",
        "labmethods.far",
        "labmethods.method",
        "labmethods.near",
        "common",
        "registered",
    }


def test_a_file_that_is_no_source_counts_by_its_bytes(tmp_path: Path) -> None:
    for name, content in {"a.so": b"\x7fELF", "b.py": b"print 'old'\n"}.items():
        (tmp_path / name).write_bytes(content)
        assert identity._read(tmp_path / name).digest == sha256(content).hexdigest()


# -- stages ---------------------------------------------------------------------------------------


class Two(CycleTranslate):
    """A method whose first stage can be changed."""

    name = "two"
    changes: dict[str, Any] = {}
    before: tuple[Stage, ...] = ()

    def stages(self) -> tuple[Stage, ...]:
        first, last = super().stages()
        changes = {n: v(self) if n in CALLED else v for n, v in self.changes.items()}
        return (*self.before, self.Kind(**{**vars(first), **changes}), last)

    Kind = Stage

    def finish(self, context: Any) -> None:
        """Nothing."""

    def other(self, *given: Any) -> Any:
        """A function that a stage may call."""
        return self.cycle.step(*given)


CALLED = ("translate", "finish", "step", "optimizers")


@pytest.fixture(scope="module")
def two() -> Any:
    bench = Bench(Two)
    yield bench.build()
    bench.close()


def key_of(method: Method, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> str:
    monkeypatch.setattr(Two, "changes", changes)
    stage = next(stage for stage in method.stages() if stage.name in ("translate", "other"))
    return json.dumps(stage_key(method, stage), sort_keys=True)


def weighted(method: Two, weight: float) -> Any:
    def step(*given: Any) -> Any:
        return {n: weight * loss for n, loss in method.cycle.step(*given).items()}

    return step


def test_every_field_of_a_stage_is_in_its_key(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, list[Any]] = {
        "name": ["other"],
        "share": [0.5],
        "depends_on": [()],
        "modules": [(), ("segmenter",), ("cycle", "segmenter")],
        "translate": [lambda m: torch.tanh, lambda m: torch.sigmoid, lambda m: m.cycle.to_target],
        "photometric": [True],
        "decay": [0.5],
        "hold": [0.5],
        "finish": [lambda m: m.finish, lambda m: None.__class__],
        "step": [
            lambda m: None,
            lambda m: m.other,
            lambda m: partial(m.other, 1),
            lambda m: partial(m.other, 2),
            lambda m: weighted(m, 1.0),
            lambda m: weighted(m, 2.0),
        ],
        "optimizers": [lambda m: None],
    }
    assert set(changes) == {item.name for item in fields(Stage)}
    keys = [key_of(two, monkeypatch)]
    keys += [key_of(two, monkeypatch, **{n: v}) for n, values in changes.items() for v in values]
    assert len(set(keys)) == len(keys)
    assert key_of(two, monkeypatch) == keys[0]


def test_a_new_field_of_a_stage_is_in_its_key_by_itself(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Later(Stage):
        clip: float = 0.0

    before = key_of(two, monkeypatch)
    monkeypatch.setattr(Two, "Kind", Later)
    later = {key_of(two, monkeypatch, clip=clip) for clip in (0.0, 1.0)}
    assert len({before, *later}) == 3


def test_a_stage_before_counts(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {key_of(two, monkeypatch)}
    for before in (Stage("warm"), Stage("warm", 0.5)):
        monkeypatch.setattr(Two, "before", (before,))
        keys.add(key_of(two, monkeypatch))
    assert len(keys) == 3


def test_methods_share_the_stage_of_their_common_part() -> None:
    keys = {}
    for method in (GlobalOnly, GLUA, CycleTranslate):
        bench = Bench(method)
        built = bench.build()
        keys[method] = json.dumps(stage_key(built, built.stages()[0]))
        bench.close()
    assert keys[GlobalOnly] == keys[GLUA] != keys[CycleTranslate]


def test_the_code_of_a_step_counts_where_the_network_is_a_librarys(tmp_path: Path) -> None:
    """The stage's code is hashed even if its network is a plain convolution."""
    text = """
from torch import nn
from torch.optim import SGD
from glua_bench.method import Stage
{}
    def __init__(self, task, config):
        super().__init__(task, config)
        self.stem = nn.Conv2d(1, 1, 3)

    def stages(self):
        stem = Stage("stem", depends_on=(), modules=("stem",), step=self.train_stem)
        return (stem, *super().stages())

    def train_stem(self, batch, context):
        loss = {} * self.stem(batch.source_images).square().mean()
        context.update("segmenter", loss)
        return {{"loss": loss}}
"""
    keys = []
    for number, factor in enumerate(("1.0", "1.0", "2.0")):
        file = write(tmp_path / str(number), {"plugged.py": text.format(PLUGIN, factor)})
        bench = Bench(Registry("method", [file]).load("plugged"))
        built = bench.build()
        keys.append(json.dumps(stage_key(built, built.stages()[0])))
        bench.close()
    assert keys[0] == keys[1] != keys[2]
