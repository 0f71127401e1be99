"""The ADM network, its sampler and its loss against numbers of the original code (data/README.md).

The comparisons in float64 are the sharp ones: a wrong eps of the normalisation, or a wrong endpoint
of the embedding's frequencies, moves D by less than float32 and its tolerance can tell.
"""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, refusal

import disback
from imagenet64 import edm
from runtime import files

DATA = ROOT / "tests" / "data"
ARGUMENTS = ("img_resolution", "img_channels", "label_dim", "model_channels", "channel_mult",
             "channel_mult_emb", "num_blocks", "attn_resolutions")


@pytest.fixture(scope="module")
def ref():
    file = np.load(DATA / "edm_tiny.npz")
    numeric = [name for name in file.files if file[name].dtype.kind != "U"]
    return {name: torch.from_numpy(file[name]) for name in numeric} | {
        "config": json.loads(str(file["config"])), "grad_keys": file["loss/grad_keys"].tolist()}


@pytest.fixture
def net(ref):
    """The tiny network in float32, with the reference weights."""
    net = edm.Denoiser(**{name: ref["config"][name] for name in ARGUMENTS})
    net.load_state_dict({name[2:]: t.float() for name, t in ref.items() if name[:2] == "w/"})
    return net


def far(found, expected):
    return (found - expected).abs().max().item()


# ------------------------------------------------------------------------------------ the network


def test_the_full_network_has_the_released_names_shapes_and_types_in_order():
    with torch.device("meta"):
        net = edm.Denoiser()
    lines = (DATA / "edm_imagenet64_keys.txt").read_text().split()
    expected = list(zip(lines[::2], lines[1::2]))
    found = [(name, "x".join(map(str, t.shape))) for name, t in net.state_dict().items()]
    assert found == expected and len(found) == 553
    assert {t.dtype for t in net.state_dict().values()} == {torch.float32}
    assert sum(p.numel() for p in net.parameters()) == 295_899_267


def test_resampling_filters_are_quarters_and_no_parameters_and_others_are_refused(net, tmp_path):
    buffers = dict(net.named_buffers())
    assert len(buffers) == 4 and all(name.endswith("resample_filter") for name in buffers)
    assert all(torch.equal(b, torch.full((1, 1, 2, 2), 0.25)) for b in buffers.values())
    other = {"model.enc.8x8_down.skip.resample_filter": torch.full((1, 1, 2, 2), 0.2)}
    files.save_tensors(tmp_path / "net.safetensors", net.state_dict() | other)
    assert "resampling filter" in refusal(files.load_net, tmp_path / "net.safetensors", net)
    with pytest.raises(ValueError, match="resampling filter"):  # as a node of a path is loaded
        disback.load_strictly(net, net.state_dict() | other)


@torch.no_grad()
def test_d_agrees_with_the_original_in_float64_and_no_labels_are_labels_of_zeros(net, ref):
    x, sigma = ref["x"], ref["sigma"]
    net.double()
    assert far(net(x, sigma, ref["labels"]), ref["D64"]) <= 1e-9
    none = net(x, sigma)
    assert far(none, ref["D_nolabel64"]) <= 1e-9
    assert torch.equal(none, net(x, sigma, torch.zeros(4, 10)))


@torch.no_grad()
def test_sigma_may_be_a_column_of_the_batch_or_one_number_for_all(net, ref):
    x, labels = ref["x"], ref["labels"]
    columns = net(x, ref["sigma"].reshape(-1, 1, 1, 1), labels)
    assert far(columns, ref["D64"]) <= 2e-5
    assert far(net(x, torch.tensor(5.0), labels), ref["D_sigma5"]) <= 2e-5
    assert far(net(x, torch.full((4, 1, 1, 1), 5.0), labels), ref["D_sigma5"]) <= 2e-5


@torch.no_grad()
def test_d_is_float32_whatever_comes_in_and_float64_where_the_weights_are(net, ref):
    for dtype in (torch.float64, torch.bfloat16):
        assert net(ref["x"].to(dtype), ref["sigma"].to(dtype)).dtype == torch.float32
    assert net.double()(ref["x"], ref["sigma"]).dtype == torch.float64


