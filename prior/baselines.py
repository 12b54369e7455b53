"""What every learned prior is compared with."""

from typing import Any

import torch
from numpy.typing import NDArray

from prior.models.bigram import Bigram
from prior.models.counted import Counted, count_pairs
from prior.models.uniform import Uniform
from prior.models.unigram import Unigram

BASELINES: dict[str, type[Counted]] = {"uniform": Uniform, "unigram": Unigram, "bigram": Bigram}


def baselines(train: NDArray[Any], val: NDArray[Any], K: int, books: int = 1) -> dict[str, float]:
    """Nats per token of val (m, L) under each baseline of train (n, L), integers in [0, K) in raster order."""
    seen, unseen = count_pairs(train, K, books), count_pairs(val, K, books)
    found = {}
    for name, kind in BASELINES.items():
        model = kind(torch.empty(books, K, 0), (1, train.shape[1] // books))
        model.fit(seen, unseen)
        found[f"{name}_nats_per_token"] = model.nats(unseen)
    return found
