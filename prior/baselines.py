"""The baselines that every learned prior is compared with."""

from typing import Any

import torch
from numpy.typing import NDArray

from prior.models.bigram import Bigram
from prior.models.counted import Counted, count_pairs
from prior.models.uniform import Uniform
from prior.models.unigram import Unigram

BASELINES: dict[str, type[Counted]] = {"uniform": Uniform, "unigram": Unigram, "bigram": Bigram}


def baselines(
    train: NDArray[Any], val: NDArray[Any], K: int, num_codebooks: int = 1
) -> dict[str, float]:
    """Nats per token of val (m, L) under each baseline fitted to train (n, L), integers in [0, K) in raster order."""
    train_pairs, val_pairs = (count_pairs(codes, K, num_codebooks) for codes in (train, val))
    nats = {}
    for name, kind in BASELINES.items():
        model = kind(torch.empty(num_codebooks, K, 0), (1, train.shape[1] // num_codebooks))
        model.fit(train_pairs, val_pairs)
        nats[f"{name}_nats_per_token"] = model.nats(val_pairs)
    return nats
