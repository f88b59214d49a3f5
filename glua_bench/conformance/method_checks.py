"""Checks of a method: contract, training, predictions, and resuming."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import MISSING, asdict, fields, is_dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from glua_bench.config import PRESETS, RunConfig, build_settings, preset_values
from glua_bench.conformance.bench import (
    BATCH,
    SIZE,
    STEPS,
    Bench,
    Killed,
    Stop,
    flatten_slices,
    quiet_machine,
)
from glua_bench.conformance.dataset_checks import check_card
from glua_bench.conformance.results import (
    METHOD_CHECKS,
    CheckFailure,
    copy_weights,
    demand,
    demand_finite,
    demand_other,
    demand_same,
    failing,
    register,
)
from glua_bench.console import Progress
from glua_bench.errors import ConfigError
from glua_bench.identity import identity
from glua_bench.method import Method, Role
from glua_bench.runs import execution
from glua_bench.runs.trainer import stage_order, to_channels_last

DOMAINS: tuple[Role, ...] = get_args(Role)
PRECISIONS = ("32-true", "bf16-mixed")  # those that every device supports
FLAT_STEPS = 20  # steps per stage on degenerate slices; enough for gradients to overflow

_FLAT_ADVICE = (
    "instance norm behind reflection padding multiplies gradients by 1/sqrt(eps) in every layer "
    "where a map is constant; use glua_bench.networks.instance_norm, which passes no gradient "
    "there, and keep denominators, logarithms and roots away from 0"
)


@register(METHOD_CHECKS)
def _card(bench: Bench) -> None:
    """`name`, `reference`, `needs` are string literals; the docstring states the source."""
    check_card(bench.method, Method)


@register(METHOD_CHECKS)
def _settings(bench: Bench) -> None:
    """Every setting has a description, a complete range (or choices), and a default within it."""
    cls = bench.method.Config
    demand(
        is_dataclass(cls) and cls.__dataclass_params__.frozen,  # type: ignore[attr-defined]
        "`Config` is not a frozen dataclass; decorate it with @dataclass(frozen=True)",
    )
    for spec in fields(cls):
        default, meta, what = spec.default, spec.metadata, f"the setting '{spec.name}'"
        demand(default is not MISSING, f"{what} has no default; set one")
        demand(
            bool(meta.get("help")),
            f"{what} has no description; declare it with glua_bench.config.setting",
        )
        low, high, choices = meta.get("low"), meta.get("high"), meta.get("choices")
        if isinstance(default, (bool, tuple)) or choices is not None:
            continue
        demand(not isinstance(default, str), f"{what} is a string without `choices`; list them")
        if isinstance(default, (int, float)):
            demand(
                low is not None and high is not None and low < high,
                f"{what} has no complete range; set `low` and `high` with low < high",
            )
            for end in (low, high):
                build_settings(cls, {spec.name: end}, "method")
    build_settings(cls, {}, "method")


@register(METHOD_CHECKS, "settings")
def _round_trip(bench: Bench) -> None:
    """Settings and run survive JSON and YAML, and the run keeps its id."""
    cls = bench.method.Config
    for values in ({}, bench.method.presets.get("quick", {}), bench.settings):
        built = build_settings(cls, dict(values), "method")
        again = build_settings(cls, json.loads(json.dumps(asdict(built))), "method")
        demand(
            again == built,
            f"settings change in JSON, from {built} to {again}; keep values as given in `Config`",
        )
    config = bench.config()
    for again in (RunConfig.from_dict(config.to_dict()), RunConfig.from_yaml(config.to_yaml())):
        demand(again.to_dict() == config.to_dict(), "the run's configuration changes in YAML")
        demand(identity(again, "", "") == identity(config, "", ""), "the run's id changes in YAML")


@register(METHOD_CHECKS, "settings")
def _presets(bench: Bench) -> None:
    """Every preset, and every variant with each preset, gives valid settings."""
    for preset in bench.method.presets:
        demand(
            preset in PRESETS, f"the preset '{preset}' is unknown; choose from {', '.join(PRESETS)}"
        )
    for preset in PRESETS:
        base = dict(preset_values(bench.method.presets, preset))
        for name, changes in {"": {}, **bench.method.variants()}.items():
            where = f"variant '{name}' with preset '{preset}'" if name else f"preset '{preset}'"
            with failing(f"{where} is invalid"):
                build_settings(bench.method.Config, {**base, **changes}, "method")


@register(METHOD_CHECKS, "settings")
def _stages(bench: Bench) -> None:
    """Names are unique, `depends_on` and `modules` exist, and each stage has optimizers."""
    method = bench.build()
    stages = tuple(method.stages())
    demand(bool(stages), "stages() is empty; return at least one stage")
    stage_order(stages)
    settings = {spec.name for spec in fields(bench.method.Config)}
    modules = {name for name, _ in method.named_modules(remove_duplicate=False)}
    for stage in stages:
        what = f"stage '{stage.name}'"
        for kind, names, known in (
            ("depends_on", stage.depends_on or (), settings),
            ("modules", stage.modules, modules),
        ):
            unknown = sorted(set(names) - known)
            demand(not unknown, f"`{kind}` of {what} names {unknown}, which do not exist")
        demand(
            stage.depends_on is None or bool(stage.modules),
            f"{what} is shared (depends_on) but has no `modules`; list those that it trains",
        )
        demand(stage.share > 0, f"{what} has share {stage.share}; set a positive one")
        optimizers = stage.trained_by(method)[1]()
        demand(
            isinstance(optimizers, dict)
            and bool(optimizers)
            and all(isinstance(o, Optimizer) for o in optimizers.values()),
            f"optimizers() of {what} must return a dictionary of optimizers",
        )


@register(METHOD_CHECKS, "stages")
def _optimizers(bench: Bench) -> None:
    """Every trainable weight is in one optimizer of some stage, and nothing else is."""
    method = bench.build()
    names = {id(p): name for name, p in method.named_parameters()}
    trained: set[int] = set()
    for stage in method.stages():
        owner: dict[int, str] = {}
        for key, optimizer in stage.trained_by(method)[1]().items():
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                name = names.get(id(parameter))
                demand(
                    name is not None,
                    f"optimizer '{key}' of stage '{stage.name}' updates a weight outside the "
                    "method, which no checkpoint saves; make its network an attribute",
                )
                demand(
                    id(parameter) not in owner,
                    f"'{name}' is in two optimizers of stage '{stage.name}', "
                    f"'{owner.get(id(parameter))}' and '{key}'; remove it from one",
                )
                owner[id(parameter)] = key
        trained |= owner.keys()
    for name, parameter in method.named_parameters():
        demand(
            id(parameter) in trained or not parameter.requires_grad,
            f"'{name}' is in no optimizer of any stage; add it to one, or call "
            "requires_grad_(False) if it is an average or fixed",
        )


@register(METHOD_CHECKS, "settings", "stages")
def _trains(bench: Bench) -> None:
    """All stages finish with finite losses and weights, and weights change."""
    for name, value in bench.baseline.weights.items():
        demand_finite(value, f"'{name}' is not finite after training")
    demand_other(
        bench.baseline.initial,
        bench.baseline.weights,
        "training changes no weight; call context.update with a loss in `step`",
    )


@register(METHOD_CHECKS, "trains")
def _flat_slices(bench: Bench) -> None:
    """Constant, empty and two-valued slices give finite losses, weights and predictions."""
    data, cache = bench.copy_of_data(), bench.fresh("cache")
    for domain in data.domains():
        flatten_slices(data.split(domain, "train"))
    for precision in PRECISIONS:
        # Augmentation would add borders and noise to the slices.
        options = {"precision": precision, "augmentation": "none"}
        where = f"on constant, empty and two-valued slices (precision {precision})"
        with failing(f"training fails {where}", _FLAT_ADVICE):
            training = bench.train(
                steps=FLAT_STEPS, dataset=data, cache=cache, options=options, even=True
            )
        for name, value in training.weights.items():
            demand_finite(value, f"{where} '{name}' is not finite after training ({_FLAT_ADVICE})")
        slices = training.built.train
        images = torch.from_numpy(slices.images(range(len(slices))))
        for domain in DOMAINS:
            with quiet_machine():
                logits = training.built.predict(images, domain)
            what = f"{where} predictions of the {domain} are not finite ({_FLAT_ADVICE})"
            demand_finite(logits, what)


@register(METHOD_CHECKS, "trains")
def _logs(bench: Bench) -> None:
    """A step returns scalar tensors, with the same names at every step of a stage."""
    problems = dict.fromkeys(bench.baseline.problems)
    demand(not problems, "; ".join(problems))


@register(METHOD_CHECKS, "trains")
def _budget(bench: Bench) -> None:
    """Stages run their steps, the last one the budget; no predicting weight is updated more."""
    stages = tuple(bench.build().stages())
    demand(
        stages[-1].share == 1.0,
        f"the last stage has share {stages[-1].share}; set 1.0, since all segmenters of a "
        "comparison get the same number of updates",
    )
    done = Counter(stage for stage, _ in bench.baseline.calls)
    for stage in stages:
        demand(
            done[stage.name] == stage.steps(STEPS),
            f"stage '{stage.name}' ran {done[stage.name]} steps instead of {stage.steps(STEPS)}",
        )
    updates = bench.baseline.updates
    predicting = _predicting_weights(bench.baseline.method, bench.images(1))
    for name in predicting:
        count = sum(updates[stage.name, name] for stage in stages)
        demand(
            count <= STEPS,
            f"'{name}', which predictions depend on, was updated {count} times on a budget of "
            f"{STEPS}; update it once per step of the last stage only",
        )
    # If an average of weights predicts, the weights that it follows are unknown, so none may have
    # more updates than the budget.
    for (stage_name, name), count in updates.items():
        demand(
            bool(predicting) or stage_name != stages[-1].name or count <= STEPS,
            f"'{name}' was updated {count} times on a budget of {STEPS}, and predictions come "
            "from weights that no optimizer updates, such as its average; update it once per step",
        )


def _predicting_weights(method: Method, images: Tensor) -> list[str]:
    """Return the names of trainable parameters that predictions depend on."""
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    with torch.enable_grad(), quiet_machine():
        outputs = [method.eval().predict(images, domain) for domain in DOMAINS]
        scalar = torch.stack([logits.float().square().sum() for logits in outputs]).sum()
        if not named or not scalar.requires_grad:
            return []
        gradients = torch.autograd.grad(scalar, [p for _, p in named], allow_unused=True)
    return [name for (name, _), g in zip(named, gradients, strict=True) if g is not None]


@torch.no_grad()
def _predict(method: Method, images: Tensor, domain: Role = "target") -> Tensor:
    with quiet_machine():
        return method.eval().predict(images, domain)


@register(METHOD_CHECKS, "trains")
def _logits(bench: Bench) -> None:
    """`predict` returns finite float logits (N, K, H, W) for both domains and any batch size."""
    for count, domain in itertools.product((BATCH, 1, 5), DOMAINS):
        _valid_logits(bench, bench.baseline.method, count, domain)


def _valid_logits(bench: Bench, method: Method, count: int, domain: Role = "target") -> Tensor:
    """Return the logits of random images; fail the check if they are invalid."""
    logits = _predict(method, bench.images(count), domain)
    wanted = (count, len(bench.dataset.structures) + 1, SIZE, SIZE)
    demand(
        isinstance(logits, Tensor), f"predict returned a {type(logits).__name__}; return a tensor"
    )
    demand(
        tuple(logits.shape) == wanted,
        f"predict returned shape {tuple(logits.shape)} for {count} images; return {wanted}",
    )
    demand(logits.is_floating_point(), f"predict returned {logits.dtype}; return a float type")
    demand_finite(logits, "predict returned values that are not finite")
    return logits


@register(METHOD_CHECKS, "trains")
def _predict_is_pure(bench: Bench) -> None:
    """In eval mode, predictions are deterministic and change no weight."""
    method, images = bench.baseline.method, bench.images(3)
    before = copy_weights(method.state_dict())
    for domain in DOMAINS:
        with quiet_machine():
            torch.manual_seed(1)
            first = _predict(method, images, domain)
            torch.manual_seed(2)
            second = _predict(method, images, domain)
        demand(
            torch.equal(first, second),
            "predict returned two results for the same images; draw no random numbers in it",
        )
    demand_same(before, method.state_dict(), "after predict, which must not change them")


@register(METHOD_CHECKS, "logits", "predict_is_pure")
def _features(bench: Bench) -> None:
    """`features` returns finite maps (N, D, h, w), independent for each image."""
    method, images = bench.baseline.method, bench.images(3)
    for domain in DOMAINS:
        with torch.no_grad(), quiet_machine():
            maps = method.eval().features(images, domain)
            alone = method.features(images[:1], domain)
        demand(
            isinstance(maps, Tensor) and maps.ndim == 4 and len(maps) == 3,
            f"features returned shape {tuple(getattr(maps, 'shape', ()))} for three images; "
            "return (3, D, h, w)",
        )
        demand_finite(maps, "features returned values that are not finite")
        demand(
            torch.allclose(maps[:1].float(), alone.float(), rtol=1e-3, atol=1e-4),
            "features of an image depend on other images of the batch; compute them per image",
        )


@register(METHOD_CHECKS, "trains")
def _pictures(bench: Bench) -> str | None:
    """`pictures` returns finite images with one slice, or as many as the method's input."""
    pictures = _valid_pictures(bench, bench.baseline.method)
    return None if pictures else "the method has no pictures"


