"""Networks whose features images are compared in, behind one contract, and what the comparison finds."""

import hashlib
import importlib
import re
import socket
import warnings
from abc import ABC, abstractmethod
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from data.datamodule import ImageDataModule
from data.errors import InputError
from data.images import to_float
from data.loading import Samples
from data.store import Arrays, stored
from data.terminal import tell
from vqgan.metrics.distances import density_coverage, frechet, inception_score, kid, precision_recall
from vqgan.metrics.provenance import Scores, library

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # the name that torch-fidelity gives the TensorFlow weights
BATCH, SEED, VERSION = 32, 0, 1  # of the proxy's training; raise the version when it changes
SUBSETS, SUBSET, SPLITS, NEAR, NEAR_DENSITY = 100, 1000, 10, 3, 5  # of KID, Inception Score, precision and recall, density


class Extractor(nn.Module, ABC):
    """uint8 images (B, C, H, W), C = 1 or 3 -> features (B, D) float32, and logits (B, classes) or None.

    `name` and `hash` say which network it is, `resize` what it does to the images first, `package` whose code it runs.
    """

    name: str
    hash: str
    resize = "none"
    package = "torch"
    speechless = "this network tells no classes"  # why there are no logits, where there are none

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...


class Inception(Extractor):
    """Inception v3 with the weights of TensorFlow, by torch-fidelity: the features of the literature's scores.

    Raises InputError where the package is missing, or the weights are neither in the torch hub folder nor, with `fetch`,
    to be fetched.
    """

    name = "inception-v3-compat"
    resize = "bilinear to 299, as TensorFlow 1"
    package = "torch-fidelity"

    def __init__(self, fetch: bool = True) -> None:
        super().__init__()
        try:
            code = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:
            raise InputError("the package torch-fidelity is missing: pip install codegrid[fidelity]") from error
        file = fetched(INCEPTION, code.URL_INCEPTION_V3, fetch)
        try:
            network = code.FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"])
        except (OSError, RuntimeError, EOFError) as error:
            raise InputError(f"{file} is damaged ({' '.join(str(error).split())[:200]}); delete it") from error
        self.network = network.eval()
        self.hash = hashlib.sha256(file.read_bytes()).hexdigest()[:12]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits


