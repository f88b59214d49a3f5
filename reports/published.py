"""Published results, shown in a separate block for context.

They come from other splits, crops and units (see docs/protocol.md), so they are never mixed with
the harness's own results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glua_bench.reports.tables import Column, Table


@dataclass(frozen=True)
class Published:
    """One row of a published table.

    Attributes:
        name: the method as published.
        mean: Dice in percent.
        parts: Dice of the structures in percent, in the order of the task's `structures`; ().
        assd: in the unit of the source, not always mm; nan if not given.
        secondary: True if taken from a secondary summary.
    """

    name: str
    mean: float
    parts: Sequence[float] = ()
    assd: float = math.nan
    secondary: bool = False


@dataclass(frozen=True)
class Block:
    """The published results of one task.

    Attributes:
        task: description of the task.
        structures: the structures of `Published.parts`.
        lines: the results.
        source: source of the numbers.
    """

    task: str
    structures: Sequence[str]
    lines: Sequence[Published]
    source: str


_HEART = ("AA", "LAC", "LVC", "MYO")
_GENERIC_SSL = "the table of GenericSSL (NeurIPS 2023), unless marked"

# (dataset, direction) → published results for the same organs and modalities.
BLOCKS: Mapping[tuple[str, str], Block] = {
    ("mmwhs", "mr-ct"): Block(
        "cardiac MR→CT",
        _HEART,
        (
            Published("no adaptation", 17.2, secondary=True),
            Published("CycleGAN", 57.6, (73.8, 75.7, 52.3, 28.7), 10.8),
            Published("SynSeg-Net", 58.2, secondary=True),
            Published("AdaOutput", 59.9, (65.2, 76.6, 54.4, 43.6), 9.6),
            Published("PnP-AdaNet", 63.9, (74.0, 68.9, 61.9, 50.8), 12.8),
            Published("CyCADA", 64.4, (72.9, 77.0, 62.4, 45.3), 9.4),
            Published("SIFA v1", 73.0, secondary=True),
            Published("SIFA v2", 74.1, (81.3, 79.5, 73.8, 61.6), 7.0),
            Published("DSFN", 75.8, (84.7, 76.9, 79.1, 62.4)),
            Published("DSAN", 78.5, (79.9, 84.8, 82.8, 66.5), 5.9),
            Published("LMISA-3D", 81.5, (), 2.3),
            Published("GenericSSL (3D)", 90.1, (), 1.7),
            Published("supervised", 90.9, (92.7, 91.1, 91.9, 87.8), 2.2),
        ),
        _GENERIC_SSL,
    ),
    ("mmwhs", "ct-mr"): Block(
        "cardiac CT→MR",
        _HEART,
        (
            Published("no adaptation", 15.7, secondary=True),
            Published("CycleGAN", 50.7, (), 6.6),
            Published("AdaOutput", 51.9, (60.8, 39.8, 71.5, 35.5), 5.7),
            Published("CyCADA", 57.5, (), 7.9),
            Published("SIFA v2", 63.4, (65.3, 62.3, 78.9, 47.3), 5.7),
            Published("DSAN", 66.5, (71.3, 66.2, 76.2, 52.1), 5.4),
            Published("LMISA-3D", 70.8, (), 3.6),
            Published("MAPSeg", 80.3, secondary=True),
            Published("supervised", 83.6, (), 2.9),
        ),
        _GENERIC_SSL,
    ),
    ("abdomen", "mr-ct"): Block(
        "abdominal MR→CT",
        (),
        (
            Published("no adaptation", 58.2, secondary=True),
            Published("AdaOutput", 81.6, secondary=True),
            Published("SLAug (no target data)", 83.05),
            Published("SIFA v2", 83.7, secondary=True),
            Published("supervised", 88.7, secondary=True),
        ),
        "secondary summaries; SLAug's own paper (AAAI 2023)",
    ),
    ("abdomen", "ct-mr"): Block(
        "abdominal CT→MR",
        (),
        (
            Published("no adaptation", 57.7, secondary=True),
            Published("AdaOutput", 83.5, secondary=True),
            Published("SIFA v2", 85.4, secondary=True),
            Published("supervised", 87.3, secondary=True),
            Published("SLAug (no target data)", 88.63),
        ),
        "secondary summaries; SLAug's own paper (AAAI 2023)",
    ),
}

NOT_COMPARABLE = (
    "As published, on other splits, crops and units: context, not a comparison. No published table "
    "of GLUA is known; `glua` is a re-implementation."
)


def context(dataset: str, direction: str) -> Table | None:
    """Build the table of published results of a task; None if there are none."""
    block = BLOCKS.get((dataset, direction))
    if block is None:
        return None
    lines, columns = block.lines, []
    for i, name in enumerate(block.structures):
        parts = [line.parts[i] if line.parts else math.nan for line in lines]
        columns.append(Column(name, parts, group="Dice (%)"))
    columns.append(Column("mean", [line.mean for line in lines], group="Dice (%)"))
    if not all(math.isnan(line.assd) for line in lines):
        columns.append(Column("mean", [line.assd for line in lines], group="ASD (as published)"))
    columns.append(
        Column("source", ["secondary" if line.secondary else "primary" for line in lines])
    )
    return Table(
        f"published_{dataset}_{direction}",
        f"Published results for {block.task} (from {block.source}).",
        [line.name for line in lines],
        columns,
        notes=[NOT_COMPARABLE],
        first="published method",
    )
