"""The gallery: each method's formulas against closed forms, and the lines of its runs."""

import copy
import importlib
import json
import math
import types

import pytest
import torch
from conftest import ROOT, refusal
from safetensors.torch import save
from torch import nn
from torch.func import jvp

import disback
from runtime import errors
from toy2d import metrics, mixture, model, problem
from toy2d.gallery import (
    __main__,
    analogues,
    boot,
    conditional,
    core,
    distillspec,
    fdistill,
    flash,
    hipa,
    hypersd,
    instaflow,
    lora,
    mdt,
    msd,
    phased,
    pictures,
    pvd,
    rcm,
    report,
    runs,
    samplers,
    snoopi,
    sprint,
    stepbystep,
    swiftbrush,
    tbcm,
    twinflow,
    versions,
    vsd,
)
from toy2d.gallery.fields import Field, render

HI, BATCH = core.HI, 64


def method(name):
    return importlib.import_module(f"toy2d.gallery.{name}")


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def exact(mean, std):
    """The denoiser of N(mean, std^2)."""
    return lambda x, sigma, cond=None: (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


@pytest.fixture
def toy(monkeypatch):
    """make(...) -> a Toy with small random teachers; loops of the methods take a few steps, of
    BATCH points."""
    def random_teacher(net):
        torch.manual_seed(7)
        return net().requires_grad_(False)

    monkeypatch.setattr(problem, "trained_teacher", lambda config, data: (
        random_teacher(lambda: model.Denoiser(16, 2, 1.0)), ""))
    for module in (msd, swiftbrush):
        monkeypatch.setattr(module, "teacher",
                            lambda toy: random_teacher(lambda: conditional.Conditional(16)))
    short = core.loop
    monkeypatch.setattr(core.Toy.sigma, "__defaults__", (BATCH,))
    monkeypatch.setattr(core, "BATCH", BATCH)
    for module in map(method, runs.METHODS):
        monkeypatch.setattr(module, "BATCH", BATCH, raising=False)
        if hasattr(module, "loop"):
            monkeypatch.setattr(module, "loop", lambda steps, *adams: short(min(steps, 3), *adams))
    return core.Toy


def weights(net):
    return torch.cat([weight.detach().flatten() for weight in net.parameters()])


def z_of(n=64):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(3))


def sample(result):
    with torch.no_grad():
        return result.sample(z_of(), torch.Generator().manual_seed(4))


def vsd_loop(student, teacher, draw, weighting, rates, betas=(0.0, 0.999)):
    """VSD by the core's own losses, Eq. 8 and then Eq. 5, in the fixture's 3 iterations, with
    draw(i) -> (x0, label); the student is trained in place, its moving average returned."""
    fake, config = copy.deepcopy(teacher).requires_grad_(), problem.Config(sigma_max=HI)
    adam = torch.optim.Adam(student.parameters(), rates[0], betas, fused=True)
    adam_fake = torch.optim.Adam(fake.parameters(), rates[1], (0.0, 0.999), fused=True)
    for i in core.loop(3, adam, adam_fake):
        x0, label = draw(i)
        sigma = problem.karras_sigma(len(x0), config)
        core.update(adam, disback.vsd_loss(x0, sigma, fake, teacher, label, weighting)[0])
        if i == 0:
            average = copy.deepcopy(student)
        disback.update_average(average, student, 0.95)
        sigma = problem.karras_sigma(len(x0), config)
        core.update(adam_fake, disback.score_matching_loss(
            fake, x0.detach(), sigma, label, problem.score_weight(sigma, 1.0)))
    return average


# ------------------------------------------------------------------------------- the frame


@pytest.mark.parametrize("name", runs.METHODS[:15])  # the others have tests of their own
def test_every_row_of_every_method_runs(name, toy, monkeypatch):
    module = method(name)
    monkeypatch.setattr(instaflow, "pairs", lambda net: (z_of(), z_of()))
    for variant, backtrack, rate in [arm for arm in runs.arms(name) if arm[2] == 1]:
        if backtrack and name == "msd":
            continue  # four paths
        settings = dict(module.VARIANTS[variant]) if variant else {}
        setting = toy(0, backtrack, rate, settings.pop("data", "ring"))
        points = sample(module.train(setting, **settings))
        assert points.shape == (64, 2) and points.isfinite().all(), variant


def test_the_walk_visits_all_nodes_and_ends_with_the_teachers_own_weights(toy):
    setting = toy(0, backtrack=True)
    target, fake, walk = setting.nets(lambda n: (torch.randn(n, 2) + 6, None), interval=2)
    seen = [walk.node]
    assert not torch.equal(weights(target), weights(setting.teacher))
    assert not torch.equal(weights(fake), weights(setting.teacher))
    for _ in range(40):
        if walk.step():
            seen.append(walk.node)
    assert seen == list(range(9, -1, -1))
    assert torch.equal(weights(target), weights(setting.teacher))


def test_iterations_change_student_and_fake_as_those_of_the_stage(toy, monkeypatch):
    """Two: in the first the fake is the teacher still, and the student's gradient 0."""
    import backtrack

    setting, kept = toy(0), {}
    monkeypatch.setattr(vsd, "loop", lambda steps, *adams: range(2))
    nets, average = core.Toy.nets, core.average
    monkeypatch.setattr(core.Toy, "nets", lambda *args: kept.setdefault("nets", nets(*args)))
    monkeypatch.setattr(vsd, "average", lambda net: average(kept.setdefault("student", net)))
    torch.manual_seed(5)
    vsd.train(setting)
    torch.manual_seed(5)
    config = problem.Config(noise="karras", sigma_data=1.0, weighting="eps", batch=core.BATCH,
                            lr_student=6e-3, lr_fake=6e-3, decay="constant", beta2=0.999)
    student = vsd.Generator()
    made = problem.assemble(config, 0, "cpu", mixture.ring(), setting.copy(), "")
    made.student = student
    torch.manual_seed(5)
    vsd.Generator()  # draws what the first one drew
    args = types.SimpleNamespace(fake_init="teacher", target="teacher", accumulate=1, shard=False,
                                 compile=False)
    stage = backtrack.Networks(args, made, None)
    for _ in range(2):
        samples, _ = stage.update_student()
        stage.update_fake(samples)
    torch.testing.assert_close(weights(kept["student"]), weights(stage.student))
    torch.testing.assert_close(weights(kept["nets"][1]), weights(stage.fake))


