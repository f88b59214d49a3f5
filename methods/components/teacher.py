"""Mean teacher; a component of `mean_teacher` and `glua_self_training`.

The teacher is the exponential moving average of the segmenter. On target images, the student reads
images recoloured by random tone curves and is trained towards the teacher's predictions on the
original images, where the teacher is confident:

    L_cons = mean over pixels of [max_k q_k > τ] · mean over classes of (p - q)².

Tarvainen and Valpola, NeurIPS 2017; confidence threshold: French et al., ICLR 2018.
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
from glua_bench.methods.components.host_count import HostCount


@dataclass(frozen=True)
class TeacherConfig:
    """Settings of self-training."""

    lambda_consistency: float = setting(3.0, "weight of the consistency loss", low=0, high=100)
    confidence: float = setting(
        0.968, "minimum probability of a teacher prediction to train on", low=0, high=1
    )
    teacher_decay: float = setting(
        0.99, "decay of the teacher's moving average per update", low=0, high=0.99999
    )


class Teacher(nn.Module):
    """Moving average of the segmenter, and the consistency loss.

    Args:
        segmenter: the student, whose weights are copied.
        config: the settings.
        channels: number of input channels, which are recoloured independently.
    """

    def __init__(self, segmenter: nn.Module, config: TeacherConfig, channels: int = 1) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        self.segmenter: Any = copy.deepcopy(segmenter).requires_grad_(False)
        self.updates = HostCount()

    def loss(
        self,
        student: nn.Module,
        images: Tensor,
        logits: Callable[[Any, Tensor], Tensor] = lambda segmenter, x: segmenter(x).logits,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the student's loss on target images and the scalars to log.

        Args:
            student: the segmenter.
            images: (N, S, H, W).
            logits: function from a segmenter (student or teacher) and target images to logits.
        """
        with torch.no_grad():
            teacher = logits(self.segmenter, images).float().softmax(1)
        sure = (teacher.amax(1) > self.config.confidence).float()
        own = logits(student, augment.tone_curves(images, self.channels)).float().softmax(1)
        consistency = (sure * (own - teacher).square().mean(1)).mean()
        # Logged because a teacher that is confident only about background teaches nothing else.
        found = sure * (teacher.argmax(1) > 0)
        logs = {"consistency": consistency, "sure": sure.mean(), "sure_foreground": found.mean()}
        return self.config.lambda_consistency * consistency, logs

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Update the teacher after a student step; faster at first to forget the initialisation."""
        done = self.updates.increase()
        keep = min(self.config.teacher_decay, done / (done + 9))
        torch._foreach_lerp_(
            list(self.segmenter.parameters()), [p.detach() for p in student.parameters()], 1 - keep
        )
        for own, other in zip(self.segmenter.buffers(), student.buffers(), strict=True):
            own.copy_(other)
