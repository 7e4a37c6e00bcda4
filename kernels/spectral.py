"""The filter of SeaCache's probe: what is signal in a noisy sample, at its noise level."""

from collections.abc import Sequence

import torch

_EPS = 1e-16
#: The noise level stays this far from 0 and 1.
_MARGIN = 1e-6


@torch.library.custom_op("fxcache::signal_filter", mutates_args=())
def signal_filter(
    sample: torch.Tensor, time: torch.Tensor, axes: Sequence[int], power: float
) -> torch.Tensor:
    """Keep what is signal in `sample`, a clean signal of falling spectrum plus white noise.

    Along each axis the gain at frequency f is ``s P / (s^2 P + n^2)`` with the noise level n, the
    signal's scale ``s = 1 - n`` and its power ``P = |f|^-power``; the product over the axes is
    divided by its mean. An operator of its own, since compilers do not generate complex code.

    Args:
        sample: [B, ...], floating.
        time: the time input, one number or one or more a sample (of more, the largest): the noise
            level in [0, 1], or a thousand times that where it is above 1.
        axes: the axes that are frequencies' (height, width, frames), of `sample`.
        power: exponent of the signal's spectrum, above 0.

    Returns:
        A new tensor like `sample`, computed in float32.

    Source: SeaCache (arXiv 2602.18993), in the normalisation of diffusers.
    """
    noise = _noise_level(time, len(sample)).reshape(-1, *[1] * (sample.ndim - 1))
    gain = torch.ones_like(noise)
    for axis in axes:
        gain = gain * _axis_gain(noise, sample.shape[axis], axis, power)
    gain = gain / gain.mean(dim=list(axes), keepdim=True)
    spectrum = torch.fft.fftn(sample.float(), dim=list(axes))
    filtered: torch.Tensor = torch.fft.ifftn(spectrum * gain, dim=list(axes))
    return filtered.real.to(sample.dtype).contiguous()


@signal_filter.register_fake
def _(sample: torch.Tensor, time: torch.Tensor, axes: Sequence[int], power: float) -> torch.Tensor:
    return sample.new_empty(sample.shape)


def _noise_level(time: torch.Tensor, samples: int) -> torch.Tensor:
    """float32 [samples]."""
    own = time.ndim > 0 and len(time) == samples
    level = time.float().reshape(samples if own else 1, -1).amax(1).expand(samples)
    return torch.where(level > 1, level / 1000, level).clamp(_MARGIN, 1 - _MARGIN)


def _axis_gain(noise: torch.Tensor, size: int, axis: int, power: float) -> torch.Tensor:
    """The gain along one axis, for samples of noise level `noise` [B, 1, ...]."""
    shape = [1] * noise.ndim
    shape[axis] = size
    frequencies = torch.fft.fftfreq(size, device=noise.device).reshape(shape)
    clean = 1 / (frequencies.abs().pow(power) + _EPS)
    signal = 1 - noise
    gain: torch.Tensor = signal * clean / (signal**2 * clean + noise**2 + _EPS)
    return gain
