"""What the page of stage=explore knows of a model: the contract between Python, which writes it, and the page's scripts.

The page is one HTML file. It holds the manifest, a JSON object, and binary parts:

    <script type="application/json" id="manifest"> ... </script>
    <script type="application/octet-stream" id="part-NAME"> ... </script>     base64 of a part's bytes; data-gzip: of gzip's
    <script type="text/plain" id="worker"> ... </script>                      worker.js with what it imports
    <script type="module"> ... </script>                                      main.js with what it imports

parts.js has `readManifest()`, and `readPart(name)`, a promise of the part's bytes as an ArrayBuffer; `readArray(array)` of a typed
array for an ARRAY below; and `readSprite(sprite)` of an ImageBitmap for a SPRITE.

A code is a number 0 ... K - 1 of a table. An image has L codes, in C order of `codes.shape`, and token t is the t-th of these.

    ARRAY       {part, type, shape}    little-endian numbers in C order; type is uint8, uint16, uint32 or float32
    SPRITE      {part, mime, cell: [height, width], columns, n, lossless}    n pictures of this size, row by row

The manifest, where `null` stands for what this model does not have:

    format          1
    title           of the page
    made            {codegrid, onnxruntime_web, date}    versions, and YYYY-MM-DD
    model           {name, id, stage: "vqgan" or "prior", tokenizer, quantizer, prior, weights: {encoder, decoder, prior}}
                    name and id of the run; the class names of its parts, and how many weights they have
    image           {height, width, channels, shown, f, fit, accepts, refusal}
                    channels of the networks; shown: the one or three of them, counted from 0, that pictures show; f: pixels of a
                    code's side, null where codes have no places; fit: "crop", "pad" or "stretch", how a picture of other
                    proportions gets the size; accepts: whether pictures of 8 bits can be encoded; refusal: if not, why
    codes           {K, num_codebooks, rows, columns, layout, shape, scales, tables, table_of, bits}
                    layout: "grid": a code, or num_codebooks of them, for each place of rows x columns; "row": a sequence without
                    places, shape [1, L]; "scales": a row of grids, one after the other, shape [1, L], with scales [[h, w], ...]
                    tables: the number of codebooks below; table_of: the table of each token; bits: of an image
    codebooks       one for each table: {use, dead, perplexity, layout, sheet, neighbours, patches}
                    use: ARRAY uint32 (K,), how often the images of `validation.counted` have each code; dead: codes that none has;
                    perplexity: of use; layout: ARRAY float32 (K, 2), places in [0, 1] of the map (x, y), similar codes nearby, each
                    in the middle of a cell of its own of sheet: [rows, columns];
                    neighbours: ARRAY uint32 (K, n), the nearest codes, the nearest first; patches: SPRITE of K pictures, what each
                    code shows. null for a table that is too large for a map
    patches_show    a clause: what the patches are, such as "the middle of a picture that has this code everywhere"
    pictures        {sprite, codes, names}    the run's pictures: SPRITE, lossless; ARRAY (n, *shape); and what each is called.
                    They are validation images in 8 bits; with image.accepts the encoder makes these codes of them
    validation      {sprite, codes, n, counted, total}    n images of the validation set, small: SPRITE, ARRAY (n, *shape);
                    counted: images behind `use`; total: images in the set
    encoder         null unless image.accepts; GRAPH: "images" float32 (B, C, H, W) in [-1, 1], a pixel p of 8 bits as
                    p / 127.5 - 1 -> "indices" int64 (B, *shape)
    decoder         GRAPH: "indices" int64 (B, *shape) -> "pictures" float32 (B, C, H, W) in [-1, 1], the pixel
                    round((x + 1) * 127.5)
    prior           GRAPH with {kind, name, is_exact, T, reads_after, labels, labels_size, classes, guidance, cache, schedule,
                    steps, own_order, sampler}
                    kind: "step": inputs codes int64 (B,), position int64 (), cache float32, [labels] -> logits (B, K), next_cache:
                          one token of raster order; codes are those of the token before, not read at position 0
                    "masked": codes int64 (B, h, w), masked bool (B, h, w), [labels] -> logits (B, h, w, K)
                    "grid": codes int64 (B, *shape), [labels] -> logits (B, *shape, K); those of a token depend on the tokens
                          before it (in "scales", on the scales before it) only; also of priors that only a server draws from
                    name: gpt, maskgit ...; is_exact: whether its likelihood is exact; T: tokens
                    reads_after: whether codes behind a hole are read
                    labels: null; "classes": labels int64 (B,), -1: none; or "vectors": float32 (B, labels_size), NaN: none, which
                    is all that the page gives; classes: names in the order of their numbers
                    guidance: whether logits without a label were learned: none + scale * (with - none)
                    cache: the shape for B = 1, whose axis 2 is B; zeros at first
                    of "masked": schedule: "cosine": int(cos(pi / 2 * s / S) * m) of m codes are missing after step s of S; or
                    "even"; steps: S, by default; null: as many as codes; own_order: "confidence" (log p of each proposal +
                    choice_temperature * (1 - s / S) * Gumbel noise, the largest are accepted) or "random"
                    sampler: {temperature, top_k, top_p, guidance, choice_temperature}, the defaults of conf/sampler
    checks          {pictures, largest_difference, equal_codes, nats, nats_of_graph}
                    pictures: how many were compared; largest_difference: of a pixel in [0, 1], to Tokenizer.decode_indices, on
                    the run's pictures; equal_codes: share of codes equal to Tokenizer.indices; nats: per token, of the prior and of
                    the graph on codes of the validation set
    notes           sentences about what this page does not have, and why
    server          null, or the address below which the models are served, "/api" (serving.py); then encoder, decoder and prior
                    have no part
    runtime         {script, binary}    parts: the module of onnxruntime-web and its WebAssembly; null with a server
    licences        [{name, version, licence, copyright, text}] of what the page holds beside the model

    GRAPH       {part, precision, inputs, outputs}    an ONNX file; precision of its weights: "float32" or "float16"; it computes in
                float32
"""

