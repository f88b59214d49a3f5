"""Draft of a dataset description from files on disk and the user's answers.

Every guess is the proposed answer to a question, so the user sees it before it is used.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from glua_bench.cli.scaffold import (
    UNANNOTATED_NAME,
    parse_structures,
    short_names,
    written_structures,
)
from glua_bench.data.formats import SUFFIXES
from glua_bench.datasets.folder.description import PLANES
from glua_bench.datasets.folder.guess import (
    Look,
    domains_by_name,
    guess_domains,
    guess_patterns,
    look,
    volumes_in,
)
from glua_bench.datasets.folder.layouts import (
    SPLITS_FILE,
    Found,
    by_nnunet,
    by_pattern,
    nnunet_channels,
    nnunet_unannotated,
    nnunet_values,
    pattern_fault,
)
from glua_bench.errors import ConfigError, DataError
from glua_bench.paths import entries
from glua_bench.task import Ask

SOFT_TISSUE = "-125 275"  # HU; the common window for abdominal CT
_SHARES = {"test": 0.2, "val": 0.1}
_NOT_ALL = "\n# The other directions have too few labelled cases for training and testing."
_SEED = 0  # for drawing test and validation cases


# Structure → raw label values.
Values = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class _Domain:
    """The files of one domain.

    Attributes:
        name: domain name.
        place: lines of the description that locate the files.
        images: image files by id.
        labels: label files by id.
        named: structure → raw values, if the files state them.
        unannotated: raw values of unannotated voxels, if the files state them.
        test: ids that the files assign to the test split.
        val: ids that the files assign to the validation split.
    """

    name: str
    place: dict[str, str]
    images: dict[str, Path]
    labels: dict[str, Path]
    named: Values
    unannotated: tuple[int, ...] = ()
    test: frozenset[str] = frozenset()
    val: frozenset[str] = frozenset()


def draft(
    name: str, data: Path, ask: Ask, domains: Sequence[str], structures: Values | None
) -> str:
    """Return the text of a description of the volumes in a directory.

    Args:
        name: dataset name.
        data: the directory.
        ask: asks the user a question.
        domains: words in the files' paths; empty to guess them from the files.
        structures: structure → raw label values, the same in all domains; None to ask.

    Raises:
        DataError: the directory holds no volumes, or fewer than two domains.
        ConfigError: an answer is invalid.
    """
    if not data.is_dir():
        raise DataError(f"{data} is not a directory: pass that of your files with --data.")
    found = _nnunet(data, domains) or _patterns(data, domains, ask)
    looks = {domain.name: look(domain.images, domain.labels) for domain in found}
    titles, values, unannotated = _classes(found, looks, ask, structures)
    plane = ask(
        "Plane of the slices: axial, coronal or sagittal",
        _plane(looks),
        partial(_one_of, among=tuple(PLANES)),
    )
    axis = PLANES[plane].slice_axis
    across = max(max(np.delete(own.extent, axis)) for own in looks.values())
    window = ask("Side of the square window in mm", f"{math.ceil(across / 10) * 10}", _length)
    thick = max(own.spacing[axis] for own in looks.values())
    between = ask("Distance between slices in mm, for all domains", f"{thick:.3g}", _length)
    shared = _shared(found, ask)
    splits = _splits(found, shared)
    pairs, served = _directions(found, splits)
    if not served:
        raise DataError(
            f"The {sum(len(d.labels) for d in found)} labels in {data} are too few for any "
            "direction: a source needs a labelled training case, and a target a labelled test "
            "case and another image for training; label more cases."
        )
    blocks = []
    for domain in found:
        own = values[domain.name]
        named = {v for numbers in own.values() for v in numbers} | {*domain.unannotated}
        rest = sorted(set(looks[domain.name].values) - named - {*unannotated[domain.name]})
        lines = {**domain.place, "values": _mapping(own)}
        if unannotated[domain.name]:
            lines["unannotated"] = (
                f"{[*unannotated[domain.name]]}   # excluded from loss and scores"
            )
        if rest:
            lines["background"] = f"{rest}   # label values that count as background"
        lines |= _intensity(domain.name, looks[domain.name], ask)
        lines |= {split: _listing(ids) for split, ids in splits[domain.name].items()}
        block = [f"  {domain.name}:", *(f"    {key}: {text}" for key, text in lines.items())]
        blocks.append("\n".join(block))
    both = " and ".join(domain.name for domain in found)
    listed = ", ".join(titles.values())
    template = files("glua_bench") / "templates" / "dataset.yaml.txt"
    return Template(template.read_text(encoding="utf-8")).substitute(
        name=name,
        title=json.dumps(f"{listed[0].upper()}{listed[1:]} in {both}", ensure_ascii=False),
        root=json.dumps(os.fspath(data.resolve()), ensure_ascii=False),
        plane=plane,
        window=f"{window:g}",
        between=f"{between:g}",
        same="true" if shared else "false",
        classes="\n".join(
            f"  {key}: {{title: {json.dumps(title)}}}" for key, title in titles.items()
        ),
        domains="\n".join(blocks),
        directions="" if served == pairs else f"{_NOT_ALL}\ndirections: {_listing(served)}\n",
    )


# -- where the files are --------------------------------------------------------------------------


def _nnunet(data: Path, names: Sequence[str]) -> list[_Domain]:
    """Return one domain per nnU-Net or Decathlon folder in the directory."""
    folders = [path for path in entries(data) if (path / "dataset.json").is_file()]
    if len(folders) < 2:
        return []
    short = [_plain(re.sub(r"^(dataset|task)\d+_", "", f.name.lower())) for f in folders]
    made = []
    for folder, name in zip(folders, short, strict=True):
        if not name or short.count(name) > 1:  # Dataset001_Heart beside Dataset002_Heart
            name = _plain(folder.name.lower())
        if names and name not in names:
            continue
        place: dict[str, str] = {"nnunet": json.dumps(folder.name, ensure_ascii=False)}
        if several := nnunet_channels(folder)[1:]:
            place["channel"] = f"0   # {1 + len(several)} channels; to use all, {_all(folder)}"
        fold = 0 if (folder / SPLITS_FILE).is_file() else None
        cases = by_nnunet(folder, fold=fold)
        made.append(
            _Domain(
                name,
                place,
                *_files(cases),
                _usable_names(nnunet_values(folder)),
                nnunet_unannotated(folder),
                *(frozenset(c.id for c in cases if c.split == split) for split in ("test", "val")),
            )
        )
    if len(made) < 2:
        raise DataError(
            f"{data} holds the folders {', '.join(f.name for f in folders)}: select two of them "
            "with --domains, without the prefix Dataset### or Task##."
        )
    return made


def _all(folder: Path) -> str:
    """Return the entry that selects all channels of a nnU-Net folder."""
    listed = (
        f"{json.dumps(name, ensure_ascii=False)}: {{channel: {number}}}"
        for number, name in enumerate(nnunet_channels(folder))
    )
    return f"channels: {{{', '.join(listed)}}}"


def _usable_names(regions: Values) -> Values:
    """Return label names normalised for answers; {} if they do not define disjoint classes."""
    made = {re.sub(r"[\s,=]+", " ", name.lower()).strip(): own for name, own in regions.items()}
    values = [value for own in regions.values() for value in own]
    named = all(any(map(str.isalpha, name)) and name.isprintable() for name in made)
    # A voxel has one class, and regions may overlap.
    return made if named and len(made) == len(regions) and len(set(values)) == len(values) else {}


def _patterns(data: Path, names: Sequence[str], ask: Ask) -> list[_Domain]:
    """Find domains by words in paths, each with a pattern for images and one for labels."""
    paths = volumes_in(data)
    if not paths:
        raise DataError(
            f"{data} holds no volumes: give a directory with files of type {', '.join(SUFFIXES)}."
        )
    groups = domains_by_name(paths, names) if names else guess_domains(paths)
    if len(groups) < 2:
        raise DataError(
            f"No two domains are recognisable among the {len(paths)} volumes in {data}: name them "
            "with --domains, by words in the files' paths, such as ct,mr."
        )
    made = []
    for name, own in groups.items():
        seen = {data / path for path in own}
        no_guess, labels = "", None
        try:
            images, labels = guess_patterns(own, partial(_finds, data=data, seen=seen))
        except DataError as error:  # no proposal, but the user may know a pattern
            images, no_guess = "", str(error)
        question = f"{name}: images, with * for the case's id"
        read_images = partial(_images, data=data, labels=labels, no_guess=no_guess)
        images = ask(question, images, read_images)
        place = {"images": json.dumps(images, ensure_ascii=False)}
        question = f"{name}: labels, with * for the case's id, or none"
        labels, cases = ask(question, labels or "none", partial(_labels, data=data, images=images))
        if labels is not None:
            place["labels"] = json.dumps(labels, ensure_ascii=False)
        made.append(_Domain(name, place, *_files(cases), {}))
    return made


def _finds(images: str, labels: str | None, data: Path, seen: set[Path]) -> bool:
    """Return True if the patterns find exactly the files `seen`."""
    cases = _paired(data, images, labels)
    found = [file for case in cases for file in (case.image, case.label) if file is not None]
    return len(found) == len(seen) and set(found) == seen


def _paired(data: Path, images: str, labels: str | None) -> list[Found]:
    """Return the cases that the patterns find, or [] if the patterns do not match."""
    if pattern_fault(images, labels):
        return []
    try:
        return by_pattern(data, images, labels, data)
    except DataError:
        return []


def _plain(name: str) -> str:
    """Reduce a name to letters, digits and _."""
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_")


def _files(cases: Sequence[Found]) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return images and labels by id."""
    return (
        {case.id: case.image for case in cases},
        {case.id: case.label for case in cases if case.label is not None},
    )


