"""The linear probe of a tokenizer's codes: how much of what an image shows can be read off their embeddings."""

import numpy as np
import torch
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.identity import identify_pixels
from codegrid.data.images import to_float
from codegrid.data.samples import ArraySamples
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.evaluation.intervals import share_interval
from codegrid.evaluation.probe import MAX_FEATURES, LinearProbe, fit_probe, pool_features
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
        self.probes: dict[str, LinearProbe] = {}  # of "codes" and of "pixels"
        self.right = dict.fromkeys(names_in_group("probe"), 0)
        self.n = self.n_train = 0
        self.absent = ""
        if tokenizer.K is None:
            self.absent = NO_CODES_MESSAGE
        elif not settings.probe:
            self.absent = "left out with probe=0"
        elif settings.split == "train":
            self.absent = "it learns from the training images; use split=val"
        else:
            self.absent = self.list_classes()
        if not self.absent:
            self.labels = self.read_labels()
            self.learn()

    def list_classes(self) -> str:
        """List the classes of the images; return why their labels are no task, empty if they are one."""
        try:
            self.classes = list_label_classes(self.images)
        except InputError as error:  # there are no training images
            return str(error)
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

    def read_labels(self) -> Tensor:
        """The labels (n,) of the judged images."""
        samples = self.images.samples(self.settings.split)
        assert isinstance(samples, ArraySamples)  # or there would be no classes
        labels = samples.labels if samples.rows is None else samples.labels[samples.rows]
        return number_batch(torch.from_numpy(labels.astype(np.int64)), self.classes)

    def update(self, x: Tensor, indices: Tensor) -> None:
        """Pixels (B, C, H, W) of the next images of the split, and their indices."""
        if self.absent:
            return
        expected = self.labels[self.n : self.n + len(x)]
        self.n += len(x)
        features = self.extract(to_float(x), indices)
        for name, kind in (("probe_top1", "codes"), ("probe_top1_pixels", "pixels")):
            predicted = self.probes[kind].predict(features[kind])
            self.right[name] += int((predicted == expected).sum())
        self.right["probe_top1_majority"] += int((expected == self.majority).sum())

    @torch.no_grad()
    def extract(self, x: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """The features of images (B, C, H, W) in [-1, 1] with these indices, (B, D) float32 on the CPU."""
        z_q = self.tokenizer.quantizer.lookup(indices)
        return {"codes": pool_features(z_q).cpu(), "pixels": pool_features(x).cpu()}

    def learn(self) -> None:
        """Fit the probes, and find the most frequent label."""
        log_line("linear probe of the codes")
        features, labels = self.read_training()
        for kind, values in features.items():
            self.probes[kind] = fit_probe(values, labels, len(self.classes))
        self.majority = int(labels.bincount().argmax())
        self.n_train = len(labels)

    def read_training(self) -> tuple[dict[str, Tensor], Tensor]:
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
        joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return joined, torch.cat(labels)

    def add_scores(self, sheet: ScoreSheet) -> None:
        """Add the shares of right labels of the codes, of the pixels, and of the most frequent label of the training images."""
        if self.absent:
            for name in names_in_group("probe"):
                sheet.mark_absent(name, self.absent)
            return
        about = {
            "n_train": self.n_train,
            "train_hash": identify_pixels(self.images, "train"),
            "classes": len(self.classes),
            "features": f"at most {MAX_FEATURES:,}",
            "library": library_versions("scipy", "torch"),
        }
        for name, count in self.right.items():
            sheet.add(name, count / self.n, **about)
            sheet.add_interval(name, share_interval(count, self.n))