def _valid_pictures(bench: Bench, method: Method) -> dict[str, Tensor]:
    """Return the pictures of a batch; fail the check if they are invalid."""
    with quiet_machine():
        pictures = method.eval().pictures(bench.batch())
    for name, picture in pictures.items():
        shape = tuple(picture.shape)
        demand(
            len(shape) == 4
            and shape[0] > 0
            and shape[2:] == (SIZE, SIZE)
            and shape[1] in (1, bench.inputs),
            f"the picture '{name}' has shape {shape}; return (N, 1, {SIZE}, {SIZE}) or "
            f"(N, {bench.inputs}, {SIZE}, {SIZE})",
        )
        demand_finite(picture, f"the picture '{name}' has values that are not finite")
    return pictures


@register(METHOD_CHECKS, "trains", "logits", "pictures")
def _slices(bench: Bench) -> str | None:
    """With three slices per image it trains, predicts and draws; the neighbours have an effect."""
    if bench.slices > 1:
        return "all checks use several slices"
    with closing(Bench(bench.method, bench.given, slices=3)) as stacked:
        with failing(
            "training or prediction fails with three slices per image",
            "build all networks that read or return images with task.inputs channels",
        ):
            method = stacked.train(steps=1).method
            logits = _valid_logits(stacked, method, 2)
            _valid_pictures(stacked, method)
        images = stacked.images(2)
        images[:, [0, 2]] *= -1
        demand(
            not torch.equal(logits, _predict(method, images)),
            "predictions do not depend on neighbouring slices; build the networks with task.inputs "
            "input channels",
        )
    return None