from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from codegrid.engine.version import VERSION
from prior.decoding.sampling import make_sampler
from prior.exploring import runtime
from prior.exploring.atlas import MAX_MAPPED, list_nearest, picture_table, sort_codes
from prior.exploring.graphs import PageNetworks
from prior.exploring.parts import PageParts
from prior.exploring.runtime import Runtime
from prior.exploring.subject import Subject, has_graph
from prior.exploring.survey import CodeSurvey
from prior.export.graphs import cache_shape, describe_graph
from prior.models.gpt import GPT
from prior.models.masked import Masked
from prior.models.maskgit import MaskGIT
from prior.prior import Prior
from vqgan.tokenizer import Tokenizer

PAGE_FORMAT = 1
IN_PLACE = "the mean of what images show where they have it; of a dead code the middle of a picture full of it, or grey"
EVERYWHERE = "a picture that has this code everywhere"
SERVER = "/api"
LOSSLESS_BYTES = 2**20  # of pixels


def describe_page(
    subject: Subject, survey: CodeSurvey, networks: PageNetworks | None, engine: Runtime | None
) -> tuple[dict[str, Any], PageParts]:
    """The manifest of a page and its parts; without networks and onnxruntime-web the page asks a server."""
    tokenizer, parts = subject.tokenizer, PageParts()
    codebooks = describe_codebooks(tokenizer, survey, parts)
    K = tokenizer.K
    assert K is not None
    is_served = networks is None
    return {
        "format": PAGE_FORMAT,
        "title": subject.name,
        "made": {
            "codegrid": VERSION,
            "onnxruntime_web": None if is_served else runtime.RUNTIME_VERSION,
            "date": date.today().isoformat(),
        },
        "model": describe_model(subject),
        "image": describe_image(subject),
        "codes": describe_code_layout(tokenizer, len(codebooks)),
        "codebooks": codebooks,
        "patches_show": IN_PLACE if survey.patches is not None else EVERYWHERE,
        "pictures": {
            "sprite": parts.add_sprite("pictures", tokenizer.rules.to_picture(survey.x), True),
            "codes": parts.add_codes("picture-codes", survey.picture_codes, K),
            "names": survey.names or [f"picture {i + 1}" for i in range(len(survey.x))],
        },
        "validation": {
            "sprite": parts.add_sprite("validation", survey.thumbnails, False),
            "codes": parts.add_codes("validation-codes", survey.codes[survey.shown], K),
            "n": len(survey.shown),
            "counted": len(survey.codes),
            "total": survey.total,
        },
        **describe_networks(subject, networks, parts),
        "checks": None if networks is None else networks.checks,
        "notes": list_notes(subject, codebooks, is_served),
        "server": SERVER if is_served else None,
        "runtime": None if engine is None else add_runtime(engine, parts),
        "licences": [] if engine is None else [runtime.LICENCE],
    }, parts


