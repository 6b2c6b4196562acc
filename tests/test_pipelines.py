"""diffusers pipelines, called as their users call them: what is known without being told, and every common option."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import pipelines
import pytest
import torch
from diffusers import (
    ControlNetModel,
    HeunDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionSAGPipeline,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection
from test_hooks import same, trace
from torch import Tensor, nn

from tome_sampler import MergeConfig, MergeSession, ModelCall, apply_patch, merging, remove_patch
from tome_sampler.hosts import modules as hosts
from tome_sampler.hosts.pipelines import _NoiseLevels

FIXED = MergeConfig(min_tokens=0, threshold=None, early_ratio=None)
SIDE = 128  # pixels: 16 x 16 tokens at the finest attention


SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2,
    "layers_per_block": 1,
}


@pytest.fixture
def pipe() -> StableDiffusionPipeline:
    return pipelines.sd()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[ModelCall]:
    """What sessions are told of each call."""
    seen: list[ModelCall] = []
    begin = MergeSession.begin

    def spy(session: MergeSession, call: ModelCall) -> None:
        seen.append(call)
        begin(session, call)

    monkeypatch.setattr(MergeSession, "begin", spy)
    return seen


def draw(pipe: Any, prompt: Any = "a b", seed: int = 0, steps: int = 3, **options: Any) -> Tensor:
    """Latents of a run."""
    options = {"height": SIDE, "width": SIDE, **options}
    generator = torch.Generator().manual_seed(seed)
    out: Tensor = pipe(prompt, num_inference_steps=steps, generator=generator, output_type="latent", **options).images
    return out


def like(pipe: Any, kind: Any, **parts: Any) -> Any:
    """Another pipeline of the same parts."""
    made = kind(**{**pipe.components, **parts}, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def test_a_plain_call_is_merged_with_all_that_the_pipeline_knows(
    pipe: StableDiffusionPipeline, calls: list[ModelCall]
) -> None:
    plain, before = draw(pipe, ["a", "b"]), trace(pipe.unet)
    with merging(pipe, FIXED) as session:
        merged = draw(pipe, ["a", "b"])
        stats, importance = session.stats.to_dict(), session.importance
        assert not torch.equal(merged, plain)
        assert torch.equal(draw(pipe, ["a", "b"]), merged)  # a second call is a fresh run
        assert session.stats.to_dict() == stats
    assert importance is not None
    assert importance.shape == (2, 16, 16)
    assert [(c.branches, c.images) for c in calls[:3]] == [(("uncond",) * 2 + ("cond",) * 2, (0, 1, 0, 1))] * 3
    sigmas = [c.sigma for c in calls[:3]]
    assert sigmas == pytest.approx([pipelines_sigma(pipe, t) for t in pipe.scheduler.timesteps], rel=1e-6)
    assert stats["merged_fraction"] == 0.5
    assert len(stats["layers"]) == 5  # two of the finest level on the way down, three on the way up
    assert stats["layers"]["down_blocks.0.attentions.0.transformer_blocks.0.attn1"]["tokens_before"] == 3 * 4 * 256
    assert not stats["notes"]
    assert same(before, trace(pipe.unet))
    assert torch.equal(draw(pipe, ["a", "b"]), plain)
    assert not hosts._attached


def pipelines_sigma(pipe: Any, t: Tensor) -> float:
    alpha = pipe.scheduler.alphas_cumprod[int(t)].double()
    return float(((1 - alpha) / alpha).sqrt())


def test_apply_patch_and_remove_patch_take_a_pipeline(pipe: StableDiffusionPipeline) -> None:
    plain, before = draw(pipe), trace(pipe.unet)
    with merging(pipe, FIXED):
        merged = draw(pipe)
    apply_patch(pipe, FIXED)
    assert torch.equal(draw(pipe), merged)
    assert remove_patch(pipe) is pipe
    assert same(before, trace(pipe.unet))
    assert torch.equal(draw(pipe), plain)


def test_the_call_after_one_that_failed_is_a_fresh_run(pipe: StableDiffusionPipeline) -> None:
    def fail(pipe: Any, step: int, t: Any, state: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with merging(pipe, MergeConfig(min_tokens=0)) as session:
        expected, stats = draw(pipe), session.stats.to_dict()
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, "c d", seed=1, callback_on_step_end=fail)
        assert torch.equal(draw(pipe), expected)
        assert session.stats.to_dict() == stats


def test_a_picture_is_the_same_alone_and_beside_others(pipe: StableDiffusionPipeline) -> None:
    latents = pipelines.structured((3, 4, 16, 16)) * torch.tensor([1.0, 0.3, 2.0])[:, None, None, None]
    config = MergeConfig(min_tokens=0, threshold=0.8, floor=0.1)
    with merging(pipe, config):
        together = draw(pipe, ["a", "b", "c"], latents=latents)
        for i, prompt in enumerate("abc"):
            alone = draw(pipe, prompt, latents=latents[i : i + 1])
            torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-3, atol=1e-3)


def test_several_pictures_of_a_prompt_are_pictures_of_their_own(
    pipe: StableDiffusionPipeline, calls: list[ModelCall]
) -> None:
    with merging(pipe, FIXED) as session:
        draw(pipe, ["a", "b"], num_images_per_prompt=2)
        assert session.importance is not None
        assert session.importance.shape[0] == 4
    assert calls[0].images == (0, 1, 2, 3) * 2


def test_without_guidance_and_where_it_ends_the_layout_follows(
    pipe: StableDiffusionPipeline, calls: list[ModelCall]
) -> None:
    def end_guidance(pipe: Any, step: int, t: Any, state: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            state["prompt_embeds"] = state["prompt_embeds"].chunk(2)[-1]
        return state

    with merging(pipe, FIXED) as session:
        draw(pipe, guidance_scale=1.0)
        assert session.importance is None
        draw(pipe, steps=4, callback_on_step_end=end_guidance, callback_on_step_end_tensor_inputs=["prompt_embeds"])
        assert not session.stats.to_dict()["notes"]
        assert session.importance is not None  # the last map that there was
    assert [c.branches for c in calls] == [("cond",)] * 3 + [("uncond", "cond")] * 2 + [("cond",)] * 2


def test_a_run_that_begins_later_has_its_own_schedule(pipe: StableDiffusionPipeline) -> None:
    image = pipelines.structured((1, 3, SIDE, SIDE)).clamp(0, 1)
    img2img = like(pipe, StableDiffusionImg2ImgPipeline)

    def drawn() -> Tensor:
        out: Tensor = img2img(
            "a", image, 0.5, num_inference_steps=8, generator=torch.Generator().manual_seed(0), output_type="latent"
        ).images
        return out

    plain = drawn()
    with merging(img2img, FIXED.with_(start=0.5)) as session:
        assert not torch.equal(drawn(), plain)
        steps = session.stats.to_dict()["steps"]
    assert [step["merged_fraction"] for step in steps] == [0.0, 0.0, 0.5, 0.5]  # half of the four that were run
    assert torch.equal(drawn(), plain)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(pipe: StableDiffusionPipeline, channels: int, calls: list[ModelCall]) -> None:
    unet = pipe.unet if channels == 4 else pipelines.unet("sd15", in_channels=9)
    inpaint = like(pipe, StableDiffusionInpaintPipeline, unet=unet)
    image, mask = pipelines.structured((1, 3, SIDE, SIDE)).clamp(0, 1), torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 32:96, 32:96] = 1
    with merging(inpaint, FIXED) as session:
        out = draw(inpaint, image=image, mask_image=mask, strength=1.0)
        stats = session.stats.to_dict()
    assert torch.isfinite(out).all()
    assert stats["merged_fraction"] == 0.5
    assert not stats["notes"]
    assert calls[0].branches == ("uncond", "cond")


@pytest.mark.parametrize("guess", [False, True])
def test_controlnet(pipe: StableDiffusionPipeline, guess: bool) -> None:
    with torch.random.fork_rng():
        net = ControlNetModel.from_unet(pipe.unet).eval()
    control = like(pipe, StableDiffusionControlNetPipeline, controlnet=net)
    image = pipelines.structured((1, 3, SIDE, SIDE)).clamp(0, 1)
    with merging(control, FIXED) as session:
        draw(control, image=image, guess_mode=guess)
        stats = session.stats.to_dict()
    assert stats["merged_fraction"] == 0.5
    assert not stats["notes"]


def test_instruct_pix2pix_has_three_chunks(pipe: StableDiffusionPipeline, calls: list[ModelCall]) -> None:
    unet = pipelines.unet("sd15", in_channels=8)
    edit = like(pipe, StableDiffusionInstructPix2PixPipeline, unet=unet)
    image, generator = pipelines.structured((1, 3, SIDE, SIDE)).clamp(0, 1), torch.Generator().manual_seed(0)
    seen: list[Tensor] = []
    unet.register_forward_hook(lambda m, args, out: seen.append(out[0]))
    with merging(edit, FIXED) as session:
        edit("a", image, num_inference_steps=3, generator=generator, output_type="latent")
        cond, _, uncond = seen[-1].chunk(3)
        assert session.importance is not None
        assert torch.equal(session.importance, (cond - uncond).abs().mean(1))
        assert not session.stats.to_dict()["notes"]
    assert calls[0].branches == ("cond", "uncond", "uncond")


def test_equal_pictures_are_no_branches(calls: list[ModelCall]) -> None:
    """PixArt's pipeline says nothing of its guidance: six equal rows are three pictures, guided, and not two that are
    edited."""
    latents = torch.randn(1, 4, 16, 16).repeat(3, 1, 1, 1)
    options: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}
    with merging(pipelines.pixart(), FIXED) as session:
        draw(pipelines.pixart(), ["a", "b", "c"], steps=1, latents=latents, **options)
        assert session.importance is not None
        assert session.importance.shape[0] == 3
    assert calls[0].branches == ("uncond",) * 3 + ("cond",) * 3


def test_a_pipeline_that_edits_and_says_nothing_is_known_by_its_channels(
    pipe: StableDiffusionPipeline, calls: list[ModelCall]
) -> None:
    class Silent(SimpleNamespace):
        """A pipeline without properties."""

    silent = Silent(scheduler=pipe.scheduler, unet=pipelines.unet("sd15", in_channels=8, **SMALL))
    x = torch.cat([torch.randn(1, 4, 8, 8).repeat(3, 1, 1, 1), torch.randn(3, 4, 8, 8)], 1)
    pipe.scheduler.set_timesteps(2)
    with merging(silent, FIXED), torch.no_grad():
        silent.unet(x, pipe.scheduler.timesteps[0], torch.randn(3, 77, pipelines.TEXT))
    assert calls[0].branches == ("cond", "uncond", "uncond")


@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_perturbed_attention_guidance(pipe: StableDiffusionPipeline, scale: float, calls: list[ModelCall]) -> None:
    """At the finest level, where its attention is over some rows of the merged tokens, and over none of the others'."""
    unet = pipelines.unet("sd15")
    pag = StableDiffusionPAGPipeline(
        **{**pipe.components, "unet": unet}, requires_safety_checker=False, pag_applied_layers=["up_blocks.3"]
    )
    pag.set_progress_bar_config(disable=True)
    latents = pipelines.structured((1, 4, 16, 16))
    plain = draw(pag, guidance_scale=scale, pag_scale=3.0, latents=latents)
    off = draw(pag, guidance_scale=scale, pag_scale=0.0, latents=latents)
    with merging(pag, FIXED.with_(ratio=0.1)) as session:
        merged = draw(pag, guidance_scale=scale, pag_scale=3.0, latents=latents)
        assert not session.stats.to_dict()["notes"]
    layout = ("uncond", "cond", "cond") if scale > 1 else ("cond", "cond")
    assert calls[-1].branches == layout
    assert (merged - plain).abs().mean() < 0.25 * (off - plain).abs().mean()  # it still guides


