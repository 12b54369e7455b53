"""A small decoder that learns to decode as a tokenizer's own does, the teacher; the codes stay."""

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from codegrid.data.datamodule import ImageDataModule
from codegrid.engine.checkpoint import find_resumable, read_checkpoint
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError, check_int, check_range
from codegrid.engine.run import Run
from codegrid.evaluation.reconstruction import ImagePSNR, pixel_step, to_levels
from vqgan.backbones import follow_device
from vqgan.learning import LEARNERS
from vqgan.load import load_images
from vqgan.losses.balancer import Term
from vqgan.losses.micro_batch import MicroBatch
from vqgan.module import VQGAN
from vqgan.quantizers.base import Quantized
from vqgan.starting import Start, describe_start
from vqgan.tokenizer import Tokenizer

STUDENT_LEARNS = LEARNERS["decoder"]
OF_DECODER = ("decoder.", "out.")  # weights that lead from the codes to a picture


class Teacher:
    """A trained tokenizer whose decoder is learned from, and what of its pictures is.

    share    of the loss that compares with its pictures; the rest compares with the images
    mix      largest share of the places of a grid that get the vector of another image of the batch, as an editor of codes would
             paint them; that of each image is uniform from 0 to this. What the teacher makes of it is the target

    It is no submodule of what learns from it: its weights are in no checkpoint.
    """

    def __init__(self, tokenizer: Tokenizer, share: float, mix: float) -> None:
        check_range("teacher_share", share, 0, 1)
        check_range("mix", mix, 0, 1)
        if share < 1 and mix:
            raise InputError(
                f"teacher_share={share} also compares with the images, and mix={mix} decodes codes that are of none; use mix=0 or "
                "teacher_share=1"
            )
        self.tokenizer = tokenizer.eval().requires_grad_(False)
        self.share, self.mix = share, mix

    @torch.no_grad()
    def decode(self, z_q: Tensor) -> Tensor:
        """What the teacher makes of z_q (B, dim, h, w): pictures (B, C, H, W) float32 in [-1, 1]."""
        tokenizer = follow_device(self.tokenizer, z_q)
        assert isinstance(tokenizer, Tokenizer)
        return tokenizer.decode(z_q).clamp(-1, 1)


class Distillation(VQGAN):
    """A tokenizer with its teacher's encoder and codes, whose decoder learns to decode as the teacher's does (Hinton et al. 2015,
    for regression: the teacher's picture is a function of the codes, which the image is not).

    Validation adds psnr_to_teacher, of the student's pictures to the teacher's, and teacher_psnr, of these to the images.
    """

    def __init__(self, *parts: Any, teacher: Teacher) -> None:
        """`parts` are those of VQGAN. Raises InputError for a loss with a discriminator."""
        super().__init__(*parts)
        if self.adversary is not None:
            raise InputError(
                "stage=distill compares with the teacher's pictures, and this loss has a discriminator; use loss=vqvae, and train "
                "the student further with stage=vqgan init=<its run> learn=decoder"
            )
        self.teacher = teacher
        self.of_teacher = MetricCollection(
            {"psnr_to_teacher": ImagePSNR(), "teacher_psnr": ImagePSNR()}, compute_groups=False
        )

    def choose_latents(self, part: MicroBatch) -> Tensor:
        return mix_places(super().choose_latents(part), self.teacher.mix)

    def compare(self, part: MicroBatch, z_q: Tensor) -> dict[str, Term]:
        share = self.teacher.share
        terms = self.reconstruction.terms(self.teacher.decode(z_q), part.x_hat) if share else {}
        weighted = {f"{name}_to_teacher": weigh_term(term, share) for name, term in terms.items()}
        if share < 1:
            to_images = super().compare(part, z_q)
            weighted |= {name: weigh_term(term, 1 - share) for name, term in to_images.items()}
        return weighted

    def judge(self, x: Tensor, q: Quantized, x_hat: Tensor) -> None:
        super().judge(x, q, x_hat)
        depth = self.tokenizer.rules.depth
        taught = self.teacher.decode(q.z_q)
        for name, picture, target in (
            ("psnr_to_teacher", x_hat, taught),
            ("teacher_psnr", taught, x),
        ):
            metric = self.of_teacher[name]
            metric.update(to_levels(picture, depth), to_levels(target, depth), pixel_step(depth))

    def show_versions(self, x: Tensor) -> list[Tensor]:
        """Images, the teacher's reconstructions, and the student's."""
        taught = self.teacher.decode(self.tokenizer.encode(x).z_q)
        return [x, taught, *super().show_versions(x)[1:]]

    @property
    def metrics(self) -> list[Metric | MetricCollection]:
        return [*super().metrics, self.of_teacher]


