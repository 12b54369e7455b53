"""A small classifier of the run's own images, for scores that need no public weights."""

from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.images import to_float
from codegrid.data.labels import ClassTable
from codegrid.data.samples import ArraySamples
from codegrid.data.store import Arrays, load_or_fill
from codegrid.engine.console import log_line
from codegrid.engine.sizes import to_setting
from codegrid.evaluation.features import Extractor, FeatureNetwork, hash_bytes

PROXY_BATCH = 32
PROXY_SEED = 0
PROXY_VERSION = 1  # part of the cache's key: raise it when the training changes


class Proxy(Extractor):
    """A small classifier trained on the images' own labels.

    With fewer than two labels it learns instead which of four rotations an image was turned by (Gidaris et al. 2018).
    Scores are comparable only under the same hash.
    """

    no_logits_reason = "these images have no labels: the proxy classifies rotations"

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.uses_rotations = classes < 2
        self.features = FeatureNetwork(channels)
        self.head = nn.Linear(FeatureNetwork.num_features, 4 if self.uses_rotations else classes)
        self.validation: dict[
            str, float
        ] = {}  # accuracy, and chance: the share of the largest class

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.features(to_float(images))
        return features, None if self.uses_rotations else self.head(features)

    def classify(self, x: Tensor, labels: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) in [-1, 1] -> logits (B, classes) and their targets (B,).

        The targets are `labels`, or `turns`, in quarters, by which the images are rotated first; of rectangles, the square in
        the middle, as a rotated rectangle shows its turn by its proportions.
        """
        if not self.uses_rotations:
            return self.head(self.features(x)), labels
        x = cut_square(x)
        rotations = torch.stack([x.rot90(turn, (2, 3)) for turn in range(4)])
        x = rotations[turns, torch.arange(len(x), device=x.device)]
        return self.head(self.features(x)), turns

    def set_identity(self, steps: int) -> None:
        """Set name and hash after `steps` steps of training."""
        self.name = (
            f"classifier of {'rotations' if self.uses_rotations else 'labels'}, {steps} steps"
        )
        weights = parameters_to_vector(self.parameters()).detach().cpu()
        self.hash = hash_bytes(weights.numpy().tobytes())


def cut_square(x: Tensor) -> Tensor:
    """The middle of images (B, C, H, W), as wide as high."""
    side = min(x.shape[2:])
    top, left = ((length - side) // 2 for length in x.shape[2:])
    return x[..., top : top + side, left : left + side]


def train_proxy(data: ImageDataModule, steps: int, device: torch.device) -> Proxy:
    """The proxy of these images: trained now, or read from their cache folder if an earlier run has trained it."""
    classes = list_label_classes(data)
    with torch.random.fork_rng():
        torch.manual_seed(PROXY_SEED)
        proxy = Proxy(data.channels, len(classes)).to(device)
        key = {
            "data": [data.cache_key("train"), data.cache_key("val")],
            "image_size": to_setting(data.image_size),
            "augmented": [data.crop, data.flip],
            "classes": len(classes) if classes.is_dense else classes.labels,
            "training": [PROXY_VERSION, steps, PROXY_BATCH, PROXY_SEED],
        }
        n = sum(p.numel() for p in proxy.parameters())

        def fill(arrays: Arrays) -> dict[str, float]:
            validation = fit_proxy(proxy, data, steps, device, classes)
            arrays["weights"][:] = parameters_to_vector(proxy.parameters()).detach().cpu().numpy()
            return validation

        arrays, proxy.validation = load_or_fill(
            data.cache_dir, f"proxy-{data.title}", key, {"weights": ((n,), "float32")}, fill
        )
    vector_to_parameters(torch.tensor(arrays["weights"]).to(device), proxy.parameters())
    proxy.set_identity(steps)
    return proxy.eval().requires_grad_(False)


def list_label_classes(data: ImageDataModule) -> ClassTable:
    """The classes of the images; none if an image has no label, or if all would have to be decoded to find out."""
    labels = []
    for split in ("train", "val"):
        samples = data.samples(split)
        if isinstance(samples, ArraySamples):
            labels.append(samples.labels if samples.rows is None else samples.labels[samples.rows])
            if labels[-1].min() < 0:
                return ClassTable([], [])
    return ClassTable.of(data.classes, *labels)


def number_batch(labels: Tensor, classes: ClassTable) -> Tensor:
    """The numbers of the classes of a batch."""
    return torch.from_numpy(classes.number(labels.numpy(), "images")) if classes.names else labels


def fit_proxy(
    proxy: Proxy, data: ImageDataModule, steps: int, device: torch.device, classes: ClassTable
) -> dict[str, float]:
    """Train a proxy; return its accuracy on the validation images and that of always guessing the most frequent class."""
    optimizer = torch.optim.AdamW(proxy.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = islice(data.shuffled_loader(min(PROXY_BATCH, data.size("train")), PROXY_SEED), steps)
    for images, labels in tqdm(batches, "proxy classifier", steps, leave=False, disable=None):
        x = data.augment(images.to(device))
        labels = number_batch(labels, classes)
        turns = labels.to(device)
        if proxy.uses_rotations:
            turns = torch.randint(4, (len(x),), device=device)
        loss = F.cross_entropy(*proxy.classify(x, labels.to(device), turns))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return validate_proxy(proxy, data, device, classes)


@torch.no_grad()
def validate_proxy(
    proxy: Proxy, data: ImageDataModule, device: torch.device, classes: ClassTable
) -> dict[str, float]:
    """Accuracy on the validation images, and chance, the share of the most frequent class."""
    correct = 0
    targets: list[Tensor] = []
    for i, (images, labels) in enumerate(data.iterate_split("val")):
        labels = number_batch(labels, classes)
        turns = (torch.arange(len(images), device=device) + i) % 4
        x = data.preprocess(images.to(device))
        logits, target = proxy.classify(x, labels.to(device), turns)
        correct += int((logits.argmax(1) == target).sum())
        targets.append(target.cpu())
    counts = torch.cat(targets).bincount()
    accuracy = correct / int(counts.sum())
    chance = float(counts.max() / counts.sum())
    log_line(f"proxy classifier: validation accuracy {accuracy:.1%}, chance {chance:.1%}")
    return {"accuracy": accuracy, "chance": chance}
