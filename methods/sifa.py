"""SIFA: synergistic image and feature alignment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from glua_bench.config import setting
from glua_bench.errors import ConfigError
from glua_bench.losses import annotated, class_maps, lsgan_loss, one_hot, precise
from glua_bench.method import Batch, Context, Method, Role, Stage, TaskInfo, frozen
from glua_bench.methods.components.image_pool import ImagePool
from glua_bench.methods.components.sifa_networks import (
    STRIDE,
    Decoder,
    Discriminator,
    Encoder,
    Generator,
    Head,
)

# The authors' step runs the encoder eleven times, the last two times only its lower level. Each of
# the five passes here replaces the listed runs: b and b̂ before the generator's update, b̂ after it,
# b and b̂ after the encoder's update.
RUNS_LOW = ((1, 3), (2,), (4,), (5, 8, 10), (6, 7, 9, 11))
RUNS_HIGH = ((1, 3), (2,), (4,), (5, 8), (6, 7, 9))
# Adversarial networks, in the order of their updates.
ADVERSARIAL = ("generator", "d_b", "decoder", "d_a", "d_p", "d_p_low")


@dataclass(frozen=True)
class SIFAConfig:
    """Settings of SIFA; defaults are those of the authors' code."""

    lr: float = setting(2e-4, "learning rate of all networks", low=1e-6, high=1e-1, log=True)
    width_generator: int = setting(32, "channels of generator and decoder", low=2, high=128)
    width_encoder: int = setting(16, "channels of the encoder (even)", low=2, high=64)
    width_discriminator: int = setting(64, "channels of the discriminators", low=2, high=256)
    generator_blocks: int = setting(9, "residual blocks of the generator", low=1, high=18)
    decoder_dropout: float = setting(
        0.25, "dropout rate in the decoder's residual blocks", low=0, high=0.9
    )
    shared_adam: bool = setting(
        True, "share one update count among all adversarial networks in Adam's bias correction"
    )
    pool_size: int = setting(50, "image pool size in batches", low=1, high=1000)
    lambda_cycle: float = setting(10.0, "weight of both cycle losses", low=0, high=1000)
    lambda_image: float = setting(
        0.1, "weight of the decoder's loss in the encoder's loss", low=0, high=10
    )
    lambda_p: float = setting(0.1, "weight of prediction alignment", low=0, high=10)
    lambda_p_low: float = setting(
        0.01, "weight of prediction alignment at the auxiliary head", low=0, high=10
    )
    lambda_aux: float = setting(
        0.1, "weight of D_A's second output (cycled or fake)", low=0, high=10
    )
    lambda_low: float = setting(0.1, "weight of the auxiliary segmentation loss", low=0, high=10)
    l2: float = setting(1e-4, "L2 weight for encoder and heads (times ½)", low=0, high=1)


