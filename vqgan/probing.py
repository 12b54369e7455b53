"""The linear probe of a tokenizer's codes: how much of what an image shows can be read off their embeddings."""

import numpy as np
import torch
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.identity import identify_pixels
from codegrid.data.images import to_float
from codegrid.data.samples import ArraySamples
from codegrid.engine.console import log_line
from codegrid.evaluation.intervals import share_interval
from codegrid.evaluation.probe import MAX_FEATURES, fit_probe, pool_features
from codegrid.evaluation.proxy import list_label_classes, number_batch
from codegrid.evaluation.scores import ScoreSheet, library_versions, names_in_group
from codegrid.evaluation.settings import EvaluationSettings
from vqgan.quantizers.base import NO_CODES_MESSAGE
from vqgan.tokenizer import Tokenizer


LEAST_PER_CLASS = 10  # training images


class ProbeJudge:
    """Learns labels from the embeddings of training images' codes, and measures how many it gets right of the judged ones.

    The embeddings are frozen: z_q, what the decoder takes. The same is done with the images' pixels for comparison.
    """

    def __init__(
        self, tokenizer: Tokenizer, images: ImageDataModule, settings: EvaluationSettings
    ) -> None:
        self.tokenizer, self.images, self.settings = tokenizer, images, settings
        self.features: dict[str, list[Tensor]] = {"codes": [], "pixels": []}  # of judged images
        self.absent = ""
        if tokenizer.K is None:
            self.absent = NO_CODES_MESSAGE
        elif not settings.probe:
            self.absent = "left out with probe=0"
        elif settings.split == "train":
            self.absent = "it learns from the training images; use split=val"
        else:
            self.classes = list_label_classes(images)
            self.absent = self.explain_labels()

    def explain_labels(self) -> str:
        """Why the labels that are there are no task; empty if they are one."""
        classes = len(self.classes)
        n = min(self.settings.probe, self.images.size("train"))
        if classes < 2:
            return "these images have no labels"
        if n < LEAST_PER_CLASS * classes:
            return (
                f"{n:,} training images are too few for {classes:,} classes; use probe={LEAST_PER_CLASS * classes}"
                " or more, if there are as many"
            )
        return ""

    def update(self, x: Tensor, indices: Tensor) -> None:
        """Pixels (B, C, H, W) of judged images, in the order of the split, and their indices."""
        if not self.absent:
            for name, values in self.extract(to_float(x), indices).items():
                self.features[name].append(values)

    @torch.no_grad()
    def extract(self, x: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """The features of images (B, C, H, W) in [-1, 1] with these indices, (B, D) float32 on the CPU."""
        z_q = self.tokenizer.quantizer.lookup(indices)
        return {"codes": pool_features(z_q).cpu(), "pixels": pool_features(x).cpu()}

    def learn_from(self) -> tuple[dict[str, Tensor], Tensor]:
        """The features of training images from all over the split, and their labels (n,)."""
        samples = self.images.samples("train")
        n = min(self.settings.probe, len(samples))
        rows = torch.from_numpy(np.linspace(0, len(samples) - 1, n).astype(int))
        parts: list[dict[str, Tensor]] = []
        labels: list[Tensor] = []
        for part in rows.split(self.settings.batch_size):
            pixels, numbers = samples.__getitems__(part.tolist())
            x = self.images.preprocess(pixels.to(self.settings.device))
            with torch.no_grad(), self.settings.autocast():
                indices = self.tokenizer.indices(x)
            parts.append(self.extract(x, indices))
            labels.append(number_batch(numbers, self.classes))
        joined = {name: torch.cat([part[name] for part in parts]) for name in self.features}
        return joined, torch.cat(labels)

    def judged_labels(self) -> Tensor:
        """The labels (n,) of the judged images."""
        samples = self.images.samples(self.settings.split)
        assert isinstance(samples, ArraySamples)  # or there would be no classes
        labels = samples.labels if samples.rows is None else samples.labels[samples.rows]
        return number_batch(torch.from_numpy(labels.astype(np.int64)), self.classes)

    def add_scores(self, sheet: ScoreSheet) -> None:
        """Add the shares of right labels of the codes, of the pixels, and of the most frequent label of the training images."""
        if self.absent:
            for name in names_in_group("probe"):
                sheet.mark_absent(name, self.absent)
            return
        log_line("linear probe of the codes")
        features, labels = self.learn_from()
        expected = self.judged_labels()
        right = {"probe_top1_majority": expected == labels.bincount().argmax()}
        for name, kind in (("probe_top1", "codes"), ("probe_top1_pixels", "pixels")):
            probe = fit_probe(features[kind], labels, len(self.classes))
            right[name] = probe.predict(torch.cat(self.features[kind])) == expected
        n = len(expected)
        about = {
            "n_train": len(labels),
            "train_hash": identify_pixels(self.images, "train"),
            "classes": len(self.classes),
            "features": f"at most {MAX_FEATURES:,}",
            "library": library_versions("scipy", "torch"),
        }
        for name in names_in_group("probe"):
            count = int(right[name].sum())
            sheet.add(name, count / n, share_interval(count, n), **about)
