"""Contrastive unpaired translation, then segmentation: CUT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from glua_bench.config import setting
from glua_bench.losses import lsgan_loss, precise, real_fake_loss
from glua_bench.method import Batch, Context, Stage, TaskInfo, frozen
from glua_bench.methods.cycle_translate import ResnetGenerator
from glua_bench.methods.source_only import SegmentConfig, SourceOnly
from glua_bench.networks import PatchGAN

DOWNSAMPLING = (3, 6)  # layers of the generator's body: the strided convolutions
FIRST_BLOCK = 9  # the first residual block
SHORTEST = 1e-3  # features that are shorter keep their length, which bounds the gradient


@dataclass(frozen=True)
class CUTConfig(SegmentConfig):
    """Settings of the segmenter and of the translation; defaults are the paper's."""

    cut_share: float = setting(
        2.0, "updates of the translation stage as a multiple of steps", low=0.001, high=100
    )
    cut_width: int = setting(64, "channels of the generator at full resolution", low=4, high=128)
    cut_blocks: int = setting(9, "residual blocks of the generator", low=1, high=18)
    cut_width_d: int = setting(
        64, "channels after the discriminator's first convolution", low=4, high=128
    )
    cut_width_heads: int = setting(256, "channels of the MLP heads", low=4, high=1024)
    cut_batch: int = setting(4, "maximum number of images per domain and step", low=1, high=64)
    cut_lr: float = setting(2e-4, "learning rate of all networks", low=1e-6, high=1e-1, log=True)
    cut_lambda_x: float = setting(
        1.0, "weight of PatchNCE on source images; FastCUT has 10", low=0.001, high=1000
    )
    cut_lambda_y: float = setting(
        1.0, "weight of PatchNCE on target images (identity); FastCUT has 0", low=0, high=1000
    )
    cut_temperature: float = setting(0.07, "temperature of PatchNCE", low=0.001, high=10)
    cut_patches: int = setting(
        256, "positions per layer; all, if the layer has fewer", low=2, high=65536
    )


