"""Search for the scans of BTCV and CHAOS below a directory, under their original names.

BTCV: `img0001.nii.gz` with `label0001.nii.gz` (in the release `RawData/Training/img` and `label`).
CHAOS: `MR/1/T2SPIR/DICOM_anon` with `MR/1/T2SPIR/Ground`; NIfTI copies: `image_1.nii.gz` with
`label_1.nii.gz`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from glua_bench.errors import DataError
from glua_bench.paths import walk

_FILES = {
    "ct": re.compile(r"(img|label)(\d{4})\.nii(?:\.gz)?"),
    "mr": re.compile(r"(image|label)_(\d+)\.nii(?:\.gz)?"),
}
_PAIR = {
    "ct": "img{0:04d}.nii.gz with label{0:04d}.nii.gz",
    "mr": "image_{0}.nii.gz with label_{0}.nii.gz",
}
_OBTAIN = {
    "ct": (
        "BTCV's img0001.nii.gz with label0001.nii.gz to img0040.nii.gz with label0040.nii.gz are "
        "in Abdomen/RawData.zip at https://www.synapse.org/Synapse:syn3193805, after registering, "
        "joining the challenge and accepting its terms"
    ),
    "mr": (
        "CHAOS's MR/1/T2SPIR to MR/39/T2SPIR, each with DICOM_anon and Ground, are in "
        "CHAOS_Train_Sets.zip at https://doi.org/10.5281/zenodo.3431873, after accepting its "
        "licence (CC BY-NC-SA 4.0) and the challenge's terms; NIfTI copies are named "
        "image_1.nii.gz with label_1.nii.gz to image_39.nii.gz with label_39.nii.gz"
    ),
}


@dataclass(frozen=True)
class Scans:
    """Scans found below a directory.

    Attributes:
        root: the directory.
        volumes: domain → id → image and label, complete pairs.
        series: id → folder T2SPIR of an MR scan.
        expected: domain → all ids.
    """

    root: Path
    volumes: Mapping[str, Mapping[int, tuple[Path, Path]]]
    series: Mapping[int, Path]
    expected: Mapping[str, Collection[int]]

    def of(self, domain: str) -> Mapping[int, Path | tuple[Path, Path]]:
        """Return the scans of a domain; MR as series or, if there are none, as volumes."""
        return (self.series if domain == "mr" else {}) or self.volumes[domain]

    def demand(self, domain: str) -> None:
        """Raise if a scan of a domain is missing.

        Raises:
            DataError: a scan is missing; the message says which and where to obtain it.
        """
        missing = [number for number in self.expected[domain] if number not in self.of(domain)]
        if not missing:
            return
        pair = domain == "ct" or self.volumes["mr"] and not self.series
        first = (_PAIR[domain] if pair else "MR/{0}/T2SPIR").format(missing[0])
        absent = [other for other in self.expected if not self.of(other)]
        raise DataError(
            f"{self.root} lacks {len(missing)} of {len(self.expected[domain])} {domain.upper()} "
            f"scans, first {first}: pass the directory that holds both data sets, at any depth "
            "and under their original names, with --data-root "
            f"({'; '.join(_OBTAIN[d] for d in dict.fromkeys([domain, *absent]))})."
        )


def find_scans(root: Path, expected: Mapping[str, Collection[int]]) -> Scans:
    """Search a directory recursively, following links.

    Args:
        root: the directory; it may be missing.
        expected: "ct" and "mr" → the ids to look for; others are skipped.

    Raises:
        DataError: a scan is found twice.
    """
    files: dict[tuple[str, str, int], Path] = {}
    for path in (folder / name for folder, names in walk(root) for name in ("", *names)):
        if path.name == "DICOM_anon":
            scan = path.parent.parent.name
            if path.parent.name != "T2SPIR" or not scan.isdecimal():
                continue
            path, key = path.parent, ("mr", "series", int(scan))
        else:
            matches = {domain: form.fullmatch(path.name) for domain, form in _FILES.items()}
            found = [(domain, match) for domain, match in matches.items() if match]
            if not found:
                continue
            ((domain, match),) = found
            key = domain, "label" if match[1] == "label" else "image", int(match[2])
        if key[2] in expected[key[0]] and files.setdefault(key, path) != path:
            raise DataError(f"{path} and {files[key]} are the same scan: remove one of them.")
    return Scans(
        root=root,
        volumes={
            domain: {
                number: (files[domain, "image", number], files[domain, "label", number])
                for number in ids
                if (domain, "image", number) in files and (domain, "label", number) in files
            }
            for domain, ids in expected.items()
        },
        series={
            number: files["mr", "series", number]
            for number in expected["mr"]
            if ("mr", "series", number) in files
        },
        expected=expected,
    )