def fetched(name: str, url: str, fetch: bool) -> Path:
    """The file of the weights `name` in the torch hub folder; fetched where it is missing, with patience for ten seconds of
    silence. InputError where that fails, or without `fetch`."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if file.is_file():
        return file
    if not fetch:
        raise InputError(f"the weights {name} are not in {file.parent}, and fetch=false")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # or a network that swallows packets would hold the run for ever
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        tell(f"fetching {name}")
        torch.hub.download_url_to_file(url, str(file), progress=False)
    except (OSError, RuntimeError) as error:
        raise InputError(f"the weights {name} are not in {file.parent} and can't be fetched ({error})") from error
    finally:
        socket.setdefaulttimeout(before)
    return file


class Features(nn.Module):
    """A small convolutional network: x (B, C, H, W) -> (B, num_features), its last maps averaged over positions, as in FID.

    So few features that the covariance over a thousand images has full rank.
    """

    num_features = 128

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, 32, 64, 128, self.num_features)
        blocks: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            blocks += [nn.Conv2d(inner, outer, 3, 2, 1), nn.GroupNorm(8, outer), nn.SiLU()]
        self.layers = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(x.contiguous())  # channels last would take five times as long on CPUs
        return features


class Proxy(Extractor):
    """A small classifier trained on the images' own labels, or where they have fewer than two, to tell by which of four
    rotations an image was turned (Gidaris et al. 2018). Comparable under the same hash alone."""

    speechless = "these images have no labels: the proxy tells rotations"

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.rotations = classes < 2
        self.features = Features(channels)
        self.head = nn.Linear(Features.num_features, 4 if self.rotations else classes)
        self.learned: dict[str, float] = {}  # how well it does on the validation images

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.features(to_float(images))
        return features, None if self.rotations else self.head(features)

    def called(self, steps: int) -> None:
        """Take the name and the hash of what it has become."""
        self.name = f"classifier of {'rotations' if self.rotations else 'labels'}, {steps} steps"
        self.hash = hashlib.sha256(parameters_to_vector(self.parameters()).detach().cpu().numpy().tobytes()).hexdigest()[:12]

    def told(self, x: Tensor, labels: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """The logits (B, classes) of x (B, C, H, W) in [-1, 1], and what they should tell; turns (B,) are quarters."""
        if self.rotations:
            turned = torch.stack([x.rot90(turn, (2, 3)) for turn in range(4)])
            x, labels = turned[turns, torch.arange(len(x), device=x.device)], turns
        return self.head(self.features(x)), labels


def proxy(data: ImageDataModule, steps: int, where: torch.device) -> Proxy:
    """The proxy of these images, trained now, or by an earlier run on the same images and kept under their cache folder."""
    classes = class_count(data)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        made = Proxy(data.channels, classes).to(where)
        key = {
            "data": [data.key("train"), data.key("val")],
            "image_size": data.image_size,
            "augmented": [data.crop, data.flip],
            "classes": classes,
            "training": [VERSION, steps, BATCH, SEED],
        }
        n = sum(p.numel() for p in made.parameters())

        def fill(arrays: Arrays) -> dict[str, float]:
            learned = learn(made, data, steps, where)
            arrays["weights"][:] = parameters_to_vector(made.parameters()).detach().cpu().numpy()
            return learned

        arrays, made.learned = stored(data.cache_dir, f"proxy-{data.title}", key, {"weights": ((n,), "float32")}, fill)
    vector_to_parameters(torch.tensor(arrays["weights"]).to(where), made.parameters())
    made.called(steps)
    return made.eval().requires_grad_(False)


def class_count(data: ImageDataModule) -> int:
    """How many classes the images are of; 0 where one has no label, or where only reading them all would tell."""
    classes = len(data.classes)
    for split in ("train", "val"):
        samples = data.split(split)
        if isinstance(samples, Samples):
            labels = samples.labels if samples.rows is None else samples.labels[samples.rows]
            if labels.min() < 0:
                return 0
            classes = max(classes, int(labels.max()) + 1)
    return classes


def learn(made: Proxy, data: ImageDataModule, steps: int, where: torch.device) -> dict[str, float]:
    """Train a proxy; its share of right answers on the validation images, and that of the most frequent answer."""
    optimizer = torch.optim.AdamW(made.parameters(), lr=2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = data.shuffled(min(BATCH, data.size("train")), SEED)
    for images, labels in tqdm(islice(batches, steps), "proxy classifier", steps, leave=False, disable=None):
        x = data.augment(images.to(where))
        turns = torch.randint(4, (len(x),), device=where) if made.rotations else labels.to(where)
        loss = F.cross_entropy(*made.told(x, labels.to(where), turns))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    right, answers = 0, []
    with torch.no_grad():
        for at, (images, labels) in enumerate(data.once("val")):
            turns = (torch.arange(len(images), device=where) + at) % 4
            logits, wanted = made.told(data.view(images.to(where)), labels.to(where), turns)
            right += int((logits.argmax(1) == wanted).sum())
            answers.append(wanted.cpu())
    counts = torch.cat(answers).bincount()
    learned = {"accuracy": right / int(counts.sum()), "chance": float(counts.max() / counts.sum())}
    tell("the proxy is right in {accuracy:.1%} of the validation images, chance {chance:.1%}".format(**learned))
    return learned


class Script(Extractor):
    """Any network in a TorchScript file: uint8 (B, 3, H, W) -> features (B, D), or a pair of features and logits.

    A TorchScript file holds operations on tensors, no Python. Raises InputError where it can't be read or gives something
    else for images of `image_size` pixels.
    """

    def __init__(self, file: str, image_size: int) -> None:
        super().__init__()
        path = Path(file).expanduser()
        if not path.is_file():
            raise InputError(f"features={file} is not there; give a file that torch.jit.save has written")
        self.name, self.suffix = path.name, "_" + re.sub(r"\W", "_", path.stem)
        if self.suffix == "_proxy":
            raise InputError(f"features={file} would give its scores the names of our own proxy's; give the file another name")
        self.hash = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is deprecated; its successor saves a graph of one batch size and device
                self.network = torch.jit.load(str(path), map_location="cpu").eval()
            features, _ = self(torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8))
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"features={file} can't be used on uint8 images (2, 3, {image_size}, {image_size}): {reason[:300]}"
            ) from error
        if features.dim() != 2 or len(features) != 2:
            raise InputError(f"features={file} must give features (n, D) of n images, and gives {tuple(features.shape)} of 2")

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        found: Any = self.network(images.expand(-1, 3, -1, -1))
        features, logits = (found, None) if isinstance(found, Tensor) else found
        return features.float(), logits


class Judge:
    """The features of two sets of images by one extractor, and the scores that compare them, named with `suffix`."""

    def __init__(self, extractor: Extractor, suffix: str) -> None:
        self.extractor, self.suffix = extractor, suffix
        self.sides: dict[str, list[Tensor]] = {"reference": [], "judged": []}
        self.logits: list[Tensor] = []

    @torch.no_grad()
    def add(self, side: str, images: Tensor) -> None:
        """uint8 images (B, C, H, W) of the "reference" or of what is "judged"."""
        features, logits = self.extractor(images)
        self.sides[side].append(features)
        if side == "judged" and logits is not None:
            self.logits.append(logits)

    def distances(self, scores: Scores, frechet_name: str, paired: bool = False) -> None:
        """Fréchet distance and KID; `paired` says that each image was made of the reference at its place."""
        real, fake = (torch.cat(self.sides[side]) for side in ("reference", "judged"))
        fewest, about = min(len(real), len(fake)), self.about(real, fake)
        subsets = {"subsets": SUBSETS, "subset": min(SUBSET, fewest)}
        for name, function, more in (
            (frechet_name, frechet, {}),
            ("kid", partial(kid, subsets=SUBSETS, size=SUBSET, paired=paired), {**subsets, "paired": paired}),
        ):
            if fewest < 2:
                scores.miss(name + self.suffix, "it needs at least 2 images on each side")
            else:
                scores.add(name + self.suffix, function(real, fake), **about, **more)

    def variety(self, scores: Scores) -> None:
        """Inception Score, precision and recall, density and coverage."""
        real, fake = (torch.cat(self.sides[side]) for side in ("reference", "judged"))
        fewest, about = min(len(real), len(fake)), self.about(real, fake)
        splits = min(SPLITS, len(fake))
        if self.logits:
            logits = torch.cat(self.logits)
            scores.add("inception_score" + self.suffix, inception_score(logits, splits), **about, splits=splits)
        else:
            scores.miss("inception_score" + self.suffix, self.extractor.speechless)
        for names, function, k in (
            (("precision", "recall"), precision_recall, NEAR),
            (("density", "coverage"), density_coverage, NEAR_DENSITY),
        ):
            found = function(real, fake, k) if fewest > k else (None, None)
            for name, value in zip(names, found, strict=True):
                if value is None:
                    scores.miss(name + self.suffix, f"it needs more than {k} images on each side")
                else:
                    scores.add(name + self.suffix, value, **about, neighbours=k)

    def about(self, real: Tensor, fake: Tensor) -> dict[str, Any]:
        """What scores in these features add to their provenance."""
        return {
            "n": len(fake),
            "n_reference": len(real),
            "resize": self.extractor.resize,
            "extractor": self.extractor.name,
            "extractor_hash": self.extractor.hash,
            "library": library(*dict.fromkeys([self.extractor.package, "torch"])),
        }


class NoJudge(Judge):
    """A judge whose network is not at hand: all its scores are absent, for one reason."""

    def __init__(self, suffix: str, reason: str) -> None:
        self.suffix, self.reason = suffix, reason

    def add(self, side: str, images: Tensor) -> None: ...

    def distances(self, scores: Scores, frechet_name: str, paired: bool = False) -> None:
        for name in (frechet_name, "kid"):
            scores.miss(name + self.suffix, self.reason)

    def variety(self, scores: Scores) -> None:
        for name in ("inception_score", "precision", "recall", "density", "coverage"):
            scores.miss(name + self.suffix, self.reason)
