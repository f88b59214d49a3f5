"""AD-GAN, the style network of GLUA's Step A; a component of `style.py`.

Re-implementation of the code that GLUA's authors name (`Kaiseem/AD-GAN`, and the training step
`synthesis_subnet.py` of GLUA's own repository), checked against its numbers. One encoder E and one
decoder G serve both domains; only the AdaIN scales and shifts, computed from the domain y, differ.
With the content c = E(x, y), the reconstruction x' = G(c, y), the translation x̂ = G(c, ŷ) to the
other domain, its content ĉ = E(x̂, ŷ) and the cycle x'' = G(ĉ, y), E and G minimise

    20 |x' - x| + 20 |x'' - x| + 1 |c - ĉ| + L_adv.

The first three terms are summed over both domains. L_adv is a least-squares loss over the images of
both domains, with a discriminator D that has one output per domain. `MODES` lists the published
training schemes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from glua_bench.config import setting
from glua_bench.losses import lsgan_loss
from glua_bench.method import Adjustment, Batch, Cases, Context, TaskInfo, frozen
from glua_bench.methods.components.image_pool import ImagePool
from glua_bench.methods.components.thin_convolution import ThinConv2d
from glua_bench.networks import AdaIN, PatchGAN

SOURCE, TARGET = 0, 1  # the domains y
HIDDEN = 64  # hidden units of `DomainAffine`


class Mode(NamedTuple):
    """A published training scheme.

    Attributes:
        aligned: "aligned disentangling training": train the decoder with L_rec alone.
        real: images that D should score as real: "reconstructions", which E and G then also train
            to be scored as fake, or "images".
        beta2: Adam's β₂.
    """

    aligned: bool
    real: str
    beta2: float


MODES = {
    "adt": Mode(True, "reconstructions", 0.99),  # AD-GAN's default
    "no_adt": Mode(False, "reconstructions", 0.99),  # AD-GAN's option
    "glua": Mode(False, "images", 0.999),  # GLUA's synthesis_subnet.py
}


@dataclass(frozen=True)
class ADGANConfig:
    """Settings of AD-GAN; defaults are the authors'."""

    adgan_width: int = setting(64, "channels of AD-GAN at full resolution", low=4, high=128)
    adgan_blocks: int = setting(4, "residual blocks of encoder and decoder", low=1, high=9)
    adgan_batch: int = setting(8, "maximum number of images per domain and step", low=1, high=64)
    adgan_mode: str = setting(
        "adt", "training scheme: AD-GAN's with or without ADT, or GLUA's", choices=tuple(MODES)
    )
    adgan_lr: float = setting(2e-4, "learning rate of all networks", low=1e-6, high=1e-1, log=True)
    adgan_rec: float = setting(20.0, "weight of the reconstruction loss", low=0, high=200)
    adgan_cycle: float = setting(20.0, "weight of the cycle loss", low=0, high=200)
    adgan_content: float = setting(1.0, "weight of the content loss", low=0, high=200)
    adgan_pool: int = setting(50, "image pool size in batches", low=1, high=1000)


# Overrides of the quick preset: a width that trains in minutes on two CPU cores, and a learning
# rate at which a small budget suffices; chosen on a phantom cohort with another seed.
QUICK_ADGAN = {"adgan_width": 8, "adgan_batch": 4, "adgan_lr": 1e-3}


