"""The commands of `glua-bench data`."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glua_bench.cli.options import (
    Plugins,
    PresetName,
    Processes,
    answer,
    note,
    progress,
    say,
    with_options,
    with_output,
)
from glua_bench.console import next_command
from glua_bench.errors import ConfigError, DataError
from glua_bench.registry import load_dataset, with_descriptions
from glua_bench.runs.completion import complete_names
from glua_bench.runs.request import DataRoot, Fold, RunsRoot

if TYPE_CHECKING:
    from glua_bench.task import Dataset

data_app = typer.Typer(
    help="Prepare, check, show or export a dataset.", no_args_is_help=True, rich_markup_mode=None
)
_SHOW = ("data", "show")
_RUN = ("run", "--method", "source_only", "--dataset")
_COMPARE = ("compare", "--methods", "fda,slaug", "--dataset")


@dataclass(frozen=True)
class Source:
    """Options of all commands of `data`."""

    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help="Name (see `glua-bench list datasets`) or FILE.yaml.",
            autocompletion=complete_names("dataset"),
        ),
    ]
    fold: Fold = 1
    data_root: DataRoot = None
    plugin: Plugins = None

    def load(self) -> Dataset:
        """Load the dataset and prepare its files."""
        name, plugins = with_descriptions(self.dataset, self.plugin)
        dataset = load_dataset(name, self.data_root, plugins, self.fold)
        dataset.prepare(note)
        return dataset

    def command(self, words: tuple[str, ...]) -> str:
        """Format a command on this dataset."""
        return next_command(
            "glua-bench",
            *words,
            self.dataset,
            plugins=self.plugin,
            data_root=self.data_root,
            fold=self.fold,
        )


@data_app.command()
@with_output
@with_options()
def prepare(source: Source, preset: PresetName = "quick", jobs: Processes = None) -> None:
    """Generate or locate a dataset's files and preprocess them."""
    from glua_bench.data.cache import cache_root
    from glua_bench.data.preparation import prepare_cases

    data = source.load()
    with progress() as bar:
        problems = prepare_cases(data, data.grid(preset), bar, jobs)
    domains = {}
    for domain in data.domains():
        sizes = {split: len(data.split(domain, split)) for split in ("train", "val", "test")}
        counts = ", ".join(f"{count} {split}" for split, count in sizes.items())
        bare = sum(case.label is None for case in data.cases(domain))
        domains[domain] = {**sizes, "unlabelled": bare}
        more = f"; {bare} without a label, used as target images only" if bare else ""
        say(f"{domain}: {counts}{more}")
    say(f"Files: {data.root}   cache: {cache_root()}")
    for problem in problems:
        say(f"PROBLEM: {problem}")
    answer(
        dataset=data.fold_name,
        root=data.root,
        cache=cache_root(),
        domains=domains,
        problems=problems,
        next=[source.command(_SHOW)],
    )
    if problems:
        raise DataError(
            f"Some cases of '{source.dataset}' in {data.root} could not be prepared; correct or "
            "replace the files listed above and repeat the command."
        )
    note(f"Next: {source.command(_SHOW)}")


@data_app.command()
@with_output
@with_options()
def check(
    source: Source,
    jobs: Processes = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write the findings to this CSV file.")
    ] = None,
) -> None:
    """Read every file and report problems.

    Reads the labels of all cases, including the target's; runs use none of the findings.
    """
    from glua_bench.data.parallel import cores
    from glua_bench.inspection.findings import write_findings
    from glua_bench.inspection.integrity import check_dataset, refuse_problems, summary

    data = source.load()
    with progress() as bar:
        facts, findings = check_dataset(data, bar, jobs or cores())
    heads = [f"{structure.name} ml" for structure in data.structures]
    widths = [max(10, len(head) + 2) for head in heads]
    first = max([14, *(len(one.case.id) + 2 for one in facts)])
    say(
        f"{'case':<{first}}{'split':<7}{'voxels':<16}{'mm':<20}"
        + "".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))
    )
    for one in facts:
        line = f"{one.case.id:<{first}}{one.case.split:<7}"
        if one.image is not None:
            line += f"{'×'.join(map(str, one.image.shape)):<16}"
            line += f"{'×'.join(f'{value:.2f}' for value in one.image.spacing):<20}"
        if one.image is not None and one.label is not None:
            line += "".join(
                f"{s.ml if s else 0:>{width}.1f}"
                for s, width in zip(one.label.structures, widths, strict=True)
            )
        say(line.rstrip())
    if findings:
        say()
    for found in findings:
        say(f"{found.severity} ({found.check}): {found.text}")
    if out is not None:
        write_findings(out, findings)
        say(f"Wrote {out}")
    answer(
        dataset=data.fold_name,
        root=data.root,
        cases=[
            {
                "case": one.case.id,
                "split": one.case.split,
                "shape": None if one.image is None else one.image.shape,
                "spacing": None if one.image is None else one.image.spacing,
                "ml": {}
                if one.label is None
                else {
                    structure.name: found.ml if found else 0.0
                    for structure, found in zip(data.structures, one.label.structures, strict=True)
                },
            }
            for one in facts
        ],
        findings=[
            {"severity": each.severity, "check": each.check, "text": each.text} for each in findings
        ],
        next=[source.command(_SHOW), source.command(_RUN)],
    )
    refuse_problems(findings, len(facts), f"'{source.dataset}' in {data.root}")
    say(f"All {len(facts)} cases in {data.root} can be used; {summary(findings)}.")
    note(f"Next: {source.command(_SHOW)}")
    note(f"      {source.command(_RUN)}")