def test_attention_reads_heads_then_channels_then_q_k_v():
    """The tiny network has one head; this is the layout that the weights of several need."""
    torch.manual_seed(0)
    n, c, side, heads = 2, 64, 3, 3
    qkv = torch.randn(n, heads * c * 3, side, side, dtype=torch.float64)
    expected = torch.empty(n, heads * c, side**2, dtype=torch.float64)
    for head in range(heads):
        q, k, v = (qkv.flatten(2)[:, [(head * c + i) * 3 + which for i in range(c)]]
                   for which in range(3))
        weights = (q.transpose(1, 2) @ k / c**0.5).softmax(dim=2)
        expected[:, head * c:(head + 1) * c] = v @ weights.transpose(1, 2)
    assert far(edm.attention(qkv, heads).flatten(2), expected) <= 1e-12


def test_a_fresh_network_starts_as_edm_does():
    torch.manual_seed(0)
    net = edm.ADM(img_resolution=16, label_dim=64, model_channels=64, channel_mult=(1, 2),
                  num_blocks=1, attn_resolutions=(8,))
    for name, module in net.named_modules():
        if not isinstance(module, (torch.nn.Linear, edm.Conv)):
            continue
        if name == "map_label":
            assert module.bias is None and module.weight.std().item() == pytest.approx(1, rel=0.02)
            assert module.weight.abs().max() > 3
        elif name.split(".")[-1] in ("conv1", "proj", "out_conv"):
            assert not module.weight.any() and not module.bias.any(), name
        else:
            bound = module.weight[0].numel() ** -0.5
            for tensor in (module.weight, module.bias):
                assert tensor.abs().max() <= bound
                assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.25), name
    for module in net.modules():
        if isinstance(module, torch.nn.GroupNorm):
            assert (module.weight == 1).all() and not module.bias.any()


# -------------------------------------------------------------------------- how it is made to run


@torch.no_grad()
def test_asked_for_bfloat16_the_network_is_in_it_and_the_preconditioning_is_not(net, ref):
    inside = []
    net.model.enc["16x16_conv"].register_forward_hook(lambda *args: inside.append(args[2].dtype))
    x, sigma = ref["x"], torch.tensor(0.002)
    exact = net(x, sigma, ref["labels"])
    net.bf16 = True
    low = net(x, sigma, ref["labels"])
    assert inside == [torch.float32, torch.bfloat16] and low.dtype == torch.float32
    assert 0 < far(low, exact) < 2e-4 < far(x.bfloat16().float(), x)  # c_skip is almost 1 here
    low = net(x, ref["sigma"], ref["labels"])
    assert ((low - ref["D64"]).norm() / ref["D64"].norm()).item() < 0.03


@torch.no_grad()
def test_in_channels_last_every_block_stays_so_and_d_is_the_same(net, ref, monkeypatch):
    """And attention gets each channel's neighbour beside it: it would fall back to pixels x pixels
    in float32 otherwise."""
    seen, asked, last, attend = [], [], torch.channels_last, F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *qkv: (asked.extend(qkv), attend(*qkv))[1])
    net.to(memory_format=last)
    for block in (*net.model.enc.values(), *net.model.dec.values()):
        block.register_forward_hook(lambda _, args, out: seen.append(out))
    found = net(ref["x"].to(memory_format=last), ref["sigma"], ref["labels"])
    assert len(seen) == 11 and all(t.is_contiguous(memory_format=last) for t in (*seen, found))
    assert asked and all(t.stride(3) == 1 and t.shape == (4, 1, 64, 64) for t in asked)
    assert far(found, ref["D64"]) <= 2e-5


# --------------------------------------------------------------------------------- noise and loss


def test_the_compiled_group_norm_in_bfloat16_and_its_gradients_are_torchs_in_float64():
    torch.manual_seed(0)
    norm = edm.group_norm(64)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = (4 + 2 * torch.randn(3, 64, 6, 5)).bfloat16().to(memory_format=torch.channels_last)
    x.requires_grad_()
    double = [t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias)]
    expected = F.group_norm(double[0], 16, *double[1:], eps=1e-5)
    out = torch.compile(norm, backend="aot_eager", dynamic=False)(x)
    torch._dynamo.reset()
    assert out.dtype == torch.float32 and out.is_contiguous(memory_format=torch.channels_last)
    assert (out - expected).norm() / expected.norm() < 1e-6
    towards = torch.randn_like(out)
    found = torch.autograd.grad((out * towards).sum(), (x, norm.weight, norm.bias))
    wanted = torch.autograd.grad((expected * towards).sum(), double)
    for ours, theirs, most in zip(found, wanted, (3e-3, 1e-6, 1e-6)):  # x's has 8 bits
        assert (ours - theirs).norm() / theirs.norm() < most


