"""Image translation by CycleGAN, then segmentation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from glua_bench.config import setting
from glua_bench.losses import lsgan_loss, real_fake_loss
from glua_bench.method import Batch, Context, Stage, TaskInfo, frozen
from glua_bench.methods.components.image_pool import ImagePool
from glua_bench.methods.components.thin_convolution import ThinConv2d
from glua_bench.methods.source_only import SegmentConfig, SourceOnly
from glua_bench.networks import PatchGAN, instance_norm, normal_weights


@dataclass(frozen=True)
class CycleConfig(SegmentConfig):
    """Settings of the segmenter and of the translation; defaults are the full size."""

    cycle_share: float = setting(
        2.0, "updates of the translation stage as a multiple of steps", low=0.001, high=100
    )
    cycle_width: int = setting(64, "channels of the generators at full resolution", low=4, high=128)
    cycle_blocks: int = setting(9, "residual blocks of a generator", low=1, high=18)
    cycle_width_d: int = setting(
        64, "channels after a discriminator's first convolution", low=4, high=128
    )
    cycle_batch: int = setting(4, "maximum number of images per domain and step", low=1, high=64)
    cycle_lr: float = setting(2e-4, "learning rate of all networks", low=1e-6, high=1e-1, log=True)
    cycle_weight: float = setting(10.0, "weight of both cycle losses", low=0, high=1000)
    cycle_pool: int = setting(50, "image pool size in batches", low=1, high=1000)


class CycleTranslate(SourceOnly):
    """Translate source images with CycleGAN, then train the segmenter on them.

    Zhu et al., *Unpaired Image-to-Image Translation using Cycle-Consistent Adversarial Networks*,
    ICCV 2017 (eq. 1-3, with the paper's least-squares loss). Stage 1: with G from source to target
    and F back, one update of both generators minimises

        adv_t(G(s)) + adv_s(F(t)) + 10 (|F(G(s)) - s| + |G(F(t)) - t|),

    then each discriminator minimises ½ (loss on real images + loss on pooled fakes). Stage 2 is
    `source_only` on G(s). Generators and 70 × 70 PatchGANs are the paper's. Differences: the
    learning rate decays over the whole stage instead of its second half, a batch has 4 images, and
    the pool stores batches. The authors' identity loss, meant for paintings, is omitted.
    """

    name = "cycle_translate"
    reference = "Zhu et al., ICCV 2017 (CycleGAN)"
    needs = "source images and labels, target images"
    uses_target = True
    Config = CycleConfig
    presets = {
        "quick": {
            "cycle_width": 8,
            "cycle_blocks": 4,
            "cycle_width_d": 16,
            "cycle_batch": 2,
            "cycle_lr": 1e-3,
            "cycle_share": 3.0,
        }
    }

    def __init__(self, task: TaskInfo, config: CycleConfig) -> None:
        super().__init__(task, config)
        batch = min(task.batch_size, config.cycle_batch)
        self.cycle = CycleGAN(config, batch, task.size, task.inputs)

    def stages(self) -> tuple[Stage, ...]:
        """Return the cached translation stage and the segmentation stage on translated images."""
        return (
            translation_stage(self.cycle, self.config),
            Stage("segment", decay=0.9, translate=self.cycle.to_target),
        )

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return source images translated to target and back, and target images as source."""
        restyled = self.cycle.to_target(batch.source_images)
        return {
            "restyled": restyled,
            "source again": self.cycle.to_source(restyled),
            "target as source": self.cycle.to_source(batch.target),
        }


def translation_stage(cycle: CycleGAN, config: CycleConfig) -> Stage:
    """Return the translation stage of a method that has the translation as attribute `cycle`."""
    return Stage(
        "translate",
        config.cycle_share,
        depends_on=tuple(n for n in CycleConfig.__dataclass_fields__ if n.startswith("cycle_")),
        modules=("cycle",),
        photometric=False,
        decay=1.0,
        step=cycle.step,
        optimizers=cycle.optimizers,
    )


class CycleGAN(nn.Module):
    """Two generators, two discriminators with image pools, and their training step."""

    def __init__(self, config: CycleConfig, batch: int, size: int, slices: int = 1) -> None:
        super().__init__()
        self.config = config
        self.to_target = ResnetGenerator(config.cycle_width, config.cycle_blocks, slices)
        self.to_source = ResnetGenerator(config.cycle_width, config.cycle_blocks, slices)
        self.d_target = PatchGAN(config.cycle_width_d, slices)
        self.d_source = PatchGAN(config.cycle_width_d, slices)
        self.pool_target = ImagePool(config.cycle_pool, batch, size, slices)
        self.pool_source = ImagePool(config.cycle_pool, batch, size, slices)

    def optimizers(self) -> dict[str, Optimizer]:
        """Return Adam with betas (0.5, 0.999) for both generators, and one per discriminator."""
        generators = nn.ModuleList([self.to_target, self.to_source])
        parts = {"generators": generators, "d_target": self.d_target, "d_source": self.d_source}
        return {
            name: Adam(part.parameters(), self.config.cycle_lr, (0.5, 0.999), fused=True)
            for name, part in parts.items()
        }

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update both generators, then each discriminator."""
        source = batch.source_images[: self.config.cycle_batch]
        target = batch.target[: self.config.cycle_batch]
        fake_source = self.to_source(target)
        # One pass of G for both: instance norm keeps the images of a batch independent.
        made = self.to_target(torch.cat([source, fake_source]))
        fake_target, cycled_target = made[: len(source)], made[len(source) :]
        cycled_source = self.to_source(fake_target)
        cycles = F.l1_loss(cycled_source, source) + F.l1_loss(cycled_target, target)
        with frozen(self.d_target, self.d_source):
            adv_target = lsgan_loss(self.d_target(fake_target), 1)
            adv_source = lsgan_loss(self.d_source(fake_source), 1)
        context.update("generators", adv_target + adv_source + self.config.cycle_weight * cycles)

        old_target = self.pool_target(fake_target.detach())
        d_target = 0.5 * real_fake_loss(self.d_target, target, old_target)
        context.update("d_target", d_target)
        old_source = self.pool_source(fake_source.detach())
        d_source = 0.5 * real_fake_loss(self.d_source, source, old_source)
        context.update("d_source", d_source)
        return {
            "cycles": cycles,
            "adv_target": adv_target,
            "adv_source": adv_source,
            "d_target": d_target,
            "d_source": d_source,
        }


class ResnetGenerator(nn.Module):
    """ResNet generator of section 7.2 of the paper, with tanh output."""

    def __init__(self, width: int = 64, blocks: int = 9, slices: int = 1) -> None:
        super().__init__()
        w = width
        self.body = nn.Sequential(
            *layer(nn.Conv2d(slices, w, 7, padding=3, padding_mode="reflect", bias=False)),
            *layer(nn.Conv2d(w, 2 * w, 3, 2, padding=1, bias=False)),
            *layer(nn.Conv2d(2 * w, 4 * w, 3, 2, padding=1, bias=False)),
            *(Residual(4 * w) for _ in range(blocks)),
            *layer(nn.ConvTranspose2d(4 * w, 2 * w, 3, 2, 1, output_padding=1, bias=False)),
            *layer(nn.ConvTranspose2d(2 * w, w, 3, 2, 1, output_padding=1, bias=False)),
            ThinConv2d(w, slices, 7, padding=3, padding_mode="reflect"),
            nn.Tanh(),
        )
        normal_weights(self)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, S, H, W) to (N, S, H, W) in [-1, 1]; H and W must be divisible by 4."""
        return self.body(images)


class Residual(nn.Module):
    """Residual block: x + two reflection-padded 3×3 convolutions of x."""

    def __init__(self, channels: int) -> None:
        super().__init__()

        def convolution() -> nn.Conv2d:
            return nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", bias=False)

        self.body = nn.Sequential(*layer(convolution()), convolution(), instance_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        return x + self.body(x)


def layer(convolution: nn.Conv2d | nn.ConvTranspose2d) -> tuple[nn.Module, ...]:
    """Return a convolution, instance norm and ReLU."""
    return convolution, instance_norm(convolution.out_channels), nn.ReLU(inplace=True)
