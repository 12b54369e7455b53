"""Reconstructions from perturbed codes, and their Fréchet distance (pFID): how a decoder takes codes that a prior gets wrong."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.evaluation.feature_set import FeatureSet
from codegrid.evaluation.scores import ScoreSheet, names_in_group
from codegrid.evaluation.settings import EvaluationSettings
from vqgan.quantizers.base import NO_CODES_MESSAGE, Quantizer
from vqgan.tokenizer import Tokenizer


@torch.no_grad()
def perturb_codes(quantizer: Quantizer, indices: Tensor, share: float, nearest: int) -> Tensor:
    """The codes of images (B, ...) with a share of each image's, at random places, replaced by one of the `nearest` codes to each.

    The share is of all codes of an image, those of all codebooks together, rounded, and at least one. What is replaced by what
    depends on the image's codes alone: neither on the other images nor on their order.
    """
    rows = indices.flatten(1)
    length = rows.shape[1]
    count = max(1, round(share * length))
    draws = [draw_places(row, count) for row in rows.cpu()]
    places = torch.stack([place for place, _ in draws]).to(rows.device)
    choices = torch.stack([choice for _, choice in draws]).to(rows.device)
    codebook_of = number_codebooks(quantizer, length).to(rows.device)[places]
    own = rows.gather(1, places)
    other = own.clone()
    for number, inner in enumerate(quantizer.list_codebooks()):
        is_own = codebook_of == number
        if is_own.any():
            near = inner.list_near(own[is_own], nearest).sort(1).values
            chosen = (choices[is_own] * near.shape[1]).long()
            other[is_own] = near.gather(1, chosen[:, None])[:, 0]
    return rows.scatter(1, places, other).view_as(indices)


def draw_places(codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` places of an image's codes (L,), and for each a number in [0, 1); always the same ones for the same codes."""
    digest = hashlib.sha256(codes.numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    places = torch.randperm(len(codes), generator=generator)[:count]
    return places, torch.rand(count, generator=generator)


def number_codebooks(quantizer: Quantizer, length: int) -> Tensor:
    """For each of an image's codes, in the order of its flattened indices, the number of its codebook, (length,) int64."""
    if lengths := quantizer.lengths:
        return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.arange(length) % quantizer.num_codebooks


class PerturbedJudge:
    """Measures reconstructions from perturbed codes by batches (pFID: Qiu et al. 2025, Image Tokenizer Needs Post-Training)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        images: ImageDataModule,
        settings: EvaluationSettings,
        feature_sets: Sequence[FeatureSet],
    ) -> None:
        self.tokenizer, self.images, self.settings = tokenizer, images, settings
        self.feature_sets = [each.share_reference() for each in feature_sets]
        self.absent = ""
        if tokenizer.K is None:
            self.absent = NO_CODES_MESSAGE
        elif not settings.perturb:
            self.absent = "left out with perturb=0"

    @torch.no_grad()
    def update(self, indices: Tensor) -> None:
        """The indices of images as the encoder chose them."""
        if self.absent:
            return
        share, nearest = self.settings.perturb, self.settings.perturb_nearest
        perturbed = perturb_codes(self.tokenizer.quantizer, indices, share, nearest)
        with self.settings.autocast():
            x_hat = self.tokenizer.decode_indices(perturbed)
        if x_hat.isnan().any():  # as pixels they would be black
            self.absent = "reconstructions from perturbed codes are NaN"
            return
        for feature_set in self.feature_sets:
            feature_set.add("judged", self.images.rules.to_pixels(x_hat))

    def add_scores(self, sheet: ScoreSheet) -> None:
        """Add pfid in the features of each network; absent without codes, and with perturb=0."""
        about = {
            "judged": "reconstructions from perturbed codes",
            "perturbed": self.settings.perturb,
            "nearest": self.settings.perturb_nearest,
        }
        of_perturbed = replace(sheet, common={**sheet.common, **about})  # the same scores
        for feature_set in self.feature_sets:
            if not self.absent:
                feature_set.add_frechet(of_perturbed, "pfid")
                continue
            for name in names_in_group("perturbed"):
                sheet.mark_absent(name + feature_set.suffix, self.absent)
