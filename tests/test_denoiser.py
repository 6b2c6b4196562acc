"""The k-diffusion wrapper, under every unmodified sampler of the real package."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tome_sampler
from tome_sampler import CFGDenoiser, MergeConfig, kdiffusion, sampling
from tome_sampler.refresh import Always, SigmaRatio

SAMPLERS = sampling.sampler_names()
TWO_CALLS = {"sample_heun", "sample_dpm_2", "sample_dpm_2_ancestral", "sample_dpmpp_2s_ancestral", "sample_dpmpp_sde"}
CONFIG = MergeConfig(threshold=None, ratio=0.5, early_ratio=None, min_tokens=0)
STEPS = 6


class Eps(nn.Module):
    """A U-Net as the eps model that k-diffusion wraps; counts its calls and remembers their batches."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet
        self.batches: list[int] = []

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        self.batches.append(x.shape[0])
        return self.unet(x, t, cond, return_dict=False)[0] * 0.1


@pytest.fixture
def wrapped(unet: nn.Module) -> Any:
    alphas = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
    return kdiffusion.load("external").DiscreteEpsDDPMDenoiser(Eps(unet), alphas, quantize=False)


def conds(images: int = 1, tokens: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    cond, uncond = torch.randn(2, images, tokens, 8, generator=generator)
    return {"cond": cond, "uncond": uncond, "cond_scale": 4.0}


def latent(images: int = 1, h: int = 16, w: int = 16) -> Tensor:
    return torch.randn(images, 4, h, w, generator=torch.Generator().manual_seed(2))


def run(name: str, model: Any, sigmas: Tensor, x: Tensor, extra_args: dict[str, Any], **kwargs: Any) -> Tensor:
    arguments: tuple[Any, ...] = (sigmas,)
    if name == "sample_dpm_fast":
        arguments = (sigmas[-2].item(), sigmas[0].item(), len(sigmas) - 1)
    elif name == "sample_dpm_adaptive":
        arguments = (sigmas[-2].item(), sigmas[0].item())
    torch.manual_seed(3)
    return getattr(sampling, name)(model, x * sigmas[0], *arguments, extra_args=extra_args, disable=True, **kwargs)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_merged_with_refreshes_and_call_counts(name: str, wrapped: Any) -> None:
    sigmas, x = wrapped.get_sigmas(STEPS), latent()
    plain = run(name, CFGDenoiser(wrapped), sigmas, x, conds())
    calls = len(wrapped.inner_model.batches)
    wrapped.inner_model.batches.clear()
    seen: list[dict[str, Any]] = []
    with tome_sampler.merging(wrapped, CONFIG, sigmas=sigmas.tolist()) as session:
        merged = run(name, CFGDenoiser(wrapped, session), sigmas, x, conds(), callback=seen.append)
        stats = session.stats.to_dict()
    again = run(name, CFGDenoiser(wrapped), sigmas, x, conds())
    assert torch.equal(again, plain), "merging left something behind"
    assert merged.isfinite().all()
    assert not torch.equal(merged, plain)
    assert seen, "k-diffusion's callback was not called"
    assert stats["merged_fraction"] == 0.5
    assert len(stats["steps"]) == len(wrapped.inner_model.batches) - calls  # the last run is in there too
    if name in TWO_CALLS:
        assert calls == 2 * STEPS - 1
    elif name not in ("sample_dpm_fast", "sample_dpm_adaptive"):
        assert calls == STEPS
    # sigma falls from 14.6 to 0.03, or nine halvings: no sampler needs many more matchings than that
    made = [step["pairings_made"] for step in stats["steps"]]
    layers = len(stats["layers"])
    assert made[0] == layers
    assert layers <= sum(made) <= (STEPS + 4) * layers
    if name in TWO_CALLS:
        assert sum(step["pairings_reused"] for step in stats["steps"]) > 0


@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpm_2", "sample_dpmpp_2m"])
def test_first_and_second_order_samplers_match_about_as_often(name: str, wrapped: Any) -> None:
    sigmas = wrapped.get_sigmas(10)
    with tome_sampler.merging(wrapped, CONFIG.with_(refresh=SigmaRatio(2.0)), sigmas=sigmas.tolist()) as session:
        run(name, CFGDenoiser(wrapped, session), sigmas, latent(), conds())
        refreshes = sum(step["pairings_made"] > 0 for step in session.stats.to_dict()["steps"])
    assert 5 <= refreshes <= 8


def test_ratio_zero_changes_not_one_bit(wrapped: Any) -> None:
    sigmas, x = wrapped.get_sigmas(STEPS), latent()
    plain = run("sample_dpmpp_2m", CFGDenoiser(wrapped), sigmas, x, conds())
    with tome_sampler.merging(wrapped, MergeConfig.preset("default", ratio=0, min_tokens=0)) as session:
        assert torch.equal(run("sample_dpmpp_2m", CFGDenoiser(wrapped, session), sigmas, x, conds()), plain)


def test_guidance_is_the_idiom_everybody_uses(wrapped: Any) -> None:
    x, sigma, args = latent(2), torch.full((2,), 3.0), conds(2)
    both = wrapped(torch.cat([x] * 2), torch.cat([sigma] * 2), cond=torch.cat([args["uncond"], args["cond"]]))
    uncond, cond = both.chunk(2)
    torch.testing.assert_close(CFGDenoiser(wrapped)(x, sigma, **args), uncond + (cond - uncond) * 4.0)


def test_serial_and_batched_agree_merged_too(wrapped: Any) -> None:
    sigmas, x, args = wrapped.get_sigmas(STEPS), latent(2), conds(2)
    out, made = [], []
    for batched in (True, False):
        with tome_sampler.merging(wrapped, CONFIG, sigmas=sigmas.tolist()) as session:
            out.append(run("sample_euler", CFGDenoiser(wrapped, session, batched=batched), sigmas, x, args))
            made.append(session.stats.to_dict()["pairings_made"])
    torch.testing.assert_close(out[0], out[1], atol=2e-4, rtol=1e-4)
    assert made[0] == made[1], "the uncond call must use the cond call's pairs"


def test_without_guidance_there_is_no_uncond_pass_and_no_importance(wrapped: Any) -> None:
    x, sigma = latent(), torch.full((1,), 3.0)
    args = conds()
    with tome_sampler.merging(wrapped, CONFIG) as session:
        denoiser = CFGDenoiser(wrapped, session)
        one = denoiser(x, sigma, args["uncond"], args["cond"], 1.0)
        session.reset()
        none = denoiser(x, sigma, None, args["cond"], 7.0)
        assert session.importance is None
    assert wrapped.inner_model.batches == [1, 1]
    torch.testing.assert_close(one, none)


def test_weighted_conds_add_their_guidance(wrapped: Any) -> None:
    x, sigma, args = latent(), torch.full((1,), 3.0), conds()
    other = args["cond"].flip(-1)
    with tome_sampler.merging(wrapped, MergeConfig(ratio=0)) as session:
        out = CFGDenoiser(wrapped, session)(x, sigma, args["uncond"], [(args["cond"], 0.7), (other, 0.5)], 3.0)
        assert session.importance is not None
    c, o, u = (wrapped(x, sigma, cond=t) for t in (args["cond"], other, args["uncond"]))
    torch.testing.assert_close(out, u + 3.0 * (0.7 * (c - u) + 0.5 * (o - u)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weight", [0.5, 0.0])
def test_the_weight_of_a_single_cond_counts_at_every_scale(wrapped: Any, weight: float) -> None:
    x, sigma, args = latent(), torch.full((1,), 3.0), conds()
    c, u = (wrapped(x, sigma, cond=args[name]) for name in ("cond", "uncond"))
    for scale in (1.0, 3.0):
        out = CFGDenoiser(wrapped)(x, sigma, args["uncond"], [(args["cond"], weight)], scale)
        torch.testing.assert_close(out, u + scale * weight * (c - u), atol=1e-4, rtol=1e-4)


def test_what_is_no_tensor_in_a_conditioning_is_handed_on(wrapped: Any) -> None:
    args = conds()

    def model(x: Tensor, sigma: Tensor, cond: dict[str, Any]) -> Tensor:
        assert cond["control"] is None
        return wrapped(x, sigma, cond=cond["text"])

    given = {name: {"text": args[name], "control": None} for name in ("cond", "uncond")}
    x, sigma = latent(), torch.full((1,), 3.0)
    out = CFGDenoiser(model)(x, sigma, **given, cond_scale=4.0)
    torch.testing.assert_close(out, CFGDenoiser(wrapped)(x, sigma, **args))


def test_conds_of_different_lengths_are_sampled_one_after_the_other(wrapped: Any) -> None:
    sigmas, args = wrapped.get_sigmas(STEPS), conds()
    args["cond"] = torch.cat([args["cond"]] * 2, 1)
    with tome_sampler.merging(wrapped, CONFIG) as session:
        run("sample_euler", CFGDenoiser(wrapped, session), sigmas, latent(), args)
    assert set(wrapped.inner_model.batches) == {1}


def test_conds_of_the_wrong_batch_are_refused_in_one_line(wrapped: Any) -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 3, 8\) and x has 2 images") as error:
        CFGDenoiser(wrapped)(latent(2), torch.full((2,), 3.0), **conds(3))
    assert "\n" not in str(error.value)


def test_it_has_what_the_inner_model_has(wrapped: Any) -> None:
    denoiser = CFGDenoiser(wrapped)
    assert denoiser.sigmas is wrapped.sigmas
    assert torch.equal(denoiser.get_sigmas(5), wrapped.get_sigmas(5))
    assert denoiser.sigma_min == wrapped.sigma_min
    assert denoiser.sigma_max == wrapped.sigma_max
    with pytest.raises(AttributeError):
        _ = denoiser.no_such_thing


def test_a_second_run_without_reset_is_refused_and_reset_readies_the_session(wrapped: Any) -> None:
    sigmas = wrapped.get_sigmas(STEPS)
    with tome_sampler.merging(wrapped, CONFIG, sigmas=sigmas.tolist()) as session:
        denoiser = CFGDenoiser(wrapped, session)
        first = run("sample_euler", denoiser, sigmas, latent(), conds())
        with pytest.raises(RuntimeError, match=r"session\.reset\(\)"):
            run("sample_euler", denoiser, sigmas, latent(), conds())
        session.reset()
        assert torch.equal(run("sample_euler", denoiser, sigmas, latent(), conds()), first)


def test_the_samplers_noise_is_not_touched(wrapped: Any) -> None:
    """With a ratio that does merge, the global generator must end where it ends plain."""
    sigmas = wrapped.get_sigmas(STEPS)
    states = []
    for config in (None, MergeConfig.preset("tomesd"), MergeConfig.preset("importance"), CONFIG):
        if config is None:
            run("sample_euler_ancestral", CFGDenoiser(wrapped), sigmas, latent(), conds())
        else:
            with tome_sampler.merging(wrapped, config) as session:
                run("sample_euler_ancestral", CFGDenoiser(wrapped, session), sigmas, latent(), conds())
        states.append(torch.get_rng_state())
    assert all(torch.equal(state, states[0]) for state in states)


def test_a_picture_is_the_same_alone_and_in_a_batch(wrapped: Any) -> None:
    sigmas, x, args = wrapped.get_sigmas(STEPS), latent(3), conds(3)
    config = MergeConfig(threshold=0.5, floor=0.1, min_tokens=0)

    def sample(rows: slice) -> Tensor:
        some = {"cond": args["cond"][rows], "uncond": args["uncond"][rows], "cond_scale": 4.0}
        with tome_sampler.merging(wrapped, config, sigmas=sigmas.tolist()) as session:
            return run("sample_euler", CFGDenoiser(wrapped, session), sigmas, x[rows], some)

    together = sample(slice(0, 3))
    for i in range(3):
        torch.testing.assert_close(sample(slice(i, i + 1))[0], together[i], atol=5e-4, rtol=1e-3)


def test_every_call_can_be_matched_anew(wrapped: Any) -> None:
    sigmas = wrapped.get_sigmas(STEPS)
    with tome_sampler.merging(wrapped, CONFIG.with_(refresh=Always())) as session:
        run("sample_heun", CFGDenoiser(wrapped, session), sigmas, latent(), conds())
        stats = session.stats.to_dict()
    assert stats["pairings_reused"] == 0
