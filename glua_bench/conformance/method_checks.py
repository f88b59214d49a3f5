"""The checks of a method: contract, training, predictions, resuming."""

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

from glua_bench.config import PRESETS, RunConfig, build_settings, identity
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
    explained,
    register,
)
from glua_bench.console import Progress
from glua_bench.errors import ConfigError
from glua_bench.method import Method, Role, Stage
from glua_bench.runs import execution
from glua_bench.runs.trainer import stage_order, to_channels_last

DOMAINS: tuple[Role, ...] = get_args(Role)

PRECISIONS = ("32-true", "bf16-mixed")  # in which every device can train

FLAT_STEPS = 20  # of each stage on slices without a picture: enough for gradients to run away


@torch.no_grad()
def _predict(method: Method, images: Tensor, domain: Role = "target") -> Tensor:
    with quiet_machine():
        return method.eval().predict(images, domain)


@register(METHOD_CHECKS)
def _card(bench: Bench) -> None:
    """Name, reference, needs and a docstring with its source, readable without an import."""
    return check_card(bench.method, Method)


@register(METHOD_CHECKS)
def _settings(bench: Bench) -> None:
    """Every setting has a meaning, a range or choices, and a default inside them."""
    cls = bench.method.Config
    demand(
        is_dataclass(cls) and cls.__dataclass_params__.frozen,  # type: ignore[attr-defined]
        "`Config` must be a frozen dataclass",
    )
    for spec in fields(cls):
        default, meta = spec.default, spec.metadata
        demand(default is not MISSING, f"the setting '{spec.name}' has no default")
        demand(
            bool(meta.get("help")),
            f"the setting '{spec.name}' has no help; declare it with glua_bench.config.setting",
        )
        low, high, choices = meta.get("low"), meta.get("high"), meta.get("choices")
        if isinstance(default, (bool, tuple)) or choices is not None:
            continue
        if isinstance(default, (int, float)):
            demand(
                low is not None and high is not None and low < high,
                f"the setting '{spec.name}' needs both ends of its range (low < high)",
            )
            for end in (low, high):
                build_settings(cls, {spec.name: end}, "method")
        elif isinstance(default, str):
            raise CheckFailure(f"the setting '{spec.name}' is a text and needs `choices`")
    build_settings(cls, {}, "method")


@register(METHOD_CHECKS, "settings")
def _round_trip(bench: Bench) -> None:
    """The settings and the run's configuration survive a dictionary, JSON and YAML."""
    cls = bench.method.Config
    for values in ({}, bench.method.presets.get("quick", {}), bench.settings):
        built = build_settings(cls, dict(values), "method")
        again = build_settings(cls, json.loads(json.dumps(asdict(built))), "method")
        demand(again == built, f"settings change on their way through JSON: {built} → {again}")
    config = bench.config()
    for again in (RunConfig.from_dict(config.to_dict()), RunConfig.from_yaml(config.to_yaml())):
        demand(again.to_dict() == config.to_dict(), "the run's configuration changes in YAML")
        demand(identity(again, "", "") == identity(config, "", ""), "the run's identity changes")


@register(METHOD_CHECKS, "settings")
def _presets(bench: Bench) -> None:
    """Every preset and, under each of them, every variant gives valid settings."""
    for preset in bench.method.presets:
        demand(preset in PRESETS, f"there is no preset '{preset}'; known: {', '.join(PRESETS)}")
    for preset in PRESETS:
        base = dict(bench.method.presets.get(preset, {}))
        for name, changes in {"": {}, **bench.method.variants()}.items():
            try:
                build_settings(bench.method.Config, {**base, **changes}, "method")
            except ConfigError as error:
                where = f"variant '{name}' under preset '{preset}'" if name else f"'{preset}'"
                raise CheckFailure(f"{where}: {error}") from error