# -- contents -------------------------------------------------------------------------------------


def _classes(
    found: Sequence[_Domain], looks: dict[str, Look], ask: Ask, given: Values | None
) -> tuple[dict[str, str], dict[str, Values], dict[str, tuple[int, ...]]]:
    """Return short name → title; per domain, raw values by short name and unannotated values."""
    answers: dict[str, Values] = {}
    titles: list[str] = []
    for domain in found:
        if given is not None or not domain.labels:
            answers[domain.name] = dict(given or {})
            titles = titles or _titles(answers[domain.name])
            continue
        values = [v for v in looks[domain.name].values if v not in domain.unannotated]
        if not values:
            raise DataError(
                f"The labels of '{domain.name}' hold only 0, such as "
                f"{next(iter(domain.labels.values()))}: correct the label pattern."
            )
        guess = _named(domain, found, values, answers)
        text = written_structures(guess)
        question = (
            f"{domain.name}: labels hold {', '.join(map(str, values))}; structures to segment as "
            "comma-separated name=value (tumour=1,2,3 merges values; unannotated=255 excludes "
            "voxels from loss and scores; the rest is background)"
        )
        read = partial(_structures, domain=domain.name, titles=tuple(titles))
        answers[domain.name] = ask(question, text, read)
        titles = titles or _titles(answers[domain.name])
    if not titles:
        raise DataError(
            f"No file of {' or '.join(d.name for d in found)} looks like a label: give the label "
            "pattern, or rename the files (label, seg, mask, gt)."
        )
    short = short_names(titles)
    # A domain without labels takes the values of the first labelled one.
    first = next(answer for answer in answers.values() if answer)
    return (
        {short[title]: title for title in titles},
        {
            name: {short[title]: (answer or first)[title] for title in titles}
            for name, answer in answers.items()
        },
        {name: (answer or first).get(UNANNOTATED_NAME, ()) for name, answer in answers.items()},
    )


