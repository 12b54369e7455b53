"""What the training steps of both stages share."""

import pytest
import torch
from torch import nn

from codegrid.engine.clock import Budget, Schedule
from codegrid.engine.module import ClockedModule


class Line(ClockedModule):
    """A linear map that is trained."""

    def __init__(self, clip: float) -> None:
        super().__init__(Budget(1), Schedule(0, floor=0.0), clip)
        torch.manual_seed(0)
        self.line = nn.Linear(4, 3)

    @property
    def learned(self) -> nn.Module:
        return self.line


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e3])
def test_scaled_gradients_are_clipped_as_those_of_the_loss_itself(clip: float) -> None:
    plain, scaled = Line(clip), Line(clip)
    scaled._scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    norms = []
    for module, scale in ((plain, 1.0), (scaled, 1024.0)):
        (scale * module.line(torch.ones(2, 4)).square().sum()).backward()
        norms.append(module.clip_gradients_of(torch.optim.SGD(module.line.parameters(), 1.0)))
    assert torch.equal(norms[0], norms[1])
    for p, q in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(q.grad / 1024, p.grad)


def test_the_loss_scale_is_a_number_without_a_scaler_and_the_scalers_own_tensor_with_one() -> None:
    module = Line(1.0)
    assert module.loss_scale == 1.0
    module._scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert isinstance(module.loss_scale, torch.Tensor)
    assert module.loss_scale == module._scaler.get_scale() == 8.0


def test_numbers_are_logged_as_tensors_of_the_modules_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = Line(1.0).to("meta")
    monkeypatch.setattr(module, "log_dict", lambda _: None)
    module.log_terms({"lr": 1e-3, "grad": torch.ones((), dtype=torch.float64, device="meta")})
    assert {(v.device.type, v.dtype) for v in module.vitals.values()} == {("meta", torch.float32)}