@register(METHOD_CHECKS, "settings")
def _stages(bench: Bench) -> None:
    """Stages have different names, and depend on settings and modules that exist."""
    method = bench.build()
    stages = tuple(method.stages())
    demand(bool(stages), "stages() is empty")
    stage_order(stages)
    known = {spec.name for spec in fields(bench.method.Config)}
    for stage in stages:
        unknown = set(stage.depends_on or ()) - known
        demand(
            not unknown,
            f"stage '{stage.name}' depends on {sorted(unknown)}, which Config does not have",
        )
        for name in stage.modules:
            try:
                method.get_submodule(name)
            except AttributeError as error:
                raise CheckFailure(
                    f"stage '{stage.name}' keeps the module '{name}', which the method lacks"
                ) from error
        demand(
            stage.depends_on is None or bool(stage.modules),
            f"stage '{stage.name}' is shared (depends_on) but names no modules to keep",
        )
        demand(stage.share > 0, f"stage '{stage.name}' has the share {stage.share}")
        optimizers = stage.trained_by(method)[1]()
        demand(
            isinstance(optimizers, dict)
            and bool(optimizers)
            and all(isinstance(o, Optimizer) for o in optimizers.values()),
            f"optimizers() of stage '{stage.name}' must be a dictionary of optimizers",
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
                    f"optimizer '{key}' of stage '{stage.name}' holds a weight that is not the "
                    "method's, so no checkpoint keeps it: make its network an attribute",
                )
                demand(
                    id(parameter) not in owner,
                    f"'{name}' is in the optimizers '{owner.get(id(parameter))}' and '{key}' of "
                    f"stage '{stage.name}', which would both move it",
                )
                owner[id(parameter)] = key
        trained |= owner.keys()
    for name, parameter in method.named_parameters():
        demand(
            id(parameter) in trained or not parameter.requires_grad,
            f"'{name}' is in no optimizer of any stage: give it to one, or say "
            "requires_grad_(False) where it is an average or fixed",
        )


@register(METHOD_CHECKS, "settings", "stages")
def _trains(bench: Bench) -> None:
    """Training goes through all stages with finite losses and finite weights."""
    for name, value in bench.baseline.weights.items():
        demand_finite(value, f"'{name}' is not finite after training")
    demand_other(bench.baseline.initial, bench.baseline.weights, "training changes no weight")


_FLAT_ADVICE = (
    "instance norm behind reflection padding multiplies gradients by 1/sqrt(eps) in every layer "
    "where a map is constant: build networks with glua_bench.networks.instance_norm, which passes "
    "no gradient there; and keep denominators, logarithms and roots away from 0"
)


@register(METHOD_CHECKS, "trains")
def _flat_slices(bench: Bench) -> None:
    """Constant, empty and two-valued slices give finite losses, weights and predictions."""
    data, cache = bench.copy_of_data(), bench.fresh("cache")
    for domain in data.domains():
        flatten_slices(data.split(domain, "train"))
    for precision in PRECISIONS:
        # Augmentation would move a border into the slices and add noise to them.
        options = {"precision": precision, "augmentation": "none"}
        where = f"with constant, empty and two-valued slices (precision {precision})"
        with explained(f"{where} it does not train", _FLAT_ADVICE):
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
    """A step returns scalar tensors, under the same names at every step of a stage."""
    problems = bench.baseline.problems
    demand(not problems, "; ".join(dict.fromkeys(problems)))


@register(METHOD_CHECKS, "trains")
def _budget(bench: Bench) -> None:
    """Each stage gets its steps, the last one the budget, and the segmenter no more than that."""
    stages = tuple(bench.build().stages())
    demand(
        stages[-1].share == 1.0,
        f"the last stage has the share {stages[-1].share}, not 1.0: all segmenters of a "
        "comparison get the same number of updates",
    )
    found = Counter(stage for stage, _ in bench.baseline.calls)
    for stage in stages:
        demand(
            found[stage.name] == stage.steps(STEPS),
            f"stage '{stage.name}' made {found[stage.name]} steps, not {stage.steps(STEPS)}",
        )
    updates = bench.baseline.updates
    behind = _behind_predictions(bench.baseline.method, bench.images(1))
    for name in behind:
        count = sum(updates[stage.name, name] for stage in stages)
        demand(
            count <= STEPS,
            f"'{name}', which predictions depend on, was updated {count} times under a budget "
            f"of {STEPS}",
        )
    if behind:
        return
    # An average of trained weights predicts. Which ones it follows cannot be seen, so none may
    # have more updates than the budget.
    for (stage_name, name), count in updates.items():
        demand(
            stage_name != stages[-1].name or count <= STEPS,
            f"'{name}' was updated {count} times under a budget of {STEPS}, and predictions come "
            "from weights that no optimizer moves, such as its average",
        )