def _titles(answer: Values) -> list[str]:
    """Return the structures of an answer."""
    return [title for title in answer if title != UNANNOTATED_NAME]


def _named(
    domain: _Domain,
    found: Sequence[_Domain],
    values: Sequence[int],
    answers: Mapping[str, Values],
) -> Values:
    """Guess names for the label values of a domain; {} if there is no basis for a guess."""
    before = next((answer for answer in answers.values() if answer), None)
    if domain.named:
        common = set.intersection(*(set(d.named) for d in found if d.named))
        wanted = before or common or domain.named
        return {title: value for title, value in domain.named.items() if title in wanted}
    if before is None:
        return {f"structure {value}": (value,) for value in values}
    # The values differ from the previous domain's, so only the user can name them.
    if not {v for title in _titles(before) for v in before[title]} <= set(values):
        return {}
    return {title: own for title, own in before.items() if set(own) <= set(values)}


def _plane(looks: dict[str, Look]) -> str:
    """Return the plane across the thickest axis if one is much thicker, else axial."""
    spacing = np.max([own.spacing for own in looks.values()], axis=0)
    axis = int(np.argmax(spacing))
    if spacing[axis] < 1.5 * np.median(spacing):
        return "axial"
    return next(name for name, reading in PLANES.items() if reading.slice_axis == axis)


