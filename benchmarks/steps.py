"""Training steps against their own convolutions, the roofline, a bare loop and no loading."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks import convolutions, small
from benchmarks.rows import Aim, Row, Settings, alternate, ratio_row
from glua_bench.config import RunConfig
from glua_bench.datasets.phantom.dataset import Phantom
from glua_bench.method import Batch, Context, Method, Stage
from glua_bench.registry import Registry
from glua_bench.runs.plan import build_method, resolve
from glua_bench.runs.request import RunRequest
from glua_bench.runs.trainer import to_channels_last
from glua_bench.task import Structure

# Stages that another method shares and that are timed there.
SHARED = {"global_only": ("style",)}
SMALL = ("grid.size=32", "grid.spacing=7", "batch_size=2", "segmenter.width=4")
OWN, PEAK, RECOMPUTED, HARNESS = Aim(0.75, True), Aim(0.45, True), Aim(0.6), Aim(1.03)


def configure(name: str, preset: str = "quick", settings: tuple[str, ...] = ()) -> RunConfig:
    """Return the configuration of a run on the phantom, which need not exist."""
    request = RunRequest(
        name, "phantom", preset=preset, device="cpu", assignments=list(settings), mlflow=False
    )
    return resolve(request, Phantom(), Registry("method").load(name))


def random_batch(config: RunConfig, method: Method) -> Batch:
    """Return random images and labels in the shapes of a run."""
    torch.manual_seed(0)
    shape = (config.batch_size, 1, config.grid.size, config.grid.size)
    images = torch.rand(2, *shape) * 2 - 1
    labels = torch.randint(0, method.task.classes, (shape[0], *shape[2:]))
    return Batch(images[0], labels, images[1] if method.uses_target else None)


def training_steps(
    config: RunConfig, structures: tuple[Structure, ...] = Phantom.structures
) -> Iterator[tuple[Method, Stage, Callable[[], object]]]:
    """Build the method of a configuration; yield it with each stage and one update of this.

    Source images are translated in every update, as in training.
    """
    chosen = Registry("method").load(config.method)
    method = build_method(config, structures, chosen)
    to_channels_last(method)
    batch = random_batch(config, method)
    images = [] if batch.target_images is None else [batch.target_images]
    for stage in method.stages():
        update, make = stage.trained_by(method)
        context = Context(stage, 0, stage.steps(config.steps), make(), lambda: iter(images))
        method.train()

        def step(stage: Stage = stage, update: Any = update, context: Context = context) -> object:
            given = batch
            if stage.translate is not None:
                with torch.no_grad():
                    given = replace(batch, source_images=stage.translate(batch.source_images))
            return update(given, context)

        yield method, stage, step
        if stage.finish is not None:  # what it leaves for the next stage, e.g. a style bank
            method.eval()
            stage.finish(context)


def measure_steps(settings: Settings, only: str) -> Iterator[Row]:
    """Yield two rows per stage of a method: its own convolutions, and the roofline."""
    peak, operations = convolutions.roofline(settings.quick, settings.clock)
    config = configure(only, settings=SMALL if settings.quick else ())
    for _, stage, step in training_steps(config):
        if stage.name in SHARED.get(only, ()):
            continue
        settings.report(f"step of {only}, stage {stage.name}")
        step()
        own = convolutions.of_step(step)
        sides = {"step": step, "own": own.repeat, "peak": peak}
        found = alternate(sides, settings.rounds, clock=settings.clock)
        ideal = [own.operations * seconds / operations for seconds in found["peak"]]
        rate, done, alone = (
            count / statistics.median(found[side]) / 1e9
            for side, count in (
                ("peak", operations),
                ("step", own.operations),
                ("own", own.operations),
            )
        )
        yield ratio_row(
            f"steps.{only}.{stage.name}.own",
            "own convolutions ÷ step",
            found["own"],
            found["step"],
            OWN,
            f"{len(own.calls)} convolutions",
        )
        yield ratio_row(
            f"steps.{only}.{stage.name}.roofline",
            "own convolutions at the roofline ÷ step",
            ideal,
            found["step"],
            replace(PEAK, reachable=alone / rate >= PEAK.bound),
            f"{done:.0f} of {rate:.0f} GFLOP/s; its convolutions alone {alone:.0f}",
        )


# -- sifa -----------------------------------------------------------------------------------------


def recomputing_step(sifa: Any, batch: Batch, context: Context) -> None:
    """Update SIFA as its authors do: every update on forward passes of its own.

    Each of the seven updates computes all that its loss reads (eleven passes through the encoder),
    and gradients only for what it updates.
    """
    from glua_bench.losses import lsgan_loss
    from glua_bench.method import frozen
    from glua_bench.methods.sifa import discriminator_loss, sifa_segmentation_loss

    a, b, labels = batch.source_images, batch.target, batch.source_labels
    adversarial = (sifa.d_a, sifa.d_b, sifa.d_p, sifa.d_p_low)

    with frozen(sifa.encoder, sifa.decoder, *adversarial):
        with torch.no_grad():
            fake_a = sifa.decoder(sifa.encode(b, 0)[0], b)
        fake_b = sifa.generator(a)
        cycle_a = sifa.decoder(sifa.encode(fake_b, 1)[0], fake_b)
        cycles = sifa.cycles(a, cycle_a, b, sifa.generator(fake_a))
        loss = cycles + lsgan_loss(sifa.d_b(fake_b), 1)
    context.update("generator", loss)
    context.update("d_b", discriminator_loss(sifa.d_b, b, sifa.pool_b(fake_b.detach())))

    with frozen(sifa.generator, sifa.decoder, *adversarial):
        with torch.no_grad():
            fake_b = sifa.generator(a)
        (latent_b, low_b), (latent, low) = sifa.encode(b, 0), sifa.encode(fake_b, 2)
        fake_a = sifa.decoder(latent_b, b)
        cycles = sifa.cycles(a, sifa.decoder(latent, fake_b), b, sifa.generator(fake_a))
        adv_a, adv_a_aux = (lsgan_loss(scores, 1) for scores in sifa.d_a(fake_a).unbind(1))
        loss = sifa.loss_segmentation(
            sifa_segmentation_loss(sifa.head(latent), labels),
            sifa_segmentation_loss(sifa.head_low(low), labels),
            cycles + adv_a,
            lsgan_loss(sifa.d_p(sifa.head(latent_b)), 1),
            lsgan_loss(sifa.d_p_low(sifa.head_low(low_b)), 1),
            adv_a_aux,
        )
    context.update("segmentation", loss)

    with frozen(sifa.generator, sifa.encoder, *adversarial):
        with torch.no_grad():
            fake_b = sifa.generator(a)
            latent_b, latent = sifa.encode(b, 3)[0], sifa.encode(fake_b, 4)[0]
        fake_a = sifa.decoder(latent_b, b)
        cycles = sifa.cycles(a, sifa.decoder(latent, fake_b), b, sifa.generator(fake_a))
        loss = cycles + lsgan_loss(sifa.d_a(fake_a)[:, 0], 1)
    context.update("decoder", loss)

    with torch.no_grad():
        fake_b = sifa.generator(a)
        cycle_a = sifa.decoder(sifa.encode(fake_b, 4)[0], fake_b)
    context.update("d_a", sifa.loss_d_a(a, cycle_a, sifa.pool_a(fake_a.detach())))

    with torch.no_grad():
        fake_b = sifa.generator(a)
        high = sifa.encode(fake_b, 4)[0], sifa.encode(b, 3)[0]
        masks = [sifa.head(latent) for latent in high]
    context.update("d_p", discriminator_loss(sifa.d_p, *masks))
    with torch.no_grad():
        fake_b = sifa.generator(a)
        # The authors' last passes run the lower level of the encoder alone.
        masks = [sifa.head_low(sifa.encoder.low(images)) for images in (fake_b, b)]
    context.update("d_p_low", discriminator_loss(sifa.d_p_low, *masks))


def whole_pass_step(sifa: Any, batch: Batch, context: Context) -> None:
    """Update SIFA with its whole forward pass before each of the seven updates.

    As plain code does: nothing is frozen or detached but the images of the discriminators, of which
    pooled ones come from the update of their generator.
    """
    from glua_bench.losses import lsgan_loss
    from glua_bench.methods.sifa import discriminator_loss, sifa_segmentation_loss

    a, b, labels = batch.source_images, batch.target, batch.source_labels
    for name in ("generator", "d_b", "segmentation", "decoder", "d_a", "d_p", "d_p_low"):
        fake_b = sifa.generator(a)
        (latent_b, low_b), (latent, low) = sifa.encode(b, 0), sifa.encode(fake_b, 1)
        fake_a = sifa.decoder(latent_b, b)
        cycle_a, cycle_b = sifa.decoder(latent, fake_b), sifa.generator(fake_a)
        masks = [sifa.head(latent), sifa.head(latent_b)]
        masks += [sifa.head_low(low), sifa.head_low(low_b)]
        cycles = sifa.cycles(a, cycle_a, b, cycle_b)
        if name == "generator":
            loss = cycles + lsgan_loss(sifa.d_b(fake_b), 1)
            pooled = fake_b.detach()
        elif name == "d_b":
            loss = discriminator_loss(sifa.d_b, b, sifa.pool_b(pooled))
        elif name == "segmentation":
            adv_a, adv_a_aux = (lsgan_loss(scores, 1) for scores in sifa.d_a(fake_a).unbind(1))
            loss = sifa.loss_segmentation(
                sifa_segmentation_loss(masks[0], labels),
                sifa_segmentation_loss(masks[2], labels),
                cycles + adv_a,
                lsgan_loss(sifa.d_p(masks[1]), 1),
                lsgan_loss(sifa.d_p_low(masks[3]), 1),
                adv_a_aux,
            )
        elif name == "decoder":
            loss = cycles + lsgan_loss(sifa.d_a(fake_a)[:, 0], 1)
            pooled = fake_a.detach()
        elif name == "d_a":
            loss = sifa.loss_d_a(a, cycle_a.detach(), sifa.pool_a(pooled))
        elif name == "d_p":
            loss = discriminator_loss(sifa.d_p, masks[0].detach(), masks[1].detach())
        else:
            loss = discriminator_loss(sifa.d_p_low, masks[2].detach(), masks[3].detach())
        context.update(name, loss)


def measure_recomputation(settings: Settings) -> Iterator[Row]:
    """Yield the rows of SIFA's step against steps that recompute their forward passes."""
    settings.report("sifa against steps that recompute")
    config = configure("sifa", settings=SMALL if settings.quick else ())
    ((method, stage, step),) = training_steps(config)
    batch = random_batch(config, method)
    context = Context(stage, 0, config.steps, stage.trained_by(method)[1](), lambda: iter(()))
    sides = {"step": step}
    for name, function in (("needed", recomputing_step), ("whole", whole_pass_step)):
        sides[name] = functools.partial(function, method, batch, context)
    counts = {name: convolutions.of_step(side).operations for name, side in sides.items()}
    found = alternate(sides, settings.rounds, 0.4, settings.clock)
    for name, what in (
        ("needed", "the networks that its loss needs, run anew for each update"),
        ("whole", "the whole forward pass for each update"),
    ):
        yield ratio_row(
            f"recompute.sifa.{name}",
            f"step of `sifa` ÷ {what}",
            found["step"],
            found[name],
            RECOMPUTED,
            f"operations of the convolutions: {counts['step'] / counts[name]:.2f}",
        )


