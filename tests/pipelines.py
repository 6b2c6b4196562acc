"""Real diffusers pipelines at their published layout and a small width, with random weights; nothing is downloaded."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNetMotionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from tome_sampler.bench.architectures import ARCHITECTURES

SCALE = 8  # pixels for each latent's side
TEXT = 32  # width of the text


def _seeded(build: Any) -> Any:
    """A model in evaluation mode with weights from a fixed seed, the caller's generator left alone. Weights keep the
    variance: at diffusers' own tiny initial values every layer would add next to nothing."""

    @functools.wraps(build)
    def made(*args: Any, **kwargs: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: nn.Module = build(*args, **kwargs)
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "embed" not in name:
                    nn.init.normal_(parameter, std=math.sqrt(1 / parameter[0].numel()))
        return model.eval().requires_grad_(False)

    return made


@functools.cache
def tokenizer() -> CLIPTokenizer:
    """Every letter is a word."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder = Path(tempfile.mkdtemp())
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)


@_seeded
def text_encoder(projected: bool = False) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=TEXT,
        intermediate_size=TEXT,
        projection_dim=TEXT,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


@_seeded
def vae() -> AutoencoderKL:
    """Eight pixels to a latent, as Stable Diffusion's; narrow."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )


@_seeded
def unet(architecture: str = "sd15", **changes: Any) -> UNet2DConditionModel:
    """The published blocks and depths of "sd15", "sd21" or "sdxl"; a tenth of the width and less."""
    config = dict(ARCHITECTURES[architecture].config)
    widths = config["block_out_channels"]
    config |= {"block_out_channels": tuple(w // 20 for w in widths), "norm_num_groups": 8, "sample_size": 16}
    config["cross_attention_dim"] = 2 * TEXT if architecture == "sdxl" else TEXT
    config["attention_head_dim"] = 2 if architecture == "sd15" else tuple(2**i for i in range(len(widths)))
    if architecture == "sdxl":
        config |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": TEXT + 6 * 8}
    return UNet2DConditionModel(**{**config, **changes})


@functools.cache
def sd(architecture: str = "sd15") -> StableDiffusionPipeline:
    """Stable Diffusion; the same object each time."""
    prediction = "v_prediction" if architecture == "sd21" else "epsilon"
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
        clip_sample=False,
        steps_offset=1,
    )
    pipe = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet(architecture),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@functools.cache
def sdxl() -> StableDiffusionXLPipeline:
    """SDXL; the same object each time."""
    pipe = StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projected=True),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=unet("sdxl"),
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@_seeded
def pixart_transformer() -> PixArtTransformer2DModel:
    """PixArt-alpha's 28 blocks on 2x2 patches, learned variance; narrow."""
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        cross_attention_dim=16,
        sample_size=32,
        patch_size=2,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=TEXT,
        use_additional_conditions=False,
    )


@functools.cache
def pixart() -> PixArtAlphaPipeline:
    """PixArt-alpha without a text encoder: prompts are given as embeddings."""
    pipe = PixArtAlphaPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae(),
        transformer=pixart_transformer(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@_seeded
def motion_unet() -> UNetMotionModel:
    adapter = MotionAdapter(
        block_out_channels=(16, 32, 64, 64),
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
        motion_max_seq_length=8,
    )
    return UNetMotionModel.from_unet2d(unet("sd15"), adapter)


@functools.cache
def animate() -> AnimateDiffPipeline:
    """AnimateDiff on the Stable Diffusion 1.5 layout."""
    pipe = AnimateDiffPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=motion_unet(),
        motion_adapter=None,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def structured(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Latents (... h w) with plain areas and a shape in them, and a little noise: what pictures are like."""
    generator = torch.Generator().manual_seed(seed)
    *rest, h, w = shape
    out = torch.randn(*rest, 1, 1, generator=generator).expand(shape).clone()
    out[..., h // 4 : h // 2, w // 4 : w // 2] += 1.5
    return out + 0.02 * torch.randn(shape, generator=generator)