def test_a_second_order_scheduler_calls_twice_a_step(pipe: StableDiffusionPipeline) -> None:
    heun = like(pipe, StableDiffusionPipeline, scheduler=HeunDiscreteScheduler.from_config(pipe.scheduler.config))
    with merging(heun, FIXED.with_(end=0.5)) as session:
        draw(heun, steps=4)
        merged = [step["merged_fraction"] for step in session.stats.to_dict()["steps"]]
    assert len(merged) == 7
    assert merged == sorted(merged, reverse=True)
    assert set(merged) == {0.0, 0.5}


@pytest.mark.parametrize(
    "name",
    [
        *("DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "TCD", "LCM"),
        *("DPMSolverSinglestep", "DPMSolverSDE", "KDPM2Discrete", "KDPM2AncestralDiscrete", "UniPCMultistep"),
        *("DEISMultistep", "EDMEuler"),
    ],
)
def test_every_scheduler_says_where_the_run_is(name: str, pipe: StableDiffusionPipeline) -> None:
    kind = getattr(diffusers, f"{name}Scheduler")
    scheduler = kind() if name == "EDMEuler" else kind.from_config({**pipe.scheduler.config, "skip_prk_steps": True})
    small = like(pipe, StableDiffusionPipeline, unet=pipelines.unet("sd15", **SMALL), scheduler=scheduler)
    with merging(small, FIXED.with_(end=0.5)) as session:
        draw(small, steps=6, latents=torch.randn(1, 4, 8, 8), height=64, width=64)
        steps = session.stats.to_dict()["steps"]
    sigmas, merged = [step["sigma"] for step in steps], [step["merged_fraction"] for step in steps]
    in_between = ("DPMSolverSDE", "KDPM2Discrete", "KDPM2AncestralDiscrete")  # these look back up
    assert sigmas == sorted(sigmas, reverse=True) or name in in_between
    assert len(set(sigmas)) >= 6
    assert sigmas[0] > 3 * sigmas[-1]
    assert merged == sorted(merged, reverse=True)
    assert merged.count(0.5) == pytest.approx(len(merged) / 2, abs=1)


def test_noise_levels_of_flows_are_those_of_diffusion() -> None:
    """A flow's sigma is the share of the noise: as noise over signal it is s / (1 - s)."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    levels = _NoiseLevels(scheduler)
    for t, s in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False):
        assert levels.sigma(t) == pytest.approx(min(s / max(1 - s, 1e-8), 1e8), rel=1e-5)
    schedule = levels.schedule(float(scheduler.timesteps[1]), None)
    assert schedule is not None
    assert len(schedule) == 4
    assert schedule == sorted(schedule, reverse=True)


@pytest.mark.parametrize("slices", ["auto", 1, "max"])
def test_attention_slicing_changes_nothing(pipe: StableDiffusionPipeline, slices: Any) -> None:
    config = MergeConfig(min_tokens=0, threshold=0.8, floor=0.1)
    with merging(pipe, config):
        expected = draw(pipe, ["a", "b"])
    sliced = like(pipe, StableDiffusionPipeline, unet=pipelines.unet("sd15"))
    sliced.unet.set_attention_slice(slices)
    with merging(sliced, config) as session:
        torch.testing.assert_close(draw(sliced, ["a", "b"]), expected, rtol=1e-3, atol=1e-3)
        assert not session.stats.to_dict()["notes"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe: StableDiffusionPipeline, dtype: torch.dtype) -> None:
    half = like(pipe, StableDiffusionPipeline, unet=pipelines.unet("sd15"), text_encoder=pipelines.text_encoder())
    half.to(dtype=dtype)
    try:
        with merging(half, FIXED) as session:
            out = draw(half)
            assert session.stats.to_dict()["merged_fraction"] == 0.5
    finally:
        half.vae.to(torch.float32)  # the one that all pipelines here share
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("whole", [True, False])
def test_weights_that_wait_elsewhere(pipe: StableDiffusionPipeline, whole: bool) -> None:
    """The hooks of accelerate that diffusers' CPU offload puts on, the whole model at once or a layer at a time."""
    import accelerate

    with merging(pipe, FIXED):
        expected = draw(pipe)
    unet = pipelines.unet("sd15")
    offloaded = like(pipe, StableDiffusionPipeline, unet=unet)
    if whole:
        accelerate.cpu_offload_with_hook(unet, "cpu")
    else:
        accelerate.cpu_offload(unet, "cpu", offload_buffers=True)
    with merging(offloaded, FIXED):
        assert torch.equal(draw(offloaded), expected)


def test_a_lora_acts_on_merged_tokens(pipe: StableDiffusionPipeline) -> None:
    peft = pytest.importorskip("peft")
    unet = pipelines.unet("sd15")
    other = like(pipe, StableDiffusionPipeline, unet=unet)
    with merging(other, FIXED) as session:
        without = draw(other)
        unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "one")
        lora = draw(other)
        assert session.stats.to_dict()["merged_fraction"] == 0.5
        assert not torch.equal(lora, without)
        unet.disable_adapters()
        assert torch.equal(draw(other), without)


