"""What the two players of a training step hand each other."""

from dataclasses import dataclass, field

from torch import Tensor

from vqgan.discriminators.base import Judgement
from vqgan.quantizers.base import Quantized


@dataclass
class MicroBatch:
    """A part of a batch: images x (B, C, H, W), and what the generator's turn leaves for the rest of the step.

    share         of the whole batch
    labels        (B,) of the images, as the data have them
    q, x_hat      the bottleneck's output and the reconstruction, which is a leaf without the decoder's graph
    real, fake    judgements of x and x_hat with a graph to the discriminator's weights; None if it has to judge again
    """

    x: Tensor
    share: float = 1.0
    labels: Tensor | None = None
    q: Quantized = field(init=False)
    x_hat: Tensor = field(init=False)
    real: Judgement | None = None
    fake: Judgement | None = None
