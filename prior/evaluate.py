"""stage=evaluate: how likely a prior finds each image and each code of it, and how good its samples are."""

import hashlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.errors import InputError
from data.images import picture, save_picture, to_uint8
from data.loading import Samples as Grids
from data.store import fingerprint
from data.terminal import counted, tell
from prior.drawing import batches, ready
from prior.extract import extract
from prior.models.base import Model
from prior.module import nats
from prior.neighbours import JUDGED, neighbours
from prior.pictures import save_samples
from prior.sampling import Sampler
from prior.stages import Trained, load_prior
from vqgan.checkpoint import described_images, read
from vqgan.evaluate import (
    beside,
    called,
    checked,
    handed_in,
    heading,
    look,
    make_judges,
    model_precision,
    origin,
    originals,
    own_features,
    steady,
    table,
)
from vqgan.evaluate import evaluate as evaluate_tokenizer
from vqgan.metrics.features import NoJudge
from vqgan.metrics.provenance import Scores, library
from vqgan.run import open_folder

SHOWN, COLUMNS = 64, 16  # samples in the picture, and in a row of it
NEAREST = ("nearest_rmse", "nearest_rmse_val", "nearest_ratio", "nearest_ratio_val")


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Judge a prior on a split: by the nats of its codes, and by samples; or a tokenizer, where `ckpt` is one."""
    where = checked(config)
    if read(config.ckpt, "vqgan", "prior")["codegrid"]["stage"] == "vqgan":
        return evaluate_tokenizer(config)
    trained, sampler = load_prior(config.ckpt), instantiate(config.sampler)
    fits(sampler, trained.model)
    ready(trained.model, sampler, where.type)
    images = described_images(trained.data, config)
    n, m = images.size(config.split), min(config.samples, images.size(config.split))
    if m and config.neighbours:
        images.size("train")  # images that are not there are missed before anything is written
    other, script = beside(config, "prior"), own_features(config, images)
    folder = open_folder(config, trained.name)
    model, tokenizer = trained.model.to(where), trained.tokenizer.to(where)
    with steady():
        fabric = Fabric(accelerator=where.type, devices=1)
        codes = extract(tokenizer, images, config.split, batch_size=config.batch_size, fabric=fabric)
        with model_precision(config, where):
            found = likelihoods(model, codes, config.batch_size)
        nothing = [NoJudge(suffix, "no samples are drawn with samples=0") for suffix in ("", "_proxy")]
        judges = make_judges(config, images, where, script) if m else nothing
        digest, made = hashlib.sha256(), list[Tensor]()
        for x in originals(images, config, where):
            digest.update(to_uint8(x).cpu().numpy().tobytes())
            for judge in judges:
                judge.add("reference", to_uint8(x))
        labels = torch.from_numpy(np.asarray(codes.labels)[np.linspace(0, n - 1, m).astype(int)]) if model.classes else None
        for drawn in samples(trained, sampler, m, labels, config, where):
            for judge in judges:
                judge.add("judged", drawn)
            if sum(map(len, made)) < max(SHOWN, JUDGED):
                made.append(drawn.cpu())
        chosen: Any = OmegaConf.to_container(config.sampler, resolve=True)
        chosen.pop("compile")  # it changes roundings alone
        about = {"sampler": chosen, "seed": config.seed}
        scores = Scores(origin(config, images, digest))
        per_image, maps = found.double().sum((1, 2, 3)), found.mean(3)
        per_token, bits = float(per_image.mean()) / model.L, per_image / math.log(2)
        told = {"n": n, "exact": model.exact, "codes": tokenizer.fingerprint(), "library": library("torch")}
        for name, value in (("nats_per_token", per_token), ("perplexity", math.exp(per_token))):
            scores.add(name, value, **told)
        scores.add("bits_per_image", float(bits.mean()), **told)
        scores.add("bits_per_image_deviation", float(bits.std(correction=0)), **told)
        scores.common = {**scores.common, "judged": "samples"} | about
        for judge in judges:
            judge.distances(scores, "gfid")
            judge.variety(scores)
        pictures = save_samples(torch.cat(made)[:SHOWN], folder / "pictures", ["grid"], COLUMNS, SHOWN)["pictures"] if m else []
        if m and config.neighbours:
            flip = trained.config["flip"]
            near, sheet = neighbours(torch.cat(made), images, tokenizer, flip)
            known = fingerprint([images.key("train"), images.image_size])
            told = {"reference": "originals of train", "reference_hash": known, "n_reference": images.size("train")}
            for name in NEAREST:
                scores.add(name, near[name], **told, n=min(m, JUDGED), mirrored=flip, library=library("torch"))
            pictures.append(str(save_picture(sheet, folder / "pictures" / "neighbours.png")))
        else:
            for name in NEAREST:
                scores.miss(name, "no samples are drawn with samples=0" if not m else "left out with neighbours=false")
    np.savez(folder / "likelihoods.npz", nats=found.view(codes.values.shape).numpy(), labels=np.asarray(codes.labels))
    likely = per_image.argsort(stable=True)
    ends = {"most_likely": likely[: config.show], "least_likely": likely.flip(0)[: config.show]}
    # Of all maps, that they may be compared; neither a single code nor the large weights of a bound's few codes stretch it.
    white, f = min(float(np.quantile(maps, 0.999)), 2 * math.log(model.K)), tokenizer.f
    rows = [row for which in ends.values() for row in (look(images, config.split, which), heat(maps[which] / white, f))]
    mean = maps.mean(0, keepdim=True)
    pictures = [
        str(save_picture(picture(rows, scale=2), folder / "pictures" / "outliers.png")),
        str(save_picture(picture([heat(mean / mean.max(), f)], scale=4), folder / "pictures" / "mean.png")),
        *pictures,
    ]
    of = trained.config.get("id")
    result = {
        **heading(config, folder, of, "prior", trained.tokenizer_of, n),
        "samples": m,
        "K": model.K,
        "grid": list(model.grid),
        **scores.values,
        "exact": model.exact,
        "white": round(white, 2),
        **{end: [called(images, config.split, i) for i in which.tolist()] for end, which in ends.items()},
        "absent": scores.absent,
        "provenance": scores.provenance,
        "likelihoods": str(folder / "likelihoods.npz"),
        "pictures": pictures,
    }
    tell(table(result, list(scores.values), other))
    tell(f"{'most likely':24}{', '.join(result['most_likely'][:4])}\n{'least likely':24}{', '.join(result['least_likely'][:4])}")
    if not model.exact:
        tell("nats and bits are upper bounds, estimated by one draw an image")
    return handed_in(folder, result)


def fits(sampler: Sampler, model: Model) -> None:
    """Refuse samples that can't be compared with the images."""
    for name in ("grid", "given"):
        if getattr(sampler, name) is not None:
            raise InputError(f"stage=evaluate judges whole samples of the prior's own grid; leave sampler.{name} out")
    if not model.classes and sampler.guidance != 1:
        raise InputError(f"sampler.guidance={sampler.guidance} needs a prior of classes; train one with conditional=true")


