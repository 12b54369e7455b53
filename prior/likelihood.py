"""What codes and predictions cost, in nats."""

import torch
import torch.nn.functional as F
from torch import Tensor

from prior.models.base import Prediction, PriorModel


def negative_log_likelihood(prediction: Prediction, smoothing: float = 0.0) -> Tensor:
    """-log p of each target (B, L); a share `smoothing` of the target is spread over all codes (Szegedy et al. 2016, section 7)."""
    logits, targets = prediction.logits.flatten(0, 1).float(), prediction.targets.flatten()
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing).view_as(
        prediction.targets
    )


def weighted_mean(per_code: Tensor, prediction: Prediction) -> Tensor:
    """The mean (scalar) of a value per code (B, L), times the prediction's weights."""
    return (per_code * prediction.weights).mean()


@torch.no_grad()
def judge_codes(model: PriorModel, codes: Tensor, labels: Tensor | None) -> Tensor:
    """-log p of each code of grids (B, h, w) or (B, h, w, num_codebooks), as (B, *model.code_shape) float32 on the CPU.

    Labels (B,) as for the model. For a model that is not `exact`, an unbiased estimate of an upper bound.
    """
    device = next(model.buffers()).device
    labels = labels.to(device) if labels is not None and model.classes else None
    prediction = model.judge(codes.flatten(1).long().to(device), labels)
    nats = (negative_log_likelihood(prediction) * prediction.weights).cpu()
    return nats.view(-1, *model.code_shape)
