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
        motion_max_seq_length=32,
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


class ReferenceAttention:
    """Zero123++'s pattern, an attention processor of our own. In the pass "w" a layer's tokens are written down; in the
    pass "r" the tokens of all rows but the first, which is unguided, attend to those as well.

    Args:
        context: gets the length of what they attend to, of each call.
    """

    def __init__(self, name: str, context: list[int]) -> None:
        self.name, self.context = name, context

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        mode: str | None = None,
        ref: dict[str, Tensor] | None = None,
    ) -> Tensor:
        def attend(x: Tensor, context: Tensor) -> Tensor:
            q, k, v = (
                to(t).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                for to, t in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
            )
            out = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return attn.to_out[1](attn.to_out[0](out))  # type: ignore[no-any-return]

        if encoder_hidden_states is not None:
            return attend(hidden_states, encoder_hidden_states)
        if ref is None:
            return attend(hidden_states, hidden_states)
        if mode == "w":
            ref[self.name] = hidden_states
            return attend(hidden_states, hidden_states)
        context = torch.cat([hidden_states[1:], ref[self.name]], 1)
        self.context.append(context.shape[1])
        return torch.cat([attend(hidden_states[:1], hidden_states[:1]), attend(hidden_states[1:], context)])


def structured(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Latents (... h w) with plain areas and a shape in them, and a little noise: what pictures are like."""
    generator = torch.Generator().manual_seed(seed)
    *rest, h, w = shape
    out = torch.randn(*rest, 1, 1, generator=generator).expand(shape).clone()
    out[..., h // 4 : h // 2, w // 4 : w // 2] += 1.5
    return out + 0.02 * torch.randn(shape, generator=generator)


def original_layout(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion 1.x pipeline under the names that single files have."""
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    ends = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    vae_ends = {"conv_norm_out": "norm_out", "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
    for i in range(4):
        for j in range(3):
            ends[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{3 * i + j + 1}.0"
            ends[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{3 * i + j + 1}.1"
            ends[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{3 * i + j}.0"
            ends[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{3 * i + j}.1"
            vae_ends[f"down_blocks.{i}.resnets.{j}"] = f"down.{i}.block.{j}"
            vae_ends[f"up_blocks.{i}.resnets.{j}"] = f"up.{3 - i}.block.{j}"
        ends[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * i + 3}.0.op"
        ends[f"up_blocks.{i}.upsamplers.0"] = f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}"
        vae_ends[f"down_blocks.{i}.downsamplers.0"] = f"down.{i}.downsample"
        vae_ends[f"up_blocks.{i}.upsamplers.0"] = f"up.{3 - i}.upsample"
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

    def renamed(name: str, starts: dict[str, str]) -> str:
        found = max((start for start in starts if name.startswith(start + ".")), key=len, default=None)
        return name if found is None else starts[found] + name[len(found) :]

    out = {}
    for name, tensor in pipe.unet.state_dict().items():
        new = renamed(name, ends)
        if "resnets" in name:
            new = ".".join(new.split(".")[: -len(name.split("resnets.")[1].split(".")) + 1]) + "."
            new += renamed(name.split("resnets.")[1].partition(".")[2], resnet)
        out[f"model.diffusion_model.{new}"] = tensor
    for name, tensor in pipe.vae.state_dict().items():
        part, _, rest = name.partition(".")
        if part not in ("encoder", "decoder"):
            out[f"first_stage_model.{name}"] = tensor
            continue
        rest = renamed(rest, vae_ends).replace("conv_shortcut", "nin_shortcut")
        if rest.startswith("mid_block.attentions.0."):
            rest = "mid.attn_1." + renamed(rest.removeprefix("mid_block.attentions.0."), attention)
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        out[f"first_stage_model.{part}.{rest}"] = tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        name = name if name.startswith("text_model.") else f"text_model.{name}"
        out[f"cond_stage_model.transformer.{name}"] = tensor
    return {name: tensor.contiguous() for name, tensor in out.items()}
