"""Each family of models at its published layout: what is merged, how close it stays, and that nothing of it is left."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pipelines
import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtSigmaPipeline, SD3Transformer2DModel
from test_hooks import same, trace
from torch import Tensor

from tome_sampler import MergeConfig, merging
from tome_sampler.hosts.families import FAMILIES, mergeable
from tome_sampler.positions import position_features

FIXED = MergeConfig(min_tokens=0, threshold=None, early_ratio=None)
TEXT = {
    name: torch.randn(2, 5, pipelines.TEXT, generator=torch.Generator().manual_seed(number))
    for number, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))
}


def text(rows: slice) -> dict[str, Any]:
    masks = {f"{name.removesuffix('_embeds')}_attention_mask": torch.ones(2, 5)[rows] for name in TEXT}
    return {"prompt": None, "negative_prompt": None, **{name: t[rows] for name, t in TEXT.items()}, **masks}


def prompts(rows: slice) -> dict[str, Any]:
    return {"prompt": ["a red fox", "b"][rows]}


class Case:
    """A family: its pipeline, the (n, blocks) that are merged, the latents' shape, what else it is called with."""

    def __init__(
        self,
        build: Callable[[], Any],
        tokens: int,
        layers: int,
        latents: tuple[int, ...],
        conditioning: Callable[[slice], dict[str, Any]] = prompts,
        **options: Any,
    ) -> None:
        self.build, self.tokens, self.layers, self.latents = build, tokens, layers, latents
        self.conditioning, self.options = conditioning, options

    def denoiser(self) -> Any:
        pipe = self.build()
        return getattr(pipe, "transformer", None) or pipe.unet

    def draw(self, rows: slice = slice(0, 1), steps: int = 3) -> Tensor:
        pipe = self.build()
        latents = pipelines.structured((2, *self.latents)) * torch.tensor([1.0, 0.5]).view(2, *(1,) * len(self.latents))
        side = self.latents[-1] * pipelines.SCALE
        result = pipe(
            num_inference_steps=steps,
            latents=latents[rows],
            height=side,
            width=side,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **self.conditioning(rows),
            **self.options,
        )
        out: Tensor = result.frames if hasattr(result, "frames") else result.images
        return out


