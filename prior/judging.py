"""Likelihoods, samples and pictures of a prior for stage=evaluate."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.identity import identify_pixels
from codegrid.data.images import to_float, to_uint8
from codegrid.data.pictures import save_picture, tile_images
from codegrid.data.samples import ArraySamples
from codegrid.engine.console import progress_bar
from codegrid.engine.distributed import cluster_plugins
from codegrid.engine.errors import InputError
from codegrid.engine.folder import PICTURES
from codegrid.engine.precision import autocast
from codegrid.evaluation.adm.judging import AbsentAdmJudge, judge_run
from codegrid.evaluation.adm.reference import open_reference
from codegrid.evaluation.feature_set import AbsentFeatureSet, FeatureSet, add_mean_ratio
from codegrid.evaluation.histograms import histogram_distance, mixed_distance, tally_codes
from codegrid.evaluation.judging import (
    ReferenceHash,
    check_numbers,
    iterate_images,
    load_own_features,
    make_feature_sets,
    view_images,
)
from codegrid.evaluation.scores import SAME_SAMPLES, ScoreSheet, library_versions, names_in_group
from codegrid.evaluation.settings import EvaluationSettings
from codegrid.evaluation.units import describe_shown
from codegrid.evaluation.validity import ValidityJudge
from codegrid.evaluation.validity_picture import save_verdicts
from prior.conditioning.base import check_guidance, shorten_value
from prior.conditioning.images import ImageLabels, open_recorded_labels
from prior.conditioning.vectors import VectorCondition
from prior.decoding.generate import check_sampler_fits, generate
from prior.decoding.pictures import show_pixels
from prior.decoding.sampling import Sampler
from prior.extract import extract
from prior.likelihood import judge_codes
from prior.models.base import PriorModel
from prior.neighbours import MAX_JUDGED, find_neighbours
from prior.prior import Prior
from prior.samples import save_grid

SAMPLES_SHOWN = 64
SAMPLE_COLUMNS = 16
STRIP = 8  # pixels a code of a sequence, in its mean map

NO_SAMPLES = "no samples are drawn with samples=0"


def check_sampler(sampler: Sampler, model: PriorModel, kind: str) -> None:
    """Raise InputError for settings whose samples can't be compared with the images, and for those that this prior, or this kind
    of device, doesn't take."""
    for name in ("grid", "init_image"):
        if getattr(sampler, name) is not None:
            raise InputError(
                f"stage=evaluate judges whole samples of the prior's own grid; leave sampler.{name} out"
            )
    check_guidance(sampler, model)
    check_sampler_fits(model, sampler, kind)


def open_image_labels(
    trained: Prior, images: ImageDataModule, ckpt: str, changes: Mapping[str, Any]
) -> ImageLabels | None:
    """The labels of the images that a prior is judged on, where `changes` or its run have them; None for classes and for none.

    Raises InputError for a file of vectors if the prior learned none.
    """
    condition, file = trained.condition, changes.get("condition")
    is_of_file = isinstance(condition, VectorCondition) and not condition.of_columns
    if file is not None and not is_of_file:
        learned = condition.summarize() if condition is not None else "classes or nothing"
        raise InputError(
            f"condition={shorten_value(file)} of stage=evaluate says where a prior's file of vectors is now, and this prior is "
            f"conditioned on {learned}; leave condition out"
        )
    return open_recorded_labels(trained.condition, trained.config, images, ckpt, changes)


@torch.no_grad()
def measure_nats(model: PriorModel, codes: ArraySamples, batch_size: int) -> Tensor:
    """-log p of each code (n, h, w, num_codebooks), float32 on the CPU; its sum over an image is the image's.

    For a model that is not `exact`, an estimate of an upper bound.
    """
    if model.classes and int(np.max(codes.labels)) >= model.classes:
        raise InputError(
            f"the images are of {int(np.max(codes.labels)) + 1} classes, and the prior learned {model.classes}; evaluate it "
            "on those that it was trained on"
        )
    batches = []
    with progress_bar(len(codes), "likelihoods") as bar:
        for first in range(0, len(codes), batch_size):
            indices, labels = codes.__getitems__(range(first, min(first + batch_size, len(codes))))
            batches.append(judge_codes(model, indices, labels))
            bar.update(len(indices))
    return torch.cat(batches)