# -- inside a run ---------------------------------------------------------------------------------


def measure_loop(settings: Settings) -> Iterator[Row]:
    """Yield the rows of the trainer's loop: against a bare one, and without loading."""
    steps = 4 if settings.quick else 25
    options = SMALL if settings.quick else ()
    with small.phantom(settings.scratch):
        for name in ("source_only",) if settings.quick else ("source_only", "local_only"):
            settings.report(f"loop of {name}")
            found: dict[str, list[float]] = {"bare": [], "harness": [], "loading": [], "memory": []}
            for _ in range(min(5, settings.rounds)):
                built = small.build(settings, name, steps, "none", options)
                held = [Batch(*built.trainer.batches.load(0, step)) for step in range(8)]
                held = [replace(b, source_labels=b.source_labels.long()) for b in held]
                found["harness"].append(small.fit(built, settings.clock) / steps)
                found["bare"].append(small.bare_loop(built, held, steps, settings.clock) / steps)
                built = small.build(settings, name, steps, "geometric", options)
                found["loading"].append(small.fit(built, settings.clock) / steps)
                built = small.build(settings, name, steps, "none", options)
                (first, *_) = held
                one = first.source_images, first.source_labels, first.target_images
                built.trainer.batches.load = lambda *place, one=one: one  # type: ignore[method-assign,misc]
                found["memory"].append(small.fit(built, settings.clock) / steps)
            yield ratio_row(
                f"loop.{name}.bare",
                "update within a run ÷ update in a bare loop over batches in memory",
                found["harness"],
                found["bare"],
                HARNESS,
            )
            yield ratio_row(
                f"loop.{name}.loading",
                "update with loading and geometric augmentation ÷ on one batch in memory",
                found["loading"],
                found["memory"],
            )