class ADGAN(nn.Module):
    """Train AD-GAN and restyle source images as target images.

    Args:
        config: the settings.
        task: the task, for image size, channels of an image and batch size.
    """

    hold, decay = 0.5, 1.0  # constant rates for half of the stage, then linear decay to 0

    def __init__(self, config: ADGANConfig, task: TaskInfo) -> None:
        super().__init__()
        self.config, self.mode = config, MODES[config.adgan_mode]
        width, slices = config.adgan_width, task.inputs
        self.encoder = Encoder(width, config.adgan_blocks, slices)
        self.decoder = Decoder(width, config.adgan_blocks, slices)
        self.discriminator = DomainDiscriminator(width, slices)
        batch = min(config.adgan_batch, task.batch_size)
        self.pools = nn.ModuleList(
            ImagePool(config.adgan_pool, batch, task.size, slices) for _ in (SOURCE, TARGET)
        )

    def check(self, cases: Cases) -> dict[str, Adjustment]:
        """Return no adjustments: any number of cases works."""
        return {}

    def finish(self, context: Context) -> None:
        """Do nothing after the last step."""

    def optimizers(self) -> dict[str, Optimizer]:
        """Return Adam with weight decay 1e-4 for encoder and decoder, and for the discriminator."""
        generator = nn.ModuleList([self.encoder, self.decoder])
        betas, rate = (0.5, self.mode.beta2), self.config.adgan_lr
        return {
            name: Adam(part.parameters(), rate, betas, weight_decay=1e-4, fused=True)
            for name, part in (("generator", generator), ("discriminator", self.discriminator))
        }

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update encoder and decoder, then the discriminator."""
        cfg, mode, d = self.config, self.mode, self.discriminator
        source = batch.source_images[: cfg.adgan_batch]
        target = batch.target[: cfg.adgan_batch]
        images, n = torch.cat([source, target]), len(source)
        own = (torch.arange(len(images), device=images.device) >= n).long()  # SOURCE, then TARGET
        other = 1 - own

        def distance(x: Tensor, y: Tensor) -> Tensor:
            """Return the mean absolute difference, summed over both domains."""
            return F.l1_loss(x[:n], y[:n]) + F.l1_loss(x[n:], y[n:])

        optimizer = context.optimizers["generator"]
        optimizer.zero_grad(set_to_none=True)
        content = self.encoder(images, own)
        same = self.decoder(content, own)
        reconstruction = distance(same, images)
        # In ADT only this term reaches the decoder, so its gradient is computed first.
        context.backward(cfg.adgan_rec * reconstruction, retain_graph=True)
        with frozen(d, *([self.decoder] if mode.aligned else [])):
            translated = self.decoder(content, other)
            content_again = self.encoder(translated, other)
            cycled = self.decoder(content_again, own)
            cycle = distance(cycled, images)
            kept = distance(content, content_again)
            if mode.real == "reconstructions":
                made, remade = d(torch.cat([translated, same]), torch.cat([other, own])).chunk(2)
                adv = lsgan_loss(made, 1) + lsgan_loss(remade, 0)
            else:
                adv = lsgan_loss(d(translated, other), 1)
            context.backward(cfg.adgan_cycle * cycle + cfg.adgan_content * kept + adv)
        context.apply("generator")

        real = same.detach() if mode.real == "reconstructions" else images
        old_target = self.pools[TARGET](translated[:n].detach())
        old_source = self.pools[SOURCE](translated[n:].detach())
        judged = torch.cat([real, old_target, old_source])
        real_scores, fake_scores = d(judged, torch.cat([own, other])).chunk(2)
        d_loss = lsgan_loss(real_scores, 1) + lsgan_loss(fake_scores, 0)
        context.update("discriminator", d_loss)
        return {
            "reconstruction": reconstruction,
            "cycle": cycle,
            "content": kept,
            "adversarial": adv,
            "discriminator": d_loss,
        }

    @torch.no_grad()
    def restyle(self, images: Tensor) -> Tensor:
        """Return G(E(x, source), target), (N, S, H, W) → the same shape in [-1, 1]."""
        own = torch.full((len(images),), SOURCE, device=images.device)
        return self.decoder(self.encoder(images, own), torch.full_like(own, TARGET))


class DomainAffine(nn.Module):
    """AdaIN scales and shifts from the domain: one-hot → 64 → 64 → all scales and shifts.

    Args:
        channels: channels of each AdaIN layer, in order.
    """

    def __init__(self, channels: list[int]) -> None:
        super().__init__()
        self.sizes = [size for count in channels for size in (count, count)]
        self.layers = nn.Sequential(
            nn.Linear(2, HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(HIDDEN, HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(HIDDEN, sum(self.sizes)),
        )

    def forward(self, domains: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield scale and shift (N, C) of each layer for domains (N,)."""
        known = torch.arange(2, device=domains.device)
        codes = (domains[:, None] == known).to(self.layers[0].weight.dtype)  # type: ignore[arg-type]
        parts = self.layers(codes).split(self.sizes, dim=1)
        return zip(parts[1::2], parts[::2], strict=True)  # a layer's shifts precede its scales


