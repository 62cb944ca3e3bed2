"""What training makes smaller, one loss for each head: (model, outputs, ages) -> losses [B]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from utils.model import AgeRegressor

LABEL_SPREAD = 2.0  # years: standard deviation of the distribution about a label
Loss = Callable[[AgeRegressor, torch.Tensor, torch.Tensor], torch.Tensor]


def absolute(model: AgeRegressor, outputs: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """Absolute error in years: L1."""
    return F.l1_loss(model.ages(outputs), ages, reduction="none")


def distribution(model: AgeRegressor, outputs: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """Absolute error in years, plus the Kullback-Leibler divergence of the predicted distribution
    from a normal curve of LABEL_SPREAD years about the label (Gao et al., DLDL-v2, IJCAI 2018)."""
    wanted = (-((model.years - ages.unsqueeze(1)) ** 2) / (2 * LABEL_SPREAD**2)).softmax(1)
    divergence = F.kl_div(outputs.log_softmax(1), wanted, reduction="none").sum(1)
    return absolute(model, outputs, ages) + divergence


def age_group(model: AgeRegressor, outputs: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the age groups 0-9, 10-19, ..., 70 and older."""
    groups = (ages / 10).long().clamp(max=outputs.shape[1] - 1)
    return F.cross_entropy(outputs, groups, reduction="none")


def ordinal(model: AgeRegressor, outputs: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the questions "older than k years?" (Cao et al., CORAL, 2020)."""
    from coral_pytorch.losses import coral_loss

    levels = (ages.unsqueeze(1) > model.years).to(outputs.dtype)
    return coral_loss(outputs, levels, reduction=None)


LOSSES: dict[str, Loss] = {
    "regression": absolute,
    "distribution": distribution,
    "groups": age_group,
    "ordinal": ordinal,
}