CASES = {
    "sd15": Case(pipelines.sd, 256, 5, (4, 16, 16)),
    "sd21": Case(lambda: pipelines.sd("sd21"), 256, 5, (4, 16, 16)),
    "sdxl": Case(pipelines.sdxl, 64, 10, (4, 16, 16)),
    "animatediff": Case(pipelines.animate, 256, 5, (4, 3, 16, 16), num_frames=3),
    "pixart": Case(pipelines.pixart, 64, 14, (4, 16, 16), text, use_resolution_binning=False),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_each_merged_layer_has_fewer_tokens_and_nothing_is_left_behind(case: Case) -> None:
    plain, before = case.draw(), trace(case.denoiser())
    seen: dict[str, set[int]] = {}
    with merging(case.build(), FIXED) as session:
        handles = [
            block.attn1.to_q.register_forward_hook(
                lambda m, args, out, name=name: seen.setdefault(name, set()).add(args[0].shape[1])
            )
            for name, block in mergeable(case.denoiser())
        ]
        merged = case.draw()
        stats = session.stats.to_dict()
        again = case.draw()
        for handle in handles:
            handle.remove()
        assert session.stats.to_dict() == stats  # a second call is a fresh run
    assert torch.equal(again, merged)
    names = {name.removesuffix(".attn1") for name in stats["layers"]}
    assert len(names) == case.layers
    assert all(seen[name] == {case.tokens // 2} for name in names)
    assert all(case.tokens // 2 not in found or name in names for name, found in seen.items())
    assert stats["merged_fraction"] == 0.5
    assert not stats["notes"]
    assert same(before, trace(case.denoiser()))
    assert torch.equal(case.draw(), plain)


def test_a_small_ratio_changes_little_and_a_larger_one_more(case: Case) -> None:
    plain, errors = case.draw(), []
    for ratio in (0.05, 0.6):
        with merging(case.build(), FIXED.with_(ratio=ratio)):
            errors.append(float((case.draw() - plain).abs().mean() / plain.std()))
    assert errors[0] < 0.05
    assert errors[0] < errors[1] < 0.5


def test_a_picture_is_the_same_alone_and_in_a_batch(case: Case) -> None:
    with merging(case.build(), MergeConfig(min_tokens=0, threshold=0.9, floor=0.1)):
        both = case.draw(slice(0, 2))
        for i in range(2):
            alone = case.draw(slice(i, i + 1))
            torch.testing.assert_close(alone, both[i : i + 1], rtol=1e-3, atol=1e-3 * float(both.abs().max()))


def test_sdxl_begins_at_downsample_2_and_its_next_level_is_deeper() -> None:
    case = CASES["sdxl"]
    with merging(case.build(), FIXED.with_(levels=2)) as session:
        case.draw()
        layers = session.stats.to_dict()["layers"]
    before = [layer["tokens_before"] // (3 * 2) for layer in layers.values()]
    assert {n: before.count(n) for n in set(before)} == {64: 10, 16: 60}  # 4 + 6, 20 + 10 + 30


def test_sdxl_that_ends_early_is_a_run_of_its_own() -> None:
    """As before a refiner: fractions are of the part that is run."""
    pipe = pipelines.sdxl()
    given = {"num_inference_steps": 8, "height": 64, "width": 64, "output_type": "latent"}
    with merging(pipe, FIXED.with_(end=0.5)) as session:
        pipe("a", denoising_end=0.5, **given)
        merged = [step["merged_fraction"] for step in session.stats.to_dict()["steps"]]
    assert merged == [0.5, 0.5, 0.0, 0.0]


def test_pixart_sigma_is_merged_as_alpha_is() -> None:
    components = pipelines.pixart().components
    pipe = PixArtSigmaPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    drawn = []
    for kind in (pipelines.pixart(), pipe):
        with merging(kind, FIXED) as session:
            options = {"use_resolution_binning": False, "output_type": "latent", "height": 128, "width": 128}
            latents = pipelines.structured((1, 4, 16, 16))
            drawn.append(kind(latents=latents, num_inference_steps=2, **text(slice(0, 1)), **options).images)
            assert len(session.stats.to_dict()["layers"]) == 14
            assert session.importance is not None
    assert torch.equal(*drawn)


def test_pixart_merges_blocks_7_to_20_by_features_and_by_place() -> None:
    case = CASES["pixart"]
    out: list[Tensor] = []
    handle = case.denoiser().register_forward_hook(lambda m, args, output: out.append(output[0]))
    with merging(case.build(), FIXED.with_(modules=("attn1", "attn2"))) as session:
        by_features = case.draw()
        layers, importance = session.stats.to_dict()["layers"], session.importance
    handle.remove()
    assert set(layers) == {f"transformer_blocks.{i}.{part}" for i in range(7, 21) for part in ("attn1", "attn2")}
    uncond, cond = out[-1][:, :4].chunk(2)  # not the learned variance
    assert importance is not None
    assert torch.equal(importance, (cond - uncond).abs().mean(1))
    paper = MergeConfig.preset(
        "importance", ratio=0.5, pool=1.0, modules=("attn1", "attn2"), metric="position", prune_until=1 / 3
    )
    with merging(case.build(), paper) as session:
        by_place = case.draw()
        stats = session.stats.to_dict()
        pairing = next(iter(session.pairings().values()))
    assert stats["merged_fraction"] == 0.5
    assert not torch.equal(by_place, by_features)
    target = pairing.target[0]
    distance = torch.dist(*(torch.stack([i // 8, i % 8]).float() for i in (torch.arange(64), target)))
    shuffled = torch.dist(
        *(torch.stack([i // 8, i % 8]).float() for i in (torch.arange(64), target[torch.randperm(64)]))
    )
    assert distance < 0.6 * shuffled


def test_positions_are_more_alike_the_nearer_they_are() -> None:
    h, w = 6, 10
    features = position_features((h, w), torch.device("cpu"))[0]
    similarity = torch.nn.functional.normalize(features, dim=-1)
    similarity = similarity @ similarity.T
    place = torch.stack([torch.arange(h * w) // w, torch.arange(h * w) % w], 1).float()
    distance = torch.cdist(place, place).round(decimals=3)
    for token in range(h * w):
        means = [similarity[token][distance[token] == d].mean() for d in distance[token].unique()]
        assert all(a > b for a, b in itertools.pairwise(means[:8]))


def test_animatediff_merges_space_and_not_time_with_a_map_for_each_frame() -> None:
    case = CASES["animatediff"]
    with merging(case.build(), FIXED.with_(levels=4, modules=("attn1", "attn2", "ff"))) as session:
        case.draw(slice(0, 2))
        layers, importance = session.stats.to_dict()["layers"], session.importance
    assert not [name for name in layers if "motion_modules" in name]
    assert len({name.rpartition(".")[0] for name in layers}) == 16  # all spatial blocks of the U-Net
    assert importance is not None
    assert importance.shape == (6, 16, 16)  # two videos of three frames
    assert not torch.equal(importance[0], importance[1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (SD3Transformer2DModel, {"num_layers": 1, "num_attention_heads": 2, "caption_projection_dim": 16}),
        (FluxTransformer2DModel, {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (2, 2, 4)}),
    ],
)
def test_joint_attention_is_unsupported_and_said_so(kind: Any, options: dict[str, Any]) -> None:
    common = {"attention_head_dim": 8, "joint_attention_dim": 16, "pooled_projection_dim": 16, "in_channels": 4}
    model = kind(**{**common, "num_attention_heads": 2, **options})

    class Pipeline:
        transformer, scheduler = model, pipelines.sd().scheduler

    before = trace(model)
    for given in (model, Pipeline()):
        message = rf"merging in {kind.__name__} is unsupported; it is supported in .*{sorted(FAMILIES)[0]}"
        with pytest.raises(ValueError, match=message), merging(given):
            pass
    assert same(before, trace(model))


def test_a_pipeline_of_a_kind_that_nobody_tried_is_unsupported() -> None:
    from diffusers import DiTTransformer2DModel

    class Pipeline:
        scheduler = pipelines.sd().scheduler
        transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8)

    with (
        pytest.raises(ValueError, match="Pipeline: merging in DiTTransformer2DModel is unsupported"),
        merging(Pipeline()),
    ):
        pass
