"""What a prediction of a prior costs, in nats."""

import torch.nn.functional as F
from torch import Tensor

from prior.models.base import Prediction


def negative_log_likelihood(prediction: Prediction, smoothing: float = 0.0) -> Tensor:
    """-log p of each target (B, L); a share `smoothing` of the target is spread over all codes (Szegedy et al. 2016, section 7)."""
    logits, targets = prediction.logits.flatten(0, 1).float(), prediction.targets.flatten()
    return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing).view_as(
        prediction.targets
    )


def weighted_mean(per_code: Tensor, prediction: Prediction) -> Tensor:
    """The mean (scalar) of a value per code (B, L), times the prediction's weights."""
    return (per_code * prediction.weights).mean()