def test_the_plain_arm_costs_as_much_as_stage_1_and_2(toy, monkeypatch):
    monkeypatch.setattr(vsd, "loop", core.loop)
    monkeypatch.setattr(core.Toy, "steps", lambda self, n, cost, stage1=core.STAGE1: (
        2 if self.backtrack else 2 + round(stage1 / cost)))
    evals = {}
    for backtrack in (False, True):
        with runs.Count() as count:
            vsd.train(toy(0, backtrack))
        evals[backtrack] = count.evals
    assert evals[True] == (2 * 8 + core.STAGE1) * core.BATCH
    assert evals[False] == pytest.approx(evals[True], abs=8 * core.BATCH)


def test_a_directional_derivative_counts_as_a_backward():
    net = model.Denoiser(8, 1, 1.0)
    x, sigma = torch.randn(10, 2), torch.ones(10, 1)
    with runs.Count() as count:
        sprint.tangent(net, x, sigma, 0 * x)
    assert count.evals == 30


# ------------------------------------------------------------------------------- the VSD family


def test_swiftbrushs_weight_in_vp_form():
    sigma, x, d_fake, d_target = double(9, 1).exp(), double(9, 2), double(9, 2), double(9, 2)
    eps_fake, eps_target = (x - d_fake) / sigma, (x - d_target) / sigma
    variance = sigma**2 / (1 + sigma**2)  # 1 - alpha^2
    torch.testing.assert_close(variance * (eps_target - eps_fake),
                               swiftbrush.published_weight(sigma) * (d_fake - d_target))


def test_guidance_of_two_gaussians_of_one_width_is_the_gaussian_at_the_moved_mean():
    def net(x, sigma, cond=None):
        return exact(-1.0 if cond is None else 0.5, 0.7)(x, sigma)

    x, sigma = double(9, 2), double(9, 1).exp()
    torch.testing.assert_close(conditional.guided(net, 3.0)(x, sigma, 1),
                               exact(-1.0 + 3 * 1.5, 0.7)(x, sigma))


@pytest.mark.parametrize("kappa", [1.0, 3.0, 7.5])
def test_where_the_fake_is_the_teacher_no_scale_gives_a_gradient(kappa):
    torch.manual_seed(0)
    net, x0 = conditional.Conditional(8), torch.randn(16, 2, requires_grad=True)
    both = [conditional.guided(net, kappa) for _ in range(2)]
    label = torch.randint(4, (16,))
    core.vsd(x0, torch.ones(16, 1), *both, "x0", label, scale=2.0)[0].backward()
    assert (x0.grad == 0).all()
    other = conditional.guided(net, kappa + 1)
    core.vsd(x0, torch.ones(16, 1), other, both[1], "x0", label)[0].backward()
    assert (x0.grad != 0).any()


def test_adapters_start_as_the_network_and_alone_are_trained_and_stored(tmp_path):
    from safetensors.torch import save_file

    net = conditional.Conditional(8)
    patched = lora.lora(net, 4)
    x, sigma = torch.randn(9, 2), torch.rand(9, 1)
    assert torch.equal(patched(x, sigma), net(x, sigma))
    names = {name for name, weight in patched.named_parameters() if weight.requires_grad}
    assert names == set(lora.adapters(patched)) and all(name[-1] in "AB" for name in names)
    with torch.no_grad():
        patched.net[0].B += 1
    save_file(lora.adapters(patched), tmp_path / "node")
    other = lora.lora(net, 4)
    lora.load_adapters(tmp_path / "node", other)
    assert torch.equal(other(x, sigma), patched(x, sigma))
    assert not torch.equal(other(x, sigma), net(x, sigma))


def test_swiftbrush_needs_no_data(toy, monkeypatch):
    def refuse(*_):
        raise AssertionError("asked for data")

    monkeypatch.setattr(mixture.Mixture, "sample", lambda self, n: (
        z_of(n) if n == metrics.Evaluation.samples else refuse()))
    swiftbrush.train(toy(0))
    tbcm.train(toy(0))


def test_snoopi_with_a_fixed_scale_is_swiftbrush(toy, monkeypatch):
    plain = sample(swiftbrush.train(toy(0), kappa=(3, 3)))
    assert not torch.equal(sample(snoopi.train(toy(0))), plain)
    train = swiftbrush.train
    monkeypatch.setattr(swiftbrush, "train", lambda toy, kappa: train(toy, kappa=(3, 3)))
    assert torch.equal(sample(snoopi.train(toy(0))), plain)


@pytest.mark.parametrize("name, divergence", [
    ("RKL", lambda p, q: q * (q / p).log()),
    ("FKL", lambda p, q: p * (p / q).log()),
    ("JS", lambda p, q: p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log())])
def test_h_turns_the_reverse_kls_gradient_into_that_of_the_divergence(name, divergence):
    """p = N(0, 1), q = N(m, 1): E_q[h(p / q) (s_q - s_p)] is dD_f / dm at m = 0.7."""
    x = torch.linspace(-14, 14, 200_001, dtype=torch.float64)

    def density(m):
        return torch.distributions.Normal(m, torch.ones((), dtype=torch.float64)).log_prob(x).exp()

    m = torch.tensor(0.7, dtype=torch.float64)
    p, q = density(0 * m), density(m)
    h = fdistill.WEIGHTS[name](p / q)
    found = torch.trapezoid(q * h * (-(x - m) + x), x)
    above, below = (torch.trapezoid(divergence(p, density(m + step)), x) for step in (1e-4, -1e-4))
    assert found.item() == pytest.approx(((above - below) / 2e-4).item(), rel=1e-6)


def test_f_distill_of_the_reverse_kl_is_vsd_to_the_bit(toy):
    monkey = toy(0)
    assert torch.equal(sample(fdistill.train(monkey, "RKL")), sample(vsd.train(toy(0))))
    assert not torch.equal(sample(fdistill.train(toy(0), "JS")), sample(vsd.train(toy(0))))