def describe_model(subject: Subject) -> dict[str, Any]:
    """Whose page it is."""
    tokenizer, trained = subject.tokenizer, subject.prior
    return {
        "name": subject.name,
        "id": subject.run_id,
        "stage": subject.stage,
        "tokenizer": f"{type(tokenizer.encoder).__name__} and {type(tokenizer.decoder).__name__}",
        "quantizer": type(tokenizer.quantizer).__name__,
        "prior": None if trained is None else type(trained.model).__name__,
        "weights": {
            "encoder": count_weights(tokenizer.encoder),
            "decoder": count_weights(tokenizer.decoder),
            "prior": None if trained is None else count_weights(trained.model),
        },
    }


def count_weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def describe_image(subject: Subject) -> dict[str, Any]:
    """The images of a tokenizer, and whether a picture can become one."""
    tokenizer = subject.tokenizer
    height, width = tokenizer.encoder.image_size
    return {
        "height": height,
        "width": width,
        "channels": tokenizer.encoder.channels,
        "shown": subject.shown,
        "f": tokenizer.f if tokenizer.is_gridded else None,
        "fit": tokenizer.fit,
        "accepts": subject.refusal is None,
        "refusal": subject.refusal,
    }


def describe_code_layout(tokenizer: Tokenizer, tables: int) -> dict[str, Any]:
    """How an image's codes are arranged."""
    quantizer, (h, w) = tokenizer.quantizer, tokenizer.grid
    is_scaled = tokenizer.is_spatial and not tokenizer.is_gridded
    layout = "grid" if tokenizer.is_gridded else "scales" if is_scaled else "row"
    shape = tokenizer.code_shape
    L = int(np.prod(shape))
    table_of = [t % tables for t in range(L)]
    if is_scaled:
        lengths = quantizer.lengths
        table_of = [k if tables > 1 else 0 for k, n in enumerate(lengths) for _ in range(n)]
    return {
        "K": tokenizer.K,
        "num_codebooks": tokenizer.num_codebooks,
        "rows": shape[0],
        "columns": shape[1],
        "layout": layout,
        "shape": list(shape),
        "scales": [list(size) for size in quantizer.scales.sizes] if is_scaled else None,  # type: ignore[union-attr]
        "tables": tables,
        "table_of": table_of,
        "bits": round(quantizer.bits * h * w, 2),
    }