def _intensity(name: str, own: Look, ask: Ask) -> dict[str, str]:
    """Return the line for the intensity window, if any."""
    question = f"{name}: window of intensities as 'low high' (HU for CT), or no"
    window = ask(question, SOFT_TISSUE if own.hounsfield else "no", _window)
    return {} if window is None else {"window": f"[{window[0]:g}, {window[1]:g}]"}


# -- splits ---------------------------------------------------------------------------------------


def _shared(found: Sequence[_Domain], ask: Ask) -> bool:
    """Ask whether an id means the same person in all domains."""
    common = set.intersection(*(set(domain.images) for domain in found))
    if not common:
        return False
    names = " and ".join(domain.name for domain in found)
    question = f"Is {min(common)} the same person in {names}? (yes: one split per person)"
    return ask(question, "yes", partial(_one_of, among=("yes", "no"))) == "yes"


def _splits(found: Sequence[_Domain], shared: bool) -> dict[str, dict[str, list[str]]]:
    """Draw validation and test ids for each domain.

    Splits given by the files are kept, in all domains if ids mean people. Every domain keeps a
    labelled training case, so a domain with a single one has no test case.

    Raises:
        DataError: a test case has an unlabelled image in another domain.
    """
    made: dict[str, dict[str, list[str]]] = {}
    for group in [list(found)] if shared else [[domain] for domain in found]:
        drawn = _draw(group)
        for domain in group:
            made[domain.name] = {
                split: sorted(case for case in domain.labels if drawn.get(case) == split)
                for split in ("val", "test")
            }
    return made


def _draw(group: Sequence[_Domain]) -> dict[str, str]:
    """Return id → "test" or "val" for domains in which an id means one person.

    Args:
        group: the domains; ids not in the result are training cases.
    """
    unlabelled = {case: d.name for d in group for case in d.images if case not in d.labels}
    drawn = dict.fromkeys((case for d in group for case in d.val if case not in unlabelled), "val")
    for domain in group:
        for case in sorted(domain.test):
            if case in unlabelled:
                raise DataError(
                    f"{case} is a test case of {domain.name} ({domain.images[case]}) but has no "
                    f"label in {unlabelled[case]}, where it would be trained on: add the label, "
                    "or remove the image."
                )
            drawn[case] = "test"
    labelled = [set(domain.labels) for domain in group if domain.labels]
    everywhere = set.intersection(*labelled) if labelled else set()

    def spare(case: str) -> bool:
        """Return True if every domain keeps another labelled case for training."""
        return case not in unlabelled and all(
            sum(other not in drawn for other in d.labels) > 1 for d in group if case in d.labels
        )

    for domain in group:
        free = [case for case in sorted(domain.labels) if case not in drawn]
        order = [str(case) for case in np.random.default_rng(_SEED).permutation(free or [""])]
        if len(group) > 1:  # first those labelled in all domains, who can be tested on in all
            order.sort(key=lambda case: case in everywhere)
        for split, share in _SHARES.items():
            count = len(domain.labels)
            wanted = max(1, round(share * count)) if count >= 3 else int(split == "test")
            if domain.test if split == "test" else domain.val:
                continue  # given by the files
            missing = wanted - sum(drawn.get(case) == split for case in domain.labels)
            able = [case for case in reversed(order) if case in domain.labels]
            for case in able:
                if missing > 0 and case not in drawn and spare(case):
                    drawn[case] = split
                    missing -= 1
    return drawn


