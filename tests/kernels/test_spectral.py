"""The filter of SeaCache's probe against its definition in float64."""

import numpy as np
import pytest
import torch
from fxcache.kernels.spectral import signal_filter

#: Shapes [B, ...], and the axes that are frequencies'.
CASES = [
    ((2, 5, 3), (1,)),
    ((3, 4, 7), (2,)),
    ((1, 1, 4), (1,)),
    ((2, 4, 8, 8), (2, 3)),
    ((1, 3, 5, 9), (2, 3)),
    ((2, 4, 1, 7), (2, 3)),
    ((2, 3, 5, 4, 6), (2, 3, 4)),
    ((1, 16, 1, 1, 13), (2, 3, 4)),
    ((2, 3, 2, 5, 7), (1, 3, 4)),
    ((1, 2, 1, 1, 1), (2, 3, 4)),
]


def in_float64(sample: np.ndarray, levels: list[float], axes: tuple[int, ...], power: float):
    """The definition, sample by sample, with dense Fourier matrices and no FFT."""
    filtered = np.empty(sample.shape)
    for b, level in enumerate(levels):
        n = min(max(level, 1e-6), 1 - 1e-6)
        x, gain = sample[b].astype(complex), np.ones([1] * (sample.ndim - 1))
        for axis in (a - 1 for a in axes):
            size = x.shape[axis]
            index = np.arange(size)
            matrix = np.exp(-2j * np.pi * np.outer(index, index) / size)
            x = np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)
            frequency = np.minimum(index, size - index) / size  # of either sign
            clean = 1 / (frequency**power + 1e-16)
            own = (1 - n) * clean / ((1 - n) ** 2 * clean + n**2 + 1e-16)
            gain = gain * own.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        x = x * (gain / gain.mean())
        for axis in (a - 1 for a in axes):
            size = x.shape[axis]
            index = np.arange(size)
            matrix = np.exp(2j * np.pi * np.outer(index, index) / size) / size
            x = np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)
        filtered[b] = x.real
    return filtered


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def check(filtered: torch.Tensor, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert filtered.shape == expected.shape
    error = np.abs(filtered.double().numpy() - expected).max()
    assert error <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("shape", "axes"), CASES)
@pytest.mark.parametrize("power", [3.0, 0.7])
def test_the_definition(shape, axes, power):
    sample = randn(*shape)
    for level in (0.0, 1e-3, 0.3, 0.62, 0.999, 1.0):
        filtered = signal_filter(sample, torch.tensor(level), list(axes), power)
        check(filtered, in_float64(sample.numpy(), [level] * shape[0], axes, power))