def describe_codebooks(
    tokenizer: Tokenizer, survey: CodeSurvey, parts: PageParts
) -> list[dict[str, Any] | None]:
    """The map of each table; None for one that is too large."""
    vectors = tokenizer.quantizer.codebooks()
    tables, K = vectors.shape[:2]
    use = survey.use if len(survey.use) == tables else survey.use.sum(0, keepdim=True)
    if K > MAX_MAPPED:
        return [None] * tables
    described: list[dict[str, Any] | None] = []
    for table, (own, counts) in enumerate(zip(vectors, use, strict=True)):
        sheet = sort_codes(own)
        p = counts.double() / counts.sum().clamp(min=1)
        pictures = picture_table(tokenizer, survey.patches, table, use)
        neighbours = list_nearest(own).numpy().astype(np.uint32)
        described.append(
            {
                "use": parts.add_array(f"use-{table}", counts.numpy().astype(np.uint32)),
                "dead": int((counts == 0).sum()),
                "perplexity": round(float(torch.exp(-torch.xlogy(p, p).sum())), 2),
                "layout": parts.add_array(f"layout-{table}", sheet.places()),
                "sheet": [sheet.rows, sheet.columns],
                "neighbours": parts.add_array(f"neighbours-{table}", neighbours),
                "patches": None if pictures is None else add_patches(pictures, table, parts),
            }
        )
    return described


def add_patches(pictures: Tensor, table: int, parts: PageParts) -> dict[str, Any]:
    """The sprite of a table's patches, without loss if it is small."""
    return parts.add_sprite(f"patches-{table}", pictures, pictures.numel() <= LOSSLESS_BYTES)


def describe_networks(
    subject: Subject, networks: PageNetworks | None, parts: PageParts
) -> dict[str, dict[str, Any] | None]:
    """The graphs, and what the page has to know of a prior to draw from it; without networks the latter alone."""
    described: dict[str, dict[str, Any] | None] = {"encoder": None, "decoder": None, "prior": None}
    if networks is not None:
        for name, graph in (("encoder", networks.encoder), ("decoder", networks.decoder)):
            if graph is not None:
                described[name] = parts.add_graph(name, graph)
    if subject.prior is not None and subject.refuse_prior(networks is None) is None:
        graph = networks.prior if networks is not None else None
        described["prior"] = {
            **describe_sampling(subject.prior),
            **({} if graph is None else parts.add_graph("prior", graph)),
        }
    return described


def describe_sampling(trained: Prior) -> dict[str, Any]:
    """How codes are drawn from a prior."""
    model = trained.model
    is_masked = isinstance(model, Masked)
    sampler = make_sampler()
    settings = ("temperature", "top_k", "top_p", "guidance", "choice_temperature")
    kind = "classes" if model.classes else "vectors" if model.vector_size else None
    return {
        "kind": describe_graph(model).kind if has_graph(model) else "grid",
        "name": type(model).__name__.lower(),
        "is_exact": model.exact,
        "T": model.T,
        "reads_after": is_masked,
        "labels": kind,
        "labels_size": model.vector_size or None,
        "classes": list(trained.classes.names) if model.classes else None,
        "guidance": kind is not None and bool(trained.config.get("label_drop")),
        "cache": list(cache_shape(model, 1)) if isinstance(model, GPT) else None,
        "schedule": ("cosine" if isinstance(model, MaskGIT) else "even") if is_masked else None,
        "steps": model.own_steps(model.T) if isinstance(model, MaskGIT) else None,
        "own_order": model.own_order if isinstance(model, Masked) else None,
        "sampler": {name: getattr(sampler, name) for name in settings},
    }


def add_runtime(engine: Runtime, parts: PageParts) -> dict[str, Any]:
    """The two files of onnxruntime-web."""
    return {
        "script": parts.add("runtime-script", engine.script),
        "binary": parts.add("runtime-binary", engine.binary),
    }


def list_notes(
    subject: Subject, codebooks: Sequence[Mapping[str, Any] | None], is_served: bool
) -> list[str]:
    """What a page does not have, and why."""
    refusals = (subject.refusal, subject.refuse_prior(is_served))
    notes = [each for each in refusals if each is not None]
    if None in codebooks:
        notes.append(
            f"The codebook has {subject.tokenizer.K:,} codes, too many for a map; up to {MAX_MAPPED:,} are shown."
        )
    return notes