def weigh_term(term: Term, share: float) -> Term:
    """A term of which only this share counts."""
    return Term(share * term.weight, term.loss)


def mix_places(z_q: Tensor, most: float) -> Tensor:
    """z_q (B, dim, h, w) with a share of the places of each image, uniform from 0 to `most`, from the image before it."""
    if not most:
        return z_q
    shares = most * torch.rand(len(z_q), 1, 1, 1, device=z_q.device)
    taken = torch.rand(len(z_q), 1, *z_q.shape[2:], device=z_q.device) < shares
    return torch.where(taken, z_q.roll(1, 0), z_q)


class TeacherStart(Start):
    """The weights are the teacher's, but for the decoder's; those of a run that is resumed are in its checkpoint."""

    def __init__(self, teacher: Teacher, of: str | None, resumes: bool) -> None:
        """`of` is the id of the teacher's run."""
        self.teacher, self.resumes = teacher.tokenizer, resumes
        self.of, self.tags = describe_start(of)

    def fill(self, tokenizer: Tokenizer, data: ImageDataModule) -> None:
        sizes = count_decoder(tokenizer), count_decoder(self.teacher)
        self.origin = {**self.of, "decoder_parameters": sizes[0], "teacher_parameters": sizes[1]}
        if self.resumes:
            return
        weights = {
            name: value
            for name, value in self.teacher.state_dict().items()
            if not name.startswith(OF_DECODER)
        }
        tokenizer.load_state_dict({**tokenizer.state_dict(), **weights})
        log_line(
            f"a decoder of {sizes[0]:,} parameters learns from one of {sizes[1]:,}; encoder and codes stay as they are"
        )


def count_decoder(tokenizer: Tokenizer) -> int:
    """The parameters that lead from the codes to a picture."""
    parts = [tokenizer.decoder, tokenizer.out]
    if tokenizer.patches is not None:
        parts.append(tokenizer.patches.out)
    return sum(p.numel() for part in parts for p in part.parameters())


def replace_decoder(
    tokenizer: Tokenizer, model: Mapping[str, Any], student: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """The `model` group of a tokenizer with the decoder that `student` describes, of the tokenizer's images and grid.

    Raises InputError for codes without places, which decoders of grids can't read; `source` is what the command names it by.
    """
    if not tokenizer.is_spatial:
        raise InputError(
            f"{source} has codes that are a sequence without places, and a student decodes a grid of codes; distill a tokenizer "
            "whose model.grid has rows and columns"
        )
    encoder = tokenizer.encoder
    sizes = {
        "image_size": list(encoder.image_size),
        "channels": encoder.channels,
        "grid": list(encoder.grid),
    }
    return {**deepcopy(dict(model)), "decoder": {**student, **sizes}}


def adopt_tokenizer(
    run: Run, tokenizer: Tokenizer, described: Mapping[str, Any]
) -> ImageDataModule:
    """The images that a tokenizer, whose run's config is `described`, was trained on. The config of a new run gets them, and the
    tokenizer's `model` and `quantizer` with the decoder that its `student` describes; one that is resumed has them."""
    config, ckpt = run.config, run.config.ckpt
    if run.resume:
        check_same_teacher(run.resume, tokenizer, ckpt)
        images: Any = OmegaConf.to_container(config.data, resolve=True)
        return load_images(images, {}, ckpt, run.resume)
    student: Any = OmegaConf.to_container(config.student, resolve=True)
    model = replace_decoder(tokenizer, described["model"], student, f"ckpt={ckpt}")
    images = dict(described["data"])
    if config.batch_size is not None:
        check_int("batch_size", config.batch_size, 1, "image")
        images["batch_size"] = config.batch_size
    data = load_images(images, config.data, ckpt)
    places = {name: value for name, value in config.data.items() if value is not None}
    config.model, config.quantizer = model, described["quantizer"]
    OmegaConf.update(config, "data", {**images, **places}, merge=False)
    return data


def check_same_teacher(folder: Path, tokenizer: Tokenizer, ckpt: str) -> None:
    """Raise InputError if the run in a folder that is resumed has learned from another tokenizer."""
    header = read_checkpoint(find_resumable(folder), "vqgan", setting="resume")["codegrid"]
    if header.get("teacher") != tokenizer.fingerprint():
        raise InputError(
            f"ckpt={ckpt} has other weights than the tokenizer that {folder} learned from; name that one, as it was then"
        )