class Encoder(nn.Module):
    """Content encoder: (N, S, H, W) and domains (N,) → (N, 4w, H / 4, W / 4)."""

    def __init__(self, width: int = 64, blocks: int = 4, slices: int = 1) -> None:
        super().__init__()
        w = width
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(slices, w, 7, padding=3, padding_mode="reflect"),
                nn.Conv2d(w, 2 * w, 3, 2, padding=1),
                nn.Conv2d(2 * w, 4 * w, 3, 2, padding=1),
            ]
        )
        self.blocks = residual_blocks(4 * w, blocks)
        self.affine = DomainAffine([w, 2 * w, 4 * w] + [4 * w] * (2 * blocks))
        self.adain = AdaIN()
        initialise(self)

    def forward(self, images: Tensor, domains: Tensor) -> Tensor:
        """Return the content of images of the given domains (N,)."""
        affine, x = self.affine(domains), images
        for layer in self.layers:
            x = F.relu(self.adain(layer(x), *next(affine)))
        return residual(self.blocks, x, affine, self.adain)


class Decoder(nn.Module):
    """Decoder: content (N, 4w, h, w) and domains (N,) → images (N, S, 4h, 4w) in [-1, 1]."""

    def __init__(self, width: int = 64, blocks: int = 4, slices: int = 1) -> None:
        super().__init__()
        w = width
        self.blocks = residual_blocks(4 * w, blocks)
        self.layers = nn.ModuleList(
            [
                nn.ConvTranspose2d(4 * w, 2 * w, 3, 2, padding=1, output_padding=1),
                nn.ConvTranspose2d(2 * w, w, 3, 2, padding=1, output_padding=1),
            ]
        )
        self.head = ThinConv2d(w, slices, 7, padding=3, padding_mode="reflect")
        self.affine = DomainAffine([4 * w] * (2 * blocks) + [2 * w, w])
        self.adain = AdaIN()
        initialise(self)

    def forward(self, content: Tensor, domains: Tensor) -> Tensor:
        """Return images of the given domains (N,) with the given content."""
        affine = self.affine(domains)
        x = residual(self.blocks, content, affine, self.adain)
        for layer in self.layers:
            x = F.relu(self.adain(layer(x), *next(affine)))
        return torch.tanh(self.head(x))


class DomainDiscriminator(PatchGAN):
    """PatchGAN with one output per domain."""

    def __init__(self, width: int = 64, slices: int = 1) -> None:
        super().__init__(width, slices, outputs=2, bias=True)

    def forward(self, images: Tensor, domains: Tensor) -> Tensor:  # type: ignore[override]
        """Return the scores of images (N, S, H, W) for their domains (N,), (N, h, w)."""
        scores = super().forward(images)
        return scores[torch.arange(len(scores), device=scores.device), domains]


def residual_blocks(channels: int, count: int) -> nn.ModuleList:
    """Return two reflection-padded 3×3 convolutions for each of `count` blocks."""
    return nn.ModuleList(
        nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        for _ in range(2 * count)
    )


def residual(
    layers: nn.ModuleList, x: Tensor, affine: Iterator[tuple[Tensor, Tensor]], adain: AdaIN
) -> Tensor:
    """Apply x + AdaIN(conv(ReLU(AdaIN(conv(x))))) for each pair of layers."""
    for first, second in zip(layers[::2], layers[1::2], strict=True):
        y = F.relu(adain(first(x), *next(affine)))
        x = x + adain(second(y), *next(affine))
    return x


def initialise(network: nn.Module) -> None:
    """Initialise weights with He's normal rule and biases with 0."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