@data_app.command()
@with_output
@with_options()
def fingerprint(
    source: Source,
    jobs: Processes = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write FILE.json or FILE.yaml.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Compare with this fingerprint.")
    ] = None,
) -> None:
    """Fingerprint a dataset without voxels, names or paths."""
    from glua_bench.data.parallel import cores
    from glua_bench.inspection import fingerprint as prints
    from glua_bench.inspection.measurements import gather

    if out is not None:
        prints.format_of(out)  # fail early
    known = prints.read(against) if against is not None else None
    data = source.load()
    with progress() as bar:
        facts = gather(data, jobs or cores(), bar)
    table = prints.fingerprint(data, facts)
    for line in prints.describe(table):
        say(line)
    if out is not None:
        prints.write(out, table)
        say(f"Wrote {out}")
    found = []
    if known is not None:
        say()
        names = {prints.case_digest(one): one.case.id for one in facts}
        found = prints.differences(table, known, names)
        for sentence in found:
            say(sentence)
    answer(fingerprint=table, file=out, against=against, differences=found, next=[])
    if known is not None:
        if found:
            raise DataError(f"The data of '{source.dataset}' in {data.root} differ from {against}.")
        say(f"The data have the same cases in the same splits as {against}.")


@data_app.command(name="export")
@with_output
@with_options()
def export_data(
    *,
    source: Source,
    to: Annotated[Path, typer.Option("--to", help="Output directory.")],
    number: Annotated[
        int, typer.Option("--number", help="nnU-Net number of the first dataset.")
    ] = 501,
    link: Annotated[bool, typer.Option("--link", help="Link images instead of copying.")] = False,
    run: Annotated[
        str | None, typer.Option("--run", help="Also export this run's predictions.")
    ] = None,
    runs_root: RunsRoot = Path("runs"),
    jobs: Processes = None,
) -> None:
    """Export a dataset, its splits and a run's predictions in nnU-Net's layout."""
    from glua_bench.data.parallel import cores
    from glua_bench.inspection import nnunet

    data = source.load()
    found = None
    if run is not None:
        from glua_bench.runs.prediction import find_run

        found = find_run(run, runs_root)
        if found.config.fold_name != data.fold_name:
            raise ConfigError(
                f"--run {run} is a run on '{found.config.fold_name}', not on '{data.fold_name}': "
                "give a run on this dataset."
            )
    with progress() as bar:
        made = nnunet.export(data, to, number, link, jobs or cores(), bar)
        if found is not None:
            target = found.config.target
            folder = nnunet.folder_of(data, target, to, number).name
            place = to / nnunet.PREDICTIONS / folder / f"{found.config.method}_{found.id}"
            count = nnunet.export_predictions(
                data, target, found.predictions, place, jobs or cores(), bar
            )
    for one in made:
        more = f"; {one.left_out} without a label skipped" if one.left_out else ""
        say(f"{one.folder}: {one.cases} cases, {one.mebibytes:.1f} MiB{more}")
        if not (one.folder / "splits_final.json").is_file():
            say("  no validation cases: nnU-Net will draw its own splits")
    if found is not None:
        say(f"{place}: predictions of {count} test cases")
    if not data.publishable:
        say("The data owner's terms of use also apply to the copies.")
    raw, preprocessed = (shlex.quote(str(to / part)) for part in (nnunet.RAW, nnunet.PREPROCESSED))
    following = [
        f"export nnUNet_raw={raw} nnUNet_preprocessed={preprocessed}",
        f"nnUNetv2_plan_and_preprocess -d {number} --verify_dataset_integrity",
    ]
    note(f"Next: {following[0]}")
    note(f"      {following[1]}")
    answer(
        dataset=data.fold_name,
        folders=made,
        predictions=None if found is None else place,
        next=following,
    )


@data_app.command()
@with_output
@with_options()
def show(
    source: Source,
    preset: PresetName = "standard",
    out: Annotated[Path, typer.Option(help="Output directory.")] = Path("figures"),
) -> None:
    """Plot each domain: slices with label contours, and intensity distributions."""
    data = source.load()
    from glua_bench.reports.run_figures import draw_dataset

    files = list(draw_dataset(data, data.grid(preset), out))
    for file in files:
        say(f"Wrote {file} (also .svg, .pdf)")
    if not data.publishable:
        say("The figures show the data owner's images: do not share them.")
    following = [source.command(_RUN), source.command(_COMPARE)]
    note(f"Next: {following[0]}")
    note(f"      {following[1]}")
    answer(files=files, shareable=data.publishable, next=following)