def test_the_ratio_is_that_of_the_target_while_it_walks(toy, monkeypatch):
    """Ten iterations a node: samples of nodes 9 ... 1 are the critic's real ones, and then data."""
    asked, real = [], []
    monkeypatch.setattr(fdistill, "node_samples", lambda target: (
        asked.append(weights(target)) or torch.full((4096, 2), float(len(asked)))))
    monkeypatch.setattr(fdistill, "critic_loss", lambda critic, some, *_: (
        real.append(some) or critic(some, torch.ones(len(some), 1)).mean()))
    monkeypatch.setattr(fdistill, "loop", lambda steps, *adams: range(93))
    setting = toy(0, backtrack=True)
    fdistill.train(setting)
    assert [some[0, 0].item() for some in real[:90]] == [1 + i // 10 for i in range(90)]
    assert all(setting.data.nearest_mode(some)[1].max() < 6 for some in real[90:])
    gaps = [(net - weights(setting.teacher)).norm().item() for net in asked]
    assert len(asked) == 9 and gaps[-1] > 0 and gaps == sorted(gaps, reverse=True)


def test_the_critic_learns_the_log_ratio_of_two_gaussians():
    torch.manual_seed(0)
    critic = fdistill.Critic()
    adam = torch.optim.Adam(critic.parameters(), 3e-3)
    for _ in core.loop(250, adam):
        sigma = torch.tensor([0.1, 1.0, 5.0])[torch.randint(3, (512, 1))]
        core.update(adam, fdistill.critic_loss(critic, torch.randn(512, 2),
                                               0.7 + torch.randn(512, 2), sigma))
    x = 0.35 + torch.randn(2000, 2)
    for sigma in (0.1, 1.0, 5.0):
        right = (0.98 - 1.4 * x.sum(1)) / (2 * (1 + sigma**2))
        error = critic(x, samplers.at(x, sigma))[:, 0] - right
        assert error.square().mean().sqrt() < 0.15 * max(right.std(), 0.5), sigma


def test_each_label_of_msd_reaches_one_student(toy, monkeypatch):
    seen = []
    monkeypatch.setattr(msd, "distilled", lambda toy, labels, batch, width: (
        seen.append((labels.tolist(), batch)) or (lambda z, label: z)))
    msd.train(toy(0), students=2)
    msd.train(toy(0), students=1)
    assert seen == [([0, 1], 32), ([2, 3], 32), ([0, 1, 2, 3], 64)]
    marked = iter((1.0, 2.0, 3.0, 4.0))

    def student(toy, labels, batch, width):
        mark = next(marked)
        return lambda z, label: (z * 0 + mark) * torch.isin(label, labels)[:, None]

    monkeypatch.setattr(msd, "distilled", student)
    points = msd.train(toy(0)).sample(z_of(400), torch.Generator().manual_seed(0))
    assert sorted(points[:, 0].unique().tolist()) == [1.0, 2.0, 3.0, 4.0]


def test_msd_with_one_student_is_vsd_with_labels(toy):
    torch.manual_seed(0)
    student, teacher = vsd.Generator(8, 4), msd.teacher(None)  # which seeds what follows

    def draw(_):
        label = torch.randint(4, (BATCH,))
        return student(torch.randn(BATCH, 2), label), label

    average = vsd_loop(student, teacher, draw, "eps", (2.4e-2, 6e-3))
    label = torch.randint(4, (64,), generator=torch.Generator().manual_seed(4))
    found = sample(msd.train(toy(0), students=1))
    assert torch.equal(found, average(z_of(), label))
    assert not torch.allclose(found, sample(msd.train(toy(0), students=2)), atol=1e-3)


def test_phased_dmd_regresses_on_a_target_whose_mean_is_the_denoiser():
    """x_b ~ N(0, tau^2 + b^2): the slope of the target on x is tau^2 / (tau^2 + sigma^2)."""
    torch.manual_seed(0)
    n, tau, b, s = 1_000_000, 0.6, 1.0, torch.tensor(1.1, dtype=torch.float64)
    xb, eps = math.sqrt(tau**2 + b**2) * double(n), double(n)
    x, slope = xb + s * eps, tau**2 / (tau**2 + b**2 + s**2)
    found = (x * phased.target_of(xb, s, eps, b)).mean() / x.square().mean()
    assert found.item() == pytest.approx(slope.item(), abs=0.004)
    assert abs((x * xb).mean() / x.square().mean() - slope) > 0.2  # what the naive target learns


def test_phased_dmds_loss_is_least_at_that_denoiser_and_from_level_0_is_score_matching():
    torch.manual_seed(0)
    xb, s = math.sqrt(0.36 + 1) * double(400_000, 1), torch.tensor(0.9, dtype=torch.float64)
    losses = {}
    for std in (0.5, 0.6, 0.7):
        torch.manual_seed(1)
        losses[std] = phased.subinterval_loss(exact(0.0, std), xb, s, b=1.0).item()
    assert min(losses, key=losses.get) == 0.6
    x0, sigma = double(50, 2), double(50, 1).exp()
    torch.manual_seed(1)
    mine = phased.subinterval_loss(exact(0.3, 0.7), x0, sigma)
    torch.manual_seed(1)
    torch.testing.assert_close(mine, core.dsm(exact(0.3, 0.7), x0, sigma))


def test_phased_dmds_weight_takes_back_what_explodes():
    """A network that answers x_b errs by b^2 / s eps; the weight is lambda s^2 / sigma^2."""
    torch.manual_seed(0)
    xb, b, s = torch.zeros(200_000, 1).double(), 1.0, torch.tensor(0.01, dtype=torch.float64)
    loss = phased.subinterval_loss(lambda x, sigma: 0 * x, xb, s, b=b).item()
    sigma2 = b**2 + 0.01**2
    assert loss == pytest.approx((sigma2 + 1) / sigma2 * b**4 / sigma2, rel=0.02)


def test_flash_dmd_gives_each_level_one_loss():
    torch.manual_seed(0)
    net, critic = model.Denoiser(8, 1, 1.0), fdistill.Critic()
    x0 = samplers.one(net)(z_of())
    flash.gan(critic, flash.low_step(lambda x, sigma: x, x0)).backward()
    assert all(weight.grad is None for weight in net.parameters())
    flash.gan(critic, flash.low_step(net, x0)).backward()
    assert any((weight.grad != 0).any() for weight in net.parameters())


def test_flash_dmds_fake_follows_the_student_by_a_share_of_its_weights(toy, monkeypatch):
    """fake <- share * fake + (1 - share) * student, which at 1 leaves the fake as without."""
    average, gaps = disback.update_average, []

    def trained(follow):
        copies, copied = [], core.Toy.copy
        with monkeypatch.context() as patch:
            patch.setattr(core.Toy, "copy", lambda self: copies.append(copied(self)) or copies[-1])
            patch.setattr(disback, "update_average", lambda *args: follow(*copies, *args))
            flash.train(toy(0))
        return weights(copies[1])

    def watched(student, fake, *args):
        expected = 0.99 * weights(fake) + 0.01 * weights(student)
        average(*args)
        gaps.append((weights(fake) - expected).abs().max().item())

    published = trained(watched)
    assert len(gaps) == 3 and max(gaps) < 1e-6
    at_1 = trained(lambda student, fake, *args: average(*args[:2], 1.0))
    assert torch.equal(at_1, trained(lambda *_: None)) and not torch.equal(at_1, published)


def test_the_preference_loss_is_log_2_at_the_reference_and_pulls_from_worst_to_best():
    torch.manual_seed(0)
    mean = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    eps, beta = double(4, 1, 2), 0.5
    loss = flash.preference(lambda x, sigma: mean, lambda x, sigma: mean.detach(), double(1, 2),
                            eps, beta)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    order = eps[:, 0, 0].argsort()
    expected = -beta / 2 * 0.8 * (eps[order[-1], 0] - eps[order[0], 0]) / 0.8**2
    torch.testing.assert_close(mean.grad[0], expected)


# ------------------------------------------------------------------------- trajectory methods


@pytest.fixture
def nets():
    torch.manual_seed(0)
    student, teacher = (model.Denoiser(16, 2, 1.0).double() for _ in range(2))
    sigma = torch.linspace(-2, 2, 9, dtype=torch.float64).exp()[:, None]
    return student, teacher, double(9, 2) * (1 + sigma), sigma


def test_the_tangent_agrees_with_central_differences(nets):
    student, teacher, x, sigma = nets
    d_teacher = teacher(x, sigma).detach()
    _, j = sprint.tangent(student, x, sigma, d_teacher)
    h = 1e-5
    above, below = (student(x + t * (x - d_teacher), sigma * math.exp(t)) for t in (h, -h))
    torch.testing.assert_close(j, (above - below).detach() / (2 * h), rtol=1e-6, atol=1e-8)


def test_scm_is_the_published_trigflow_loss(nets):
    """F = (cos x_t - f) / sin, and g = -cos^2 (F - dx/dt) - r (cos sin x_t + cos sin dF/dt)."""
    student, teacher, x, sigma = nets
    t, r = sigma.atan(), 0.6
    d_teacher = teacher(x, sigma).detach()

    def raw(xt, t):
        return (t.cos() * xt - student(xt / t.cos(), t.tan())) / t.sin()

    xt = t.cos() * x
    slope = (t.cos() * xt - d_teacher) / t.sin()  # dx_t / dt
    f, df = jvp(raw, (xt, t), (slope, torch.ones_like(t)))
    g = -t.cos()**2 * (f - slope) - r * (t.cos() * t.sin() * xt + t.cos() * t.sin() * df)
    g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    loss = (raw(xt, t) - f.detach() - g.detach()).square().sum(1).mean()
    mine = sprint.scm(student, x, sigma, d_teacher, r)
    torch.testing.assert_close(mine, loss)
    found, right = (torch.autograd.grad(part, list(student.parameters())) for part in (mine, loss))
    for a, b in zip(found, right):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_the_denoisers_raw_output_is_minus_trigflows(nets):
    student, _, x, sigma = nets
    raw = {}
    student.net.register_forward_hook(lambda module, inputs, output: raw.update(value=output))
    d = student(x, sigma)
    t = sigma.atan()
    torch.testing.assert_close(raw["value"], -(t.cos()**2 * x - d) / t.sin())


def test_flow_and_trigflow_are_the_same_answer(nets):
    """SANA-Sprint's map of a flow network v(x_s, s): F at t, with s = sin / (sin + cos)."""
    _, teacher, x, sigma = nets
    t = sigma.atan()
    s = t.sin() / (t.sin() + t.cos())
    xs = (1 - s) * x
    torch.testing.assert_close(s, sigma / (1 + sigma))
    v = (xs - teacher(x, sigma)) / s
    norm = (s**2 + (1 - s) ** 2).sqrt()
    published = ((1 - 2 * s) * xs + (1 - 2 * s + 2 * s**2) * v) / norm
    torch.testing.assert_close(published, (t.cos()**2 * x - teacher(x, sigma)) / t.sin())


def test_a_gaussians_consistency_function_has_no_tangent():
    m, tau = 0.4, 0.7

    def f(x, sigma):
        return m + tau * (x - m) / (tau**2 + sigma**2).sqrt()

    x, sigma = double(9, 2), double(9, 1).exp()
    _, j = sprint.tangent(f, x, sigma, exact(m, tau)(x, sigma))
    assert j.abs().max() < 1e-14
    _, off = sprint.tangent(f, x, sigma, exact(m + 0.1, tau)(x, sigma))
    assert off.abs().max() > 1e-3


def test_without_critic_or_vsd_sprint_and_rcm_are_scm(toy):
    scm = sample(sprint.train(toy(0), adv=0, steps=3))
    assert torch.equal(sample(rcm.train(toy(0), mu=0.0, steps=3)), scm)
    assert not torch.equal(sample(rcm.train(toy(0), steps=3)), scm)
    assert not torch.equal(sample(sprint.train(toy(0), steps=3)), scm)


def test_rcm_without_consistency_is_vsd_of_the_denoiser(toy):
    setting = toy(0)
    student = setting.copy()

    def draw(i):
        torch.manual_seed(i)  # of VSD's own random numbers
        return samplers.one(student)(torch.randn(BATCH, 2)), None

    vsd_loop(student, setting.teacher, draw, "dmd", (1e-3, 2e-3), (0.9, 0.99))
    found = sample(rcm.train(toy(0), consistency=0.0))
    assert torch.equal(found, samplers.one(student)(z_of()))
    assert not torch.allclose(found, samplers.one(setting.teacher)(z_of()), atol=1e-4)


def test_tbcms_points_lie_on_ddim_trajectories(nets):
    _, teacher, _, _ = nets
    torch.manual_seed(0)
    sigmas = torch.tensor([5.0, 2.0, 0.3], dtype=torch.float64)
    teacher.float()
    x, sigma, d = tbcm.trajectories(teacher, sigmas.float(), 4)
    assert sigma[:, 0].tolist() == pytest.approx([5.0] * 4 + [2.0] * 4 + [0.3] * 4)
    torch.testing.assert_close(d, teacher(x, sigma))
    for i, (a, b) in enumerate(((5.0, 2.0), (2.0, 0.3))):
        here = slice(4 * i, 4 * i + 4)
        slope = (x[here] - d[here]) / a
        torch.testing.assert_close(x[4 * i + 4:4 * i + 8], x[here] + (b - a) * slope)


def test_mdts_velocity_matching_is_continuous_time_consistency(nets):
    """(v_T - s d) - u = df / ds, and that is J / (s (1 - s))."""
    student, teacher, x, sigma = nets
    s = sigma / (1 + sigma)
    xs = (1 - s) * x
    v, u = mdt.velocity(teacher, xs, s), mdt.velocity(student, xs, s)
    d = mdt.derivative(student, xs, s, v.detach(), normalised=False)
    _, df = jvp(lambda xs, s: student(xs / (1 - s), s / (1 - s)), (xs, s), (v, torch.ones_like(s)))
    torch.testing.assert_close(v - s * d - u, df)
    _, j = sprint.tangent(student, x, sigma, teacher(x, sigma))
    torch.testing.assert_close(df.detach(), j / (s * (1 - s)))


def test_velocity_distillation_reaches_the_generating_velocity_alone(nets, monkeypatch):
    student, teacher, x, _ = nets
    monkeypatch.setattr(mdt, "flow_time", lambda n: torch.full((n, 1), 0.4, dtype=torch.float64))
    monkeypatch.setattr(mdt, "at", lambda x, s: torch.full((len(x), 1), s, dtype=torch.float64))
    torch.manual_seed(0)
    mdt.distillation(student, teacher, x, False).backward()
    found = [weight.grad.clone() for weight in student.parameters()]
    torch.manual_seed(0)
    top = torch.full((len(x), 1), mdt.S_MAX, dtype=torch.float64)
    u = mdt.velocity(student, mdt.S_MAX * x, top)
    xf = (mdt.S_MAX * (x - u)).detach()
    s = torch.full((len(x), 1), 0.4, dtype=torch.float64)
    xs = (1 - s) * xf + s * torch.randn_like(xf)
    v = mdt.velocity(teacher, xs, s).detach()
    d = mdt.derivative(student, xs, s, v, False)
    g = (mdt.velocity(student, xs, s) - v + s * d).detach()
    right = torch.autograd.grad((2 * g * u).mean(), list(student.parameters()))
    for a, b in zip(found, right):
        torch.testing.assert_close(a, b)


def test_hyper_sds_segments_end_below_the_next_level():
    n = torch.arange(40)
    for segments in (1, 2, 4, 8, 40):
        end = hypersd.segment_end(n, segments)
        assert (end >= n + 1).all() and (end <= 40).all()
        assert len(end.unique()) == segments
    assert torch.equal(hypersd.segment_end(n, 40), n + 1)  # then the target is the solver's step


def test_hyper_sds_step_is_the_samplers(nets):
    _, teacher, x, _ = nets
    teacher.float()
    x = x.float()
    for i in (0, 17, 39):
        pair = [hypersd.GRID[i].item(), hypersd.GRID[i + 1].item()]
        mine = hypersd.heun(teacher, x, samplers.at(x, pair[0]), samplers.at(x, pair[1]))
        torch.testing.assert_close(mine, samplers.ode(teacher, x, pair))


@pytest.mark.parametrize("segments", [1, 8])
def test_a_gaussians_exact_jumps_nearly_solve_hyper_sd(segments):
    m, tau = 0.4, 0.7

    def f(x, sigma):
        """The answer whose DDIM step to the segment's end is where the ODE leads."""
        n = (hypersd.GRID - sigma).abs().argmin(dim=1, keepdim=True)
        end = hypersd.GRID[hypersd.segment_end(n, segments)]
        there = m + (x - m) * ((tau**2 + end**2) / (tau**2 + sigma**2)).sqrt()
        return (there - end / sigma * x) / (1 - end / sigma)

    torch.manual_seed(0)
    x0 = m + tau * torch.randn(2048, 2)
    losses = [hypersd.consistency(net, exact(m, tau), x0, segments) for net in (
        f, lambda x, sigma: f(x, sigma) * 1.1)]
    assert losses[0] < 1e-2 * losses[1]


def test_twinflows_rectification_is_vsd_of_weight_1_plus_sigma_over_sigma(monkeypatch):
    """The branches' velocities stand for two denoisers: v = (x_s - D) / s."""
    torch.manual_seed(0)
    d_real, d_fake, seen = exact(0.2, 0.9), exact(-0.5, 0.4), {}

    def net(y, s, to):
        seen["y"], seen["s"] = (y, s) if s.mean() > 0 else (seen["y"], seen["s"])
        t = s.abs()
        return (y - (d_real if s.mean() > 0 else d_fake)(y / (1 - t), t / (1 - t))) / t

    seen.update(y=None, s=None)
    z = double(20, 2)
    f = double(20, 2).requires_grad_()
    twinflow.rectify(net, (z - f).detach(), f).backward()
    s, x = seen["s"], seen["y"] / (1 - seen["s"])
    sigma = s / (1 - s)
    gradient = (1 + sigma) / sigma * (d_fake(x, sigma) - d_real(x, sigma))
    # The loss is a mean of squares, so 2 / 40 of it; x_f = z - f, so that its sign turns.
    torch.testing.assert_close(-f.grad * 20, gradient, rtol=1e-4, atol=1e-5)


def test_twinflows_fake_branch_learns_the_flow_of_its_samples():
    torch.manual_seed(0)
    net = twinflow.Flow()
    adam = torch.optim.Adam(net.parameters(), 3e-3)
    points = torch.randn(400, 2) * 0.3 + torch.tensor([1.0, -1.0])
    for _ in core.loop(200, adam):
        core.update(adam, twinflow.flow_loss(net, points[torch.randint(400, (256,))], sign=-1))
    s, x = torch.full((500, 1), 0.6), points[torch.randint(400, (500,))]
    y = s * torch.randn(500, 2) + (1 - s) * x
    right = (y - mixture.Mixture.of_samples(points).denoise(y / (1 - s), s / (1 - s))) / s
    error = (net(y, -s, -s) - right).square().mean().sqrt()
    assert error < 0.15 * right.square().mean().sqrt()


def test_twinflows_consistency_is_0_for_the_right_mean_velocity():
    """Data at one point: the flow is straight, and every mean velocity is z - x."""
    x, z = torch.zeros(30, 2) + 0.3, torch.randn(30, 2)

    def right(xs, s, to):
        return (xs - 0.3) / s

    s = 0.1 + 0.9 * torch.rand(30, 1)
    assert twinflow.consistency(right, right, x, z, s, s * 0.5) < 1e-8
    assert twinflow.consistency(lambda *a: right(*a) + 0.2, right, x, z, s, s * 0.5) > 1e-3


def test_boots_hop_is_the_ddim_step_without_its_noise(nets):
    _, teacher, x, sigma = nets
    z = double(9, 2)
    lower = sigma * math.exp(-boot.HOP)
    mine = boot.hop(teacher, x, z, sigma) + lower * z
    state = x + sigma * z
    torch.testing.assert_close(mine, samplers.jump(state, teacher(state, sigma), sigma,
                                                   lower).detach())


def test_boots_loss_is_near_0_for_a_gaussians_own_signal():
    m, tau = torch.tensor(0.4, dtype=torch.float64), 0.7

    def signal(z, sigma):
        top = HI * z + (exact(m, tau)(HI * z, torch.tensor(HI).double()))
        x = m + (top - m) * ((tau**2 + sigma**2) / (tau**2 + HI**2)).sqrt()
        return x - sigma * z

    z, log = double(200, 2), torch.linspace(-3, 2.5, 200, dtype=torch.float64)[:, None]
    _, slope = jvp(lambda log: signal(z, log.exp()), (log,), (torch.ones_like(log),))
    y, sigma = signal(z, log.exp()), log.exp()
    torch.testing.assert_close(slope, y - exact(m, tau)(y + sigma * z, sigma))
    top = exact(m, tau)(HI * z, torch.full((200, 1), HI, dtype=torch.float64))
    below = boot.hop(exact(m, tau), y, z, sigma)
    error = (below - signal(z, sigma * math.exp(-boot.HOP))).abs().max()
    assert error < 0.02 and (signal(z, torch.full((200, 1), HI).double()) - top).abs().max() < 1e-6


def test_reflows_line_begins_at_the_noise_and_its_optimum_reproduces_the_pairs():
    """A Gaussian's pairs are x0 = a x_T + b: on the line the denoiser is affine, and exact."""
    z = double(50, 2)
    a, b = 0.03, 0.4
    x0 = a * HI * z + b
    eps = z - x0 / HI
    torch.testing.assert_close(x0 + HI * eps, HI * z)

    def reflowed(x, sigma, cond=None):  # x = x0 + sigma (z - x0 / HI) solved for x0
        slope = a + sigma * (1 / HI - a / HI)
        return a * (x - b * (1 - sigma / HI)) / slope + b

    sigma = torch.full((50, 1), 3.0, dtype=torch.float64)
    assert core.dsm(reflowed, x0, sigma, eps=eps) < 1e-25
    torch.testing.assert_close(samplers.one(reflowed)(z), x0)


def test_straightness_is_0_for_a_straight_flow_only(monkeypatch):
    monkeypatch.setattr(instaflow, "lognormal", lambda n: torch.rand(n, 1).double() + 0.5)
    z = double(50, 2)
    x0 = torch.full_like(z, 0.3)
    assert instaflow.straightness(lambda x, sigma: 0 * x + 0.3, z, x0) < 1e-20
    assert instaflow.straightness(lambda x, sigma: 0 * x + 0.4, z, x0) > 1e-3


# ------------------------------------------------------------------------------ analogues


def test_the_flow_of_circles_in_fourier_planes_keeps_phases_and_ends_on_their_radii():
    """E[x0|x] in a plane is R I1 / I0 (R |p| / sigma^2) along p: the ODE must end at R."""
    n = torch.arange(hipa.N, dtype=torch.float64) / hipa.N
    planes = [torch.stack([(2 * math.pi * k * n).cos(), (2 * math.pi * k * n).sin()], dim=1)
              * math.sqrt(2 / hipa.N) for k, _ in hipa.WAVES]

    def denoiser(x, sigma, cond=None):
        answer = torch.zeros_like(x)
        for basis, (_, size) in zip(planes, hipa.WAVES):
            p, radius = x @ basis, size * math.sqrt(hipa.N / 2)
            norm = p.norm(dim=1, keepdim=True)
            k = radius * norm / sigma**2
            ratio = torch.special.i1e(k) / torch.special.i0e(k)
            answer = answer + radius * ratio * (p / norm) @ basis.T
        return answer

    torch.manual_seed(0)
    z = double(20, hipa.N)
    end = samplers.ode(denoiser, hipa.BEGIN * z, samplers.levels(100, hipa.BEGIN))
    assert hipa.amplitudes(end) == pytest.approx([1, 1], abs=2e-3)
    assert hipa.amplitudes(hipa.signals(20)) == pytest.approx([1, 1])
    for k, _ in hipa.WAVES:
        turned = torch.fft.rfft(end)[:, k] / torch.fft.rfft(z)[:, k]
        assert turned.angle().abs().max() < 1e-6
    once = hipa.amplitudes(hipa.once(denoiser, double(4000, hipa.N)))
    lines = runs.read(ROOT / "toy2d" / "gallery" / "lines.jsonl")
    of_seeds = [line["numbers"] for line in lines.values() if line["method"] == "hipa"]
    for wave, right in zip(("low", "high"), once):  # 0.39 and 0.21: the high is lost first
        found = [numbers[f"{wave}, one step"] for numbers in of_seeds]
        assert found == pytest.approx(len(found) * [right], abs=0.02), "the trained networks'"


def test_the_high_pass_takes_the_low_wave_and_leaves_the_high_one():
    turns = torch.arange(hipa.N) / hipa.N
    low, high = ((2 * math.pi * k * turns).cos()[None] for k in (1, 5))
    torch.testing.assert_close(hipa.high(low + high), high, atol=1e-6, rtol=0)


def test_acceptance_by_enumeration_is_that_of_speculative_decoding():
    """20,000 sequences: a drafted token is accepted or replaced, and the output's law is p's."""
    torch.manual_seed(0)
    p, weight = distillspec.target(mixture.uneven())
    q = (p + 0.3 * torch.rand_like(p)).softmax(1)
    accepted, node = [], torch.zeros(20_000, dtype=torch.long)
    for _ in range(distillspec.TOKENS):
        drafted = torch.multinomial(q[node], 1)
        keep = torch.rand(20_000, 1) < (p[node] / q[node]).gather(1, drafted)
        rest = (p - q).clamp(min=0)[node] + 1e-12
        token = torch.where(keep, drafted, torch.multinomial(rest, 1))
        accepted.append(keep.float().mean())
        node = 4 * node + 1 + token[:, 0]
    found = torch.stack(accepted).mean().item()
    assert distillspec.acceptance(p, weight, q) == pytest.approx(found, abs=0.005)
    direct = torch.zeros(20_000, dtype=torch.long)
    for _ in range(distillspec.TOKENS):
        direct = 4 * direct + 1 + torch.multinomial(p[direct], 1)[:, 0]
    leaves = [torch.bincount(leaf - distillspec.NODES, minlength=1024) / 20_000
              for leaf in (node, direct)]
    law = (weight[-256:, None] * p[-256:]).flatten()
    tv = [(found - law).abs().sum() / 2 for found in leaves]
    assert tv[0] < 1.15 * tv[1]


def test_the_quadtrees_probabilities_are_the_densitys():
    p, weight = distillspec.target(mixture.uneven())
    torch.testing.assert_close(p.sum(1), torch.ones(distillspec.NODES))
    assert weight[1:5].sum().item() == pytest.approx(1, abs=1e-5)
    right = mixture.uneven().sample(200_000)
    quadrant = (right[:, 0] > 0).long() * 2 + (right[:, 1] > 0)
    share = torch.bincount(quadrant, minlength=4) / 200_000
    torch.testing.assert_close(weight[1:5], share, atol=0.02, rtol=0)


@pytest.mark.parametrize("name", distillspec.DIVERGENCES)
def test_divergences_are_torchs_and_0_at_equality(name):
    torch.manual_seed(0)
    p, q = torch.rand(2, 5, 4).softmax(2)
    kl = nn.functional.kl_div
    m = (p + q) / 2
    right = {"FKL": kl(q.log(), p, reduction="none").sum(1),
             "RKL": kl(p.log(), q, reduction="none").sum(1),
             "JSD": sum(kl(m.log(), a, reduction="none").sum(1) for a in (p, q)) / 2,
             "TVD": (p - q).abs().sum(1) / 2}[name]
    torch.testing.assert_close(distillspec.DIVERGENCES[name](p, q), right)
    assert distillspec.DIVERGENCES[name](p, p).abs().max() < 1e-6


def test_rendered_lines_agree_with_the_closed_form():
    """Of a mixture the integral along a line is a sum of w N(offset; m . u, std^2). The ring is
    shrunk, so that nothing of it lies beyond the ends of the chords."""
    ring = mixture.ring()
    data = mixture.Mixture(ring.weights.double(), 0.7 * ring.means.double(), ring.stds.double())
    angle, offset = double(7), torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)
    across = torch.stack([angle.cos(), angle.sin()], dim=1) @ data.means.T
    right = (data.weights * torch.distributions.Normal(
        across, data.stds[:, 0]).log_prob(offset[:, None]).exp()).sum(1)
    found = render(lambda x: data.log_density(x).exp(), angle, offset,
                   torch.full((7, 400), 0.5, dtype=torch.float64))
    torch.testing.assert_close(found, right, rtol=0, atol=2e-12)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_a_field_equal_to_the_teacher_has_no_loss_at_any_stage(share):
    torch.manual_seed(0)
    field, other = Field(grid=False), Field(grid=True)
    assert pvd.from_inside(field, field, share) == 0
    assert pvd.from_inside(other, field, share) > 0