def test_noise_levels_and_weights_are_those_of_edms_loss(ref, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: ref["loss/rnd_normal"].reshape(shape))
    sigma = edm.lognormal_sigma(8)
    assert sigma.shape == (8, 1, 1, 1)
    torch.testing.assert_close(sigma, ref["loss/sigma"], rtol=1e-6, atol=0)
    torch.testing.assert_close(edm.score_weight(sigma), ref["loss/weight"], rtol=1e-5, atol=0)


def test_the_score_matching_loss_and_its_gradients_are_edms(net, ref, monkeypatch):
    """EDM sums over pixels and channels where score_matching_loss takes the mean."""
    net.double()
    monkeypatch.setattr(torch, "randn_like", lambda x0: ref["loss/unit_noise"].double())
    sigma = ref["loss/sigma"].double()
    loss = 3 * 16 * 16 * disback.score_matching_loss(
        net, ref["loss/y"].double(), sigma, ref["loss/labels"], edm.score_weight(sigma))
    assert loss.item() == pytest.approx(ref["loss/scalar_loss"].item(), rel=1e-6)
    loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert list(gradients) == ref["grad_keys"]
    norms = torch.stack([g.norm() for g in gradients.values()])
    torch.testing.assert_close(norms, ref["loss/grad_l2"], rtol=1e-4, atol=1e-5)
    whole = [name for name in ref if name.startswith("loss/grad/")]
    assert len(whole) > 80
    for name in whole:
        expected = ref[name].double()
        assert far(gradients[name[10:]], expected) <= 1e-4 * expected.abs().max().item(), name


def test_the_gradient_through_d_to_its_input_is_the_originals(net, ref):
    sigma = ref["loss/sigma"]
    x = (ref["loss/y"] + sigma * ref["loss/unit_noise"]).double().requires_grad_()
    d = net.double()(x, sigma, ref["loss/labels"])
    gradient, = torch.autograd.grad(d, x, ref["loss/xgrad_cotangent"].double())
    expected = ref["loss/xgrad"]
    assert far(gradient, expected) <= 1e-5 * expected.abs().max().item()


# ------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("steps", [8, 18, 40, 256])
def test_the_grid_of_noise_levels_is_the_originals(steps, ref):
    grid = edm.karras_grid(steps)
    assert grid.dtype == torch.float64 and grid[-1] == 0
    torch.testing.assert_close(grid, ref[f"sampler/t_steps_{steps}"], rtol=1e-13, atol=0)


def test_heun_draws_the_originals_images_in_15_calls(net, ref):
    calls, net = [], net.double()
    images = edm.heun(lambda x, sigma, cond: (calls.append(sigma), net(x, sigma, cond))[1],
                      ref["sampler/latents"], ref["sampler/labels"], steps=8)
    assert len(calls) == 15 and not images.requires_grad
    assert images.dtype == torch.float64 and far(images, ref["sampler/images64"]) <= 1e-9
    found = edm.to_uint8(images).permute(0, 2, 3, 1)
    assert far(found.int(), ref["sampler/images_uint8"].int()) <= 1  # where a level is just met


def test_heun_finds_the_flow_of_a_gaussian_from_end_to_end(gaussian):
    """For N(m, s^2) the flow keeps (x - m) / sqrt(s^2 + sigma^2)."""
    torch.manual_seed(0)
    z = torch.randn(5, 3, 2, 2)
    found = edm.heun(gaussian(0.3, 0.5), z, steps=300)
    start = (80 * z.double() - 0.3) / (0.5**2 + 80**2) ** 0.5
    assert far(found, 0.3 + 0.5 * start) <= 1e-3


def test_images_become_bytes_by_cutting_off_within_0_to_255():
    x = torch.tensor([-9.0, -1.0, -0.001, 0.0, 0.0039, 0.996, 1.0, 9.0])
    assert edm.to_uint8(x).tolist() == [0, 0, 127, 128, 128, 254, 255, 255]
