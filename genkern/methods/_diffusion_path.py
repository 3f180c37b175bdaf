"""The path of Diffusion from what its constructor is given, and the times on it that a sampler visits."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import check, grids, paths

PREDICTIONS = ("epsilon", "v", "sample", "score")
CONTINUOUS = ("continuous_vp", "cosine_log_snr")
FIRST = 1e-3  # the time whose noise level ends a named grid of noise levels on a continuous path (arXiv:2011.13456)

VP = paths.DiscreteVP | paths.ContinuousVP


def path_of(
    schedule: str | paths.ContinuousVP, timesteps: int, prediction: str, beta_start: float | None,
    beta_end: float | None, betas: Any, alphas_cumprod: Any, final_alphas_cumprod: float, shift: float,
    rescale_zero_snr: bool,
) -> VP:  # fmt: skip
    """The path; arguments and errors are Diffusion's."""
    if betas is not None and alphas_cumprod is not None:
        raise ValueError("betas: expected None beside alphas_cumprod")
    given = betas is not None or alphas_cumprod is not None
    if given and (beta_start is not None or beta_end is not None):
        raise ValueError("beta_start, beta_end: expected None beside betas or alphas_cumprod")
    if not given and (isinstance(schedule, paths.ContinuousVP) or schedule in CONTINUOUS):
        if rescale_zero_snr or final_alphas_cumprod != 1.0:
            raise ValueError("rescale_zero_snr, final_alphas_cumprod: expected a schedule of discrete time")
        return _continuous(schedule, beta_start, beta_end, shift)
    if alphas_cumprod is None:
        if not given:
            name = check.choice("schedule", schedule, (*paths.SCHEDULES, *CONTINUOUS))
            betas = paths.betas(name, timesteps, beta_start, beta_end)
        alphas_cumprod = paths.alphas_cumprod_of(betas)
    if shift != 1.0:
        alphas_cumprod = paths.shift_noise_level(alphas_cumprod, shift)
    if rescale_zero_snr:
        alphas_cumprod = paths.rescale_zero_snr(alphas_cumprod)
    path = paths.DiscreteVP(alphas_cumprod, final_alphas_cumprod)
    if path.finite < path.timesteps and prediction in ("epsilon", "score"):
        raise ValueError(
            "prediction: expected 'v' or 'sample' with a schedule that ends without signal (zero terminal SNR), "
            f"got {prediction!r}"
        )
    return path


def grid_of(path: VP, steps: int | None, spacing: str | None, timesteps: Any, sigmas: Any) -> np.ndarray:
    """The times of the network's calls, decreasing, and the end of the path; arguments as of Diffusion.sample."""
    given = [n for n, v in (("steps", steps), ("timesteps", timesteps), ("sigmas", sigmas)) if v is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]}: expected None beside {given[1]}, got {given[0]} and {given[1]}")
    return np.append(_visited(path, steps, spacing, timesteps, sigmas), path.start).astype(np.float64)


def _visited(path: VP, steps: int | None, spacing: str | None, timesteps: Any, sigmas: Any) -> np.ndarray:
    if sigmas is not None:
        levels = grids.given(np.append(sigmas, 0.0), "sigmas", 0.0)
        if levels[0] < levels[1]:
            raise ValueError(f"sigmas: expected strictly decreasing noise levels > 0, got {sigmas}")
        return _times_at(path, levels[:-1])
    discrete = isinstance(path, paths.DiscreteVP)
    if timesteps is not None:
        if isinstance(path, paths.DiscreteVP):
            return grids.given_timesteps(timesteps, path.timesteps)
        times = grids.given(np.append(timesteps, 0.0), "timesteps", 0.0, 1.0)
        if times[0] < times[1]:
            raise ValueError(f"timesteps: expected strictly decreasing times of (0, 1], got {timesteps}")
        return times[:-1]
    plain = grids.SPACINGS if discrete else ("uniform",)
    if spacing is None:
        spacing = "trailing" if discrete else "uniform"
    check.choice("spacing", spacing, (*plain, *grids.NOISE_LEVELS))
    if steps is None:
        steps = min(50, path.timesteps) if isinstance(path, paths.DiscreteVP) else 50
    if spacing == "uniform":
        return grids.uniform(steps, 1.0, 0.0)[:-1]
    low, high = FIRST, 1.0
    if isinstance(path, paths.DiscreteVP):
        if spacing in plain:
            return grids.timesteps(steps, path.timesteps, spacing)
        low, high = 0, path.finite - 1
    levels = grids.noise_levels(spacing, steps, path.noise_level(low), path.noise_level(high))
    times = _times_at(path, levels)
    if high != path.stop:  # sampling starts from the end without signal, whose noise level is infinite
        times[0] = path.stop
    return times


def _times_at(path: VP, levels: np.ndarray) -> np.ndarray:
    times = np.asarray(path.time_at(levels), dtype=np.float64)
    if isinstance(path, paths.ContinuousVP):
        path.check_time("sigmas", float(times.max()))
    return times


def _continuous(schedule: Any, beta_start: float | None, beta_end: float | None, shift: float) -> paths.ContinuousVP:
    if schedule == "continuous_vp":
        return paths.LinearVP(
            0.1 if beta_start is None else beta_start, 20.0 if beta_end is None else beta_end, shift=shift
        )
    if beta_start is not None or beta_end is not None:
        raise ValueError("beta_start, beta_end: expected None with a schedule that has none")
    if schedule == "cosine_log_snr":
        return paths.CosineVP(shift=shift)
    if shift != 1.0:
        raise ValueError("shift: expected 1 with a given path, which has its own")
    return schedule