def test_what_is_beyond_the_clip_changes_little():
    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return torch.zeros(len(x), 8), torch.full((len(x),), self.value)

    assert pvd.from_inside(Constant(-40.0), Constant(-60.0), 0.3) < 1e-20
    assert pvd.from_inside(Constant(-4.0), Constant(-6.0), 0.3) > 1


def test_the_rationale_ends_in_the_label_and_predicting_does_not_need_it():
    digits = torch.randint(5, (30, 6))
    assert torch.equal(stepbystep.running_sums(digits)[:, -1], digits.sum(1) % 5)
    student = stepbystep.Student()
    before = student(digits)[0]
    with torch.no_grad():
        student.rationale.weight += 1
    assert torch.equal(student(digits)[0], before)
    loss = stepbystep.loss(student, digits, stepbystep.running_sums(digits), alpha=1.0)
    right = nn.functional.cross_entropy(before, digits.sum(1) % 5)
    torch.testing.assert_close(loss, right)


def test_permuted_rationales_bring_the_accuracy_back_to_chance(toy, monkeypatch):
    """Five digits mod 3 here, so that 200 updates suffice: chance is 1 / 3."""
    monkeypatch.setattr(stepbystep, "DIGITS", 5)
    monkeypatch.setattr(stepbystep, "BASE", 3)
    found = [stepbystep.accuracy(toy(0, rate=2.0), 100, 0.5, permuted, 200)
             for permuted in (False, True)]
    assert found[0] > 0.9 and found[1] < 0.55


