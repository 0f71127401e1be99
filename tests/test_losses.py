"""The method's formulas against closed forms of Gaussians."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import disback

WEIGHTS = {  # w(sigma) of Eq. 8; "dmd" depends on the sample as well
    "score": lambda sigma, x0, d_target: torch.ones_like(sigma),
    "eps": lambda sigma, x0, d_target: sigma,
    "half": lambda sigma, x0, d_target: sigma**1.5,
    "x0": lambda sigma, x0, d_target: sigma**2,
    "dmd": lambda sigma, x0, d_target: sigma**2 / (x0 - d_target).abs().mean(1, keepdim=True),
}


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_vsd_gradient_is_the_weighted_difference_of_the_two_gaussian_scores(gaussian, weighting):
    torch.manual_seed(0)
    fake, target = gaussian(1.0, 0.5), gaussian(-2.0, 1.5)
    x0, sigma = double(7, 3), torch.logspace(-1, 1, 7, dtype=torch.float64)[:, None]
    x = x0 + sigma * double(7, 3)
    s_fake, s_target = (1.0 - x) / (0.25 + sigma**2), (-2.0 - x) / (2.25 + sigma**2)
    d_target = target(x, sigma)
    weight = WEIGHTS[weighting](sigma, x0, d_target)
    found = disback.vsd_gradient(x0, sigma, fake(x, sigma), d_target, weighting)
    torch.testing.assert_close(found, weight * (s_fake - s_target), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weighting", ["score", "eps", "half", "x0"])
def test_vsd_loss_has_the_gradient_of_the_kl_divergence_between_noised_gaussians(
        gaussian, weighting):
    """G(z) = a + b z against N(-0.5, 1.2^2): Eq. 8 is w(sigma) times the gradient of the KL."""
    torch.manual_seed(0)
    a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    n, sigma = 400_000, torch.tensor([[0.8]], dtype=torch.float64)
    loss, _ = disback.vsd_loss(a + b * double(n, 1), sigma, gaussian(1.0, 0.7),
                               gaussian(-0.5, 1.2), None, weighting)
    loss.backward()
    student = Normal(a, (b**2 + sigma**2).sqrt())
    target = Normal(-0.5, (1.2**2 + sigma**2).sqrt())
    weight = WEIGHTS[weighting](sigma, None, None)
    expected = torch.autograd.grad((weight * kl_divergence(student, target)).sum(), (a, b))
    assert a.grad.item() == pytest.approx(expected[0].item(), rel=0.02)
    assert b.grad.item() == pytest.approx(expected[1].item(), rel=0.02)


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_vsd_over_all_sigma_moves_a_gaussian_student_onto_the_teacher(gaussian, weighting):
    torch.manual_seed(0)
    a, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3.0, 0.3))
    teacher, optimizer = gaussian(-1.0, 0.8), torch.optim.Adam([a, b], lr=0.04)
    for _ in range(500):
        sigma = torch.logspace(-1, 1, 64, dtype=torch.float64).repeat(4)[:, None]
        fake = gaussian(a.item(), b.item())  # always exact
        loss, _ = disback.vsd_loss(a + b * double(256, 1), sigma, fake, teacher, None, weighting)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert a.item() == pytest.approx(-1.0, abs=0.1)
    assert b.item() == pytest.approx(0.8, abs=0.1)


def test_mismatch_degree_is_the_mean_distance_of_the_denoisers_over_sigma_plus_half(gaussian):
    x0, sigma = double(5, 2), torch.full((5, 1), 1.5, dtype=torch.float64)
    three, one = (lambda x, s, c: 3 * torch.ones_like(x)), (lambda x, s, c: torch.ones_like(x))
    _, degree = disback.vsd_loss(x0, sigma, three, one, None, "x0")
    assert degree.item() == pytest.approx(1.0)
    _, zero = disback.vsd_loss(x0, sigma, one, one, None, "x0")
    assert zero.item() == 0.0


def test_vsd_asks_both_networks_at_the_same_noised_samples():
    torch.manual_seed(0)
    asked, x0, sigma = [], torch.zeros(50_000, 1), torch.full((50_000, 1), 0.7)

    def net(x, sigma, cond):
        asked.append(x)
        return x

    disback.vsd_loss(x0, sigma, net, net, None, "x0")
    assert torch.equal(asked[0], asked[1])
    assert asked[0].std().item() == pytest.approx(0.7, rel=0.02)


def test_no_gradient_of_the_students_loss_reaches_fake_or_target(gaussian):
    fake, target = gaussian(1.0, 0.5), gaussian(0.0, 1.0)
    x0 = double(8, 1).requires_grad_()
    loss, _ = disback.vsd_loss(x0, torch.ones(8, 1), fake, target, None, "eps")
    loss.backward()
    assert x0.grad.abs().sum() > 0
    assert all(p.grad is None for net in (fake, target) for p in net.parameters())


def test_score_matching_of_a_linear_denoiser_finds_the_exact_one_of_a_gaussian():
    """Data N(1.5, 0.6^2) at sigma 0.9: D(x) = (0.36 x + 0.81 * 1.5) / 1.17."""
    torch.manual_seed(0)
    line = torch.nn.Linear(1, 1)
    optimizer = torch.optim.Adam(line.parameters(), lr=0.02)
    sigma = torch.full((4096, 1), 0.9)
    for step in range(600):
        x0 = 1.5 + 0.6 * torch.randn(4096, 1)
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 600)
        disback.update_score_model(lambda x, s, c: line(x), optimizer,
                                   [(x0, sigma, None, torch.randn_like(x0))])
    assert line.weight.item() == pytest.approx(0.36 / 1.17, abs=0.01)
    assert line.bias.item() == pytest.approx(0.81 * 1.5 / 1.17, abs=0.01)


def test_score_matching_loss_of_the_exact_denoiser_is_the_posterior_variance(gaussian):
    torch.manual_seed(0)
    sigma, weight = torch.full((200_000, 1), 0.5, dtype=torch.float64), 3.0
    x0 = 2.0 + 1.5 * double(200_000, 1)
    loss = disback.score_matching_loss(gaussian(2.0, 1.5), x0, sigma, weight=weight)
    assert loss.item() == pytest.approx(3.0 * 2.25 * 0.25 / 2.5, rel=0.02)
