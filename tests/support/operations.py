"""Operations between two linear layers, for the memory that no tensor shows: one table, many kinds of kernels.

Each takes z (B, T, T), B examples of T = 64 positions of 64 numbers, and returns B rows of anything. Sizes are such
that what an operation allocates is a large part of the step's peak.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from groupsearch.workloads import Workload

T = 64
EXAMPLES = 16
Operation = Callable[[Tensor], Tensor]


def _image(z: Tensor) -> Tensor:
    """(B, 4, 32, 32), contiguous."""
    return z.reshape(-1, 4, T // 2, T // 2)


def _positive(z: Tensor) -> Tensor:
    """(8 B, 8, 8), positive definite."""
    small = z.reshape(-1, 8, 8)[: 8 * z.shape[0]]
    return small @ small.mT + torch.eye(8, dtype=z.dtype, device=z.device)


def _per_example(f: Operation) -> Operation:
    """The operation on matrices, its result per example."""
    return lambda z: f(_positive(z)).reshape(z.shape[0], -1)


def _ids(z: Tensor) -> Tensor:
    """(B, T) of column numbers, the same for all values."""
    return (torch.arange(T, device=z.device) * 7 % T).expand(z.shape[0], T)


def _heads(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B, 4, T, 16)."""
    heads = z.unflatten(-1, (4, 16)).transpose(1, 2)
    return heads, heads * 0.5, heads + 1


def _attend(mask: str) -> Operation:
    def attend(z: Tensor) -> Tensor:
        query, key, value = _heads(z)
        if mask == "bool":
            allowed = torch.ones(T, T, dtype=torch.bool, device=z.device).tril()
            return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        if mask == "float":
            bias = torch.zeros(z.shape[0], 1, T, T, device=z.device)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return F.scaled_dot_product_attention(query, key, value, is_causal=mask == "causal")

    return attend


def _grid(z: Tensor) -> Tensor:
    line = torch.linspace(-1, 1, 24, device=z.device)
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).expand(z.shape[0], 24, 24, 2)


def _stft(z: Tensor) -> Tensor:
    window = torch.ones(32, device=z.device)
    return torch.stft(z.flatten(1), 32, 16, window=window, return_complex=True)


def _istft(z: Tensor) -> Tensor:
    return torch.istft(_stft(z), 32, 16, window=torch.ones(32, device=z.device))


def _connect(z: Tensor) -> Tensor:
    lengths = torch.full((z.shape[0],), T), torch.full((z.shape[0],), 8)
    likely = z.transpose(0, 1).log_softmax(2)
    return F.ctc_loss(likely, _ids(z)[:, :8], *lengths, blank=63, reduction="none")[:, None] * z.mean(1)