# ---------------------------------------------------------------------------------- the lines


def refused(*argv):
    return refusal(__main__.main, list(argv))


def test_mistakes_are_refused(tmp_path):
    assert "nothing" in refused("nothing", "--out", str(tmp_path))
    assert "--backtrack" in refused("boot", "--variant", "x", "--out", str(tmp_path))
    assert "instaflow" in refused("instaflow", "--backtrack", "--out", str(tmp_path))
    assert "--seeds" in refused("all", "--seeds", "0", "--out", str(tmp_path))
    assert "one METHOD" in refused("all", "--backtrack", "--out", str(tmp_path))
    assert "--seed " in refused("vsd", "--seeds", "2", "--out", str(tmp_path))
    assert "'abc'" in refused("vsd", "--seed", "abc", "--out", str(tmp_path))
    assert "empty" in refused("vsd", "--out", "")
    assert "no lines" in refused("table", "--out", str(tmp_path))


def test_what_cannot_be_written_is_told_before_a_method_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(__main__, "execute", lambda *_: pytest.fail("it ran"))
    for name in ("clouds", "lines.jsonl"):
        (tmp_path / name).touch()
    assert "clouds is no folder: name another --out" in refused("vsd", "--out", str(tmp_path))
    (tmp_path / "clouds").unlink()
    full = types.SimpleNamespace(free=10**7 - 1)
    monkeypatch.setattr(errors.shutil, "disk_usage", lambda _: full)
    assert "10 MB of free space" in refused("vsd", "--out", str(tmp_path))


