"""Export a run's model for use without the run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import torch
from torch import Tensor

from glua_bench import __version__
from glua_bench.config import ORACLE
from glua_bench.data.neighbours import Neighbourhood
from glua_bench.errors import PluginError, UserError
from glua_bench.files import new_folder, sha256, write_bytes, write_checked_json, write_text
from glua_bench.method import Method, Role
from glua_bench.paths import entries
from glua_bench.records.run_directory import RunDirectory
from glua_bench.runs.plan import build_method
from glua_bench.runs.prediction import (
    CARD,
    CONFIG,
    LICENSE,
    ROLES,
    WEIGHTS,
    Model,
    answer_of,
    ready,
    seeded,
)
from glua_bench.scoring.metrics import METRICS

CARD_TEXT = """\
# {config.method}, trained on {config.fold_name} {config.direction}

Segments slices of {structures} in images of the domains of {config.dataset}. Written by \
glua-bench {version}; `glua-bench predict --model DIRECTORY IMAGE...` uses it. Images are read as \
{config.target}, or with `--domain {config.source}` as {config.source}. For research, not for \
diagnosis.

## Method

{method}

## Protocol

- Scenario: {config.scenario}; {labels}
- Checkpoint: step {step} of {config.steps}, selected by `{selector}`{note}.
- Working grid: {grid}; batch {config.batch_size}; augmentation {config.augmentation}; seed \
{config.seed}; run {run}.
- Input slices: {slices}.{channels}
- All settings are in config.json.

## Scores on the target's test cases

3-D, per case, on the original grids of the files, averaged over cases; missed structures are \
included. One seed, no confidence interval.

{table}

## Licence

The code is under the Apache License 2.0 (LICENSE). Whether these weights may be redistributed is \
for the owners of the training data to decide.
"""


def export(model: Model, run: RunDirectory, folder: Path, selector: str = "last") -> Path:
    """Write a directory for `from_directory`, to use the model without the run.

    It contains only the networks that take part in predictions, including the translation of source
    images: no discriminators, and no pools of training images. Its facts about the data are label
    values, readings, and median intensities over training images, but no names of files or cases.

    Args:
        model: from `from_run`.
        run: the run, for its scores.
        folder: a new or empty directory.
        selector: selector that chose the model's checkpoint.

    Raises:
        UserError: the directory is not empty.
        PluginError: predictions depend on modules that the method does not call.
        RunFailure: the disk is full or the directory cannot be written.
    """
    from safetensors.torch import save

    if folder.exists() and (not folder.is_dir() or entries(folder)):
        raise UserError(f"{folder} is not an empty directory; use another --out.")
    weights = predicting_weights(model)
    described = {
        "version": __version__,
        "run": model.config.to_dict(),
        **model.data.to_dict(),
        "weights": sorted(weights),
    }
    licence = next(f for f in distribution("glua-bench").files or () if f.name == "LICENSE")
    with new_folder(folder, "--out") as unfinished:
        write_bytes(unfinished / WEIGHTS, save(weights))
        files = {WEIGHTS: sha256(unfinished / WEIGHTS)}
        write_checked_json(unfinished / CONFIG, {**described, "files": files})
        write_text(unfinished / CARD, card(model, run, selector))
        write_text(unfinished / LICENSE, licence.read_text(encoding="utf-8"))
    return folder


def predicting_weights(model: Model) -> dict[str, Tensor]:
    """Return the state of the modules that take part in predictions of either domain.

    Raises:
        PluginError: predictions depend on further modules.
    """
    return {name: w for role in ROLES for name, w in _weights_of(model, role).items()}


def _weights_of(model: Model, role: Role) -> dict[str, Tensor]:
    method = model.method
    called: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.add(name))
        for name, module in method.named_modules()
    ]
    inputs, size = model.channels * model.config.slices, model.config.grid.size
    shape = (2, inputs, size, size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = images.to(model.device)
    try:
        expected = _seeded_answer(method, images, role)
    finally:
        for hook in hooks:
            hook.remove()
    # A module may call its submodules and read its own tensors without being called itself, as a
    # style bank does. Its tensors are kept only if necessary, because they may be anything.
    parents = {
        ".".join(name.split(".")[:depth])
        for name in called
        for depth in range(1, name.count(".") + 1)
    }
    own = {name for name, _ in method.named_parameters(recurse=False)}  # read by the method itself
    for modules in (called, called | parents):
        kept = {
            name: tensor.detach().cpu().contiguous().clone()
            for name, tensor in method.state_dict().items()
            if name.rpartition(".")[0] in modules or name in own
        }
        if torch.equal(expected, _seeded_answer(_fresh(model, kept), images, role)):
            return kept
    raise PluginError(
        f"Method '{model.config.method}' cannot be exported, because its predictions of the {role} "
        "depend on weights of modules that it does not call; call its networks as modules."
    )


@torch.no_grad()
def _seeded_answer(method: Method, images: Tensor, role: Role) -> Tensor:
    """Return logits, with the same random numbers at every call."""
    with seeded(images.device, 0):
        return answer_of(method, images, role)


def _fresh(model: Model, weights: Mapping[str, Tensor]) -> Method:
    """Build another method of the same class, with another seed and the given weights."""
    config = replace(model.config, seed=model.config.seed + 1)
    method = build_method(config, model.structures, type(model.method), model.channels)
    method.load_state_dict(weights, strict=False)
    return ready(method, model.device)


def _channels_line(model: Model) -> str:
    """Return the card's line about input channels; "" for a single one."""
    config, known = model.config, model.data.domains
    if model.channels == 1:
        return ""
    names = {
        name: ", ".join(channel.name for channel in known[name].reading.channels)
        for name in (config.target, config.source)
    }
    listed = "; ".join(f"{own} of {name}" for name, own in names.items())
    return f"\n- Input channels, in this order: {listed}."


def card(model: Model, run: RunDirectory, selector: str) -> str:
    """Return the model card in Markdown: protocol, settings and scores."""
    config, grid, summary = model.config, model.config.grid, run.read_summary()
    labels = "no target label was used in training."
    if config.privileged:
        labels = "**privileged: trained on target labels.**"
    note = ", **which read target labels**" if selector == ORACLE else ""
    table = [
        ["structure", *(metric.label for metric in METRICS.values()), "missed", "cases"],
        ["---"] * (len(METRICS) + 3),
        *(
            [
                row["structure"],
                *(metric.text(row.get(name)) for name, metric in METRICS.items()),
                row["misses"],
                row["cases"],
            ]
            for row in summary["scores"]
            if row["selector"] == selector
        ),
    ]
    return CARD_TEXT.format(
        config=config,
        structures=", ".join(f"{s.title} ({s.name})" for s in model.structures),
        version=__version__,
        method=inspect.cleandoc(type(model.method).__doc__ or ""),
        labels=labels,
        step=summary["chosen_steps"][selector],
        selector=selector,
        note=note,
        grid=f"{grid.size} × {grid.size} pixels of {grid.spacing:.3g} mm",
        run=run.id,
        slices=Neighbourhood.of(config),
        channels=_channels_line(model),
        table="\n".join(f"| {' | '.join(map(str, cells))} |" for cells in table),
    )
