"""What every learned prior is compared with."""

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
    """Nats per token of val (m, L) under each baseline of train (n, L), integers in [0, K) in raster order."""
    seen, unseen = count_pairs(train, K, num_codebooks), count_pairs(val, K, num_codebooks)
    found = {}
    for name, kind in BASELINES.items():
        model = kind(torch.empty(num_codebooks, K, 0), (1, train.shape[1] // num_codebooks))
        model.fit(seen, unseen)
        found[f"{name}_nats_per_token"] = model.nats(unseen)
    return found