def test_lines_of_another_version_are_refused_and_a_torn_one_is_none(tmp_path):
    line = {"method": "vsd", "variant": "", "backtrack": False, "rate": 1, "seed": 0,
            "version": "old"}
    file = tmp_path / "lines.jsonl"
    file.write_text(json.dumps(line) + "\n")
    assert "vsd" in refused("table", "--out", str(tmp_path))
    fresh = line | {"version": versions.version("vsd")}
    file.write_text(json.dumps(line) + "\n" + json.dumps(fresh) + "\n"
                    + json.dumps(line)[:40])
    assert list(runs.read(file).values()) == [fresh]
    others = (json.dumps(line | odd) for odd in ({"method": "gone"}, {"variant": []}))
    for other in ('{"run": 1}', "5", "My notes\n", '{"method" is missing', *others):
        file.write_text(other + "\n")
        assert "another kind" in refused("table", "--out", str(tmp_path))


def test_a_line_of_no_use_is_named_and_no_figure_is_drawn(tmp_path):
    line = {"method": "vsd", "variant": "", "backtrack": False, "rate": 1, "seed": 4, "evals": 1,
            "version": versions.version("vsd"), "numbers": {}, "mode_tv": 0.1, "off_mode": 0.1}
    for odd in ({}, {"swd": "3"}, {"swd": math.nan}, {"swd": 0.1, "numbers": {"x": math.inf}}):
        (tmp_path / "lines.jsonl").write_text(json.dumps(line | odd) + "\n")
        assert "vsd, seed 4, is of no use" in refused("table", "--out", str(tmp_path))
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("held", [
    b"", b"\x10" + bytes(20), None, *(save({"x": x}) for x in (
        torch.zeros(3, 1), torch.zeros(0, 2), torch.full((3, 2), torch.nan)))])