def _directions(
    found: Sequence[_Domain], splits: dict[str, dict[str, list[str]]]
) -> tuple[list[str], list[str]]:
    """Return all directions, and those with enough cases for training and testing."""
    held_out = {name: {c for ids in own.values() for c in ids} for name, own in splits.items()}
    pairs = [(a, b) for a in found for b in found if a is not b]
    served = [
        (source, target)
        for source, target in pairs
        if set(source.labels) - held_out[source.name]
        and set(target.images) - held_out[target.name]
        and splits[target.name]["test"]
    ]
    return [f"{a.name}-{b.name}" for a, b in pairs], [f"{a.name}-{b.name}" for a, b in served]


# -- answers --------------------------------------------------------------------------------------


def _images(answer: str, data: Path, labels: str | None, no_guess: str) -> str:
    """Return the answer if the pattern finds images.

    Args:
        answer: the pattern.
        data: the directory of the volumes.
        labels: the label pattern to be proposed next; images may match it, too.
        no_guess: why no pattern was proposed.
    """
    if not answer:
        raise DataError(no_guess)
    fault = pattern_fault(answer, None)
    if fault:
        raise ConfigError(f"{fault}.")
    if labels is None or not _paired(data, answer, labels):
        by_pattern(data, answer, None, data)
    return answer


def _labels(answer: str, data: Path, images: str) -> tuple[str | None, list[Found]]:
    """Return the label pattern, and the cases that it finds with the image pattern."""
    if answer.lower() in ("none", ""):
        return None, by_pattern(data, images, None, data)
    fault = pattern_fault(images, answer)
    if fault:
        raise ConfigError(f"{fault}.")
    return answer, by_pattern(data, images, answer, data)


def _structures(answer: str, domain: str, titles: Sequence[str]) -> Values:
    """Return name → values; names must be those of the previous domains."""
    if not answer:
        raise ConfigError(
            f"{domain}: the label values differ from the previous domain's; answer the questions "
            f"(run without --yes), for example {titles[0]}=63."
        )
    found = parse_structures(answer, domain)
    if not _titles(found):
        raise ConfigError(f"{domain}: '{answer}' has no structure; add one, such as liver=1.")
    if titles and set(_titles(found)) != set(titles):
        raise ConfigError(
            f"{domain}: the structures must be {', '.join(titles)}, as in the previous domain; "
            "give each a value."
        )
    return found


def _window(answer: str) -> tuple[float, float] | None:
    if answer.strip().lower() in ("no", "n", ""):
        return None
    try:
        low, high = map(float, re.split(r"[\s,]+", answer.strip(" []")))
    except ValueError:
        low = high = math.nan
    if not low < high:
        raise ConfigError(
            f"'{answer}' is not a window; enter two increasing numbers, such as {SOFT_TISSUE}, or "
            "no."
        )
    return low, high


def _one_of(answer: str, among: Sequence[str]) -> str:
    """Return the word that the answer abbreviates."""
    found = [word for word in among if word.startswith(answer.strip().lower())]
    if len(found) != 1 or not answer.strip():
        raise ConfigError(f"'{answer}' is not valid; answer {' or '.join(among)}.")
    return found[0]


def _length(answer: str) -> float:
    try:
        value = float(answer)
    except ValueError:
        value = math.nan
    if not 0 < value < 10_000:
        raise ConfigError(f"'{answer}' is not a length; enter a number in mm, such as 320.")
    return value


def _mapping(values: Values) -> str:
    texts = {key: own[0] if len(own) == 1 else list(own) for key, own in values.items()}
    return "{" + ", ".join(f"{key}: {text}" for key, text in texts.items()) + "}"


def _listing(ids: Sequence[str]) -> str:
    return "[" + ", ".join(json.dumps(case, ensure_ascii=False) for case in ids) + "]"
