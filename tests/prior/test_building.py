"""What is tried before a prior's images are encoded: its blocks, and a dry run's labels."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from codegrid.engine.errors import InputError
from prior import training
from prior.stages.building import build_parts
from prior.training import BLANK_LABELS, choose_blank_labels
from tests.helpers.configs import compose_config
from tests.helpers.stage1 import make_tokenizer


@pytest.mark.parametrize("setting", ["checkpoint_activations", "compile"])
def test_blocks_that_a_prior_lacks_are_missed_before_images_are_encoded(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*_: Any) -> None:
        raise AssertionError("images are encoded")

    monkeypatch.setattr(training, "load_codes", encode)
    config = compose_config("stage=prior", "prior=lstm")
    wanted = SimpleNamespace(**{"checkpoint_activations": False, "compile": False, setting: True})
    run: Any = SimpleNamespace(config=config, training=wanted)
    tokenizer, images = make_tokenizer(), SimpleNamespace()
    before = torch.get_rng_state()
    with pytest.raises(InputError, match=rf"trainer\.{setting}=true .* LSTM has none"):
        build_parts(run, tokenizer, images)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), before)


class Labelled:
    """Images whose labels are known once they are read."""

    def __init__(self, labels: list[int], classes: tuple[str, ...] = (), known: Any = None) -> None:
        self.labels, self.classes, self.known, self.title = labels, classes, known, "mine"
        self.most = 0  # images read at once

    def source(self, _: str) -> Any:
        class Source:
            labels = self.known
            __len__ = staticmethod(lambda: len(self.labels))

        return Source()

    def read_first(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.most = max(self.most, n)
        return torch.zeros(n), torch.tensor(self.labels[:n])


MANY = BLANK_LABELS + 1


@pytest.mark.parametrize(
    ("images", "conditional", "labels", "guesses", "most"),
    [
        (Labelled([5, 5, 3, 9]), True, [3, 5, 9], False, 4),
        (Labelled([4] * MANY), True, [4, 5], True, BLANK_LABELS),
        (Labelled([4, -1] * MANY), True, [-1, 4, 5], True, BLANK_LABELS),
        (Labelled([4] * 6), True, [4], False, 6),  # all are read: it is refused, as in the run
        (Labelled([-1] * MANY), True, [-1], False, BLANK_LABELS),
        (Labelled([4] * MANY), False, [4], False, 1),
        (Labelled([0] * MANY, ("a", "b", "c")), True, [0, 1, 2], False, 1),
        (Labelled([0] * MANY, known=np.array([0, 7])), True, [0, 7], False, 1),
    ],
)
def test_a_dry_run_has_the_labels_that_it_can_know(
    images: Any,
    conditional: bool,
    labels: list[int],
    guesses: bool,
    most: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert choose_blank_labels(images, conditional).tolist() == labels
    assert ("how many classes there are is known once" in capsys.readouterr().err) == guesses
    assert images.most == most