@register(METHOD_CHECKS, "trains", "logits", "pictures")
def _channels(bench: Bench) -> str | None:
    """With two input channels it trains, predicts and draws, or is refused before training."""
    if bench.channels > 1:
        return "all checks use several channels"
    with closing(Bench(bench.method, bench.given, channels=2)) as doubled:
        with failing(
            "training or prediction fails with two input channels",
            "build all networks that read or return images with task.inputs channels",
        ):
            try:
                method = doubled.train(steps=1).method
            except ConfigError as error:
                return f"the method does not support several input channels: {error}"
            logits = _valid_logits(doubled, method, 2)
            _valid_pictures(doubled, method)
        images = doubled.images(2)
        images[:, 1] *= -1
        demand(
            not torch.equal(logits, _predict(method, images)),
            "predictions do not depend on the second input channel; build the networks with "
            "task.inputs input channels, or refuse task.channels > 1 with ConfigError",
        )
    return None


@register(METHOD_CHECKS, "trains", "presets")
def _variants_train(bench: Bench) -> str | None:
    """Every declared variant trains for a step."""
    variants = bench.method.variants()
    cache = bench.cache()  # shared, so that a stage of several variants trains once
    for name, changes in variants.items():
        with failing(f"variant '{name}' does not train"):
            bench.train(changes, steps=1, cache=cache)
    return None if variants else "the method declares no variants"


