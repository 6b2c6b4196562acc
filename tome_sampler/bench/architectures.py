"""Models to measure: the layouts that people run, with random weights, or the embedded one with its own."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tome_sampler.bench.memory import require_memory

Prediction = Literal["eps", "v"]
_DOWN, _UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
_CAPTION = 120  # tokens of PixArt-alpha's
SIZES = range(512, 2049, 64)  # pixels


def call_unet(model: nn.Module, x: Tensor, timestep: Tensor, conditioning: dict[str, Any]) -> Tensor:
    """One call as diffusers' pipelines make it; positional, as tomesd and DeepCache read it."""
    out: Tensor = model(x, timestep, return_dict=False, **conditioning)[0]
    return out


def conditioning_of_unet(model: nn.Module, rows: int, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Random text, as much and as wide as the model takes, for `rows` batch rows."""
    config: Any = model.config
    given = {"encoder_hidden_states": torch.randn(rows, 77, config.cross_attention_dim, generator=generator).to(dtype)}
    if config.addition_embed_type != "text_time":
        return given
    sizes = torch.tensor([[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0]]).expand(rows, -1)  # SDXL: original, crop, target
    pooled = config.projection_class_embeddings_input_dim - sizes.shape[1] * config.addition_time_embed_dim
    text = torch.randn(rows, pooled, generator=generator)
    return {**given, "added_cond_kwargs": {"text_embeds": text.to(dtype), "time_ids": sizes.to(dtype)}}


def call_pixart(model: nn.Module, x: Tensor, timestep: Tensor, conditioning: dict[str, Any]) -> Tensor:
    """A timestep for each row, and the prediction alone: the rest of what comes out is a learned variance."""
    out: Tensor = model(x, timestep=timestep.expand(len(x)), return_dict=False, **conditioning)[0]
    return out[:, : x.shape[1]]


def conditioning_of_pixart(
    model: nn.Module, rows: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Any]:
    """A random caption, none of it padding, and the picture's size."""
    config: Any = model.config
    text = torch.randn(rows, _CAPTION, config.caption_channels, generator=generator).to(dtype)
    size = {"resolution": torch.full((rows, 2), 1024.0).to(dtype), "aspect_ratio": torch.ones(rows, 1, dtype=dtype)}
    mask = torch.ones(rows, _CAPTION, dtype=dtype)
    return {"encoder_hidden_states": text, "encoder_attention_mask": mask, "added_cond_kwargs": size}


@dataclass(frozen=True)
class Architecture:
    """A model that can be measured.

    config: as published, of the diffusers class `model`. sizes: that it can be measured at, pixels a side. size: the
    usual one. scale: pixels for each latent's side. frames: of a clip, where it draws clips. betas: the first and the
    last one of its noise schedule; between them they lie on a line, or, unless `linear`, their roots do. trained: its
    weights are real, so that presets run as they are. settings: of presets, where the model needs others. call,
    conditioning: how it is called, and with what beside latent and timestep.
    """

    config: Mapping[str, Any]
    model: str = "UNet2DConditionModel"
    prediction: Prediction = "eps"
    sizes: range = SIZES
    size: int = 512
    scale: int = 8
    frames: int | None = None
    betas: tuple[float, float] = (0.00085, 0.012)
    linear: bool = False
    trained: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[[nn.Module, Tensor, Tensor, dict[str, Any]], Tensor] = call_unet
    conditioning: Callable[[nn.Module, int, torch.dtype, torch.Generator], dict[str, Any]] = conditioning_of_unet

    @property
    def is_plain_unet(self) -> bool:
        """Whether it is of Stable Diffusion's class, which checkpoints and other packages are for."""
        return self.model == "UNet2DConditionModel"


_STABLE_DIFFUSION: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (_DOWN, _DOWN, _DOWN, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", _UP, _UP, _UP),
}

ARCHITECTURES: dict[str, Architecture] = {
    "sd15": Architecture({**_STABLE_DIFFUSION, "sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}),
    "sd21": Architecture(
        {
            **_STABLE_DIFFUSION,
            "sample_size": 96,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        prediction="v",
    ),
    "sdxl": Architecture(
        {
            **_STABLE_DIFFUSION,
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", _DOWN, _DOWN),
            "up_block_types": (_UP, _UP, "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        }
    ),
    "pixart": Architecture(  # PixArt-alpha XL/2, 1024 pixels
        {
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "sample_size": 128,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "use_additional_conditions": True,
        },
        model="PixArtTransformer2DModel",
        betas=(0.0001, 0.02),
        linear=True,
        call=call_pixart,
        conditioning=conditioning_of_pixart,
    ),
    "animatediff": Architecture(  # the motion modules of version 3, which has none in the middle, on SD 1.5
        {
            **_STABLE_DIFFUSION,
            "sample_size": 64,
            "num_attention_heads": 8,
            "cross_attention_dim": 768,
            "down_block_types": ("CrossAttnDownBlockMotion",) * 3 + ("DownBlockMotion",),
            "up_block_types": ("UpBlockMotion",) + ("CrossAttnUpBlockMotion",) * 3,
            "motion_max_seq_length": 32,
            "motion_num_attention_heads": 8,
            "use_motion_mid_block": False,
        },
        model="UNetMotionModel",
        frames=16,
        linear=True,
    ),
    "embedded": Architecture({}, prediction="v", sizes=range(32, 257, 32), size=128, scale=2, trained=True),
    "tiny": Architecture(  # for tests: the same blocks, on 256 and 64 tokens
        {
            **_STABLE_DIFFUSION,
            "sample_size": 16,
            "block_out_channels": (16, 32),
            "down_block_types": (_DOWN, _DOWN),
            "up_block_types": (_UP, _UP),
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 8,
            "norm_num_groups": 8,
        },
        size=128,
        settings={"min_tokens": 0},
    ),
}
"""The models that can be measured, by name. Another one is a line here: its class and configuration, and where its call
differs from a U-Net's, the two functions for that."""


def build(name: str, dtype: torch.dtype, device: torch.device, seed: int, checkpoint: Path | None = None) -> nn.Module:
    """A model in evaluation mode, without gradients; it is in memory once.

    Raises:
        ValueError: its weights do not fit into the memory that is free. ImportError: there is no diffusers.
    """
    architecture = ARCHITECTURES[name]
    if name == "embedded":
        from tome_sampler import demo

        own = copy.deepcopy(demo.load_model().unet)  # the caller's object stays as it is
        return nn.Module.to(own, device, dtype)
    if checkpoint is not None:
        return _load(architecture, checkpoint, dtype).to(device).eval().requires_grad_(False)
    with torch.device("meta"):
        model: nn.Module = _class_of(architecture)(**architecture.config)
    model = nn.Module.to(model, dtype).eval().requires_grad_(False)  # diffusers's own warns of each change
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    require_memory(weights, device, f"the weights of {name} in {str(dtype).removeprefix('torch.')}")
    return _fill(model.to_empty(device=device), seed)


def _class_of(architecture: Architecture) -> Any:
    try:
        import diffusers
    except ImportError:
        raise ImportError("diffusers is not installed; pip install 'tome-sampler[demo]' brings it") from None
    return getattr(diffusers, architecture.model)


def _fill(model: nn.Module, seed: int) -> nn.Module:
    """Random weights that neither blow up nor die out: norms pass, all else keeps the variance."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, math.sqrt(1 / parameter[0].numel()), generator=generator)
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and module.weight is not None:
            module.weight.data.fill_(1)
        if isinstance(getattr(module, "bias", None), Tensor):
            module.bias.data.zero_()  # type: ignore[operator]
    for buffer in model.buffers():  # positions, of the variance that sines have
        buffer.normal_(0, math.sqrt(1 / 2), generator=generator)
    return model


def _load(architecture: Architecture, path: Path, dtype: torch.dtype) -> nn.Module:
    """The U-Net of a diffusers folder (its own, or a pipeline's) or of a single file; nothing is downloaded."""
    if not path.exists():
        raise ValueError(
            f"checkpoint is {str(path)!r}; it must be a diffusers folder or a safetensors file that exists"
        )
    kind = _class_of(architecture)
    folder = path / "unet" if (path / "unet").is_dir() else path
    files = [path] if path.is_file() else [f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin")]
    require_memory(
        max((f.stat().st_size for f in files), default=0), torch.device("cpu"), f"the weights of {path.name}"
    )
    try:
        if path.is_dir():
            model = kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
        else:
            model = _load_file(kind, architecture, path, dtype)
    except Exception as error:  # diffusers raises all sorts of them, with pages of advice
        said = str(error).strip().partition("\n")[0]
        raise ValueError(f"checkpoint {path} cannot be read as a {kind.__name__}: {said}") from error
    if model.config.in_channels != model.config.out_channels:
        raise ValueError(f"checkpoint {path} takes {model.config.in_channels} channels, more than a latent has")
    return model  # type: ignore[no-any-return]


def _load_file(kind: Any, architecture: Architecture, path: Path, dtype: torch.dtype) -> Any:
    with tempfile.TemporaryDirectory() as folder:  # without a configuration, diffusers would ask the hub for one
        with torch.device("meta"):
            kind(**architecture.config).save_config(folder)
        return kind.from_single_file(path, config=folder, torch_dtype=dtype, local_files_only=True)