def add_likelihood_scores(sheet: ScoreSheet, trained: Prior, nats: Tensor) -> None:
    """Add nats per token, perplexity and bits per image; `nats` (n, h, w, num_codebooks) is -log p of each code."""
    about = {
        "n": len(nats),
        "exact": trained.model.exact,
        "codes": trained.tokenizer.fingerprint(),
        "library": library_versions("torch"),
    }
    per_image = nats.double().sum((1, 2, 3))
    per_token = float(per_image.mean()) / trained.model.L
    bits = per_image / math.log(2)
    sheet.add("nats_per_token", per_token, **about)
    sheet.add("perplexity", exp_or_infinity(per_token), **about)
    sheet.add("bits_per_image", float(bits.mean()), **about)
    sheet.add("bits_per_image_deviation", float(bits.std(correction=0)), **about)


def exp_or_infinity(nats: float) -> float:
    """e^nats; infinity from about 710 nats on, where a float ends."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def iterate_samples(
    trained: Prior,
    sampler: Sampler,
    m: int,
    labels: Tensor | None,
    settings: EvaluationSettings,
) -> Iterator[Tensor]:
    """m samples, batches (b, C, H, W) of pixels as a file would hold them; a conditional prior draws those of `labels` (m, ...).

    Raises InputError for a sample that is NaN.
    """
    tokenizer = trained.tokenizer
    batches = generate(trained.model, sampler, m, settings.seed, settings.batch_size, labels)
    with progress_bar(m, "samples") as bar:
        while True:
            with torch.no_grad(), settings.autocast():
                codes = next(batches, None)
                if codes is None:
                    return
                images = tokenizer.decode_indices(codes)
            check_numbers(images, "samples", settings)
            yield tokenizer.rules.to_pixels(images)
            bar.update(len(images))


class PriorJudge:
    """Measures a prior on a split: the likelihood of its images' codes, and samples compared with the images.

    `sampler_settings` are the settings of the sampler, for the provenance; `labels` are those of the images, for a prior of another
    condition than classes. Raises InputError, before any work is done, if the
    sampler's samples can't be compared with the images, or if images that will be needed are missing.
    """

    def __init__(
        self,
        trained: Prior,
        sampler: Sampler,
        sampler_settings: Mapping[str, Any],
        images: ImageDataModule,
        settings: EvaluationSettings,
        labels: ImageLabels | None = None,
    ) -> None:
        check_sampler(sampler, trained.model, settings.device.type)
        self.trained = trained
        self.sampler = sampler
        self.sampler_settings = sampler_settings
        self.images = images
        self.settings = settings
        self.labels = labels
        if labels is not None:
            labels.check(flip=False, crops=1)
        self.n = images.size(settings.split)
        self.m = min(settings.number_of_samples, self.n)
        self.reference = open_reference(settings, images, images.cache_dir)
        if self.m and settings.neighbours:
            images.size("train")
        self.validity = ValidityJudge(images, settings.validity, None if self.m else NO_SAMPLES)
        self.own = load_own_features(settings, images)
        trained.to(settings.device)

    def measure_all(self) -> ScoreSheet:
        """All scores of the split and of the samples; the latter are absent if none are drawn."""
        self.codes = self.encode_images()
        with self.settings.autocast():
            self.nats = measure_nats(self.trained.model, self.codes, self.settings.batch_size)
        feature_sets: list[FeatureSet] = [
            AbsentFeatureSet(suffix, NO_SAMPLES)
            for suffix in ("", "_proxy", *(f"_{name}" for name in self.settings.networks))
        ]
        if self.m:
            feature_sets = make_feature_sets(self.settings, self.images, self.own)
        self.adm = judge_run(self.reference, self.images)
        if self.reference is not None and not self.m:
            self.adm = AbsentAdmJudge(NO_SAMPLES)
        sheet = ScoreSheet(self.add_references(feature_sets))
        self.samples = self.add_samples(feature_sets)
        add_likelihood_scores(sheet, self.trained, self.nats)
        chosen = {k: v for k, v in self.sampler_settings.items() if k not in SAME_SAMPLES}
        if not self.trained.model.any_order:
            chosen["order"] = None  # whatever is the default of priors that have one
        about = {"judged": "samples", "sampler": chosen, "seed": self.settings.seed}
        sheet.common = {**sheet.common, **about}
        for feature_set in feature_sets:
            feature_set.add_distances(sheet, "gfid")
            feature_set.add_mind(sheet)
            feature_set.add_variety(sheet)
        add_mean_ratio(sheet, "gfid", feature_sets)
        self.add_histogram_scores(sheet)
        self.adm.add_scores(sheet)
        self.validity.add_scores(sheet, {"valid": "valid_samples", "empty": "empty_samples"})
        self.neighbours = self.add_neighbour_scores(sheet)
        return sheet

    def encode_images(self) -> ArraySamples:
        """The codes of the split's images (n, h, w) or (n, h, w, num_codebooks), with the numbers of the images' classes or their
        other labels."""
        fabric = Fabric(
            accelerator=self.settings.device.type, devices=1, plugins=cluster_plugins(1)
        )
        codes = extract(
            self.trained.tokenizer,
            self.images,
            self.settings.split,
            batch_size=self.settings.batch_size,
            fabric=fabric,
        )
        if self.labels is not None:
            codes.labels = self.labels.read(self.settings.split, fabric=fabric)
        if self.trained.model.classes:
            what = f"images of {self.images.title}"
            codes.labels = self.trained.classes.number(codes.labels, what)
        return codes

    def add_references(self, feature_sets: Sequence[FeatureSet]) -> dict[str, Any]:
        """Add all images of the split to the feature sets; return the provenance that all scores begin with."""
        reference_hash = ReferenceHash()
        for x in iterate_images(self.images, self.settings):
            pixels = self.images.rules.to_pixels(x)
            reference_hash.update(pixels)
            for feature_set in feature_sets:
                feature_set.add("reference", pixels)
        return reference_hash.provenance(self.images, self.settings.split)

    def add_samples(self, feature_sets: Sequence[FeatureSet]) -> Tensor:
        """Draw the samples and add them to the feature sets; return the pixels of the first ones (at most m, C, H, W).

        A conditional prior draws the classes of the images, or what else it is conditioned on.
        """
        labels = None
        if self.trained.model.is_conditional:
            evenly = np.linspace(0, self.n - 1, self.m).astype(int)
            labels = self.codes.__getitems__(evenly.tolist())[1]
        first: list[Tensor] = []
        self.sample_codes: list[Tensor] = []
        for batch in iterate_samples(self.trained, self.sampler, self.m, labels, self.settings):
            for feature_set in feature_sets:
                feature_set.add("judged", batch)
            self.adm.add(batch)
            self.validity.add(batch)
            self.sample_codes.append(self.encode_samples(batch))
            if sum(map(len, first)) < max(SAMPLES_SHOWN, MAX_JUDGED):
                first.append(batch.cpu())
        return torch.cat(first) if first else torch.empty(0)

    @torch.no_grad()
    def encode_samples(self, pixels: Tensor) -> Tensor:
        """The codes of samples, pixels (b, C, H, W), in the precision in which `extract` encodes images."""
        with autocast(self.settings.device):
            return self.trained.tokenizer.indices(to_float(pixels)).cpu()

    def add_histogram_scores(self, sheet: ScoreSheet) -> None:
        """Add how far the codes of samples are from those of the images in how often each occurs."""
        names = names_in_group("histogram")
        if not self.m:
            for name in names:
                sheet.mark_absent(name, NO_SAMPLES)
            return
        tokenizer = self.trained.tokenizer
        code_use = tokenizer.quantizer.make_code_use()
        both = np.asarray(self.codes.values), torch.cat(self.sample_codes).numpy()
        about = {
            "n": self.m,
            "n_reference": self.n,
            "codes": tokenizer.fingerprint_codes(),
            "library": library_versions("torch"),
        }
        real, drawn = (tally_codes(codes, code_use) for codes in both)
        sheet.add("chd", histogram_distance(real, drawn), **about)
        sheet.add("chd_mixed", mixed_distance(*both, code_use), **about)

    def add_neighbour_scores(self, sheet: ScoreSheet) -> Tensor | None:
        """Add how close samples are to training images; return a picture of the nearest ones, (3, H, W) uint8."""
        names = names_in_group("neighbours")
        if not self.m or not self.settings.neighbours:
            reason = NO_SAMPLES if not self.m else "left out with neighbours=false"
            for name in names:
                sheet.mark_absent(name, reason)
            return None
        flip = self.trained.config["flip"]
        nearest, neighbours = find_neighbours(
            self.samples, self.images, self.trained.tokenizer, flip
        )
        about = {
            "reference": "originals of train",
            "reference_hash": identify_pixels(self.images, "train"),
            "n_reference": self.images.size("train"),
            "n": min(self.m, MAX_JUDGED),
            "mirrored": flip,
            "library": library_versions("torch"),
        }
        for name in names:
            sheet.add(name, nearest[name], **about)
        return neighbours

    def rank_by_likelihood(self) -> dict[str, Tensor]:
        """The indices of the `show` most likely and of the `show` least likely images."""
        order = self.nats.double().sum((1, 2, 3)).argsort(stable=True)
        show = self.settings.show
        return {"most_likely": order[:show], "least_likely": order.flip(0)[:show]}

    def map_places(self) -> Tensor:
        """The mean nats of the codes of each place, (n, h, w)."""
        return self.trained.model.map_nats(self.nats.flatten(1))

    def white_level(self) -> float:
        """The nats of a code that are white in the maps, taken from all maps so that their shades can be compared.

        Neither a single improbable code nor the large weights of a bound's few codes stretch the scale.
        """
        maps = self.map_places()
        level = min(float(np.quantile(maps, 0.999)), 2 * math.log(self.trained.model.K))
        return level or 1.0  # codes that are certain have no nats, and their maps are black

    def save_files(self, folder: Path, ends: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write likelihoods.npz and the pictures; return where they are, and the nats that are white in the maps.

        likelihoods.npz has `nats` in the shape of the codes and the `labels` (n,) of the images.
        """
        file = folder / "likelihoods.npz"
        nats = self.nats.view(self.codes.values.shape).numpy()
        np.savez(file, nats=nats, labels=np.asarray(self.codes.labels))
        pictures = self.save_pictures(folder / PICTURES, ends)
        return {
            "white": round(self.white_level(), 2),
            "likelihoods": str(file),
            "pictures": [str(path) for path in pictures],
        }

    def save_pictures(self, folder: Path, ends: Mapping[str, Tensor]) -> list[Path]:
        """The images at the `ends` of the ranking with maps of their nats, the mean map, samples and their neighbours."""
        maps = self.map_places()
        tokenizer = self.trained.tokenizer
        has_places = tokenizer.is_spatial and maps.shape[1:] == tokenizer.grid
        f = tokenizer.f if has_places else STRIP  # codes without places lie on no image
        caption = describe_shown(self.images.rules, self.images.channels)
        rows = []
        for indices in ends.values():
            x = view_images(self.images, self.settings.split, indices)
            rows.append(self.images.rules.to_picture(x))
            if has_places:
                rows.append(heat_map_pictures(maps[indices] / self.white_level(), f))
        mean = maps.mean(0, keepdim=True)
        mean_picture = tile_images([heat_map_pictures(mean / (mean.max() or 1.0), f)], scale=4)
        files = [
            save_picture(tile_images(rows, scale=2), folder / "outliers.png", caption),
            save_picture(mean_picture, folder / "mean.png"),
        ]
        if self.m:
            shown = show_pixels(self.samples[:SAMPLES_SHOWN], self.images.rules)
            files.append(save_grid(shown, folder, SAMPLE_COLUMNS, SAMPLES_SHOWN, (), caption))
        files += save_verdicts(self.validity, folder)
        if self.neighbours is not None:
            files.append(save_picture(self.neighbours, folder / "neighbours.png", caption))
        return files

    @property
    def origin(self) -> tuple[str | None, str, str | None, int]:
        """The id of the prior's run, its stage, the id of its tokenizer's run, and the number of images."""
        return self.trained.config.get("id"), "prior", self.trained.tokenizer_of, self.n

    def describe_model(self) -> dict[str, Any]:
        """What the result says about the samples and the model."""
        model = self.trained.model
        return {"samples": self.m, "K": model.K, "grid": list(model.grid), "exact": model.exact}


def summarize_likelihoods(result: Mapping[str, Any]) -> list[str]:
    """Lines for the terminal: the most and the least likely images, and whether likelihoods are bounds."""
    lines = [
        f"{'most likely':24}{', '.join(result['most_likely'][:4])}",
        f"{'least likely':24}{', '.join(result['least_likely'][:4])}",
    ]
    if not result["exact"]:
        lines.append("nats and bits are upper bounds, estimated from one draw per image")
    return lines


def heat_map_pictures(maps: Tensor, f: int) -> Tensor:
    """Maps (n, h, w) as uint8 pictures (n, 3, f * h, f * w): black at 0, over red and yellow to white from 1 on."""
    red_green_blue = 3 * maps[:, None] - torch.arange(3)[:, None, None]  # each rises after the last
    pixels = to_uint8(red_green_blue.clamp(0, 1) * 2 - 1)
    return pixels.repeat_interleave(f, 2).repeat_interleave(f, 3)