def test_a_cloud_that_is_missing_or_broken_is_named(tmp_path, held):
    if held is not None:
        (tmp_path / "clouds").mkdir()
        (tmp_path / "clouds" / "pvd.safetensors").write_bytes(held)
    with pytest.raises(disback.Refusal, match="pvd.safetensors is missing or broken: run that"):
        analogues.cloud(tmp_path, "pvd", 2, "x")


def test_the_figure_tells_what_was_not_run_from_what_cannot_be(tmp_path):
    """vsd can walk back, instaflow cannot; neither has."""
    said = {}
    for name in ("vsd", "instaflow"):
        figure, axis = pictures.plt.subplots()
        line = {"seed": 1, "swd": 0.1}
        pictures.clouds(axis, tmp_path, {(name, "", False, 1): [line]}, name, torch.zeros(1, 2),
                        method(name).BACKTRACK)
        said[name] = [text.get_text() for text in axis.texts]
        pictures.plt.close(figure)
    assert said == {"vsd": ["not run", "not run"], "instaflow": ["not run", "not defined"]}


def test_a_page_with_both_marks_gets_the_table_and_every_other_is_left_alone(tmp_path):
    page, marks = tmp_path / "README.md", [mark.encode() for mark in (report.BEGIN, report.END)]
    for held in (b"Caf\xe9", b"a" + marks[0] + b"b", b"a" + marks[1] + marks[0], b"a" + marks[1]):
        page.write_bytes(held)
        report.show(page, "table")
        assert page.read_bytes() == held
    page.write_bytes(b"Caf\xe9 " + marks[0] + b" old " + marks[1] + b" end")
    page.rename(tmp_path / "elsewhere")
    page.symlink_to(tmp_path / "elsewhere")
    report.show(page, "table")
    assert b" old " in page.read_bytes()
    (tmp_path / "elsewhere").replace(page)
    report.show(page, "table")
    assert page.read_bytes() == (
        b"Caf\xe9 " + marks[0] + b"\n\ntable\n" + marks[1] + b" end")


