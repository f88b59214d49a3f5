"""Splits of a drafted description: who is tested on, and which directions have enough cases."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from glua_bench.datasets.folder.sources import DraftDomain
from glua_bench.errors import ConfigError, DataError
from glua_bench.task import Ask

_SHARES = {"test": 0.2, "val": 0.1}
_SEED = 0  # for drawing test and validation cases


def ask_shared(found: Sequence[DraftDomain], ask: Ask) -> bool:
    """Ask whether an id means the same person in all domains."""
    common = set.intersection(*(set(domain.images) for domain in found))
    if not common:
        return False
    names = " and ".join(domain.name for domain in found)
    question = f"Is {min(common)} the same person in {names}? (yes: one split per person)"
    return ask(question, "yes", partial(one_of, among=("yes", "no"))) == "yes"


def draw_splits(found: Sequence[DraftDomain], shared: bool) -> dict[str, dict[str, list[str]]]:
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


def _draw(group: Sequence[DraftDomain]) -> dict[str, str]:
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


def served_directions(
    found: Sequence[DraftDomain], splits: dict[str, dict[str, list[str]]]
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


def one_of(answer: str, among: Sequence[str]) -> str:
    """Return the word that the answer abbreviates."""
    found = [word for word in among if word.startswith(answer.strip().lower())]
    if len(found) != 1 or not answer.strip():
        raise ConfigError(f"'{answer}' is not valid; answer {' or '.join(among)}.")
    return found[0]