@pytest.mark.parametrize(
    ("time", "levels"),
    [
        (torch.tensor(0.25), [0.25] * 3),
        (torch.tensor([0.25]), [0.25] * 3),
        (torch.tensor([0.1, 0.5, 0.9]), [0.1, 0.5, 0.9]),
        (torch.tensor([[0.1, 0.2], [0.5, 0.1], [0.0, 0.9]]), [0.2, 0.5, 0.9]),
        (torch.tensor([[0.1], [0.5], [0.9]]), [0.1, 0.5, 0.9]),
        (torch.tensor(250), [0.25] * 3),
        (torch.tensor([1000, 500, 2]), [1.0, 0.5, 0.002]),
        (torch.tensor([1000.0, 0.5, 7.5]), [1.0, 0.5, 0.0075]),
        (torch.tensor([250.0], dtype=torch.float64), [0.25] * 3),
        (torch.tensor([1, 0, 999]), [1.0, 0.0, 0.999]),
        (torch.tensor([0.5]).expand(3), [0.5] * 3),
    ],
)
def test_times(time, levels):
    """One number or one or more a sample; above 1, thousandths."""
    sample = randn(3, 4, 6, 5)
    filtered = signal_filter(sample, time, [2, 3], 3.0)
    check(filtered, in_float64(sample.numpy(), levels, (2, 3), 3.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    """Computed in float32, and rounded once."""
    sample = randn(2, 4, 6, 5, dtype=dtype)
    filtered = signal_filter(sample, torch.tensor([0.3, 0.7]), [2, 3], 3.0)
    assert filtered.dtype == dtype
    expected = in_float64(sample.double().numpy(), [0.3, 0.7], (2, 3), 3.0)
    check(filtered, expected, max(2e-5, torch.finfo(dtype).eps))


def test_constants_pass_with_the_gain_of_frequency_zero():
    """Noise is what goes: the higher the level, the more of the high frequencies."""
    flat = torch.ones(1, 1, 8, 8)
    check(signal_filter(flat, torch.tensor(1e-9), [2, 3], 3.0), np.ones((1, 1, 8, 8)))
    zigzag = flat.clone()
    zigzag[..., ::2] = -1
    left = [signal_filter(zigzag, torch.tensor(t), [2, 3], 3.0).norm() for t in (0.1, 0.5, 0.9)]
    kept = [signal_filter(flat, torch.tensor(t), [2, 3], 3.0).norm() for t in (0.1, 0.5, 0.9)]
    shares = [(a / b).item() for a, b in zip(left, kept, strict=True)]
    assert shares[0] > shares[1] > shares[2] > 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_sample_is_filtered_by_itself_and_nan_stays_in_it(broken):
    sample, time = randn(3, 4, 6, 5), torch.tensor([0.1, 0.5, 0.9])
    together = signal_filter(sample, time, [2, 3], 3.0)
    for b in range(3):
        alone = signal_filter(sample[b : b + 1], time[b : b + 1], [2, 3], 3.0)
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-6)
    sample = randn(2, 3, 4, 4)
    sample[1, 1, 2, 2] = broken
    filtered = signal_filter(sample, torch.tensor(0.5), [2, 3], 3.0)
    assert filtered[0].isfinite().all()
    assert filtered[1, 0].isfinite().all()
    assert filtered[1, 1].isnan().any()
    time = torch.tensor([0.5, float("nan")])
    filtered = signal_filter(randn(2, 3, 4, 4), time, [2, 3], 3.0)
    assert filtered[0].isfinite().all()
    assert filtered[1].isnan().all()


def test_the_result_is_new_and_contiguous():
    wide = randn(2, 6, 5, 4)
    sample = wide.permute(0, 3, 1, 2)[..., ::2]
    before, time = wide.clone(), torch.tensor([700.0, 300.0])
    filtered = signal_filter(sample, time, [2, 3], 3.0)
    assert filtered.is_contiguous()
    assert filtered.data_ptr() != wide.data_ptr()
    assert torch.equal(wide, before)
    check(filtered, in_float64(sample.numpy(), [0.7, 0.3], (2, 3), 3.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    strided = randn(2, 6, 5, 4, dtype=dtype).permute(0, 3, 1, 2)
    samples = [(randn(*shape, dtype=dtype), axes) for shape, axes in CASES[:1] + CASES[3:8:2]]
    for sample, axes in [*samples, (strided, (2, 3))]:
        for time in (torch.tensor(0.5), torch.full((len(sample),), 300)):
            torch.library.opcheck(torch.ops.fxcache.signal_filter, (sample, time, list(axes), 3.0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    """Dynamic shapes, and no graph break."""

    @torch.compile(backend=backend, fullgraph=True, dynamic=True)
    def compiled(sample, time):
        return signal_filter(sample * 1, time, [2, 3], 3.0) + 1

    for shape in ((2, 4, 8, 8), (3, 4, 5, 9)):
        sample, time = randn(*shape), torch.full((shape[0],), 0.4)
        expected = in_float64(sample.numpy(), [0.4] * shape[0], (2, 3), 3.0)
        check(compiled(sample, time) - 1, expected)