class SIFA(Method):
    """Synergistic image and feature alignment (v2): translate and segment with a shared encoder.

    Chen, Dou, Chen, Qin, Heng, *Unsupervised Bidirectional Cross-Modality Adaptation via Deeply
    Synergistic Image and Feature Alignment for Medical Image Segmentation*, IEEE TMI 2020. A
    re-implementation, checked against numbers of the authors' TensorFlow code (`cchen-cc/SIFA`):
    outputs, losses, and all variables after one training step agree. G is the generator a → b, E
    the shared encoder, U the decoder, b̂ = G(a), â = U(E(b)); adversarial losses are least squares,
    and 10 = `lambda_cycle`:

        cycles      C   = 10 |U(E(b̂)) - a| + 10 |G(â) - b|
        generator   G   : C + adv_B(b̂)
        decoder     U   : C + adv_A(â)
        encoder, heads  : CE + Dice + 0.1 (CE + Dice)_low + 10⁻⁴ · ½‖w‖² + 0.1 (C + adv_A(â))
                          + 0.1 adv_P(S(b)) + 0.01 adv_P,low(S_low(b)) + 0.1 adv_A,aux(â).

    CE and Dice are SIFA's own and compare the prediction on b̂ with a's labels. D_A and D_B read
    pooled fakes; D_A's second output separates cycled from fake images; D_P and D_P,low read
    logits.

    The authors update G, D_B, encoder and heads, U, D_A, D_P, D_P,low, each on a new forward pass.
    Here a pass is repeated only after a weight it depends on has changed. Passes of b through E and
    U serve the updates of G (with â detached) and of the encoder; passes of b and b̂ through the
    updated E, detached, serve U and the last three updates; b̂ is detached from G outside G's own
    update. Losses and gradients are the published ones, and batch norm's moving averages count each
    pass as often as the authors' code repeats it.

    Two quirks of that code are kept, each with a setting. The decoder's residual blocks drop a
    quarter of their features (`decoder_dropout`), although dropout is off everywhere else. One Adam
    serves the six adversarial networks, so its bias correction advances six times per step
    (`shared_adam`). The segmenter is SIFA's own encoder, not the shared one of the other methods.
    """

    name = "sifa"
    reference = "Chen et al., IEEE TMI 2020"
    needs = "source images and labels, target images"
    uses_target = True
    Config = SIFAConfig
    presets = {
        "quick": {
            "lr": 1e-3,
            "width_generator": 8,
            "width_encoder": 4,
            "width_discriminator": 16,
            "generator_blocks": 4,
        }
    }

    def __init__(self, task: TaskInfo, config: SIFAConfig) -> None:
        super().__init__(task, config)
        if task.size % STRIDE:
            raise ConfigError(
                f"sifa needs a slice size divisible by {STRIDE}, but that of {task.dataset} is "
                f"{task.size}; choose another preset or dataset."
            )
        if config.width_encoder % 2:
            raise ConfigError(
                f"method.width_encoder = {config.width_encoder} is odd; set an even value, since "
                "skips are padded equally on both sides."
            )
        slices = task.inputs
        self.generator = Generator(config.width_generator, config.generator_blocks, slices)
        self.encoder = Encoder(config.width_encoder, slices)
        self.decoder = Decoder(
            self.encoder.channels, config.width_generator, config.decoder_dropout, slices
        )
        self.head = Head(self.encoder.channels, task.classes)
        self.head_low = Head(self.encoder.channels, task.classes)
        width = config.width_discriminator
        self.d_a = Discriminator(slices, width, outputs=2)  # real or fake; cycled or fake
        self.d_b = Discriminator(slices, width)
        self.d_p = Discriminator(task.classes, width)
        self.d_p_low = Discriminator(task.classes, width)
        self.pool_a = ImagePool(config.pool_size, task.batch_size, task.size, slices)
        self.pool_b = ImagePool(config.pool_size, task.batch_size, task.size, slices)

    def stages(self) -> tuple[Stage, ...]:
        """Return one stage with constant learning rates."""
        return (Stage("segment"),)

    def optimizers(self) -> dict[str, Optimizer]:
        """Return Adam with β₁ = 0.5 for adversarial networks and 0.9 for encoder and heads."""
        lr, sharing = self.config.lr, len(ADVERSARIAL) if self.config.shared_adam else 1
        optimizers: dict[str, Optimizer] = {
            name: TensorFlowAdam(
                self.get_submodule(name).parameters(), lr, 0.5, index % sharing, sharing
            )
            for index, name in enumerate(ADVERSARIAL)
        }
        optimizers["segmentation"] = TensorFlowAdam(self.segmentation_weights(), lr, 0.9)
        return optimizers

    def segmentation_weights(self) -> list[nn.Parameter]:
        """Return the parameters of encoder and heads."""
        modules = (self.encoder, self.head, self.head_low)
        return [p for module in modules for p in module.parameters()]

    def step(self, batch: Batch, context: Context) -> dict[str, Tensor]:
        """Run the seven updates in the authors' order."""
        a, b, labels = batch.source_images, batch.target, batch.source_labels

        with frozen(self.decoder):
            latent_b, low_b = self.encode(b, 0)
            fake_a = self.decoder(latent_b, b)
        with frozen(self.encoder, self.decoder, self.d_b):
            fake_b = self.generator(a)
            cycle_a = self.decoder(self.encode(fake_b, 1)[0], fake_b)
            cycle_b = self.generator(fake_a.detach())
            adv_b = lsgan_loss(self.d_b(fake_b), 1)
        cycles = self.cycles(a, cycle_a, b, cycle_b)
        context.update("generator", cycles + adv_b)

        loss_d_b = discriminator_loss(self.d_b, b, self.pool_b(fake_b.detach()))
        context.update("d_b", loss_d_b)

        with torch.no_grad():
            fake_b = self.generator(a)
        with frozen(self.generator, self.decoder, self.d_a, self.d_p, self.d_p_low):
            latent, low = self.encode(fake_b, 2)
            cycle_a, cycle_b = self.decoder(latent, fake_b), self.generator(fake_a)
            cycles = self.cycles(a, cycle_a, b, cycle_b)
            adv_a, adv_a_aux = (lsgan_loss(scores, 1) for scores in self.d_a(fake_a).unbind(1))
            adv_p = lsgan_loss(self.d_p(self.head(latent_b)), 1)
            adv_p_low = lsgan_loss(self.d_p_low(self.head_low(low_b)), 1)
        segmentation = sifa_segmentation_loss(self.head(latent), labels)
        segmentation_low = sifa_segmentation_loss(self.head_low(low), labels)
        loss = self.loss_segmentation(
            segmentation, segmentation_low, cycles + adv_a, adv_p, adv_p_low, adv_a_aux
        )
        context.update("segmentation", loss)

        with torch.no_grad():
            (latent_b, low_b), (latent, low) = self.encode(b, 3), self.encode(fake_b, 4)
        with frozen(self.generator, self.d_a):
            fake_a = self.decoder(latent_b, b)
            cycle_a, cycle_b = self.decoder(latent, fake_b), self.generator(fake_a)
            adv_a = lsgan_loss(self.d_a(fake_a)[:, 0], 1)
        cycles = self.cycles(a, cycle_a, b, cycle_b)
        context.update("decoder", cycles + adv_a)

        with torch.no_grad():
            cycle_a = self.decoder(latent, fake_b)
        loss_d_a = self.loss_d_a(a, cycle_a, self.pool_a(fake_a.detach()))
        context.update("d_a", loss_d_a)

        with torch.no_grad():
            high_masks = self.head(latent), self.head(latent_b)
            low_masks = self.head_low(low), self.head_low(low_b)
        loss_d_p = discriminator_loss(self.d_p, *high_masks)
        context.update("d_p", loss_d_p)
        loss_d_p_low = discriminator_loss(self.d_p_low, *low_masks)
        context.update("d_p_low", loss_d_p_low)
        return {
            "segmentation": segmentation,
            "segmentation_low": segmentation_low,
            "cycles": cycles,
            "adv_a": adv_a,
            "adv_a_aux": adv_a_aux,
            "adv_b": adv_b,
            "adv_p": adv_p,
            "adv_p_low": adv_p_low,
            "d_a": loss_d_a,
            "d_b": loss_d_b,
            "d_p": loss_d_p,
            "d_p_low": loss_d_p_low,
        }

    def encode(self, images: Tensor, turn: int) -> tuple[Tensor, Tensor]:
        """Run a pass through E with the momentum that matches the authors' repeated passes.

        Args:
            images: (N, S, H, W).
            turn: index of the pass in the step, 0 to 4.
        """
        for level, runs in ((self.encoder.low, RUNS_LOW), (self.encoder.high, RUNS_HIGH)):
            momentum = batch_norm_momenta(runs)[turn]
            for layer in level.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.momentum = momentum
        latent, low = self.encoder(images)
        return latent, low

    def cycles(self, a: Tensor, cycle_a: Tensor, b: Tensor, cycle_b: Tensor) -> Tensor:
        """Return the weighted sum of both cycle losses."""
        return self.config.lambda_cycle * (F.l1_loss(cycle_a, a) + F.l1_loss(cycle_b, b))

    def loss_segmentation(
        self,
        segmentation: Tensor,
        segmentation_low: Tensor,
        decoder: Tensor,
        adv_p: Tensor,
        adv_p_low: Tensor,
        adv_a_aux: Tensor,
    ) -> Tensor:
        """Return the loss of encoder and heads from its parts; `decoder` is the decoder's loss."""
        cfg = self.config
        return (
            segmentation
            + cfg.lambda_low * segmentation_low
            + cfg.l2 * self.half_squared_norm()
            + cfg.lambda_image * decoder
            + cfg.lambda_p * adv_p
            + cfg.lambda_p_low * adv_p_low
            + cfg.lambda_aux * adv_a_aux
        )

    def half_squared_norm(self) -> Tensor:
        """Return ½‖w‖² of encoder and heads, including the norms' scales and shifts."""
        return 0.5 * torch.stack([p.square().sum() for p in self.segmentation_weights()]).sum()

    def loss_d_a(self, real: Tensor, cycled: Tensor, fake: Tensor) -> Tensor:
        """Return D_A's loss, real or fake plus cycled or fake, in one pass."""
        scores = self.d_a(torch.cat([real, cycled, fake])).chunk(3)
        return half_real_fake(scores[0][:, 0], scores[2][:, 0]) + half_real_fake(
            scores[1][:, 1], scores[2][:, 1]
        )

    def predict(self, images: Tensor, domain: Role) -> Tensor:
        """Return logits (N, K, H, W) for (N, S, H, W); source images are translated first."""
        return self.head(self.features(images, domain))

    def features(self, images: Tensor, domain: Role) -> Tensor:
        """Return the latent that the head reads, (N, 32 · `width_encoder`, H/8, W/8)."""
        return self.encoder(self.generator(images) if domain == "source" else images)[0]

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Return source images translated to target, and target images translated to source."""
        back = self.decoder(self.encoder(batch.target)[0], batch.target)
        return {"restyled": self.generator(batch.source_images), "target as source": back}


class TensorFlowAdam(Adam):
    """Adam as in TensorFlow 1: ε is added to √v before v's bias correction, not after it.

    Several networks can share one update count, as if one optimizer stepped them in turn.

    Args:
        parameters: parameters of one network.
        lr: learning rate.
        beta1: β₁; β₂ is 0.999 and ε is 1e-8.
        index: index of the network among those that share the count.
        sharing: number of networks that share the count.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        beta1: float,
        index: int = 0,
        sharing: int = 1,
    ) -> None:
        group = {"params": list(parameters), "updates": 0}  # a group is part of a checkpoint
        super().__init__([group], lr, (beta1, 0.999), fused=True)
        self.index, self.sharing = index, sharing
        # Let float16's gradient scaler skip the whole step, so skipped updates are not counted.
        self._step_supports_amp_scaling = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update with torch's Adam at the rate and ε that match TensorFlow's."""
        (group,) = self.param_groups
        lr, eps = group["lr"], group["eps"]
        counted = self.sharing * group["updates"] + self.index + 1
        group["updates"] += 1
        own = correction(group["betas"], group["updates"])  # what torch applies
        group["lr"] = lr * correction(group["betas"], counted) / own
        group["eps"] = eps / math.sqrt(1 - group["betas"][1] ** group["updates"])
        result = super().step(closure)
        group["lr"], group["eps"] = lr, eps
        return result


def correction(betas: tuple[float, float], updates: int) -> float:
    """Return the factor that Adam's bias corrections apply to the learning rate."""
    return math.sqrt(1 - betas[1] ** updates) / (1 - betas[0] ** updates)