def ip_adapter(unet: nn.Module) -> dict[str, Any]:
    """Random weights of an IP-Adapter for pictures of 16 numbers."""
    width: Any = unet.config.cross_attention_dim
    weights, number = {}, 1
    for name, processor in unet.attn_processors.items():
        del processor
        if name.endswith("attn2.processor"):
            hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            layer = IPAdapterAttnProcessor2_0(hidden, width).state_dict()
            for key in ("to_k_ip", "to_v_ip"):
                weights[f"{number}.{key}.weight"] = layer[f"{key}.0.weight"]
            number += 2
    projection = ImageProjection(16, width, 4).state_dict()
    renamed = {key.replace("image_embeds", "proj"): value for key, value in projection.items()}
    return {"image_proj": renamed, "ip_adapter": weights}


@pytest.mark.parametrize("modules", [("attn1",), ("attn1", "attn2"), ("block",)])
def test_ip_adapter(pipe: StableDiffusionPipeline, modules: tuple[str, ...]) -> None:
    unet = pipelines.unet("sd15")
    unet._load_ip_adapter_weights([ip_adapter(unet)])
    other = like(pipe, StableDiffusionPipeline, unet=unet)
    pictures = [torch.randn(2, 1, 16), torch.randn(2, 1, 16)]
    with merging(other, FIXED.with_(modules=modules)) as session:
        first, second = (draw(other, ip_adapter_image_embeds=[p]) for p in pictures)
        assert not torch.equal(first, second)
        assert session.stats.to_dict()["merged_fraction"] == 0.5
        masked = draw(
            other,
            ip_adapter_image_embeds=pictures[:1],
            cross_attention_kwargs={"ip_adapter_masks": [torch.ones(1, 1, SIDE, SIDE)]},
        )
    assert torch.isfinite(masked).all()


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_at_a_fixed_ratio_is_as_eager_with_importance(pipe: StableDiffusionPipeline) -> None:
    expected, stats = None, None
    for compiled in (False, True):
        unet = pipelines.unet("sd15", **SMALL)
        other = like(pipe, StableDiffusionPipeline, unet=unet)
        if compiled:
            other.unet = torch.compile(unet, backend="eager", fullgraph=True)
        with merging(other, FIXED) as session:
            drawn = draw(other)
            importance = session.importance
            assert importance is not None
            if compiled:
                torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
                assert session.stats.to_dict()["tokens_after"] == stats["tokens_after"]  # type: ignore[index]
            expected, stats = drawn, session.stats.to_dict()
        assert not hosts._attached