def _behind_predictions(method: Method, images: Tensor) -> list[str]:
    """Names of the trained parameters that predictions depend on."""
    named = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    with torch.enable_grad(), quiet_machine():
        answers = [method.eval().predict(images, domain) for domain in DOMAINS]
        scalar = torch.stack([logits.float().square().sum() for logits in answers]).sum()
        if not named or not scalar.requires_grad:
            return []
        gradients = torch.autograd.grad(scalar, [p for _, p in named], allow_unused=True)
    return [name for (name, _), g in zip(named, gradients, strict=True) if g is not None]


@register(METHOD_CHECKS, "trains")
def _logits(bench: Bench) -> None:
    """predict gives finite float logits (N, K, H, W) of both domains, for one image as for many."""
    for count, domain in itertools.product((BATCH, 1, 5), DOMAINS):
        _sound_logits(bench, bench.baseline.method, count, domain)


def _sound_logits(bench: Bench, method: Method, count: int, domain: Role = "target") -> Tensor:
    """Predict random images, and demand sound logits."""
    logits = _predict(method, bench.images(count), domain)
    wanted = (count, len(bench.dataset.structures) + 1, SIZE, SIZE)
    demand(isinstance(logits, Tensor), f"predict returned a {type(logits).__name__}")
    demand(
        tuple(logits.shape) == wanted,
        f"predict of {count} images gives the shape {tuple(logits.shape)}, not {wanted}",
    )
    demand(logits.is_floating_point(), f"predict gives {logits.dtype}, not a float type")
    demand_finite(logits, "predict gives values that are not finite")
    return logits


@register(METHOD_CHECKS, "trains")
def _predict_is_pure(bench: Bench) -> None:
    """In eval mode predict draws no random numbers and changes no weight."""
    method, images = bench.baseline.method, bench.images(3)
    before = copy_weights(method.state_dict())
    for domain in DOMAINS:
        with quiet_machine():
            torch.manual_seed(1)
            first = _predict(method, images, domain)
            torch.manual_seed(2)
            second = _predict(method, images, domain)
        demand(torch.equal(first, second), "predict gives two answers for the same images")
    demand_same(before, method.state_dict(), "after predict")


@register(METHOD_CHECKS, "logits", "predict_is_pure")
def _features(bench: Bench) -> None:
    """features() gives finite maps, one for each image, that do not depend on the others."""
    method, images = bench.baseline.method, bench.images(3)
    for domain in DOMAINS:
        with torch.no_grad(), quiet_machine():
            maps = method.eval().features(images, domain)
            alone = method.features(images[:1], domain)
        demand(
            isinstance(maps, Tensor) and maps.ndim == 4 and len(maps) == 3,
            f"features are {tuple(getattr(maps, 'shape', ()))} for three images, not (3, D, h, w)",
        )
        demand_finite(maps, "features are not finite")
        demand(
            bool(torch.allclose(maps[:1].float(), alone.float(), rtol=1e-3, atol=1e-4)),
            "an image's features depend on the images beside it",
        )


@register(METHOD_CHECKS, "trains")
def _pictures(bench: Bench) -> str | None:
    """pictures gives finite images, of one slice or of as many as the method sees."""
    pictures = _sound_pictures(bench, bench.baseline.method)
    return None if pictures else "the method shows no pictures"


