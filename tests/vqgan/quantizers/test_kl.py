import torch
from torch.distributions import Independent, Normal, kl_divergence

from tests.helpers.parts import make
from vqgan.quantizers.kl import KL, LOGVAR_OFFSET


def test_the_loss_is_the_closed_form_of_the_divergence() -> None:
    quantizer, z_e = make(KL, 5, weight=0.01), torch.randn(3, 10, 4, 4)
    mean, std = z_e[:, :5], ((z_e[:, 5:] + LOGVAR_OFFSET) / 2).exp()
    posterior = Independent(Normal(mean.movedim(1, -1), std.movedim(1, -1)), 1)
    prior = Independent(Normal(torch.zeros(3, 4, 4, 5), torch.ones(3, 4, 4, 5)), 1)
    torch.testing.assert_close(quantizer(z_e).loss, 0.01 * kl_divergence(posterior, prior).mean())


def test_training_samples_around_the_mean_with_the_predicted_spread() -> None:
    quantizer = make(KL, 2).train()
    z_e = torch.tensor([1.0, -2.0, 3.0, 4.0]).view(1, 4, 1, 1).expand(1, 4, 200, 200)
    z = quantizer(z_e).z_q.flatten(2)[0]
    torch.testing.assert_close(z.mean(1), torch.tensor([1.0, -2.0]), atol=0.03, rtol=0)
    torch.testing.assert_close(
        z.std(1),
        torch.tensor([(3 + LOGVAR_OFFSET) / 2, (4 + LOGVAR_OFFSET) / 2]).exp(),
        rtol=0.03,
        atol=0,
    )


def test_evaluation_takes_the_mean() -> None:
    quantizer, z_e = make(KL, 5).eval(), torch.randn(3, 10, 4, 4)
    torch.testing.assert_close(quantizer(z_e).z_q, z_e[:, :5])


def sample_latents(quantizer: KL, n: int, seed: int, **settings: int) -> torch.Tensor:
    return torch.cat(
        list(quantizer.sample_latents(n, (4, 4), seed, **{"batch_size": 3, **settings}))
    )


def test_sampled_latents_are_normal_at_the_scale_of_the_encoder() -> None:
    quantizer = make(KL, 3)
    quantizer.initialise(torch.randn(2000, 6) * 4 + 2)
    latents = sample_latents(quantizer, 800, seed=1, batch_size=300)
    assert latents.shape == (800, 3, 4, 4)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.full((3,), 2.0), atol=0.3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.full((3,), 4.0), atol=0.3, rtol=0)


def test_a_sampled_latent_depends_only_on_seed_and_position() -> None:
    quantizer = make(KL, 3)
    latents = sample_latents(quantizer, 5, seed=1)
    assert torch.equal(latents[:3], sample_latents(quantizer, 3, seed=1, batch_size=2))
    assert torch.equal(latents[2:], sample_latents(quantizer, 5, seed=1, start=2))
    assert not torch.equal(latents, sample_latents(quantizer, 5, seed=2))


def test_latents_come_in_batches() -> None:
    batches = make(KL, 3).sample_latents(8, (4, 4), 1, batch_size=3, start=1)
    assert [len(batch) for batch in batches] == [3, 3, 1]