class CUT(SourceOnly):
    """Translate source images with CUT, then train the segmenter on them.

    Park et al., *Contrastive Learning for Unpaired Image-to-Image Translation*, ECCV 2020 (eq. 1-5;
    `taesungp/contrastive-unpaired-translation` where the paper is silent). Stage 1: a generator G
    from source to target, whose first half encodes, and an MLP head H_l for each of its layers l.
    With the features z of an image x and ẑ of G(x), after H_l and normalised to length 1, at random
    positions s and r of the same image,

        NCE(x) = mean over l, s of -log(exp(ẑ_s · z_s / τ) / Σ_r exp(ẑ_s · z_r / τ)).

    The discriminator minimises ½ (loss on target images + loss on G(x)); G and H minimise

        adv(G(x)) + λ_X NCE(x) + λ_Y NCE(y)

    with y from the target, whose term is an identity loss. z passes no gradient. Layers are the
    image, both strided convolutions, and the first and the fifth residual block. Stage 2 is
    `source_only` on G(x). The adversarial losses are least squares, without an image pool, and
    learning rates decay linearly in the second half of the stage, as published. Differences:
    generator and PatchGAN are those of `cycle_translate`, without the authors' blur before each
    change of resolution; λ_Y is the paper's (the code halves both weights while λ_Y > 0); a batch
    has 4 images instead of 1; linear layers start as usual in PyTorch; FastCUT's flips are omitted.
    """

    name = "cut"
    reference = "Park et al., ECCV 2020 (CUT)"
    needs = "source images and labels, target images"
    uses_target = True
    Config = CUTConfig
    presets = {
        "quick": {
            "cut_width": 8,
            "cut_blocks": 4,
            "cut_width_d": 16,
            "cut_width_heads": 64,
            "cut_batch": 2,
            "cut_lr": 1e-3,
            "cut_share": 3.0,
        }
    }

    def __init__(self, task: TaskInfo, config: CUTConfig) -> None:
        super().__init__(task, config)
        self.cut = ContrastiveTranslation(config, task.inputs)

    @classmethod
    def variants(cls) -> Mapping[str, Mapping[str, Any]]:
        """Return CUT and the weights of FastCUT."""
        return {"CUT": {}, "weights of FastCUT": {"cut_lambda_x": 10.0, "cut_lambda_y": 0.0}}

    def stages(self) -> tuple[Stage, ...]:
        """Return the cached translation stage and the segmentation stage on translated images."""
        return (
            translation_stage(self.cut, self.config),
            Stage("segment", decay=0.9, translate=self.cut.to_target),
        )

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return translated source images, and target images through the same generator."""
        return {
            "restyled": self.cut.to_target(batch.source_images),
            "target as target": self.cut.to_target(batch.target),
        }


def translation_stage(cut: ContrastiveTranslation, config: CUTConfig) -> Stage:
    """Return the translation stage of a method that has the translation as attribute `cut`."""
    return Stage(
        "translate",
        config.cut_share,
        depends_on=tuple(n for n in CUTConfig.__dataclass_fields__ if n.startswith("cut_")),
        modules=("cut",),
        photometric=False,
        decay=1.0,
        hold=0.5,
        step=cut.step,
        optimizers=cut.optimizers,
    )


class ContrastiveTranslation(nn.Module):
    """Generator, MLP heads and discriminator of CUT, and their training step.

    Args:
        config: the settings.
        planes: C·S, channels of an image.
    """

    def __init__(self, config: CUTConfig, planes: int = 1) -> None:
        super().__init__()
        self.config = config
        self.to_target = ResnetGenerator(config.cut_width, config.cut_blocks, planes)
        fifth = FIRST_BLOCK + min(5, config.cut_blocks) - 1
        # With one residual block, the first is also the last.
        self.layers = (*DOWNSAMPLING, *sorted({FIRST_BLOCK, fifth}))
        w, blocks = config.cut_width, len(self.layers) - len(DOWNSAMPLING)
        channels = [planes, 2 * w, 4 * w, *[4 * w] * blocks]
        self.heads = nn.ModuleList(head(size, config.cut_width_heads) for size in channels)
        self.discriminator = PatchGAN(config.cut_width_d, planes)

    def optimizers(self) -> dict[str, Optimizer]:
        """Return Adam with betas (0.5, 0.999) for generator and heads, and the discriminator."""
        generator = nn.ModuleList([self.to_target, self.heads])
        return {
            name: Adam(part.parameters(), self.config.cut_lr, (0.5, 0.999), fused=True)
            for name, part in (("generator", generator), ("discriminator", self.discriminator))
        }

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Update the discriminator, then generator and heads."""
        cfg = self.config
        source, target = batch.source_images[: cfg.cut_batch], batch.target[: cfg.cut_batch]
        count = len(source)
        images = torch.cat([source, target]) if cfg.cut_lambda_y else source
        made, keys = self.generate(images)
        fake = made[:count]
        d_loss = 0.5 * real_fake_loss(self.discriminator, target, fake.detach())
        context.update("discriminator", d_loss)

        with frozen(self.discriminator):
            adv = lsgan_loss(self.discriminator(fake), 1)
        queries = self.encode(made)
        losses = patch_nce(self.heads, queries, keys, cfg.cut_patches, cfg.cut_temperature)
        nce = losses[:count].mean()
        loss, logs = adv + cfg.cut_lambda_x * nce, {"nce": nce}
        if cfg.cut_lambda_y:
            logs["nce_identity"] = losses[count:].mean()
            loss = loss + cfg.cut_lambda_y * logs["nce_identity"]
        context.update("generator", loss)
        return {**logs, "adversarial": adv, "discriminator": d_loss}

    def generate(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the generator's images and the detached features of the images given to it."""
        made, features = self._pass(images, len(self.to_target.body))
        return made, [maps.detach() for maps in features]

    def encode(self, images: Tensor) -> list[Tensor]:
        """Return the features of images: these, and the maps (N, C, h, w) of `layers`."""
        return self._pass(images, self.layers[-1] + 1)[1]

    def _pass(self, images: Tensor, parts: int) -> tuple[Tensor, list[Tensor]]:
        """Return the output and the features of the first parts of the generator."""
        features, x = [images], images
        for index, part in enumerate(self.to_target.body[:parts]):
            x = part(x)
            if index in self.layers:
                features.append(x)
        return x, features


def head(channels: int, width: int) -> nn.Sequential:
    """Return the MLP of a layer, C → width → width."""
    return nn.Sequential(nn.Linear(channels, width), nn.ReLU(inplace=True), nn.Linear(width, width))


def patch_nce(
    heads: Sequence[nn.Module] | nn.ModuleList,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    patches: int,
    temperature: float,
) -> Tensor:
    """Compute PatchNCE of each image, averaged over layers and positions.

    Args:
        heads: an MLP for each layer.
        queries: features of the generated images, (N, C_l, h_l, w_l) for each layer.
        keys: features of the images given to the generator, of the same shapes; they pass no
            gradient.
        patches: positions to draw in each layer, the same in all images; all, if there are fewer.
        temperature: τ.

    Returns:
        (N,).
    """
    total = precise(queries[0]).new_zeros(len(queries[0]))
    for mlp, query, key in zip(heads, queries, keys, strict=True):
        places = torch.randperm(query[0, 0].numel())[:patches]
        places = places.to(query.device, non_blocking=True)
        own = unit_features(mlp, query, places)
        with torch.no_grad():
            other = unit_features(mlp, key, places)
        total = total + contrast(own, other, temperature)
    return total / len(queries)


def unit_features(mlp: nn.Module, maps: Tensor, places: Tensor) -> Tensor:
    """Return an MLP's outputs of length 1 at positions (P,), (N, C, h, w) → (N, P, D)."""
    chosen = maps.flatten(2)[:, :, places].transpose(1, 2)
    return F.normalize(precise(mlp(chosen)), dim=2, eps=SHORTEST)


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Return each image's mean cross-entropy of finding a query's own key among the image's keys.

    Args:
        queries: (N, P, D).
        keys: (N, P, D).
        temperature: τ, divides the dot products.

    Returns:
        (N,).
    """
    # In half precision, the rounding error of a dot product, divided by τ, would reach several %.
    with torch.autocast(queries.device.type, enabled=False):
        logits = queries @ keys.transpose(1, 2) / temperature
    own = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
    return F.cross_entropy(logits.transpose(1, 2), own, reduction="none").mean(1)