def _sound_pictures(bench: Bench, method: Method) -> dict[str, Tensor]:
    """Let a method show a batch, and demand sound pictures."""
    with quiet_machine():
        pictures = method.eval().pictures(bench.batch())
    for name, picture in pictures.items():
        shape = tuple(picture.shape)
        demand(
            len(shape) == 4
            and shape[0] > 0
            and shape[1] in (1, bench.slices)
            and shape[2:] == (SIZE, SIZE),
            f"the picture '{name}' has the shape {shape}, not (N, {bench.slices}, {SIZE}, {SIZE})",
        )
        demand_finite(picture, f"the picture '{name}' is not finite")
    return pictures


@register(METHOD_CHECKS, "trains", "logits", "pictures")
def _slices(bench: Bench) -> str | None:
    """With three slices in an image it trains, predicts and shows, and the neighbours count."""
    if bench.slices > 1:
        return "all checks see several slices"
    with closing(Bench(bench.method, bench.given, slices=3)) as stacked:
        with explained(
            "with three slices in an image it does not train",
            "build all networks that take or make images with task.slices channels",
        ):
            method = stacked.train(steps=1).method
            logits = _sound_logits(stacked, method, 2)
            _sound_pictures(stacked, method)
        images = stacked.images(2)
        images[:, [0, 2]] *= -1
        demand(
            not torch.equal(logits, _predict(method, images)),
            "predictions do not depend on the neighbours of a slice, so several slices would cost "
            "and change nothing: give its networks task.slices channels",
        )
    return None


@register(METHOD_CHECKS, "trains", "presets")
def _variants_train(bench: Bench) -> str | None:
    """Every declared variant trains a step."""
    variants = bench.method.variants()
    cache = bench.cache()  # one for all, so that a stage they share trains once
    for name, changes in variants.items():
        with explained(f"variant '{name}' does not train"):
            bench.train(changes, steps=1, cache=cache)
    return None if variants else "the method declares no variants"


@register(METHOD_CHECKS, "trains")
def _checkpoint(bench: Bench) -> None:
    """A method built anew that loads saved weights predicts the same, bit for bit."""
    trained, images = bench.baseline.method, bench.images(3)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    other = bench.build(bench.config(seed=1))
    other.load_state_dict(torch.load(file, weights_only=True))
    to_channels_last(other)  # as the trainer does; rounding follows from it
    for domain in DOMAINS:
        demand(
            torch.equal(_predict(trained, images, domain), _predict(other, images, domain)),
            "predictions change when the weights are saved and loaded: what they depend on must "
            "be parameters or buffers",
        )


@register(METHOD_CHECKS, "trains")
def _hidden_state(bench: Bench) -> None:
    """What a step leaves for the next one is parameters, buffers and optimizers' state."""
    for stage, held in bench.baseline.hidden.items():
        # What the first step makes may be a constant that is made once.
        for before, after in zip(held, held[1:], strict=False):
            changed = [n for n in {**before, **after} if before.get(n) != after.get(n)]
            demand(
                not changed,
                f"'{changed[0] if changed else ''}' changes from step to step of stage '{stage}' "
                "and is in no checkpoint: keep it as a buffer (pools, counters, averages), or "
                "derive it from context.step",
            )


@register(METHOD_CHECKS, "trains")
def _same_seed(bench: Bench) -> None:
    """The same seed gives the same weights, bit for bit."""
    demand_same(
        bench.baseline.weights,
        bench.train().weights,
        "two trainings with one seed (draw random numbers from torch only, which the harness "
        "seeds at every step)",
    )


@register(METHOD_CHECKS, "same_seed")
def _other_seed(bench: Bench) -> None:
    """Another seed gives other weights, before training and after it."""
    other = bench.train(seed=1)
    trainable = {name for name, _ in bench.baseline.method.named_parameters()}
    for what, a, b in (
        ("before", bench.baseline.initial, other.initial),
        ("after", bench.baseline.weights, other.weights),
    ):
        demand_other(
            {name: a[name] for name in trainable},
            {name: b[name] for name in trainable},
            f"two seeds give the same weights {what} training",
        )


