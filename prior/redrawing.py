"""Codes that a prior draws, or draws anew, for a decoder that trains on them (`stage=vqgan init=... codes=<prior run>`)."""

import torch
from torch import Tensor

from codegrid.engine.errors import InputError, check_int, check_range
from prior.decoding.sampling import Sampler, make_sampler
from prior.load import load_prior
from prior.models.base import PriorModel
from vqgan.backbones import follow_device
from vqgan.learning import Learners
from vqgan.losses.code_changes import CodeChange
from vqgan.quantizers.base import Quantized, Quantizer
from vqgan.tokenizer import Tokenizer


class Redraw(CodeChange):
    """Lets a prior draw a share of each image's codes anew (RobusTok, Qiu et al. 2025, section 3.3).

    The share of an image is uniform in [0, `share`], and which of its codes are drawn is random; the others stay, and tie the
    codes to the image that the decoder has to reconstruct. In one pass the prior draws each of these codes by what it reads of
    the image: all codes before it, or, of a masked prior, those that are not masked with it. In each further pass it reads what
    it drew in the pass before. The random numbers of all passes are the same, so of an autoregressive prior L passes draw as
    `fill` does, code by code; fewer are on the way there.

    The prior is no submodule: its weights are in no checkpoint.
    """

    def __init__(
        self,
        ckpt: str,
        share: float,
        passes: int,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> None:
        check_range("redraw.share", share, 0, 1)
        check_int("redraw.passes", passes, 1, "pass")
        self.share, self.passes = share, passes
        self.sampler = make_sampler(temperature=temperature, top_k=top_k, top_p=top_p)
        self.source = f"codes={ckpt}"
        prior = load_prior(ckpt)
        if prior.condition is not None:
            raise InputError(
                f"{self.source} is a prior of vectors or of other images' codes, which the images of this run don't come with; "
                "name a prior of no condition, or of classes"
            )
        self.model = prior.model.requires_grad_(False)
        self.code_shape = prior.tokenizer.code_shape
        self.channels = prior.tokenizer.encoder.channels
        self.fingerprint = prior.tokenizer.fingerprint_codes()
        self.has_classes = len(prior.classes) > 0
        self._labels = torch.tensor([-1, *prior.classes.labels])  # of its classes, in their order

    def check(self, tokenizer: Tokenizer, learners: Learners) -> None:
        super().check(tokenizer, learners)
        if learners.encoder or learners.codes or not learners.any:
            raise InputError(
                f"{self.source} draws codes of the tokenizer that init=... names, which have to stay as they are while the "
                "decoder learns them; add learn=decoder"
            )
        if tokenizer.code_shape != self.code_shape:
            sizes = ["x".join(map(str, shape)) for shape in (self.code_shape, tokenizer.code_shape)]
            raise InputError(
                f"{self.source} draws {sizes[0]} codes an image, and the images of this run have {sizes[1]}; "
                "use images of the size that the prior learned"
            )
        if tokenizer.encoder.channels != self.channels:
            raise InputError(
                f"{self.source} draws codes of images of {self.channels} channels, and these have {tokenizer.encoder.channels}; "
                f"use data.channels={self.channels}"
            )

    @torch.no_grad()
    def __call__(
        self, quantizer: Quantizer, q: Quantized, indices: Tensor, labels: Tensor | None
    ) -> Tensor:
        model: PriorModel = follow_device(self.model, indices)  # type: ignore[assignment]
        codes = indices.flatten(1)
        classes = None if labels is None else self.number_labels(labels)
        shares = self.share * torch.rand(len(codes), 1, device=codes.device)
        is_drawn = torch.rand(codes.shape, device=codes.device) < shares
        uniform = torch.rand(codes.shape, device=codes.device)
        drawn = redraw_codes(model, codes, is_drawn, uniform, self.passes, self.sampler, classes)
        return drawn.view_as(indices)

    def number_labels(self, labels: Tensor) -> Tensor | None:
        """The prior's classes of images that have these labels (B,) in the data, -1 for none and for one that it did not learn;
        None for a prior without classes."""
        if not self.has_classes:
            return None
        if self._labels.device != labels.device:
            self._labels = self._labels.to(labels.device)
        places = torch.searchsorted(self._labels, labels).clamp(max=len(self._labels) - 1)
        return torch.where(self._labels[places] == labels, places - 1, -1)


def redraw_codes(
    model: PriorModel,
    codes: Tensor,
    is_drawn: Tensor,
    uniform: Tensor,
    passes: int,
    sampler: Sampler,
    labels: Tensor | None = None,
) -> Tensor:
    """The codes (n, L) with those that `is_drawn` (n, L) drawn anew by the numbers `uniform` (n, L), in so many passes."""
    current = codes
    for _ in range(passes):
        current = torch.where(is_drawn, model.redraw(current, labels, uniform, sampler), codes)
    return current
