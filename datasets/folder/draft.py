"""Draft of a dataset description from files on disk and the user's answers.

Every guess is the proposed answer to a question, so the user sees it before it is used.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
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
from glua_bench.console import say
from glua_bench.datasets.folder.description import PLANES
from glua_bench.datasets.folder.guess import Look, inside, look
from glua_bench.datasets.folder.label_sets import (
    SHORT,
    LabelSet,
    Values,
    explained,
    known_sets,
    proposed_set,
)
from glua_bench.datasets.folder.planes import (
    arrays_agree,
    body,
    contradiction,
    guess_plane,
    spreads,
    stored_axes,
    usual,
)
from glua_bench.datasets.folder.sources import DraftDomain, domains_of
from glua_bench.datasets.folder.splitting import (
    ask_shared,
    draw_splits,
    one_of,
    served_directions,
)
from glua_bench.errors import ConfigError, DataError
from glua_bench.inspection.findings import enumerate_names
from glua_bench.inspection.measurements import INSIDE, outside_window
from glua_bench.inspection.windows import CLIPPED, clipping, common_levels, outward
from glua_bench.task import Ask

SOFT_TISSUE = -125.0, 275.0  # HU; the common window for abdominal CT
_NOT_ALL = "\n# The other directions have too few labelled cases for training and testing."
_STAMP = (
    "\n# Remove this line if you replace the proposed window.\n"
    "protocol: window of {} derived from the labels of its training cases, also as the target\n"
)
_MARGIN = 100.0, 0.1  # of proposed windows: HU, and fraction of the structures' range


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
    found = domains_of(data, domains, ask)
    looks = {domain.name: look(domain.images, domain.labels) for domain in found}
    titles, values, unannotated = _classes(found, looks, ask, structures, data)
    stored = {domain.name for domain in found if _stored(domain.name, looks[domain.name], ask)}
    bodies = {name: body(own.headers, own.anatomies, name in stored) for name, own in looks.items()}
    guess, reason = guess_plane(bodies)
    question = f"Plane of the slices: axial, coronal or sagittal ({reason})"
    plane = ask(question, guess, partial(one_of, among=tuple(PLANES)))
    axis = PLANES[plane].slice_axis
    across = max(max(np.delete(own.extent, axis)) for own in bodies.values())
    side = ask("Side of the square window in mm", f"{math.ceil(across / 10) * 10}", _length)
    thick = max(own.spacing[axis] for own in bodies.values())
    between = ask("Distance between slices in mm, for all domains", f"{thick:.3g}", _length)
    shared = ask_shared(found, ask)
    splits = draw_splits(found, shared)
    pairs, served = served_directions(found, splits)
    if not served:
        raise DataError(
            f"The {sum(len(d.labels) for d in found)} labels in {data} are too few for any "
            "direction: a source needs a labelled training case, and a target a labelled test "
            "case and another image for training; label more cases."
        )
    targets = {direction.split("-")[1] for direction in served}
    stamps = []
    blocks = []
    for domain in found:
        own = values[domain.name]
        used = {v for numbers in own.values() for v in numbers} | {*domain.unannotated}
        rest = sorted(set(looks[domain.name].values) - used - {*unannotated[domain.name]})
        lines = {**domain.place, "values": _mapping(own)}
        if unannotated[domain.name]:
            lines["unannotated"] = (
                f"{[*unannotated[domain.name]]}   # excluded from loss and scores"
            )
        if rest:
            lines["background"] = f"{rest}   # label values that count as background"
        if domain.name in stored:
            lines["stored"] = _stored_lines(looks[domain.name], plane)
        held_out = {case for ids in splits[domain.name].values() for case in ids}
        training = {c: p for c, p in domain.labels.items() if c not in held_out}
        named = {f"{key} ({titles[key]})": numbers for key, numbers in own.items()}
        window, derived = _intensity(domain, training, named, looks[domain.name].hounsfield, ask)
        if window is not None:
            lines["window"] = f"[{window[0]:g}, {window[1]:g}]"
        if derived and domain.name in targets:
            stamps.append(domain.name)
        lines |= {split: _listing(ids) for split, ids in splits[domain.name].items()}
        block = [f"  {domain.name}:", *(f"    {key}: {text}" for key, text in lines.items())]
        blocks.append("\n".join(block))
    both = " and ".join(domain.name for domain in found)
    listed = ", ".join(titles.values())
    template = files("glua_bench") / "templates" / "dataset.yaml.txt"
    return Template(template.read_text(encoding="utf-8")).substitute(
        name=name,
        title=json.dumps(f"{listed[0].upper()}{listed[1:]} in {both}", ensure_ascii=False),
        root=json.dumps(os.path.abspath(data), ensure_ascii=False),
        plane=plane,
        window=f"{side:g}",
        between=f"{between:g}",
        same="true" if shared else "false",
        classes="\n".join(
            f"  {key}: {{title: {json.dumps(title)}}}" for key, title in titles.items()
        ),
        domains="\n".join(blocks),
        protocol=_STAMP.format(" and ".join(stamps)) if stamps else "",
        directions="" if served == pairs else f"{_NOT_ALL}\ndirections: {_listing(served)}\n",
    )


# -- contents -------------------------------------------------------------------------------------


def _classes(
    found: Sequence[DraftDomain], looks: dict[str, Look], ask: Ask, given: Values | None, data: Path
) -> tuple[dict[str, str], dict[str, Values], dict[str, tuple[int, ...]]]:
    """Return short name → title; per domain, raw values by short name and unannotated values."""
    answers: dict[str, Values] = {}
    titles: list[str] = []
    public = {domain.name: _public(domain, looks[domain.name], data) for domain in found}
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
        guess = _named(domain, found, values, answers, public)
        text = written_structures(guess)
        question = (
            f"{domain.name}: labels hold {', '.join(map(str, values))}"
            f"{_source(values, public[domain.name], guess)}; structures to segment as "
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
    usual_names = {**short, **{title: SHORT[title] for title in titles if title in SHORT}}
    if len(set(usual_names.values())) == len(titles):
        short = usual_names
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
    domain: DraftDomain,
    found: Sequence[DraftDomain],
    values: Sequence[int],
    answers: Mapping[str, Values],
    public: Mapping[str, LabelSet | None],
) -> Values:
    """Guess names for the label values of a domain; {} if there is no basis for a guess."""
    before = next((answer for answer in answers.values() if answer), None)
    if domain.named:
        common = set.intersection(*(set(d.named) for d in found if d.named))
        wanted = before or common or domain.named
        return {title: value for title, value in domain.named.items() if title in wanted}
    known = public[domain.name]
    own = {} if known is None else explained(known, values)
    if before is None and known is not None:
        others = [o for o in found if o.labels and o is not domain]
        common = set(own)
        for other in others:
            set_of = public[other.name]
            common &= set(set_of.values) if set_of is not None else common
        return {title: v for title, v in own.items() if title in common} or own
    if before is None:
        return {f"label_{value}": (value,) for value in values}
    if known is not None and set(_titles(before)) <= set(own):
        return {title: own[title] for title in _titles(before)}
    # The values differ from the previous domain's, so only the user can name them.
    if not {v for title in _titles(before) for v in before[title]} <= set(values):
        return {}
    return {title: own for title, own in before.items() if set(own) <= set(values)}


def _public(domain: DraftDomain, own: Look, data: Path) -> LabelSet | None:
    """Return the public dataset that the label values of a domain are those of, if one is."""
    place = data.absolute().parent
    paths = [os.path.relpath(p, place) for p in (*domain.images.values(), *domain.labels.values())]
    return proposed_set(own.values, paths) if domain.labels else None


def _source(values: Sequence[int], known: LabelSet | None, guess: Values) -> str:
    """Describe which public datasets have these label values."""
    if known is not None and set(guess) <= set(known.values):
        return f" (as in {known.name})"
    whole = [one for one in known_sets(values) if len(explained(one, values)) == len(one.values)]
    names = list(dict.fromkeys(one.name for one in whole))
    if names and guess and all(title.startswith("label_") for title in guess):
        return f" (as in {enumerate_names(names)}, and in other datasets with other meanings)"
    return ""


def _intensity(
    domain: DraftDomain,
    training: Mapping[str, Path],
    structures: Values,
    hounsfield: bool,
    ask: Ask,
) -> tuple[tuple[float, float] | None, bool]:
    """Ask for the intensity window, and warn if it clips a structure.

    The common window for soft tissue is proposed for CT unless it clips a structure of the training
    cases; then the range of their intensities is, with a margin.

    Args:
        domain: the domain.
        training: label files of its training cases.
        structures: displayed name → raw label values.
        hounsfield: whether images look like CT.
        ask: asks the user a question.

    Returns:
        The window, or None; and True if it is the one that was derived from labels.
    """
    samples = inside(domain.images, training, structures) if hounsfield else {}
    levels = common_levels(samples)
    derived, basis = None, ""
    if levels is not None:
        low, high = levels
        basis = f"; structures of the training cases lie between {low:.0f} and {high:.0f}"
        sampled = [own for own in samples.values() if own.size]
        if any(outside_window(own, SOFT_TISSUE) > CLIPPED for own in sampled):
            margin = max(_MARGIN[0], _MARGIN[1] * (high - low))
            derived = outward(low - margin, high + margin)
    guess = _ends(derived or SOFT_TISSUE) if hounsfield else "no"
    question = f"{domain.name}: window of intensities as 'low high' (HU for CT{basis}), or no"
    window = ask(question, guess, _window)
    if window is None:
        return None, False
    for title, own in (samples or inside(domain.images, training, structures)).items():
        share = outside_window(own, window) if own.size else 0.0
        if share > CLIPPED:
            ends = np.percentile(own, INSIDE).tolist()
            say(f"Warning: {clipping(domain.name, title, share, window, (ends[0], ends[1]))}")
    return window, window == derived


def _stored(name: str, own: Look, ask: Ask) -> bool:
    """Ask whether arrays are used as stored, if the headers of a domain contradict each other."""
    why, common = contradiction(own.headers), usual(own.headers)
    if not why or common is None or stored_axes(common, "axial") is None:
        return False
    found = spreads(own.headers, own.anatomies)
    evidence = ""
    if found is not None:
        evidence = (
            f" (a structure's place varies by {found[0]:.0%} of the volume in the arrays, and by "
            f"{found[1]:.0%} by the headers)"
        )
    question = (
        f"{name}: {why}; use the arrays as stored? no: each array is turned upright by its own "
        "header; yes: headers' orientations are ignored, which is right if all arrays show the "
        f"body in the same orientation{evidence}"
    )
    guess = "yes" if arrays_agree(found) else "no"
    return ask(question, guess, partial(one_of, among=("yes", "no"))) == "yes"


def _stored_lines(own: Look, plane: str) -> str:
    """Return the entry `stored` of a domain, by its most frequent orientation."""
    common = usual(own.headers)
    axes = None if common is None else stored_axes(common, plane)
    assert axes is not None  # as checked by `_stored`
    slices, rows, flip = axes
    return f"{{slices: {slices}, rows: {rows}, flip: {flip}}}   # headers' orientations are ignored"


# -- answers --------------------------------------------------------------------------------------


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


def _ends(window: tuple[float, float]) -> str:
    """Return a window as it is answered."""
    return f"{window[0]:g} {window[1]:g}"


def _window(answer: str) -> tuple[float, float] | None:
    if answer.strip().lower() in ("no", "n", ""):
        return None
    try:
        low, high = map(float, re.split(r"[\s,]+", answer.strip(" []")))
    except ValueError:
        low = high = math.nan
    if not low < high:
        raise ConfigError(
            f"'{answer}' is not a window; enter two increasing numbers, such as "
            f"{_ends(SOFT_TISSUE)}, or no."
        )
    return low, high


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