@register(METHOD_CHECKS, "same_seed")
def _resume(bench: Bench) -> None:
    """A training that is interrupted again and again ends in the weights of one that is not."""
    stages = tuple(bench.build().stages())
    stops = []
    for index, stage in enumerate(stages):
        total = stage.steps(STEPS)
        # Step 0 of a later stage is the boundary. "After the last step" dies between a stage's
        # last update and its end, so that this update is done anew.
        steps = sorted({0 if index else 1, total // 2, total - 1})
        stops += [Stop(stage.name, step) for step in steps if step < total]
        stops.append(Stop(stage.name, total - 1, after=True))
    cache, root = bench.cache(), bench.fresh("runs")
    for stop in stops:
        try:
            bench.train(cache=cache, root=root, stop=stop)
        except Killed:
            continue
        raise CheckFailure(f"step {stop.step} of stage '{stop.stage}' was never reached")
    resumed = bench.train(cache=cache, root=root)
    where = ", ".join(f"{stop.stage} {stop.step}" for stop in stops)
    demand_same(
        bench.baseline.weights,
        resumed.weights,
        f"after interruptions at {where} (what a step depends on must be weights, buffers or "
        "optimizer states, or follow from context.step)",
    )


@register(METHOD_CHECKS, "same_seed")
def _shared_stages(bench: Bench) -> str | None:
    """A run that takes a finished stage from the cache ends as the run that trained it."""
    shared = _shared(bench)
    if not shared:
        return "no stage is shared"
    again = bench.train(cache=bench.baseline.cache)
    demand(
        again.reused == set(shared),
        f"a second run reused the stages {sorted(again.reused)}, not {sorted(shared)}",
    )
    demand_same(
        bench.baseline.weights,
        again.weights,
        f"a run that reuses {', '.join(shared)} (`modules` must name all that a stage trains)",
    )
    return None


@register(METHOD_CHECKS, "shared_stages")
def _stage_dependencies(bench: Bench) -> str | None:
    """The result of a shared stage depends on no setting but those that it names."""
    shared = _shared(bench)
    if not shared:
        return "no stage is shared"
    named = {name for stage in shared.values() for name in stage.depends_on or ()}
    changes = {
        spec.name: _another(bench.settings[spec.name], spec.metadata)
        for spec in fields(bench.method.Config)
        if spec.name not in named and spec.name not in bench.given
    }
    stages = [stage.name for stage in bench.build().stages()]
    after = max(map(stages.index, shared)) + 1
    stop = Stop(stages[after], 0) if after < len(stages) else None
    cache = bench.cache()
    with suppress(Killed):
        bench.train(changes, cache=cache, stop=stop)
    for path in sorted((bench.baseline.cache / "stages").glob("*.pt")):
        other = cache / "stages" / path.name
        demand(other.is_file(), f"{path.name} was not found again under other settings")
        a, b = (torch.load(file, weights_only=True) for file in (path, other))
        for module in a:
            demand_same(
                a[module],
                b[module],
                f"'{module}' of the stage {path.stem.rsplit('-', 1)[0]} changes with one of the "
                f"settings {', '.join(changes)}, which `depends_on` does not name",
            )
    return None


def _shared(bench: Bench) -> dict[str, Stage]:
    return {s.name: s for s in bench.build().stages() if s.depends_on is not None}


def _another(value: Any, meta: Mapping[str, Any]) -> Any:
    """Another allowed value, near the given one."""
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
    """A run trains, selects, evaluates and is done; the same run again does nothing."""
    with quiet_machine(bench.fresh("cache")):
        planned = bench.plan(scored=True)
        execution.execute(planned, Progress(enabled=False))
        rows = planned.directory.read_cases()
        again = execution.execute(planned, Progress(enabled=False))
    tests = bench.dataset.split(planned.config.target, "test")
    # A selector that can judge no checkpoint is left out; the first one always can.
    wanted = len(tests) * len(bench.dataset.structures)
    for selector in {planned.config.selectors[0], *rows["selector"]}:
        found = int((rows["selector"] == selector).sum())
        demand(found == wanted, f"the run has {found} rows of '{selector}', not {wanted}")
    demand(again.already_done, "the same run was executed twice")