def test_a_pipeline_can_be_collected() -> None:
    def made() -> tuple[weakref.ref[Any], weakref.ref[Any]]:
        pipe = like(pipelines.sd(), StableDiffusionPipeline, unet=pipelines.unet("sd15", **SMALL))
        apply_patch(pipe, FIXED)
        draw(pipe, steps=2)
        return weakref.ref(pipe), weakref.ref(pipe.unet)

    references = made()
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_a_layout_that_the_latents_contradict_is_not_believed(pipe: StableDiffusionPipeline) -> None:
    class Odd(StableDiffusionPipeline):
        do_classifier_free_guidance = True

    odd = like(pipe, Odd, unet=pipelines.unet("sd15", **SMALL))
    odd.scheduler.set_timesteps(3)
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, pipelines.TEXT)
    with merging(odd, FIXED) as session, torch.no_grad():
        odd.unet(x, odd.scheduler.timesteps[0], text)
        stats = session.stats.to_dict()
    assert stats["merged_fraction"] == 0.5
    assert session.importance is None
    assert "each row counts as a picture of its own" in stats["notes"][0]


class ReferenceUNet(nn.Module):
    """A U-Net that runs first over a condition's latents, of another size, and then over those to be denoised."""

    def __init__(self, unet: nn.Module, context: list[int]) -> None:
        super().__init__()
        self.unet, self.config = unet, unet.config
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.add_embedding = None
        self.condition = pipelines.structured((1, 4, 8, 8), seed=5)
        unet.set_attn_processor({name: pipelines.ReferenceAttention(name, context) for name in unet.attn_processors})

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Any:
        ref: dict[str, Tensor] = {}
        text, b = encoder_hidden_states[-1:], sample.shape[0]
        self.unet(self.condition, timestep, text, cross_attention_kwargs={"mode": "w", "ref": ref})
        ref = {name: tokens.expand(b - 1, -1, -1) for name, tokens in ref.items()}
        self.written = {tokens.shape[1] for tokens in ref.values()}
        return self.unet(
            sample, timestep, encoder_hidden_states, cross_attention_kwargs={"mode": "r", "ref": ref}, return_dict=False
        )


