"""docs/: the code of guides runs, and pages agree with the code and the results."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest

from glua_bench.conformance import DATASET_CHECKS, METHOD_CHECKS, run_checks, run_dataset_checks
from glua_bench.registry import Registry
from glua_bench.reports import figures, report_tables, statistics
from glua_bench.reports.comparison import competing
from glua_bench.reports.results import from_rows
from glua_bench.reports.tables import markdown
from glua_bench.selection import Selector

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
OURS = [e.name for e in Registry("method").entries() if e.origin == "glua-bench"]


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def assert_all_pass(results, checks):
    """Assert that all checks of the conformance kit ran and passed."""
    assert len(results) == len(checks)
    assert not [f"{r.check}: {r.message}" for r in results if not r.passed]


@pytest.fixture
def plugin(tmp_path):
    """Write the plugin of a page to a file."""

    def extract(name: str) -> Path:
        shown = re.findall(r"<!-- plugin: (\S+) -->\n```python\n(.*?)```", page(name), re.DOTALL)
        assert len(shown) == 1, f"{name} must show one plugin"
        file = tmp_path / shown[0][0]
        file.write_text(shown[0][1])
        return file

    return extract


# -- adding-a-method.md ---------------------------------------------------------------------------


def test_the_method_of_the_guide_is_sound(plugin):
    file = plugin("adding-a-method.md")
    assert len(file.read_text().splitlines()) <= 60
    entry = Registry("method", [file]).entry(file.stem)
    assert entry.summary.endswith(".") and entry.attributes["needs"]
    assert_all_pass(run_checks(file.stem, plugins=[file]), METHOD_CHECKS)


def commands_of(name: str) -> list[str]:
    """Return the lines of a page's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", page(name), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_the_guide_s_commands_run_in_its_order(plugin, phantom_root, tmp_path):
    """Run all commands from an empty directory to a comparison, with small data and few steps."""
    file = plugin("adding-a-method.md")
    folder = tmp_path / "work"
    folder.mkdir()
    small = f"--data-root {phantom_root} --steps 2 --set grid.size=32 --set grid.spacing=7"
    small += " --set batch_size=2 --preset quick --device cpu"
    commands = commands_of("adding-a-method.md")
    assert [c.split()[0] for c in commands].count("pytest") == 1
    for command in commands:
        program, *words = shlex.split(command)
        if program == "pytest":
            run = [sys.executable, "-m", "pytest", "-q", *words, "-k", "card or trains or poison"]
        else:
            assert program == "glua-bench"
            run = [sys.executable, "-m", "glua_bench", *words]
            if words[0] in ("run", "compare"):
                run += [*shlex.split(small), "--no-mlflow"]
            if words[0] == "compare":
                run += ["--seeds", "1"]
        done = subprocess.run(run, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        if words[0] == "new-method":
            assert (folder / file.name).read_text() != file.read_text()
        if "--set" not in words and words[0] == "run":
            # The template was tried; the page's code takes its place.
            (folder / file.name).write_text(file.read_text())
    assert "3 runs: 3 run now" in done.stdout and "phantom mr-ct" in done.stdout
    block = done.stdout.split("\nphantom mr-ct\n")[1].split("\n\n")[0]
    rows = [line.split()[0] for line in block.splitlines()[1:4]]
    assert sorted(rows) == ["coral", "source_only", "supervised"]


# -- adding-data.md -------------------------------------------------------------------------------


def test_the_description_of_the_guide_is_sound(write_livers, tmp_path):
    shown = re.findall(
        r"<!-- plugin: liver.yaml -->\n```yaml\n(.*?)```", page("adding-data.md"), re.S
    )
    assert len(shown) == 1
    file = tmp_path / "liver.yaml"
    file.write_text(shown[0])
    write_livers(tmp_path / "volumes")
    assert_all_pass(run_dataset_checks("liver", plugins=[file]), DATASET_CHECKS)


def test_the_guide_explains_every_entry_of_a_description(write_livers, tmp_path):
    """The tables list exactly the entries that the parser of descriptions reads."""
    from glua_bench.datasets.folder import description

    source = Path(description.__file__).read_text(encoding="utf-8")
    calls = (
        r"(?:\.(?:take|texts|numbers|table|tables|choice)\(\s*|_(?:listed|located)\(\w+, )\"(\w+)\""
    )
    taken = set(re.findall(calls, source))
    taken -= {"slices", "rows", "flip", "size"}  # within `stored` and `grids`
    taken |= {"values"}
    tables = page("adding-data.md").split("## A class")[0]
    rows = [line for line in tables.splitlines() if line.startswith("| `")]
    mentioned = {name for row in rows for name in re.findall(r"`(\w+)[`:]", row)}
    assert taken <= mentioned, taken - mentioned
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert explained <= taken, explained - taken


def test_the_dataset_of_the_guide_is_sound(plugin, write_livers, tmp_path, monkeypatch):
    file = plugin("adding-data.md")
    write_livers(tmp_path / "data" / file.stem)
    monkeypatch.setenv("GLUA_BENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("GLUA_BENCH_CACHE", str(tmp_path / "cache"))
    assert_all_pass(run_dataset_checks(file.stem, plugins=[file]), DATASET_CHECKS)


def test_the_dataset_of_the_guide_says_what_is_missing(plugin, tmp_path):
    from glua_bench.errors import DataError

    dataset = Registry("dataset", [plugin("adding-data.md")]).load("liver")(tmp_path / "nothing")
    with pytest.raises(DataError, match="--data-root"):
        dataset.prepare()


# -- sweeps.md ------------------------------------------------------------------------------------


def rows_of(text: str, head: str) -> dict[str, str]:
    """Return first cell → other cells of the table with a heading."""
    body = text.split(f"| {head} |", 1)[1].split("\n\n")[0].splitlines()[2:]
    return {row.split("|")[1].strip(): row.split("|", 2)[2] for row in body}


def test_the_guide_explains_every_entry_of_a_sweep():
    """The tables list exactly the entries that the parser of definitions reads."""
    from glua_bench.sweeps import definition

    source = Path(definition.__file__).read_text(encoding="utf-8")
    taken = set(re.findall(r"\btext\.(?:take|texts|table|choice)\(\s*\"(\w+)\"", source))
    taken |= set(re.findall(r"_positive\(text, \"(\w+)\"", source))
    entries = rows_of(page("sweeps.md"), "entry")
    assert taken == {name for cell in entries for name in re.findall(r"`(\w+)`", cell)}
    written = " ".join(rows_of(page("sweeps.md"), "written"))
    explained = page("sweeps.md").split("| written |")[1].split("Whole numbers")[0]
    for name in re.findall(r"\bpart\.take\(\"(\w+)\"", source):
        assert f"{name}: " in explained, name
    assert "auto" in written and "[topk, soft]" in written


def test_the_guide_names_every_sampler_pruner_and_objective():
    from glua_bench.config import SELECTORS
    from glua_bench.sweeps.definition import COSTS, PRUNERS, SAMPLERS

    text = page("sweeps.md")
    assert list(rows_of(text, "sampler")) == [f"`{name}`" for name in SAMPLERS]
    assert list(rows_of(text, "pruner")) == [f"`{name}`" for name in PRUNERS if name != "none"]
    judged = text.split("## What a trial is judged by")[1].split("\n## ")[0]
    for name in SELECTORS:
        assert (f"`{name}`" in judged) == (name != "last"), name
    objective = rows_of(text, "entry")["`objective`"]
    assert "`oracle`" in objective and all(cost in objective for cost in COSTS)


def test_the_sweep_of_the_guide_can_be_used(tmp_path):
    from glua_bench.sweeps.definition import read

    (shown,) = re.findall(r"```yaml\n(.*?)```", page("sweeps.md"), re.S)
    (tmp_path / "my_ratio.yaml").write_text(shown)
    found = read(tmp_path / "my_ratio.yaml", oracle=False)
    assert (found.name, found.trials, found.runs_per_trial) == ("my_ratio", 20, 3)


# -- methods.md, protocol.md ----------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_every_method_has_a_card(name):
    cards = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", page("methods.md"), re.M | re.S))
    assert set(cards) == set(OURS)
    method = Registry("method").load(name)
    # A card may refer to that of another method for settings that they share.
    referred, waiting = "", [name]
    while waiting:
        card = cards[waiting.pop()]
        referred += card
        settings = re.search(r"^Settings of (.*)$", card, re.MULTILINE)
        if settings is not None:
            waiting += [n for n in re.findall(r"`(\w+)`", settings[1]) if n in cards]
    for spec in fields(method.Config):
        assert f"`{spec.name}`" in referred, f"the card of {name} lacks {spec.name}"
    for variant in method.variants():
        assert f"| {variant} |" in cards[name]
    assert "reconstruction" not in method.reference or "Reconstruction" in cards[name]


def test_no_card_names_a_setting_that_does_not_exist():
    known = {s.name for name in OURS for s in fields(Registry("method").load(name).Config)}
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page("methods.md"), re.MULTILINE)
    values = {"topk", "soft", "random", "none", "detached", "constant"}  # in tables of their own
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named - values == known


def test_the_page_names_the_words_of_maps():
    (line,) = re.findall(r"^- \*\*Pictures\.\*\*.*$", page("adding-a-method.md"), re.MULTILINE)
    named = line.partition("one of the words ")[2]
    assert set(re.findall(r"[a-z]+", named)) - {"or"} == figures.MAPS - {"d"}


def test_protocol_names_every_selector_and_split():
    text = page("protocol.md")
    for entry in Registry("selector").entries():
        if entry.origin == "glua-bench":
            assert f"| `{entry.name}`" in text
            assert issubclass(Registry("selector").load(entry.name), Selector)
    for name in ("phantom", "mscmr", "mmwhs"):
        dataset = Registry("dataset").load(name)
        for domain in (d for direction in dataset.directions for d in direction.split("-")):
            assert f"| {domain} |" in text


def test_protocol_states_the_splits_of_the_code():
    from glua_bench.datasets.mmwhs_layout import MMWHSLayout

    for domain, text in ((d, page(p)) for d in ("ct", "mr") for p in ("protocol.md", "mmwhs.md")):
        (row,) = re.findall(rf"^\|(?:[^|]*\|)? {domain} \|(.*)\|$", text, re.MULTILINE)
        _, val, test = (cell.strip() for cell in row.split("|"))
        assert val == ", ".join(map(str, MMWHSLayout.val_ids[domain]))
        assert test == ", ".join(map(str, MMWHSLayout.test_ids[domain]))


def test_the_page_of_abdomen_states_the_splits_of_the_code():
    from glua_bench.datasets.abdomen import SPLIT_FILE
    from glua_bench.datasets.partitions import read_partition

    text = page("abdomen.md")
    for domain, ids in read_partition(SPLIT_FILE, 1).items():
        (row,) = re.findall(rf"^\| {domain} \|(.*)\|$", text, re.MULTILINE)
        train, *others = (cell.strip() for cell in row.split("|"))
        assert f"the other {list(ids.values()).count('train')} of" in train
        for split, cell in zip(("val", "test"), others, strict=True):
            assert cell == ", ".join(str(n) for n, own in ids.items() if own == split)


def test_every_test_ids_paragraph_of_mscmr_is_the_code_s():
    from glua_bench.datasets import mscmr

    text = page("protocol.md")
    for domain, splits in mscmr._SPLITS.items():
        (row,) = re.findall(rf"^\|[^|]*\| {domain} \|(.*)\|$", text, re.MULTILINE)
        for cell, split in zip(row.split("|"), ("train", "val", "test"), strict=True):
            ends = [int(number) for number in re.findall(r"\d+", cell)]
            assert (ends[0], ends[-1]) == (splits[split][0], splits[split][-1])


# -- results.md and the README --------------------------------------------------------------------


def loaded(name: str):
    """Import a module of benchmarks/, which is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        return importlib.import_module(f"benchmarks.{name}")


COMPARISON = loaded("comparison")


def result_rows(name: str) -> list[str]:
    """Return the lines of a results table below its head."""
    rows = pd.read_parquet(ROOT / "results" / f"{name}.parquet")
    assert set(rows["dataset"]) == {"phantom"}, "rows of real patients may not be published"
    return COMPARISON.page_table(rows)[2:]


TASKS = ("mr-ct", "ct-mr")
TABLES = ("", "_codes", "_baselines", "_h100")


@pytest.mark.parametrize("name", ["phantom_benchmark", *(f"phantom_quick{w}" for w in TABLES)])
def test_the_results_of_the_page_are_those_of_the_rows(name):
    """Each table precedes the link to its file."""
    assert last_table(page("results.md"), name) == result_rows(name)


def test_a_table_of_results_holds_the_means_of_its_rows(tmp_path):
    """The same numbers, from the file alone."""
    rows = pd.read_parquet(ROOT / "results" / "phantom_quick.parquet")
    first = rows[(rows["selector"] == "last") & (rows["perturbation"] == 0)]
    dice = first[first["task"] == "phantom ct-mr"].groupby(["entry", "seed"])["dice"].mean()
    for entry, own in dice.groupby("entry"):
        (line,) = [
            line
            for line in result_rows("phantom_quick")
            if line.replace("`", "").replace(" (privileged)", "").startswith(f"| {entry} |")
        ]
        assert f"| {own.mean():.2f} ± {own.std():.2f} |" in line
    target = tmp_path / "page.md"
    target.write_text("a\n<!-- phantom_quick: begin -->\nold\n<!-- phantom_quick: end -->\nb\n")
    COMPARISON.into_page(target, "phantom_quick", COMPARISON.page_text(rows))
    text = target.read_text()
    assert text.startswith("a\n<!-- phantom_quick: begin -->\n| method | MR→CT Dice |")
    assert text.endswith("<!-- phantom_quick: end -->\nb\n") and "old" not in text
    with pytest.raises(SystemExit, match="lacks the comments"):
        COMPARISON.into_page(target, "other", "")


def test_rows_of_new_runs_join_those_of_a_file(tmp_path):
    rows = pd.read_parquet(ROOT / "results" / "phantom_benchmark.parquet")
    first, second, *_ = rows["run"].unique()
    of_first, of_both = rows[rows["run"] == first], rows[rows["run"].isin([first, second])]
    file = tmp_path / "rows.parquet"
    assert COMPARISON.added(of_first, file).equals(of_first), "a new file"
    of_first.to_parquet(file)
    joined = COMPARISON.added(of_both.assign(dice=0.5), file)
    assert len(joined) == len(of_both) and (joined["dice"] == 0.5).all(), "equal ids are replaced"
    of_first.drop(columns="labels").to_parquet(file)
    assert set(COMPARISON.added(of_both[of_both["run"] == second], file)["labels"]) <= {
        "",
        "sealed",
    }
    patients = of_both.assign(dataset="mscmr")
    assert len(COMPARISON.added(patients, file)) == len(of_first), "no row of a patient"


def test_what_the_page_says_of_the_benchmark_follows_from_its_rows():
    rows = pd.read_parquet(ROOT / "results" / "phantom_benchmark.parquet")
    assert set(rows["entry"]) >= {"source_only", "supervised", "source_only + photometric"}
    assert rows["code"].str.fullmatch(r"\d[\w.]*\+[0-9a-f]{10}").all()
    assert (rows.groupby("entry", observed=True)["code"].nunique() == 1).all(), "one code per entry"
    text = page("results.md")
    block = text.split("<!-- phantom_benchmark: begin -->\n")[1]
    block = block.split("\n<!-- phantom_benchmark: end -->")[0]
    assert block == COMPARISON.page_text(rows)
    assert block.count("- phantom ") >= rows["task"].nunique()
    (line,) = re.findall(r"^- phantom mr-ct, Dice of glua minus.*$", block, re.MULTILINE)
    dice = rows[(rows["task"] == "phantom mr-ct") & (rows["selector"] == "last")]
    dice = dice[dice["perturbation"] == 0].groupby(["entry", "seed"], observed=True)["dice"].mean()
    difference = 100 * (dice["glua"] - dice["global_only"]).mean()  # over the seeds that both have
    assert f"global_only {difference:.1f} (" in line


def test_what_the_page_concludes_from_the_benchmark_is_what_its_rows_say():
    file = ROOT / "results" / "phantom_benchmark.parquet"
    (paragraph,) = re.findall(r"^\*\*What this shows so far.*$", page("results.md"), re.MULTILINE)
    lines = COMPARISON.table(pd.read_parquet(file))["gap recovered"]
    other = 100 * lines["phantom ct-mr"]
    assert f"(`global_only` {other['global_only']:.0f} %, GLUA {other['glua']:.0f} %)" in paragraph
    assert f"tone curves recover {other['source_only + photometric']:.0f} %." in paragraph
    gaps = lines["phantom mr-ct"]
    for entry, said in {
        "glua": "GLUA recovers {} % of the gap",
        "global_only": "(`global_only`) {} %",
        "local_only": "(`local_only`) {} %",
        "glua + gain constant": "everywhere (*gain constant*), {} % are recovered",
        "glua + Step A + D1 + D2": "without a gain (*Step A + D1 + D2*), {} %",
        "cycle_translate": "CycleGAN follows with {} %",
        "source_only + photometric": "read no target image, with {} %",
        "ada_output": "ends below no adaptation in MR→CT ({} %)",
    }.items():
        assert said.format(round(100 * gaps[entry])) in paragraph, entry
    quick = COMPARISON.table(pd.read_parquet(ROOT / "results" / "phantom_quick.parquet"))["Dice"]
    added = 100 * (quick["phantom mr-ct", "glua"] - quick["phantom mr-ct", "global_only"])
    assert f"after 500 updates Step B added {added:.0f} points to Step A" in paragraph
    rows = pd.read_parquet(file)
    rows = rows[(rows["entry"] == "ada_output") & (rows["selector"] == "last")]
    missed = rows[rows["structure"] == "LVC"]["missed"].sum()
    assert f"misses the left ventricular cavity in {missed} of 20 cases" in paragraph
    regrets = report_tables.regrets(from_rows(file))
    means = 100 * regrets.groupby("selector", observed=True)["regret"].mean()
    assert f"last checkpoint loses {means['last']:.1f} points" in paragraph
    assert f"BNM {means['bnm']:.1f}, SND {means['snd']:.1f}." in paragraph


def test_the_readme_says_what_the_rows_of_the_benchmark_say():
    lines = COMPARISON.table(pd.read_parquet(ROOT / "results" / "phantom_benchmark.parquet"))
    own, glua = (
        [round(100 * lines.loc[f"phantom {task}", entry]["gap recovered"]) for task in TASKS]
        for entry in ("source_only + photometric", "glua")
    )
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"recover {own[0]} % (MR→CT) and {own[1]} % (CT→MR) of the gap" in text
    assert f"GLUA recovers {glua[0]} % (MR→CT) and {glua[1]} % (CT→MR) of the gap" in text


def last_table(text: str, name: str) -> list[str]:
    """Return the rows of the last table before the link to a file of results."""
    before = text.split(f"results/{name}.parquet)")[0]
    return re.findall(r"^\|---.*\n((?:\|.*\n)+)", before, re.MULTILINE)[-1].splitlines()


def test_the_readme_is_one_page_with_one_table_of_results():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert last_table(text, "phantom_benchmark") == result_rows("phantom_benchmark")
    assert len(re.findall(r"^\|[-| ]+\|$", text, re.MULTILINE)) == 1
    assert text.count("![") == 1
    prose = re.sub(r"^```.*?^```|^\|.*?$|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)
    assert len(prose.split()) <= 600
    assert len(text.splitlines()) <= 120, "three screens"


def test_what_the_page_says_of_glua_and_of_last_bits_is_what_the_rows_say():
    text = page("results.md")
    rows = pd.read_parquet(ROOT / "results" / "phantom_quick.parquet")
    (paragraph,) = re.findall(r"^On this phantom and at this budget.*$", text, re.MULTILINE)
    tested = []
    for task in ("phantom mr-ct", "phantom ct-mr"):
        pairs = statistics.pairs(competing(statistics.scores(rows, task))).set_index(["a", "b"])
        tested += list(pairs["p_holm"])
        own = pairs.loc["global_only", "glua"]
        ends = f"{-100 * own['high']:.1f} to {-100 * own['low']:.1f}"
        assert f"{-100 * own['difference']:.1f} points above" in paragraph and ends in paragraph
        if task == "phantom mr-ct":
            assert f"p = {own['p_holm']:.2f} after it" in paragraph
    assert min(tested) >= statistics.SIGNIFICANT, "the pages say that no two differ significantly"
    (paragraph,) = re.findall(r"^\*\*Last bits can .*$", text, re.MULTILINE)
    rows = rows[(rows["task"] == "phantom mr-ct") & (rows["seed"] == 0)]
    rows = rows[rows["selector"] == "last"]
    dice = rows.groupby(["entry", "perturbation"])["dice"].mean()
    for entry in ("glua", "source_only + photometric"):
        first, second, third = dice[entry].sort_index()
        assert f"{first:.2f}, {second:.2f} and {third:.2f}" in paragraph


def test_the_ablation_of_the_page_is_that_of_the_rows():
    found = from_rows(ROOT / "results" / "phantom_quick_ablation.parquet")
    assert set(found.rows["dataset"]) == {"phantom"}, "rows of real patients may not be published"
    text = page("results.md")
    block = text.split("<!-- phantom_quick_ablation -->\n")[1].split("<!-- end -->")[0]
    table_ = markdown(report_tables.ablation(found, "glua"))
    lines = [line for line in table_.splitlines() if line.startswith("|")]
    assert block.splitlines() == lines, "take the table from `glua-bench report --rows`"


def test_what_the_page_says_of_the_gain_is_what_its_files_say():
    gain = loaded("gain")
    text = page("results.md")
    (paragraph,) = re.findall(r"^\*\*Does it help .*$", text, re.MULTILINE)
    pairs = gain.differences(ROOT / "results" / "phantom_quick_ablation.parquet")
    assert set(pairs["count"]) == {6}
    for variant in ("gain constant", "Step A + D1 + D2"):
        mean, spread = pairs.loc[variant, ["mean", "std"]]
        assert f"{mean:.1f} ± {spread:.1f}" in paragraph
    steps = pd.read_csv(ROOT / "results" / "phantom_quick_gain.csv").groupby("updates")
    for part, said in (
        ("26-150", "({:.2f} for source, {:.2f} for target features), where the gain is {:.2f}"),
        ("301-500", "at {:.2f} and {:.2f} (gain {:.2f}, standard deviation {:.2f}, "),
    ):
        assert said.format(*steps.get_group(part)[list(gain.MEANS)].mean()) in paragraph
    last = steps.get_group("301-500")
    ends = last["gain_min"].min(), last["gain_max"].max()
    assert "between {:.2f} and {:.2f})".format(*ends) in paragraph


def test_the_budget_ladder_of_the_page_is_that_of_the_rows():
    rows = pd.read_parquet(ROOT / "results" / "phantom_ladder.parquet")
    assert set(rows["dataset"]) == {"phantom"} and set(rows["seed"]) == {0}
    dice = rows[rows["selector"] == "last"].groupby("entry")["dice"].mean()
    (block,) = re.findall(
        r"^\| updates \| 500 .*\n\|---.*\n((?:\|.*\n)+)",
        page("results.md"),
        re.MULTILINE,
    )
    shown = {}
    for line in block.splitlines():
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        entry = name.replace("`", "").removesuffix(" (privileged)")
        for budget, cell in zip(("", " + 2000 updates", " + 8000 updates"), cells, strict=True):
            if cell:
                shown[entry + budget] = cell
    assert shown == {entry: f"{value:.2f}" for entry, value in dice.items()}
    gained = {
        entry: f"{100 * (dice[f'{entry} + 8000 updates'] - dice[f'{entry} + 2000 updates']):.0f}"
        for entry in ("glua", "global_only", "source_only + photometric", "cycle_translate")
    }
    said = (
        "`glua` still gained {glua} points of Dice, `global_only` {global_only}, random tone "
        "curves {source_only + photometric}, `cycle_translate` {cycle_translate} and"
    )
    assert said.format(**gained) in page("results.md")


def test_what_selectors_give_away_on_the_page_is_what_the_rows_say():
    """Regrets follow from the rows; correlations need scores from run directories."""
    found = report_tables.regrets(from_rows(ROOT / "results" / "phantom_quick_ablation.parquet"))
    table_ = pd.read_csv(ROOT / "results" / "phantom_quick_selectors.csv").set_index("selector")
    text = page("results.md")
    block = text.split("<!-- phantom_quick_selectors -->\n")[1].split("<!-- end -->")[0]
    lines = [line.replace("\\", "").replace("*", "") for line in block.splitlines()[2:]]
    shown = {
        line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines
    }
    assert list(shown) == list(table_.index)
    for name, cells in shown.items():
        for place, task in ((0, "phantom ct-mr"), (3, "phantom mr-ct")):
            own = 100 * found[(found["selector"] == name) & (found["task"] == task)]["regret"]
            assert cells[place] == f"{own.mean():.1f} ± {own.std():.1f}"
            for offset, kind in ((1, "pooled"), (2, "within")):
                value = table_.loc[name, f"{task} ρ {kind}"]
                assert cells[place + offset] == ("–" if pd.isna(value) else f"{value:.2f}")
