"""What codes and predictions cost, in nats."""

import torch
from torch import Tensor

from prior.heads.base import Judged
from prior.models.base import Prediction, PriorModel


def negative_log_likelihood(prediction: Prediction, smoothing: float = 0.0) -> Tensor:
    """-log p of each target (B, L); a share `smoothing` of the target is spread over all codes (Szegedy et al. 2016, section 7)."""
    return prediction.head.nats(prediction.features, prediction.targets, smoothing)


def learning_losses(prediction: Prediction, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """What an update minimises at each target (B, L), as the head has it, and the target's nats, without gradients."""
    return prediction.head.losses(prediction.features, prediction.targets, smoothing)


def judge_prediction(prediction: Prediction) -> Judged:
    """The nats and the ranks of the targets (B, L)."""
    return prediction.head.judge(prediction.features, prediction.targets)


def weighted_mean(per_code: Tensor, prediction: Prediction) -> Tensor:
    """The mean (scalar) of a value per code (B, L), times the prediction's weights."""
    return (per_code * prediction.weights).mean()


@torch.no_grad()
def judge_codes(model: PriorModel, codes: Tensor, labels: Tensor | None) -> Tensor:
    """-log p of each code of grids (B, h, w) or (B, h, w, num_codebooks), as (B, *model.code_shape) float32 on the CPU.

    Labels (B, ...) as for the model. For a model that is not `exact`, an unbiased estimate of an upper bound.
    """
    device = next(model.buffers()).device
    labels = labels.to(device) if labels is not None and model.is_conditional else None
    prediction = model.judge(codes.flatten(1).long().to(device), labels)
    nats = (negative_log_likelihood(prediction) * prediction.weights).cpu()
    return nats.view(-1, *model.code_shape)