def samples(
    trained: Trained, sampler: Sampler, m: int, labels: Tensor | None, config: DictConfig, where: torch.device
) -> Iterator[Tensor]:
    """m samples, batches (b, C, H, W) uint8; of a prior of classes those of these labels (m,)."""
    drawn = batches(trained.model, sampler, m, config.seed, config.batch_size, labels)
    with counted(m, "samples") as bar:
        while True:
            with torch.no_grad(), model_precision(config, where):
                codes = next(drawn, None)
                if codes is None:
                    return
                images = to_uint8(trained.tokenizer.decode_indices(codes))
            yield images
            bar.update(len(images))


@torch.no_grad()
def likelihoods(model: Model, codes: Grids, batch_size: int) -> Tensor:
    """-log p (n, h, w, books) of each code, float32 on the CPU, whose sum over an image is the image's; where the model is
    not `exact`, an estimate of a bound on that."""
    where, found = next(model.buffers()).device, []
    if model.classes and int(np.max(codes.labels)) >= model.classes:
        raise InputError(
            f"the images are of {int(np.max(codes.labels)) + 1} classes, and the prior learned {model.classes}; give it those "
            "that it was trained on, with data.root=<folder>"
        )
    with counted(len(codes), "likelihoods") as bar:
        for first in range(0, len(codes), batch_size):
            indices, labels = codes.__getitems__(range(first, min(first + batch_size, len(codes))))
            prediction = model.judge(indices.flatten(1).long().to(where), labels.to(where) if model.classes else None)
            told = (nats(prediction) * prediction.weights).cpu()
            found.append(told.view(-1, *model.grid, model.books))
            bar.update(len(told))
    return torch.cat(found)


def heat(maps: Tensor, f: int) -> Tensor:
    """Maps (n, h, w) of numbers as uint8 pictures (n, 3, f * h, f * w), from 0 on black, red, yellow, white from 1 on."""
    red_green_blue = 3 * maps[:, None] - torch.arange(3)[:, None, None]  # one after the other
    return to_uint8(red_green_blue.clamp(0, 1) * 2 - 1).repeat_interleave(f, 2).repeat_interleave(f, 3)
