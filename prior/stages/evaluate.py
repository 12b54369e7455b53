"""stage=evaluate: judge a prior, or a tokenizer where ckpt is one."""

import hashlib
import math
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.images import to_uint8
from data.pictures import save_picture, tile_images
from data.store import fingerprint
from engine.checkpoint import read_checkpoint
from engine.console import log_line
from engine.run import Run
from evaluation.feature_set import AbsentFeatureSet
from evaluation.judging import (
    check_settings,
    deterministic_float32,
    evaluation_precision,
    finish_evaluation,
    image_name,
    image_provenance,
    iterate_images,
    load_script,
    make_feature_sets,
    read_compared,
    result_heading,
    view_images,
)
from evaluation.scores import Scores, library
from evaluation.table import format_table
from prior.decoding.generate import check_compile_sampler
from prior.extract import extract
from prior.judging import check_sampler, heat_map_pictures, iterate_samples, likelihoods
from prior.load import load_prior
from prior.neighbours import MAX_JUDGED, find_neighbours
from prior.samples import save_samples
from vqgan.load import load_images
from vqgan.losses.perceptual import check_lpips
from vqgan.stages.evaluate import evaluate_tokenizer as evaluate_tokenizer

SAMPLES_SHOWN, COLUMNS = 64, 16  # samples in the picture, and in a row of it

NEAREST = ("nearest_rmse", "nearest_rmse_val", "nearest_ratio", "nearest_ratio_val")


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Judge a prior on a split: by the nats of its codes, and by samples; or a tokenizer, where `ckpt` is one."""
    where = check_settings(config)
    check_lpips(config.lpips)
    if read_checkpoint(config.ckpt, "vqgan", "prior")["codegrid"]["stage"] == "vqgan":
        return evaluate_tokenizer(config)
    trained, sampler = load_prior(config.ckpt), instantiate(config.sampler)
    check_sampler(sampler, trained.model)
    check_compile_sampler(trained.model, sampler, where.type)
    images = load_images(trained.data, config.data, config.cache_dir)
    n, m = images.size(config.split), min(config.samples, images.size(config.split))
    if m and config.neighbours:
        images.size("train")  # images that are not there are missed before anything is written
    other, script = read_compared(config, "prior"), load_script(config, images)
    run = Run.open(config)
    folder = run.start(trained.name)
    model, tokenizer = trained.model.to(where), trained.tokenizer.to(where)
    with deterministic_float32():
        fabric = Fabric(accelerator=where.type, devices=1)
        codes = extract(
            tokenizer, images, config.split, batch_size=config.batch_size, fabric=fabric
        )
        with evaluation_precision(config, where):
            found = likelihoods(model, codes, config.batch_size)
        nothing = [
            AbsentFeatureSet(suffix, "no samples are drawn with samples=0")
            for suffix in ("", "_proxy")
        ]
        judges = make_feature_sets(config, images, where, script) if m else nothing
        digest, made = hashlib.sha256(), list[Tensor]()
        for x in iterate_images(images, config, where):
            digest.update(to_uint8(x).cpu().numpy().tobytes())
            for judge in judges:
                judge.add("reference", to_uint8(x))
        labels = (
            torch.from_numpy(np.asarray(codes.labels)[np.linspace(0, n - 1, m).astype(int)])
            if model.classes
            else None
        )
        for drawn in iterate_samples(trained, sampler, m, labels, config, where):
            for judge in judges:
                judge.add("judged", drawn)
            if sum(map(len, made)) < max(SAMPLES_SHOWN, MAX_JUDGED):
                made.append(drawn.cpu())
        chosen: Any = OmegaConf.to_container(config.sampler, resolve=True)
        chosen.pop("compile")  # it changes roundings alone
        about = {"sampler": chosen, "seed": config.seed}
        scores = Scores(image_provenance(config, images, digest))
        per_image, maps = found.double().sum((1, 2, 3)), found.mean(3)
        per_token, bits = float(per_image.mean()) / model.L, per_image / math.log(2)
        told = {
            "n": n,
            "exact": model.exact,
            "codes": tokenizer.fingerprint(),
            "library": library("torch"),
        }
        for name, value in (("nats_per_token", per_token), ("perplexity", math.exp(per_token))):
            scores.add(name, value, **told)
        scores.add("bits_per_image", float(bits.mean()), **told)
        scores.add("bits_per_image_deviation", float(bits.std(correction=0)), **told)
        scores.common = {**scores.common, "judged": "samples"} | about
        for judge in judges:
            judge.distances(scores, "gfid")
            judge.variety(scores)
        pictures = (
            save_samples(
                torch.cat(made)[:SAMPLES_SHOWN],
                folder / "pictures",
                ["grid"],
                COLUMNS,
                SAMPLES_SHOWN,
            )["pictures"]
            if m
            else []
        )
        if m and config.neighbours:
            flip = trained.config["flip"]
            near, sheet = find_neighbours(torch.cat(made), images, tokenizer, flip)
            known = fingerprint([images.cache_key("train"), images.image_size])
            told = {
                "reference": "originals of train",
                "reference_hash": known,
                "n_reference": images.size("train"),
            }
            for name in NEAREST:
                scores.add(
                    name,
                    near[name],
                    **told,
                    n=min(m, MAX_JUDGED),
                    mirrored=flip,
                    library=library("torch"),
                )
            pictures.append(str(save_picture(sheet, folder / "pictures" / "neighbours.png")))
        else:
            for name in NEAREST:
                scores.miss(
                    name,
                    "no samples are drawn with samples=0"
                    if not m
                    else "left out with neighbours=false",
                )
    np.savez(
        folder / "likelihoods.npz",
        nats=found.view(codes.values.shape).numpy(),
        labels=np.asarray(codes.labels),
    )
    likely = per_image.argsort(stable=True)
    ends = {"most_likely": likely[: config.show], "least_likely": likely.flip(0)[: config.show]}
    # Of all maps, that they may be compared; neither a single code nor the large weights of a bound's few codes stretch it.
    white, f = min(float(np.quantile(maps, 0.999)), 2 * math.log(model.K)), tokenizer.f
    rows = [
        row
        for which in ends.values()
        for row in (
            view_images(images, config.split, which),
            heat_map_pictures(maps[which] / white, f),
        )
    ]
    mean = maps.mean(0, keepdim=True)
    pictures = [
        str(save_picture(tile_images(rows, scale=2), folder / "pictures" / "outliers.png")),
        str(
            save_picture(
                tile_images([heat_map_pictures(mean / mean.max(), f)], scale=4),
                folder / "pictures" / "mean.png",
            )
        ),
        *pictures,
    ]
    of = trained.config.get("id")
    result = {
        **result_heading(config, folder, of, "prior", trained.tokenizer_of, n),
        "samples": m,
        "K": model.K,
        "grid": list(model.grid),
        **scores.values,
        "exact": model.exact,
        "white": round(white, 2),
        **{
            end: [image_name(images, config.split, i) for i in which.tolist()]
            for end, which in ends.items()
        },
        "absent": scores.absent,
        "provenance": scores.provenance,
        "likelihoods": str(folder / "likelihoods.npz"),
        "pictures": pictures,
    }
    log_line(format_table(result, list(scores.values), other))
    log_line(
        f"{'most likely':24}{', '.join(result['most_likely'][:4])}\n{'least likely':24}{', '.join(result['least_likely'][:4])}"
    )
    if not model.exact:
        log_line("nats and bits are upper bounds, estimated by one draw an image")
    return finish_evaluation(run, result)
