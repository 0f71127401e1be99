"""EDM's ImageNet-64 network: the ADM U-Net (Dhariwal & Nichol, arXiv 2105.05233) as a denoiser with
EDM's preconditioning and sampler (Karras et al., arXiv 2206.00364), to the released weights' names.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import disback


class Denoiser(nn.Module):
    """D(x, sigma, cond) -> x0 with EDM's preconditioning (Karras et al. 2022, Table 1).

    x [n, c, h, w] holds images in [-1, 1] plus noise of sigma > 0, which is 0-dim or [n, 1, 1, 1];
    cond [n, label_dim] is one-hot, None stands for zeros. D has x's shape, in float32, or float64
    where the weights are; with `bf16` the network inside computes in that, its weights stay as is.
    """

    def __init__(self, sigma_data: float = 0.5, bf16: bool = False, **network):
        super().__init__()
        self.sigma_data, self.bf16 = sigma_data, bf16
        self.model = ADM(**network)

    def forward(self, x: Tensor, sigma: Tensor, cond: Tensor | None = None) -> Tensor:
        double = self.model.out_conv.weight.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        x, sigma = x.to(dtype), sigma.to(x.device, dtype).reshape(-1, 1, 1, 1)
        variance = sigma**2 + self.sigma_data**2
        c_skip, c_out = self.sigma_data**2 / variance, sigma * self.sigma_data * variance.rsqrt()
        c_in, c_noise = variance.rsqrt(), sigma.log() / 4
        cond = None if cond is None else cond.to(dtype)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            raw = self.model(c_in * x, c_noise.flatten(), cond)
        return c_skip * x + c_out * raw.to(dtype)


class ADM(nn.Module):
    """F(x, c_noise, labels), the raw network; the defaults are the released model's.

    Every output of the encoder is a skip, which a block of the decoder takes beside its input. The
    dropout of 0.1 that the released weights were trained with is off in every role here.
    """

    def __init__(self, img_resolution: int = 64, img_channels: int = 3, label_dim: int = 1000,
                 model_channels: int = 192, channel_mult: Sequence[int] = (1, 2, 3, 4),
                 channel_mult_emb: int = 4, num_blocks: int = 3,
                 attn_resolutions: Sequence[int] = (32, 16, 8)):
        super().__init__()
        self.noise_channels, emb = model_channels, model_channels * channel_mult_emb
        self.map_layer0, self.map_layer1 = nn.Linear(model_channels, emb), nn.Linear(emb, emb)
        if label_dim:
            self.map_label = nn.Linear(label_dim, emb, bias=False)
            nn.init.normal_(self.map_label.weight)

        levels = [(img_resolution >> i, model_channels * m) for i, m in enumerate(channel_mult)]
        self.enc, self.dec, now = nn.ModuleDict(), nn.ModuleDict(), levels[0][1]
        self.enc[f"{img_resolution}x{img_resolution}_conv"] = Conv(img_channels, now, 3)
        skips = [now]
        for res, channels in levels:
            if res < img_resolution:
                self.enc[f"{res}x{res}_down"] = Block(now, now, emb, resample="down")
                skips.append(now)
            for i in range(num_blocks):
                attends = res in attn_resolutions
                self.enc[f"{res}x{res}_block{i}"] = Block(now, channels, emb, attends)
                skips.append(now := channels)

        for res, channels in reversed(levels):
            if res == levels[-1][0]:
                self.dec[f"{res}x{res}_in0"] = Block(now, now, emb, attends=True)
                self.dec[f"{res}x{res}_in1"] = Block(now, now, emb)
            else:
                self.dec[f"{res}x{res}_up"] = Block(now, now, emb, resample="up")
            for i in range(num_blocks + 1):
                block = Block(now + skips.pop(), channels, emb, attends=res in attn_resolutions)
                self.dec[f"{res}x{res}_block{i}"], now = block, channels
        self.out_norm, self.out_conv = group_norm(now), zero(Conv(now, img_channels, 3))
        self.register_load_state_dict_post_hook(check_filters)

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor | None = None) -> Tensor:
        emb = embed(c_noise, self.noise_channels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if labels is not None:
            emb = emb + self.map_label(labels)
        emb = F.silu(emb)

        skips = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, Block) else block(x)
            skips.append(x)
        for block in self.dec.values():
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, skips.pop()], dim=1)
            x = block(x, emb)
        return self.out_conv(F.silu(self.out_norm(x)))


class Block(nn.Module):
    """A residual block [n, in, h, w] -> [n, out, h, w], h and w doubled or halved by `resample`;
    with attention where it `attends`, in heads of 64 channels."""

    def __init__(self, in_channels: int, out_channels: int, emb_channels: int,
                 attends: bool = False, resample: str = ""):
        super().__init__()
        self.in_channels, self.heads = in_channels, out_channels // 64 if attends else 0
        self.norm0 = group_norm(in_channels)
        self.conv0 = Conv(in_channels, out_channels, 3, resample)
        self.affine = nn.Linear(emb_channels, 2 * out_channels)
        self.norm1 = group_norm(out_channels)
        self.conv1 = zero(Conv(out_channels, out_channels, 3))
        self.skip = Resample(resample)
        if in_channels != out_channels:
            self.skip = Conv(in_channels, out_channels, 1, resample)
        if self.heads:
            self.norm2 = group_norm(out_channels)
            self.qkv = Conv(out_channels, 3 * out_channels, 1)
            self.proj = zero(Conv(out_channels, out_channels, 1))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(shift + self.norm1(h) * (1 + scale))) + self.skip(x)
        return h + self.proj(attention(self.qkv(self.norm2(h)), self.heads)) if self.heads else h


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention over the pixels of qkv [n, 3c, h, w] -> [n, c, h, w].

    The released weights interleave: channel (head * c / heads + i) * 3 + {0: q, 1: k, 2: v}. The
    copy is what lets the fused kernels run: they ask for the channels of q, k, v side by side.
    """
    n, channels, height, width = qkv.shape
    qkv = qkv.reshape(n, heads, channels // (3 * heads), 3, height * width)
    q, k, v = qkv.permute(3, 0, 1, 4, 2).contiguous().unbind()  # [n, heads, h * w, c / heads] each
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2).reshape(n, height, width, channels // 3).permute(0, 3, 1, 2)


def embed(c_noise: Tensor, channels: int) -> Tensor:
    """c_noise [n] -> [n, channels]: cosines, then sines, of frequencies 1 down to almost 1e-4."""
    k = torch.arange(channels // 2, dtype=torch.float32, device=c_noise.device)
    angles = torch.outer(c_noise, ((1 / 10000) ** (k / (channels // 2))).to(c_noise.dtype))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Resample(nn.Module):
    """Halves or doubles height and width, or keeps them. The released filter [1, 1], normalised,
    is the mean of 2 x 2 pixels, and repetition: its buffer is there for strict loading alone, as
    those two fuse with what comes before, where a convolution would not."""

    def __init__(self, direction: str = ""):
        super().__init__()
        self.direction = direction
        if direction:
            self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        if self.direction == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2) if self.direction == "up" else x


class Conv(Resample):
    """A convolution that keeps height and width, after the resampling. It starts, as do the linear
    layers, by torch's default: uniform in +-1 / sqrt(fan_in), biases too, just as in EDM."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, resample: str = ""):
        super().__init__(resample)
        convolution = nn.Conv2d(in_channels, out_channels, kernel)
        self.weight, self.bias = convolution.weight, convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(super().forward(x), self.weight, self.bias, padding="same")


class GroupNorm(nn.GroupNorm):
    """Group normalisation of x [n, c, h, w]. Compiled and in bfloat16 it sums over each channel's
    pixels first and over a group's channels then, as that reads channels-last memory in one go: on
    an H200 a block of 192 channels at 64 x 64 went from 3.8 ms to 2.8, backward and all. The mean
    of squares less the squared mean, in float32, is exact enough for numbers of 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 or not torch.compiler.is_compiling():
            return super().forward(x)
        x, size = x.float(), x[0].numel() // self.num_groups
        mean, square = (channels.unflatten(1, (self.num_groups, -1)).sum(dim=2) / size
                        for channels in (x.sum(dim=(2, 3)), x.square().sum(dim=(2, 3))))
        scale = ((square - mean**2).clamp(min=0) + self.eps).rsqrt()
        of_each = x.shape[1] // self.num_groups
        scale = scale.repeat_interleave(of_each, dim=1) * self.weight
        shift = self.bias - mean.repeat_interleave(of_each, dim=1) * scale
        return x * scale[:, :, None, None] + shift[:, :, None, None]


def group_norm(channels: int) -> GroupNorm:
    return GroupNorm(min(32, channels // 4), channels, eps=1e-5)


def zero(conv: Conv) -> Conv:
    """Start the convolution at zero, so that its block starts as the identity."""
    nn.init.zeros_(conv.weight), nn.init.zeros_(conv.bias)
    return conv


def check_filters(net: nn.Module, _) -> None:
    """Refuse weights that were trained with a filter that Resample does not compute."""
    for name, buffer in net.named_buffers():
        if not buffer.is_meta and not (buffer == 0.25).all():
            raise ValueError(f"{name} is not 0.25 throughout: another resampling filter")


# ------------------------------------------------------------------------- noise levels, sampling


def score_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """EDM's lambda(sigma) = 1 / c_out^2, which weighs every noise level alike at initialisation."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def lognormal_sigma(n: int, mean: float = -1.2, std: float = 1.2,
                    device: torch.device | str = "cpu") -> Tensor:
    """n noise levels [n, 1, 1, 1], ln(sigma) ~ N(mean, std^2), as EDM was trained with."""
    return (mean + std * torch.randn(n, 1, 1, 1, device=device)).exp()


def karras_grid(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0,
                rho: float = 7.0) -> Tensor:
    """Noise levels [steps + 1] from sigma_max to sigma_min, then 0; float64 (Karras Eq. 5)."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    i = torch.arange(steps, dtype=torch.float64)
    sigma = (high + i / max(steps - 1, 1) * (low - high)) ** rho
    return torch.cat([sigma, sigma.new_zeros(1)])


@torch.no_grad()
def heun(net: Callable, z: Tensor, cond: Tensor | None = None, steps: int = 18,
         sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Images [n, c, h, w] in float64 from latents z ~ N(0, 1) of that shape, by Heun's method in
    2 * steps - 1 calls of the network (Karras Algorithm 1); nothing else is random."""
    grid = karras_grid(steps, sigma_min, sigma_max, rho)
    x = z.double() * sigma_max

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - net(x, sigma, cond).double()) / sigma

    for sigma, lower in zip(grid, grid[1:]):
        first = slope(x, sigma)
        euler = x + (lower - sigma) * first
        x = euler if lower == 0 else x + (lower - sigma) * (first + slope(euler, lower)) / 2
    return x


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes: 127.5 x + 128, clipped and cut off, as EDM does for its FID.
    Refusal where they are not finite."""
    if not x.isfinite().all():  # which would become black, or white
        raise disback.Refusal("images are not finite: the weights that made them are too large")
    return (127.5 * x + 128).clip(0, 255).to(torch.uint8)
