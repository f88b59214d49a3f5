"""The style stage of DAR-UNet; a component of `style.py`.

Reconstruction after DAR-UNet (Yao et al., 2022), later work of GLUA's research group; there are no
numbers of its authors to check it against. Both domains share a content encoder and an AdaIN
decoder, and each has its own style encoder. With c = E_c(x), s = E_s(x), x̂ = G(c, s), the
generator minimises

    λ_rec |x̂_aa - a| + λ_cyc |x̂_aba - a| + |E_c(x̂_ab) - c_a| + |E_s(x̂_ab) - s_b|
    + LSGAN of images + LSGAN of content,      and the same with a and b exchanged.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from glua_bench.config import setting
from glua_bench.errors import ConfigError
from glua_bench.losses import lsgan_loss, real_fake_loss
from glua_bench.method import Adjustment, Batch, Cases, Context, TaskInfo, frozen
from glua_bench.methods.components.host_count import HostCount
from glua_bench.methods.components.style_code_networks import (
    ContentEncoder,
    MultiScaleDiscriminator,
    PatchDiscriminator,
    StyleDecoder,
    StyleEncoder,
)

CODES = 32  # style codes stored per cluster
SMALLEST = 16  # minimum image side in pixels: a patch discriminator halves it four times


@dataclass(frozen=True)
class CodesConfig:
    """Settings of DAR-UNet's style stage; defaults are the full size."""

    codes_width: int = setting(
        32, "channels of the style networks at full resolution", low=4, high=128
    )
    codes_blocks: int = setting(4, "residual blocks of encoder and decoder", low=1, high=9)
    codes_scales: int = setting(3, "scales of the image discriminators", low=1, high=4)
    codes_batch: int = setting(4, "maximum number of images per domain and step", low=1, high=64)
    codes_lr: float = setting(1e-4, "learning rate of the generator", low=1e-6, high=1e-1, log=True)
    codes_lr_d: float = setting(
        2e-4, "learning rate of the discriminators", low=1e-6, high=1e-1, log=True
    )
    codes_decay: float = setting(
        0.0, "power of the polynomial decay of both learning rates; 0: no decay", low=0, high=3
    )
    codes_rec: float = setting(10.0, "weight of self-reconstruction", low=0, high=100)
    codes_cycle: float = setting(10.0, "weight of cycle reconstruction", low=0, high=100)
    codes_gan: float = setting(1.0, "weight of the image GAN", low=0, high=100)
    codes_content_gan: float = setting(1.0, "weight of the content GAN", low=0, high=100)
    codes_clusters: int = setting(6, "k-means clusters of target styles", low=1, high=64)


# Overrides of the quick preset: a width that trains in minutes on two CPU cores, weights at which
# a small budget suffices (at 10/10 the reconstruction terms dominate), and a decay that lets the
# short training converge. Chosen on a phantom cohort with another seed than the reported one.
QUICK_CODES = {
    "codes_width": 8,
    "codes_blocks": 3,
    "codes_lr": 1e-3,
    "codes_lr_d": 1e-3,
    "codes_decay": 0.9,
    "codes_rec": 3.0,
    "codes_cycle": 3.0,
}


class Generator(nn.Module):
    """Content encoder, both style encoders, and decoder."""

    def __init__(self, config: CodesConfig, slices: int) -> None:
        super().__init__()
        width, blocks = config.codes_width, config.codes_blocks
        self.content = ContentEncoder(width, blocks, slices)
        self.style_source = StyleEncoder(width, slices=slices)
        self.style_target = StyleEncoder(width, slices=slices)
        self.decode = StyleDecoder(width, blocks=blocks, slices=slices)


