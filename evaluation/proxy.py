"""A small classifier of the run's own images, for scores that need no public weights."""

import hashlib
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from data.datamodule import ImageDataModule
from data.images import to_float
from data.samples import ArraySamples
from data.store import Arrays, load_or_fill
from engine.console import log_line
from evaluation.features import Extractor, FeatureNetwork

PROXY_BATCH, PROXY_SEED, PROXY_VERSION = (
    32,
    0,
    1,
)  # of the proxy's training; raise the version when it changes


class Proxy(Extractor):
    """A small classifier trained on the images' own labels, or where they have fewer than two, to tell by which of four
    rotations an image was turned (Gidaris et al. 2018). Comparable under the same hash alone."""

    speechless = "these images have no labels: the proxy tells rotations"

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.rotations = classes < 2
        self.features = FeatureNetwork(channels)
        self.head = nn.Linear(FeatureNetwork.num_features, 4 if self.rotations else classes)
        self.learned: dict[str, float] = {}  # how well it does on the validation images

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.features(to_float(images))
        return features, None if self.rotations else self.head(features)

    def called(self, steps: int) -> None:
        """Take the name and the hash of what it has become."""
        self.name = f"classifier of {'rotations' if self.rotations else 'labels'}, {steps} steps"
        self.hash = hashlib.sha256(
            parameters_to_vector(self.parameters()).detach().cpu().numpy().tobytes()
        ).hexdigest()[:12]

    def told(self, x: Tensor, labels: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (B, classes) of x (B, C, H, W) in [-1, 1], and what they should tell; turns (B,) are quarters."""
        if self.rotations:
            turned = torch.stack([x.rot90(turn, (2, 3)) for turn in range(4)])
            x, labels = turned[turns, torch.arange(len(x), device=x.device)], turns
        return self.head(self.features(x)), labels


def train_proxy(data: ImageDataModule, steps: int, where: torch.device) -> Proxy:
    """The proxy of these images, trained now, or by an earlier run on the same images and kept under their cache folder."""
    classes = count_label_classes(data)
    with torch.random.fork_rng():
        torch.manual_seed(PROXY_SEED)
        made = Proxy(data.channels, classes).to(where)
        key = {
            "data": [data.cache_key("train"), data.cache_key("val")],
            "image_size": data.image_size,
            "augmented": [data.crop, data.flip],
            "classes": classes,
            "training": [PROXY_VERSION, steps, PROXY_BATCH, PROXY_SEED],
        }
        n = sum(p.numel() for p in made.parameters())

        def fill(arrays: Arrays) -> dict[str, float]:
            learned = learn(made, data, steps, where)
            arrays["weights"][:] = parameters_to_vector(made.parameters()).detach().cpu().numpy()
            return learned

        arrays, made.learned = load_or_fill(
            data.cache_dir, f"proxy-{data.title}", key, {"weights": ((n,), "float32")}, fill
        )
    vector_to_parameters(torch.tensor(arrays["weights"]).to(where), made.parameters())
    made.called(steps)
    return made.eval().requires_grad_(False)


def count_label_classes(data: ImageDataModule) -> int:
    """How many classes the images are of; 0 where one has no label, or where only reading them all would tell."""
    classes = len(data.classes)
    for split in ("train", "val"):
        samples = data.samples(split)
        if isinstance(samples, ArraySamples):
            labels = samples.labels if samples.rows is None else samples.labels[samples.rows]
            if labels.min() < 0:
                return 0
            classes = max(classes, int(labels.max()) + 1)
    return classes


def learn(made: Proxy, data: ImageDataModule, steps: int, where: torch.device) -> dict[str, float]:
    """Train a proxy; its share of right answers on the validation images, and that of the most frequent answer."""
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = data.shuffled_loader(min(PROXY_BATCH, data.size("train")), PROXY_SEED)
    for images, labels in tqdm(
        islice(batches, steps), "proxy classifier", steps, leave=False, disable=None
    ):
        x = data.augment(images.to(where))
        turns = torch.randint(4, (len(x),), device=where) if made.rotations else labels.to(where)
        loss = F.cross_entropy(*made.told(x, labels.to(where), turns))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    right, answers = 0, []
    with torch.no_grad():
        for at, (images, labels) in enumerate(data.iterate_split("val")):
            turns = (torch.arange(len(images), device=where) + at) % 4
            logits, wanted = made.told(data.preprocess(images.to(where)), labels.to(where), turns)
            right += int((logits.argmax(1) == wanted).sum())
            answers.append(wanted.cpu())
    counts = torch.cat(answers).bincount()
    learned = {"accuracy": right / int(counts.sum()), "chance": float(counts.max() / counts.sum())}
    log_line(
        "the proxy is right in {accuracy:.1%} of the validation images, chance {chance:.1%}".format(
            **learned
        )
    )
    return learned