OPERATIONS: dict[str, Operation] = {
    "rfft and irfft": lambda z: torch.fft.irfft(torch.fft.rfft(z, dim=1), n=T, dim=1),
    "rfft2 and irfft2": lambda z: torch.fft.irfft2(torch.fft.rfft2(z), s=(T, T)),
    "fft and ifft": lambda z: torch.fft.ifft(torch.fft.fft(z)).real,
    "fftn": lambda z: torch.fft.fftn(z, dim=(1, 2)).abs(),
    "fftshift": lambda z: torch.fft.fftshift(torch.fft.fft(z, dim=1), dim=1).imag,
    "hfft": lambda z: torch.fft.hfft(torch.fft.rfft(z), n=T),
    "stft": lambda z: _stft(z).abs(),
    "istft": _istft,
    "unfold and fold": lambda z: F.fold(F.unfold(z[:, None], 3, padding=1), (T, T), 3, padding=1),
    "unfold": lambda z: F.unfold(z[:, None], 5, stride=2).sin(),
    "unfold of a dimension": lambda z: z.unfold(1, 8, 4).sin(),
    "max pooling": lambda z: F.max_pool2d(_image(z), 2),
    "max pooling of lines": lambda z: F.max_pool1d(z, 3, stride=1, padding=1),
    "max pooling of volumes": lambda z: F.max_pool3d(z.reshape(-1, 1, 16, 16, 16), 2),
    "max unpooling": lambda z: F.max_unpool2d(*F.max_pool2d(_image(z), 2, return_indices=True), 2),
    "average pooling": lambda z: F.avg_pool2d(_image(z), 3, 1, 1),
    "average pooling of lines": lambda z: F.avg_pool1d(z, 4),
    "average pooling of volumes": lambda z: F.avg_pool3d(z.reshape(-1, 1, 16, 16, 16), 2),
    "adaptive pooling": lambda z: F.adaptive_avg_pool2d(_image(z), 5),
    "adaptive max pooling": lambda z: F.adaptive_max_pool2d(_image(z), 5),
    "fractional max pooling": lambda z: F.lp_pool2d(_image(z).abs() + 1, 2.0, 2),
    "interpolation, nearest": lambda z: F.interpolate(_image(z), scale_factor=2),
    "interpolation, bilinear": lambda z: F.interpolate(_image(z), scale_factor=1.5, mode="bilinear"),
    "interpolation, bicubic": lambda z: F.interpolate(_image(z), scale_factor=2, mode="bicubic"),
    "interpolation, linear": lambda z: F.interpolate(z, scale_factor=2, mode="linear"),
    "interpolation, area": lambda z: F.interpolate(_image(z), size=20, mode="area"),
    "interpolation, antialiased": lambda z: F.interpolate(_image(z), size=20, mode="bilinear", antialias=True),
    "interpolation, trilinear": lambda z: F.interpolate(z.reshape(-1, 1, 16, 16, 16), scale_factor=2, mode="trilinear"),
    "sort": lambda z: z.sort(dim=1).values,
    "topk": lambda z: z.topk(20, dim=-1).values,
    "median": lambda z: z.median(dim=-1).values,
    "quantile": lambda z: z.quantile(0.3, dim=-1),
    "kthvalue": lambda z: z.kthvalue(5, dim=1).values,
    "mode of rounded": lambda z: z.mode(dim=-1).values,
    "cumsum": lambda z: z.cumsum(1),
    "cumprod": lambda z: z.cumprod(1),
    "cummax": lambda z: z.cummax(-1).values,
    "logcumsumexp": lambda z: z.logcumsumexp(-1),
    "gather": lambda z: z.gather(2, _ids(z)[:, None].expand(z.shape)),
    "scatter": lambda z: torch.zeros_like(z).scatter(2, _ids(z)[:, None].expand(z.shape), z),
    "scatter add": lambda z: torch.zeros_like(z).scatter_add(2, _ids(z)[:, None].expand(z.shape), z),
    "scatter reduce": lambda z: z.scatter_reduce(2, _ids(z)[:, None].expand(z.shape), z, "amax"),
    "index select": lambda z: z.index_select(1, _ids(z)[0]),
    "index": lambda z: z[:, _ids(z)[0]],
    "index put": lambda z: torch.zeros_like(z).index_put((torch.arange(z.shape[0])[:, None], _ids(z)), z),
    "index add": lambda z: torch.zeros_like(z).index_add(1, _ids(z)[0], z),
    "take along": lambda z: torch.take_along_dim(z, z.argsort(-1), -1),
    "masked fill": lambda z: z.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -1e9),
    "einsum": lambda z: torch.einsum("bij,bkj->bikj", z[:, :16], z[:, :8]),
    "einsum of odd layouts": lambda z: torch.einsum("bij,bjk->bki", z.mT, z[:, :, ::2]),
    "product of every other column": lambda z: z[:, :, ::2] @ z[:, ::2],
    "batched product of transposed": lambda z: torch.bmm(z.mT, z.mT),
    "outer": lambda z: z[:, :8, :, None] * z[:, :8, None, :],
    "cholesky": _per_example(torch.linalg.cholesky),
    "inverse": _per_example(torch.linalg.inv),
    "solve": _per_example(lambda m: torch.linalg.solve(m, m.mT)),
    "triangular solve": _per_example(lambda m: torch.linalg.solve_triangular(m.tril(), m, upper=False)),
    "qr": _per_example(lambda m: torch.linalg.qr(m).R),
    "svd": _per_example(lambda m: torch.linalg.svd(m).S),
    "eigh": _per_example(lambda m: torch.linalg.eigh(m).eigenvalues),
    "determinant": _per_example(torch.logdet),
    "slogdet": _per_example(lambda m: torch.linalg.slogdet(m).logabsdet),
    "matrix exponential": _per_example(lambda m: torch.linalg.matrix_exp(m / 100)),
    "pseudo-inverse": _per_example(torch.linalg.pinv),
    "least squares": _per_example(lambda m: torch.linalg.lstsq(m, m).solution),
    "softmax": lambda z: z.softmax(1),
    "log softmax": lambda z: z.mT.log_softmax(-1),
    "logsumexp": lambda z: z.logsumexp(1),
    "norm": lambda z: z.norm(dim=1),
    "norm of order 3": lambda z: torch.linalg.vector_norm(z, 3, dim=2),
    "variance": lambda z: z.var(1),
    "deviation": lambda z: z.std(2),
    "normalised": lambda z: F.normalize(z, dim=1),
    "cdist": lambda z: torch.cdist(z, z[:, :32]),
    "cdist of order 1": lambda z: torch.cdist(z, z[:, :32], p=1.0),
    "cosine similarity": lambda z: F.cosine_similarity(z[:, :, None], z[:, None, :16], dim=-1),
    "pairwise distance": lambda z: F.pairwise_distance(z, z.flip(1)),
    "transposed convolution": lambda z: F.conv_transpose2d(_image(z), torch.ones(4, 2, 3, 3) / 9, stride=2),
    "transposed convolution of lines": lambda z: F.conv_transpose1d(z, torch.ones(T, 8, 4) / 9, stride=2),
    "dilated convolution": lambda z: F.conv2d(_image(z), torch.ones(8, 4, 3, 3) / 9, dilation=2),
    "convolution by groups": lambda z: F.conv1d(z, torch.ones(T, 1, 5) / 9, groups=T, padding=2),
    "convolution of volumes": lambda z: F.conv3d(z.reshape(-1, 1, 16, 16, 16), torch.ones(2, 1, 3, 3, 3) / 9),
    "padded by reflection": lambda z: F.pad(z, (5, 5), mode="reflect"),
    "padded by its edge": lambda z: F.pad(_image(z), (3, 3, 3, 3), mode="replicate"),
    "padded around": lambda z: F.pad(z, (5, 5), mode="circular"),
    "padded by zeros": lambda z: F.pad(z, (5, 5, 2, 2)),
    "rolled": lambda z: z.roll((3, 5), (1, 2)),
    "flipped": lambda z: z.flip(1, 2),
    "turned": lambda z: z.rot90(1, (1, 2)),
    "buckets": lambda z: z * torch.bucketize(z.detach(), torch.linspace(-2, 2, 9)),
    "searched": lambda z: z * torch.searchsorted(torch.linspace(-2, 2, 9), z.detach()),
    "histogram by comparison": lambda z: (
        (z[..., None] > torch.linspace(-1, 1, 9)).float().mean(1) * z.mean(1)[..., None]
    ),
    "embedding bag": lambda z: F.embedding_bag(_ids(z), torch.ones(T, T), mode="mean") * z.mean(1),
    "embedding of constants": lambda z: F.embedding(_ids(z), torch.ones(T, T)) * z,
    "one hot": lambda z: F.one_hot(_ids(z), T).to(z.dtype) * z,
    "grid sample": lambda z: F.grid_sample(_image(z), _grid(z), align_corners=False),
    "grid sample, nearest": lambda z: F.grid_sample(_image(z), _grid(z), mode="nearest", align_corners=True),
    "affine grid": lambda z: F.grid_sample(
        _image(z), F.affine_grid(z[:, :2, :3], (z.shape[0], 4, 16, 16), align_corners=False), align_corners=False
    ),
    "pixel shuffle": lambda z: F.pixel_shuffle(_image(z), 2).sin(),
    "channel shuffle": lambda z: F.channel_shuffle(_image(z), 2).sin(),
    "erfinv": lambda z: z.tanh().mul(0.9).erfinv(),
    "lgamma": lambda z: torch.lgamma(z.abs() + 1),
    "digamma": lambda z: torch.digamma(z.abs() + 1),
    "bessel": lambda z: torch.special.i0e(z),
    "complex product": lambda z: (torch.complex(z, z.flip(1)) * torch.complex(z, z)).abs(),
    "complex matrix product": lambda z: torch.view_as_real(torch.complex(z, z) @ torch.complex(z, -z)),
    "polar": lambda z: torch.polar(z.abs(), z).real,
    "prelu": lambda z: F.prelu(z, torch.full((T,), 0.1)),
    "glu": lambda z: F.glu(z),
    "rrelu": lambda z: F.rrelu(z, training=False),
    "gelu": lambda z: F.gelu(z, approximate="tanh"),
    "mish": lambda z: F.mish(z.mT),
    "softplus": lambda z: F.softplus(z),
    "hardswish": lambda z: F.hardswish(z),
    "dropout": lambda z: F.dropout(z, 0.5, training=True),
    "feature dropout": lambda z: F.dropout1d(z, 0.5, training=True),
    "attention": _attend(""),
    "attention, causal": _attend("causal"),
    "attention, boolean mask": _attend("bool"),
    "attention, added mask": _attend("float"),
    "repeat interleave": lambda z: z.repeat_interleave(3, dim=1).sin(),
    "repeat": lambda z: z.repeat(1, 2, 2).sin(),
    "tile and narrow": lambda z: z.tile(2).narrow(2, 10, 80).sin(),
    "concatenation": lambda z: torch.cat([z, z.mT, z.flip(1)], 2),
    "stacked": lambda z: torch.stack([z, z.mT], 1),
    "triangles": lambda z: z.tril() + z.triu(1).mT,
    "diagonal": lambda z: torch.diag_embed(z[:, :16]).sin(),
    "trace of products": lambda z: (z @ z.mT).diagonal(dim1=1, dim2=2),
    "cross": lambda z: torch.linalg.cross(z[:, :63].unflatten(1, (21, 3)), z[:, 1:].unflatten(1, (21, 3)), dim=2),
    "differences": lambda z: z.diff(dim=1),
    "trapezoid": lambda z: torch.trapezoid(z, dim=1),
    "where": lambda z: torch.where(z > 0, z, z.mT),
    "lerp": lambda z: z.lerp(z.mT, 0.3),
    "clamped": lambda z: z.clamp(-1, 1),
    "extremes": lambda z: z.amax(1) + z.min(2).values,
    "layer norm of a transposed": lambda z: F.layer_norm(z.mT, (T,)),
    "group norm": lambda z: F.group_norm(_image(z), 2),
    "instance norm": lambda z: F.instance_norm(_image(z)),
    "local response": lambda z: F.local_response_norm(_image(z), 3),
    "rms norm": lambda z: F.rms_norm(z.mT, (T,)),
    "mixed types": lambda z: z * torch.arange(T) + z.double().mean(2, keepdim=True).float(),
    "half and back": lambda z: (z.bfloat16() @ z.bfloat16().mT).float(),
    "double and back": lambda z: z.double().cumsum(1).float(),
    "product of numbers": lambda z: (z.abs() + 1).prod(1),
    "product of all": lambda z: (z.flatten(1)[:, :32] + 2).prod(1, keepdim=True) * z.mean(1),
    "nan median": lambda z: z.nanmedian(dim=1).values,
    "index fill": lambda z: z.index_fill(1, _ids(z)[0, :9], 0.5),
    "index copy": lambda z: z.index_copy(1, _ids(z)[0], z.mT),
    "slice added": lambda z: z[:, :1] + z,
    "slices multiplied and added": lambda z: z[:, :1] * z[:, 1:2] * z[:, :1] + z,
    "sum added": lambda z: z.sum(1, keepdim=True) + z,
    "row added": lambda z: (z[0] * z[1])[None] + z,
    "multiplied chain": lambda z: torch.linalg.multi_dot([z[0], z[1], z[0]])[None] + z,
    "powers": lambda z: torch.linalg.matrix_power(z / T, 3),
    "condition": _per_example(lambda m: torch.linalg.cond(m)),
    "nuclear norm": _per_example(lambda m: torch.linalg.matrix_norm(m, "nuc")),
    "spectral norm": _per_example(lambda m: torch.linalg.matrix_norm(m, 2)),
    "lu": _per_example(lambda m: torch.linalg.lu(m)[2]),
    "general eigenvalues": _per_example(lambda m: torch.linalg.eigvals(m).abs()),
    "sorted differences": lambda z: z.flatten(1).sort(stable=True).values.diff(dim=1),
    "unfolded volume": lambda z: z.reshape(-1, 1, 16, 16, 16).unfold(2, 4, 2).sin(),
    "negative log likelihood": lambda z: F.nll_loss(z.log_softmax(1), _ids(z), reduction="none"),
    "cross entropy of rows": lambda z: F.cross_entropy(z, _ids(z), reduction="none", label_smoothing=0.1),
    "connectionist loss": _connect,
    "bilinear": lambda z: F.bilinear(z[:, :, :8], z[:, :, 8:16], torch.ones(5, 8, 8)),
    "renormalised": lambda z: z / z.flatten(1).norm(dim=1).clamp(min=1)[:, None, None],
    "recurrent": lambda z: torch._VF.gru(
        z, torch.zeros(1, z.shape[0], 8), [torch.ones(24, T), torch.ones(24, 8)], False, 1, 0.0, False, False, True
    )[0],
}


BY_VALUES = frozenset({"cumprod", "product of numbers"})
"""Whose gradients' formulas depend on whether there are zeros."""
NEEDING_VALUES = frozenset({"istft", "least squares", "connectionist loss"})
"""That fake tensors do not run."""


class Between(nn.Module):
    """linear -> operation -> mean of rows -> linear."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.operation = operation
        self.first = nn.Linear(T, T)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3)."""
        made = self.operation(self.first(x)).flatten(1)
        return self.last(F.adaptive_avg_pool1d(made[:, None], 8)[:, 0])


def workload(name: str, examples: int = EXAMPLES) -> Workload:
    """A step of the operation of that name."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    def make_batch(size: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {"x": torch.randn(size, T, T, generator=generator), "y": torch.arange(size) % 3}

    return Workload(name, lambda seed=0: Between(OPERATIONS[name]), make_batch, loss, batch_size=examples)