def test_nothing_that_is_not_the_gallerys_is_replaced(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    (tmp_path / "README.md").write_text("notes")
    line = {"method": "vsd", "variant": "", "backtrack": False, "rate": 1, "seed": 4, "evals": 1,
            "version": versions.version("vsd"), "numbers": {}}
    report.write(tmp_path, [line | {"swd": 0.1, "mode_tv": 0.1, "off_mode": 0.1}], runs.METHODS)
    assert (tmp_path / "README.md").read_text() == "notes"
    for words in (("vsd",), ("all",), ("table",)):
        assert "table.md is of no gallery" in refused(*words, "--out", str(tmp_path))
    (tmp_path / "lines.jsonl").write_text('{"of": "a study"}\n')
    assert "another kind" in refused("vsd", "--out", str(tmp_path))
    assert (tmp_path / "lines.jsonl").read_text() == '{"of": "a study"}\n'


def test_a_version_follows_code_and_kin_but_not_prose(tmp_path, monkeypatch):
    import shutil

    shutil.copytree(ROOT / "toy2d", tmp_path / "toy2d")
    here = tmp_path / "toy2d" / "gallery"
    monkeypatch.setattr(versions, "HERE", here)
    version = versions.version.__wrapped__  # without its cache
    before = {name: version(name) for name in ("snoopi", "vsd", "boot")}
    file = here / "swiftbrush.py"
    file.write_text(file.read_text().replace('"""', '"""Other words. ', 1) + "# a remark\n")
    assert {name: version(name) for name in before} == before
    file.write_text(file.read_text().replace("RANK = 16", "RANK = 8"))
    assert [version(name) == before[name] for name in before] == [False, True, True]


def test_every_method_has_a_file_and_no_file_is_long():
    assert len(runs.METHODS) == 19
    found = {file.stem: len(file.read_text().splitlines())
             for file in (ROOT / "toy2d" / "gallery").glob("*.py")}
    assert found.keys() > set(runs.METHODS)
    for name, lines in found.items():
        assert lines <= (120 if name in ("core", "__main__") else 80), name


def test_the_committed_lines_are_of_the_present_code_and_make_the_table(
        tmp_path, all_samples):
    import shutil

    here = ROOT / "toy2d" / "gallery"
    shutil.copytree(here / "clouds", tmp_path / "clouds")
    shutil.copy(here / "lines.jsonl", tmp_path)
    __main__.main(["table", "--out", str(tmp_path)])
    assert (tmp_path / "table.md").read_text() == (here / "table.md").read_text()