class StyleCodes(nn.Module):
    """Train the style stage and restyle source images as target images.

    Args:
        config: the settings.
        task: the task, for image size and channels; all channels and slices are restyled as one,
            in one style.

    Raises:
        ConfigError: the slices are too small for `codes_scales`.
    """

    hold = 0.0

    bank: Tensor
    bank_share: Tensor

    def __init__(self, config: CodesConfig, task: TaskInfo) -> None:
        super().__init__()
        size, slices = task.size, task.inputs
        needed = SMALLEST * 2 ** (config.codes_scales - 1)  # each further scale halves the slice
        if size < needed:
            raise ConfigError(
                f"grid.size = {size} is too small for codes_scales = {config.codes_scales}, which "
                f"needs {needed}; increase grid.size, or set method.codes_scales to "
                f"{int(math.log2(size / SMALLEST)) + 1} or less."
            )
        self.config, self.decay = config, config.codes_decay
        self.generator = Generator(config, slices)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)  # EMA, used to restyle
        width, scales = 2 * config.codes_width, config.codes_scales
        self.d_source = MultiScaleDiscriminator(width, scales=scales, slices=slices)
        self.d_target = MultiScaleDiscriminator(width, scales=scales, slices=slices)
        self.d_content = PatchDiscriminator(self.generator.content.channels, width, layers=2)
        self.register_buffer("bank", torch.zeros(config.codes_clusters, CODES, 8))
        self.register_buffer("bank_share", torch.ones(config.codes_clusters))
        self.updates = HostCount()

    def check(self, cases: Cases) -> dict[str, Adjustment]:
        """Limit clusters to the number of target cases, so that no cluster covers a single case."""
        if self.config.codes_clusters <= cases.target:
            return {}
        reason = f"with more clusters than the {cases.target} target training cases, a cluster "
        reason += "would hold slices of a single case"
        return {"codes_clusters": Adjustment(max(1, cases.target), reason)}

    def optimizers(self) -> dict[str, Optimizer]:
        """Return Adam with betas (0.5, 0.9) for the generator and for all discriminators."""
        discriminators = nn.ModuleList([self.d_source, self.d_target, self.d_content])
        betas = (0.5, 0.9)
        return {
            "generator": Adam(self.generator.parameters(), self.config.codes_lr, betas, fused=True),
            "discriminators": Adam(
                discriminators.parameters(), self.config.codes_lr_d, betas, fused=True
            ),
        }

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update the generator, then the discriminators on the same fakes."""
        a = batch.source_images[: self.config.codes_batch]
        b = batch.target[: self.config.codes_batch]
        n, real = len(a), torch.cat([a, b])
        g, cfg = self.generator, self.config

        content = g.content(real)
        style_a, style_b = g.style_source(a), g.style_target(b)
        # One decoder call for aa, bb, ab, ba: instance norm keeps images of a batch independent.
        images = g.decode(
            torch.cat([content, content]), torch.cat([style_a, style_b, style_b, style_a])
        )
        same, fake = images[: 2 * n], images[2 * n :]
        ab, ba = fake[:n], fake[n:]
        content_again = g.content(fake)
        style_again = torch.cat([g.style_source(ba), g.style_target(ab)])
        cycle = g.decode(content_again, torch.cat([style_a, style_b]))

        with frozen(self.d_source, self.d_target, self.d_content):
            gan = lsgan_loss(self.d_target(ab), 1) + lsgan_loss(self.d_source(ba), 1)
            content_gan = lsgan_loss(self.d_content(content), 0.5)  # ½: neither domain
        reconstruction, cycled = F.l1_loss(same, real), F.l1_loss(cycle, real)
        consistency = F.l1_loss(content_again, content.detach()) + F.l1_loss(
            style_again, torch.cat([style_a, style_b]).detach()
        )
        loss = (
            cfg.codes_rec * reconstruction
            + cfg.codes_cycle * cycled
            + consistency
            + cfg.codes_gan * gan
            + cfg.codes_content_gan * content_gan
        )
        context.update("generator", loss)
        self.update_average()

        fake, content = fake.detach(), content.detach()
        d_loss = (
            real_fake_loss(self.d_target, b, fake[:n])
            + real_fake_loss(self.d_source, a, fake[n:])
            + real_fake_loss(self.d_content, content[:n], content[n:])
        )
        context.update("discriminators", d_loss)
        return {
            "reconstruction": reconstruction,
            "cycle": cycled,
            "consistency": consistency,
            "gan": gan,
            "content_gan": content_gan,
            "discriminators": d_loss,
        }

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the moving average, faster at the start to forget the initialisation."""
        done = self.updates.increase()
        weight = 1 - min(0.999, (1 + done) / (10 + done))
        torch._foreach_lerp_(
            list(self.average.parameters()), list(self.generator.parameters()), weight
        )

    @torch.no_grad()
    def finish(self, context: Context) -> None:
        """Cluster the target's style codes with k-means and store codes of each cluster."""
        codes = torch.cat([self.average.style_target(x) for x in context.target_slices()])
        points = codes.float().cpu().numpy()
        rng = np.random.default_rng(0)  # the codes differ by seed; the clustering need not
        _, cluster = kmeans2(points, self.config.codes_clusters, minit="++", seed=rng)
        for index in range(self.config.codes_clusters):
            members = np.flatnonzero(cluster == index)
            self.bank_share[index] = len(members) / len(points)
            if len(members):
                chosen = rng.choice(members, CODES)
                self.bank[index] = codes[torch.from_numpy(chosen).to(codes.device)]

    @torch.no_grad()
    def restyle(self, images: Tensor) -> Tensor:
        """Restyle source images (N, S, H, W) in styles drawn from clusters by their share."""
        drawn = torch.multinomial(self.bank_share.cpu(), len(images), replacement=True)
        member = torch.randint(CODES, (len(images),))
        styles = self.bank[drawn.to(images.device), member.to(images.device)]
        return self.average.decode(self.average.content(images), styles.to(images.dtype))
