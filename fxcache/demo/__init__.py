"""The demo: samples from a small trained denoiser, uncached and cached, side by side."""