def batch_norm_momenta(runs: Sequence[Sequence[int]], momentum: float = 0.1) -> list[float]:
    """Return momenta for a step's passes that reproduce the moving averages of repeated passes.

    Args:
        runs: for each pass, in order, the positions of the repeated passes it replaces, from 1.
        momentum: momentum of a repeated pass.
    """
    last = max(place for places in runs for place in places)
    shares = [momentum * sum((1 - momentum) ** (last - p) for p in places) for places in runs]
    # Later passes shrink a pass's contribution, so divide by the part that they leave.
    return [share / (1 - sum(shares[turn + 1 :])) for turn, share in enumerate(shares)]


def half_real_fake(real: Tensor, fake: Tensor) -> Tensor:
    """Return ½ (mean (real - 1)² + mean fake²) of scores."""
    return 0.5 * (lsgan_loss(real, 1) + lsgan_loss(fake, 0))


def discriminator_loss(discriminator: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Return a discriminator's loss from one joint pass; instance norm keeps images independent."""
    return half_real_fake(*discriminator(torch.cat([real, fake])).chunk(2))


def sifa_segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return SIFA's cross-entropy + Dice loss, both including the background."""
    return sifa_cross_entropy(logits, labels) + sifa_dice_loss(logits, labels)


def sifa_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of -(1 - class frequency) log p, with the label's p clipped at 0.005.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), class indices or `UNANNOTATED`.
    """
    seen, classes = annotated(labels)
    own = precise(logits).softmax(1).gather(1, classes.unsqueeze(1)).squeeze(1)
    # Factor from means over all pixels to means over annotated ones; exactly 1 if all are.
    number = seen.sum().clamp(min=1).to(own)
    more = torch.full_like(number, labels.numel()) / number
    counts = one_hot(labels, logits.shape[1]).sum((0, 2, 3))
    frequency = counts.to(own) / labels.numel() * more
    losses = (1 - frequency)[classes] * own.clamp(0.005, 1).log() * seen
    return -losses.mean() * more


def sifa_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 - mean over classes of 2 Σ p r / (Σ p² + Σ r + 1e-7), summed over the batch.

    Args:
        logits: (N, K, H, W).
        labels: (N, H, W), class indices or `UNANNOTATED`.
    """
    probabilities, reference = class_maps(logits, labels)
    overlap = (probabilities * reference).sum((0, 2, 3))
    size = probabilities.square().sum((0, 2, 3)) + reference.sum((0, 2, 3))
    return 1 - (2 * overlap / (size + 1e-7)).mean()
