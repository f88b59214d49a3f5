"""Discs: a generated dataset."""

import nibabel as nib
import numpy as np

from glua_bench.task import Case, Dataset, Grid, Reading, Structure

SPLITS = ("train", "train", "val", "test")


class Discs(Dataset):
    """Bright and dark discs on gray, four volumes of each."""

    name = "discs"
    reference = "generated"
    needs = "a directory to write to"
    structures = (Structure("DISC", "disc", (1,), "#0072b2"),)
    directions = ("bright-dark", "dark-bright")
    reading = Reading()
    grids = {preset: Grid(32, 1.0) for preset in ("quick", "standard", "paper")}
    publishable = True

    def prepare(self, report=lambda line: None):
        """Write what is missing."""
        for domain in self.domains():
            for number, case in enumerate(self.cases(domain)):
                if case.image.is_file() and case.label.is_file():
                    continue
                rng = np.random.default_rng([number, domain == "dark"])
                x, y, z = np.indices((32, 32, 4))
                disc = np.hypot(x - rng.uniform(12, 20), y - rng.uniform(12, 20)) < 7 + z
                image = 0.5 + (0.4 if domain == "bright" else -0.4) * disc
                image = image + rng.normal(0, 0.02, disc.shape)
                case.image.parent.mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(disc.astype(np.int16), np.eye(4)), case.label)
                nib.save(nib.Nifti1Image(image.astype(np.float32), np.eye(4)), case.image)
                report(f"wrote {case.id}")

    def cases(self, domain):
        """Two for training, one for validation, one for the test."""
        return tuple(
            Case(
                id=f"{domain}_{number}",
                domain=domain,
                image=self.root / f"{domain}_{number}.nii.gz",
                label=self.root / f"{domain}_{number}_label.nii.gz",
                split=split,
                subject=f"{domain} {number}",
            )
            for number, split in enumerate(SPLITS)
        )