@register(METHOD_CHECKS, "trains")
def _checkpoint(bench: Bench) -> None:
    """A new object with the loaded weights gives bit-identical predictions."""
    trained, images = bench.baseline.method, bench.images(3)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    other = bench.build(bench.config(seed=1))
    other.load_state_dict(torch.load(file, weights_only=True))
    to_channels_last(other)  # as the trainer does, since it affects rounding
    for domain in DOMAINS:
        demand(
            torch.equal(_predict(trained, images, domain), _predict(other, images, domain)),
            "predictions change after saving and loading the weights; keep everything that they "
            "depend on in parameters or buffers",
        )


@register(METHOD_CHECKS, "trains")
def _hidden_state(bench: Bench) -> None:
    """State kept between steps is in parameters, buffers and optimizers."""
    for stage, states in bench.baseline.hidden.items():
        # The state before the first step is not compared: that step may create constants.
        for before, after in itertools.pairwise(states):
            changed = [n for n in {**before, **after} if before.get(n) != after.get(n)]
            demand(
                not changed,
                f"{changed[:1]} changes between steps of stage '{stage}' and is in no checkpoint; "
                "keep it as a buffer (pools, counters, averages), or derive it from context.step",
            )


@register(METHOD_CHECKS, "trains")
def _same_seed(bench: Bench) -> None:
    """Equal seeds give bit-identical weights."""
    what = "after two trainings with the same seed (draw random numbers only from torch, which "
    what += "the harness seeds at every step)"
    demand_same(bench.baseline.weights, bench.train().weights, what)


