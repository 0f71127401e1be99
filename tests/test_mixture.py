"""The mixture's exact functions against scipy and autograd."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from toy2d import metrics, mixture

pytestmark = pytest.mark.usefixtures("all_samples")
PRESETS = [mixture.ring, mixture.grid, mixture.uneven, mixture.ring16]


def in_double(m):
    return mixture.Mixture(m.weights.double(), m.means.double(), m.stds.double())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("sigma", [0.0, 0.1, 3.0])
def test_log_density_is_scipys(preset, sigma):
    m = in_double(preset())
    x = m.sample(20).double()
    expected = np.log(sum(
        w * multivariate_normal(mean, np.diag(s**2 + sigma**2)).pdf(x.numpy())
        for w, mean, s in zip(m.weights.numpy(), m.means.numpy(), m.stds.numpy())))
    np.testing.assert_allclose(m.log_density(x, sigma).numpy(), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("preset", PRESETS)
def test_score_is_the_gradient_of_the_log_density_near_and_far(preset):
    m = in_double(preset())
    x = torch.cat([m.sample(30).double(), 20 + torch.randn(10, m.dims, dtype=torch.float64)])
    x.requires_grad_()
    sigma = torch.logspace(-1.5, 1.3, 40, dtype=torch.float64)[:, None]
    (expected,) = torch.autograd.grad(m.log_density(x, sigma).sum(), x)
    torch.testing.assert_close(m.score(x.detach(), sigma), expected, rtol=1e-8, atol=1e-8)


def test_float32_score_far_off_the_data_has_its_digits():
    m = mixture.ring()
    x = 20 + torch.randn(50, 2)
    torch.testing.assert_close(m.score(x, 0.1).double(), in_double(m).score(x.double(), 0.1),
                               rtol=1e-4, atol=1e-4)


def test_score_of_a_sample_set_is_the_mixtures_when_the_samples_are_its_centres():
    """A mode of width s at noise sigma is a point at noise sqrt(s^2 + sigma^2)."""
    m = in_double(mixture.ring())
    points = mixture.Mixture.of_samples(m.means)
    x = 3 * torch.randn(50, 2, dtype=torch.float64)
    torch.testing.assert_close(points.score(x, (0.15**2 + 0.4**2) ** 0.5), m.score(x, 0.4),
                               rtol=1e-6, atol=1e-6)


def test_samples_have_the_weights_means_and_widths_of_the_modes():
    torch.manual_seed(0)
    m = mixture.uneven()
    x = m.sample(100_000)
    mode, _ = m.nearest_mode(x)
    shares = torch.bincount(mode, minlength=5) / len(x)
    torch.testing.assert_close(shares, m.weights, rtol=0.05, atol=0.005)
    tight = mode == 3
    torch.testing.assert_close(x[tight].mean(0), m.means[3], rtol=0, atol=0.01)
    torch.testing.assert_close(x[tight].std(0), m.stds[3].expand(2), rtol=0.05, atol=0)


def test_metrics_of_a_shifted_sample_set_are_the_known_ones():
    """Shifting samples by v moves every projection by v.e: SWD = |v| / sqrt(2) in the plane."""
    evaluation = metrics.Evaluation(mixture.ring())
    found = evaluation.of(evaluation.reference + torch.tensor([30.0, 40.0]))
    assert found["swd"] == pytest.approx(50 / 2**0.5, rel=1e-3)
    assert found["off_mode"] == 1.0
    same = evaluation.of(evaluation.reference)
    assert same["swd"] == pytest.approx(0, abs=1e-6)
    assert same["energy_distance"] == pytest.approx(0, abs=1e-5)
    assert same["off_mode"] < 0.001 and same["modes_missed"] == 0 and same["mode_tv"] < 0.02


def test_metrics_of_samples_in_16_dimensions_are_the_planes_and_the_way_to_it():
    """Samples of the ring, lifted off its plane by a vector of length 5."""
    flat, thick = metrics.Evaluation(mixture.ring()), metrics.Evaluation(mixture.ring16())
    x = torch.cat([flat.reference + torch.tensor([30.0, 40.0]), torch.zeros(10_000, 14)], dim=1)
    x[:, [2, 15]] = torch.tensor([3.0, 4.0])
    found, expected = thick.of(x), flat.of(x[:, :2])
    assert found["off_plane"] == pytest.approx(5) and "off_plane" not in expected
    assert found["swd"] == pytest.approx((50**2 / 2 + 25) ** 0.5, rel=1e-3)
    assert expected["swd"] == pytest.approx(50 / 2**0.5, rel=1e-3)


def test_metrics_count_missing_modes_and_their_weights():
    m = mixture.ring()
    evaluation = metrics.Evaluation(m)
    found = evaluation.of(m.means[:2].repeat(5000, 1))  # two of eight modes
    assert found["modes_missed"] == 6
    assert found["mode_tv"] == pytest.approx(0.75)
