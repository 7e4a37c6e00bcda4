"""How near two batches of pictures are."""

import torch
from torch.nn.functional import conv2d


def psnr(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, the mean over pictures. Both [N, C, H, W] in [0, 1]."""
    error = (images - reference).square().flatten(1).mean(1)
    return float((-10 * error.clamp_min(1e-10).log10()).mean())


def ssim(images: torch.Tensor, reference: torch.Tensor) -> float:
    """Structural similarity, the mean over pictures. Both [N, C, H, W] in [0, 1], H and W >= 11.

    Gaussian window of 11 x 11, sigma 1.5, K1 = 0.01, K2 = 0.03, without padding.
    Source: Wang et al., "Image quality assessment: from error visibility to structural
    similarity", IEEE TIP 2004.
    """
    offset = torch.arange(11, dtype=images.dtype) - 5
    line = torch.exp(-offset.square() / (2 * 1.5**2))
    line /= line.sum()
    channels = images.shape[1]
    window = (line[:, None] * line[None, :]).expand(channels, 1, 11, 11)

    def blur(x: torch.Tensor) -> torch.Tensor:
        return conv2d(x, window, groups=channels)

    mean_a, mean_b = blur(images), blur(reference)
    var_a = blur(images.square()) - mean_a.square()
    var_b = blur(reference.square()) - mean_b.square()
    covariance = blur(images * reference) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    scale = (mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)
    return float((likeness / scale).mean())