def reference_pipeline(pipe: Any) -> tuple[Any, list[int]]:
    context: list[int] = []
    made = like(pipe, StableDiffusionPipeline)
    made.register_modules(unet=ReferenceUNet(pipelines.unet("sd15", **SMALL), context))
    return made, context


@pytest.mark.parametrize("modules", [("attn1",), ("block",)])
def test_reference_attention_writes_all_tokens_and_reads_with_merged_ones(
    pipe: StableDiffusionPipeline, modules: tuple[str, ...], calls: list[ModelCall]
) -> None:
    made, context = reference_pipeline(pipe)
    mosaic = {"height": 3 * 64, "width": 2 * 64}  # six views: 24 x 16 tokens
    latents = pipelines.structured((1, 4, 24, 16))
    plain = draw(made, latents=latents, **mosaic)
    del context[:], calls[:]
    with merging(made, FIXED.with_(modules=modules, ratio=0.25)) as session:
        merged = draw(made, latents=latents, **mosaic)
        stats, importance = session.stats.to_dict(), session.importance
    assert made.unet.written == {64, 16}  # all of the condition's
    assert set(context[:3]) <= {24 * 16 * 3 // 4 + 64, 12 * 8 + 16}  # fewer queries and keys of its own
    assert stats["merged_fraction"] == 0.25
    assert not stats["notes"]
    assert importance is not None
    assert importance.shape == (1, 24, 16)
    assert len(calls) == 3
    assert (merged - plain).abs().mean() < 0.1 * plain.std()
    assert torch.equal(draw(made, latents=latents, **mosaic), plain)


def test_a_pipeline_that_makes_both_passes_itself_is_read_as_well(
    pipe: StableDiffusionPipeline, calls: list[ModelCall]
) -> None:
    made, _ = reference_pipeline(pipe)
    made.register_modules(unet=made.unet.unet)  # called twice in each step, and not by a module around it
    text, condition = torch.randn(2, 77, pipelines.TEXT), pipelines.structured((1, 4, 8, 8))
    made._guidance_scale = 5.0
    with merging(made, FIXED) as session, torch.no_grad():
        made.scheduler.set_timesteps(3)
        latents = torch.randn(1, 4, 16, 16).repeat(2, 1, 1, 1)
        for t in made.scheduler.timesteps:
            ref: dict[str, Tensor] = {}
            made.unet(condition, t, text[1:], cross_attention_kwargs={"mode": "w", "ref": ref})
            assert {tokens.shape[1] for tokens in ref.values()} == {64, 16}
            made.unet(latents, t, text, cross_attention_kwargs={"mode": "r", "ref": ref})
        stats = session.stats.to_dict()
        assert session.importance is not None
        assert session.importance.shape == (1, 16, 16)
    assert stats["merged_fraction"] == 0.5
    assert stats["pairings_reused"] > 0  # the writing pass did not end the run's pairs
    assert not stats["notes"]
    assert [len(call.images) for call in calls] == [0, 2] * 3


def test_reference_attention_counts_its_own_merged_keys_and_each_reference_once(pipe: StableDiffusionPipeline) -> None:
    made, _ = reference_pipeline(pipe)
    block: Any = next(m for m in made.unet.unet.modules() if hasattr(m, "attn1"))
    x = torch.randn(2, 16, 16).repeat_interleave(4, 1)  # in cells of 2 x 2 after this: exact duplicates
    x = x.view(2, 4, 4, 2, 2, 16).transpose(2, 3).reshape(2, 64, 16)
    ref = {block.attn1.processor.name: torch.randn(1, 9, 16)}
    error = {}
    for proportional in (True, False):
        with torch.no_grad():
            exact = block.attn1(x, mode="r", ref=ref)
            with merging(block, FIXED.with_(ratio=0.6, proportional=proportional)) as session:
                error[proportional] = (block.attn1(x, mode="r", ref=ref) - exact).abs().max().item()
        assert not session.stats.notes
    assert error[True] < 1e-5 < 1e-3 < error[False]


def test_calls_of_another_row_count_are_laid_out_by_themselves(pipe: StableDiffusionPipeline) -> None:
    """Self-attention guidance calls the denoiser once more, with the conditional rows alone."""
    guided = like(pipe, StableDiffusionSAGPipeline)

    def pictures(n: int) -> Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(n)]
        options = {"generator": generators, "num_images_per_prompt": n, "output_type": "latent"}
        return guided("a b", num_inference_steps=2, height=SIDE, width=SIDE, **options).images

    with merging(guided, FIXED):
        torch.testing.assert_close(pictures(2)[:1], pictures(1), atol=1e-3, rtol=1e-3)
