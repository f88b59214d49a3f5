"""Self-training by a mean teacher, a component of `mean_teacher` and `glua_self_training`.

The teacher is the exponential moving average of the segmenter. On target images the segmenter,
which sees them through random tone curves, is drawn to what the teacher says of them as they
are, where the teacher is sure:

    L_cons = mean over pixels of [max_k q_k > τ] · mean over classes of (p - q)².

Tarvainen and Valpola, NeurIPS 2017; confidence instead of a ramp: French et al., ICLR 2018.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from glua_bench import augment
from glua_bench.config import setting


@dataclass(frozen=True)
class TeacherConfig:
    """Settings of the self-training."""

    lambda_consistency: float = setting(3.0, "weight of the consistency", low=0, high=100)
    confidence: float = setting(
        0.968, "probability above which the teacher is believed", low=0, high=1
    )
    teacher_decay: float = setting(
        0.99, "share of itself that the teacher keeps in an update", low=0, high=0.99999
    )


class Teacher(nn.Module):
    """The averaged segmenter, and the loss that it gives.

    Args:
        segmenter: the student, whose weights are copied.
        config: the settings.
    """

    updates: Tensor

    def __init__(self, segmenter: nn.Module, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.segmenter: Any = copy.deepcopy(segmenter).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def loss(
        self,
        student: nn.Module,
        images: Tensor,
        logits: Callable[[Any, Tensor], Tensor] = lambda segmenter, x: segmenter(x).logits,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the student minimises on target images, and what to log of it.

        Args:
            student: the segmenter.
            images: (N, S, H, W).
            logits: of a segmenter, the student or the teacher, and target images.
        """
        with torch.no_grad():
            teacher = logits(self.segmenter, images).float().softmax(1)
        sure = (teacher.amax(1) > self.config.confidence).float()
        own = logits(student, augment.tone_curves(images)).float().softmax(1)
        consistency = (sure * (own - teacher).square().mean(1)).mean()
        # A teacher that is sure of the background alone teaches to find nothing.
        found = sure * (teacher.argmax(1) > 0)
        logs = {"consistency": consistency, "sure": sure.mean(), "sure_foreground": found.mean()}
        return self.config.lambda_consistency * consistency, logs

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move the teacher after a step of the student; faster at first, to forget the start."""
        self.updates += 1
        done = int(self.updates)
        keep = min(self.config.teacher_decay, done / (done + 9))
        torch._foreach_lerp_(
            list(self.segmenter.parameters()), [p.detach() for p in student.parameters()], 1 - keep
        )
        for own, other in zip(self.segmenter.buffers(), student.buffers(), strict=True):
            own.copy_(other)
