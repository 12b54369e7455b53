import torch
from torch import nn

from prior.models.steps import Steps
from prior.models.transformer import Block, RMSNorm, rotary

WIDTH, HEADS, GRID = 32, 2, (3, 4)


def blocks() -> nn.ModuleList:
    made = nn.ModuleList(Block(WIDTH, HEADS, dropout=0.5) for _ in range(3)).eval()
    for name, p in made.named_parameters():
        nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)  # the norms' own scales must count
    return made


def at_once(stack: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in stack:
        x = block(x, rotary(GRID, WIDTH // HEADS))
    return x


@torch.no_grad()
def test_step_by_step_equals_all_at_once() -> None:
    stack, x = blocks(), 5 * torch.randn(4, 12, WIDTH)
    steps = Steps(stack, rotary(GRID, WIDTH // HEADS), 4)
    found = torch.stack([steps(x[:, t]) for t in range(12)], 1)
    torch.testing.assert_close(found, at_once(stack, x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_restarts_has_forgotten() -> None:
    stack, x = blocks(), torch.randn(4, 12, WIDTH)
    steps = Steps(stack, rotary(GRID, WIDTH // HEADS), 4)
    first = [steps(x[:, t]) for t in range(5)]
    steps.restart()
    assert all(torch.equal(steps(x[:, t]), first[t]) for t in range(5))


@torch.no_grad()
def test_steps_follow_autocast_as_near_as_the_blocks_do() -> None:
    stack, x = blocks(), torch.randn(4, 12, WIDTH)
    exact = at_once(stack, x)
    with torch.autocast("cpu", torch.bfloat16):
        steps = Steps(stack, rotary(GRID, WIDTH // HEADS), 4)
        assert steps.past.dtype == torch.bfloat16
        error = (torch.stack([steps(x[:, t]) for t in range(12)], 1) - exact).norm()
        usual = (at_once(stack, x) - exact).norm()
    assert 0 < error < 2 * usual


@torch.no_grad()
def test_steps_leave_the_weights_and_the_input_alone() -> None:
    stack, x = blocks(), torch.randn(4, WIDTH)
    weights, kept = {name: p.clone() for name, p in stack.named_parameters()}, x.clone()
    steps = Steps(stack, rotary(GRID, WIDTH // HEADS), 4)
    steps(x)
    steps(x)
    assert torch.equal(x, kept)
    assert all(torch.equal(p, weights[name]) for name, p in stack.named_parameters())


def test_the_norm_is_torchs_and_so_is_its_gradient() -> None:
    ours, theirs = RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
    for norm in (ours, theirs):
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x = [torch.randn(4, 3, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    slope = torch.randn(4, 3, WIDTH)
    found = [norm(each) for norm, each in zip((ours, theirs), x, strict=True)]
    for y in found:
        y.backward(slope)
    torch.testing.assert_close(*found)
    torch.testing.assert_close(x[0].grad, x[1].grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    tiny = 1e-4 * torch.randn(4, WIDTH)  # where its epsilon counts
    torch.testing.assert_close(ours(tiny), theirs(tiny))