@register(METHOD_CHECKS, "same_seed")
def _other_seed(bench: Bench) -> None:
    """Different seeds give different weights, before and after training."""
    other = bench.train(seed=1)
    trainable = [name for name, _ in bench.baseline.method.named_parameters()]
    for when, a, b in (
        ("before", bench.baseline.initial, other.initial),
        ("after", bench.baseline.weights, other.weights),
    ):
        demand_other(
            {name: a[name] for name in trainable},
            {name: b[name] for name in trainable},
            f"two seeds give the same weights {when} training; do not seed torch in the method",
        )


@register(METHOD_CHECKS, "same_seed")
def _resume(bench: Bench) -> None:
    """A training interrupted at many points, including stage boundaries, ends in equal weights."""
    stages = tuple(bench.build().stages())
    stops = []
    for index, stage in enumerate(stages):
        total = stage.steps(STEPS)
        # Step 0 of a later stage is the boundary. Stopping after the last step is between a
        # stage's last update and its end, so the update is repeated.
        steps = sorted({0 if index else 1, total // 2, total - 1})
        stops += [Stop(stage.name, step) for step in steps if step < total]
        stops.append(Stop(stage.name, total - 1, after=True))
    cache, root = bench.cache(), bench.fresh("runs")
    for stop in stops:
        try:
            bench.train(cache=cache, root=root, stop=stop)
        except Killed:
            continue
        raise CheckFailure(f"step {stop.step} of stage '{stop.stage}' was not reached")
    where = ", ".join(f"{stop.stage} {stop.step}" for stop in stops)
    what = f"after interruptions at {where} (keep everything that a step depends on in weights, "
    what += "buffers or optimizers, or derive it from context.step)"
    demand_same(bench.baseline.weights, bench.train(cache=cache, root=root).weights, what)


@register(METHOD_CHECKS, "same_seed")
def _shared_stages(bench: Bench) -> str | None:
    """A run that loads a finished stage from the cache ends as the run that trained it."""
    shared = [s.name for s in bench.build().stages() if s.depends_on is not None]
    if not shared:
        return "no stage is shared"
    again = bench.train(cache=bench.baseline.cache)
    demand(
        again.reused == set(shared),
        f"a second run reused the stages {sorted(again.reused)} instead of {sorted(shared)}",
    )
    what = f"after reusing {', '.join(shared)} (list all modules that a stage trains in `modules`)"
    demand_same(bench.baseline.weights, again.weights, what)
    return None


@register(METHOD_CHECKS, "shared_stages")
def _stage_dependencies(bench: Bench) -> str | None:
    """A shared stage depends only on settings listed in `depends_on`.

    A choice between stages that depend on different settings is not changed: the other stage has
    another name anyway.
    """
    stages = list(bench.build().stages())

    def chooses(name: str, value: Any) -> bool:
        others = bench.build(bench.config({name: value})).stages()
        return [s.depends_on for s in others] != [s.depends_on for s in stages]

    shared = [index for index, stage in enumerate(stages) if stage.depends_on is not None]
    if not shared:
        return "no stage is shared"
    named = {name for index in shared for name in stages[index].depends_on or ()}
    changes = {
        spec.name: _another(bench.settings[spec.name], spec.metadata)
        for spec in fields(bench.method.Config)
        if spec.name not in named and spec.name not in bench.given
    }
    choices = [s.name for s in fields(bench.method.Config) if s.metadata.get("choices")]
    for name in changes.keys() & choices:
        if chooses(name, changes[name]):
            del changes[name]
    following = stages[shared[-1] + 1 :]
    cache = bench.cache()
    with suppress(Killed):
        bench.train(changes, cache=cache, stop=Stop(following[0].name, 0) if following else None)
    for path in sorted((bench.baseline.cache / "stages").glob("*.pt")):
        other = cache / "stages" / path.name
        demand(other.is_file(), f"with other settings, {path.name} has another name")
        a, b = (torch.load(file, weights_only=True) for file in (path, other))
        for module in a:
            what = f"'{module}' of stage {path.stem.rsplit('-', 1)[0]} with other values of "
            what += f"{', '.join(changes)} (list those that it depends on in `depends_on`)"
            demand_same(a[module], b[module], what)
    return None


def _another(value: Any, meta: Mapping[str, Any]) -> Any:
    """Return another allowed value of a setting, near the given one."""
    if isinstance(value, bool):
        return not value
    if meta.get("choices") is not None:
        return next((choice for choice in meta["choices"] if choice != value), value)
    low, high = meta.get("low"), meta.get("high")
    if isinstance(value, int):
        return value + 1 if high is None or value + 1 <= high else max(low or 0, value - 1)
    if isinstance(value, float):
        more = value * 1.25 if value else 0.01
        return more if high is None or more <= high else value * 0.8
    return value


@register(METHOD_CHECKS, "trains", "logs", "logits")
def _whole_run(bench: Bench) -> None:
    """A run trains, selects, evaluates and finishes; repeating it does nothing."""
    with quiet_machine(bench.fresh("cache")):
        planned = bench.plan(scored=True)
        execution.execute(planned, Progress(enabled=False), apart=False)
        rows = planned.directory.read_cases()
        again = execution.execute(planned, Progress(enabled=False))
    tests = bench.dataset.split(planned.config.target, "test")
    # A selector without any score is left out; the first one always has scores.
    wanted = len(tests) * len(bench.dataset.structures)
    for selector in {planned.config.selectors[0], *rows["selector"]}:
        found = int((rows["selector"] == selector).sum())
        demand(found == wanted, f"the run has {found} rows of '{selector}' instead of {wanted}")
    demand(again.already_done, "repeating a finished run trained it again")
