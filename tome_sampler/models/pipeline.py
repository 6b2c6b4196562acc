"""Checkpoints of diffusers' text-to-image pipelines, as :class:`tome_sampler.models.Model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from tome_sampler import kdiffusion
from tome_sampler.hosts.families import require_known
from tome_sampler.hosts.pipelines import prediction
from tome_sampler.models import Model, Usual

_NEVER_CLEAN = 1e-8
_FRAMES = 16  # of the clips that AnimateDiff's motion modules were trained on (Guo et al. 2023)
_LATENT_SIDE = 64  # Stable Diffusion 1.x's, which a U-Net with motion modules does not write down
_KINDS = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "AnimateDiffPipeline",
)
_FROM_PICTURES = (  # of the same parts as one that starts from none
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
_NUMBERS = 6  # that SDXL is told of a picture: its size, where it was cut, the size to draw
_COND_SCALE = {"StableDiffusionXLPipeline": 5.0, "PixArtAlphaPipeline": 4.5, "PixArtSigmaPipeline": 4.5}


class PipelineModel(Model):
    """A pipeline of Stable Diffusion 1.x, 2.x, SDXL, PixArt or AnimateDiff.

    Attributes:
        pipe: the pipeline; for one that starts from a picture, that of the same parts which starts from none. A
            k-diffusion sampler uses its text encoders, VAE and noise levels, and not its loop.

    Raises:
        ValueError: it is a pipeline of another kind.
    """

    def __init__(self, pipe: Any, name: str) -> None:
        kind = type(pipe).__name__
        if not hasattr(pipe, "vae") or not hasattr(pipe, "encode_prompt"):
            raise ValueError(f"{name} is a {kind}, which draws no pictures of prompts")
        denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        if not isinstance(denoiser, nn.Module):
            raise ValueError(f"{name} is a {kind}, which has neither a 'unet' nor a 'transformer'")
        require_known(pipe, denoiser)
        config: Any = denoiser.config
        moves = type(denoiser).__name__ == "UNetMotionModel"
        if config.in_channels != pipe.vae.config.latent_channels:
            raise ValueError(f"{name} is for inpainting or editing: it takes more channels than a latent has")
        _check_refiner(pipe, config, name)
        if kind in _FROM_PICTURES:
            pipe = _of_prompts(pipe)
            kind = type(pipe).__name__
        if kind not in _KINDS:
            raise ValueError(f"{name} is a {kind}; known here are {', '.join(_KINDS)}")
        self.name, self.pipe, self.module = name, pipe, denoiser
        self._is_pixart = type(denoiser).__name__ == "PixArtTransformer2DModel"
        self._scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        side = int(config.sample_size or _LATENT_SIDE) * self._scale
        self.usual = Usual((side, side), cond_scale=_COND_SCALE.get(kind, 7.5))
        if moves:
            most = int(config.motion_max_seq_length)
            self.usual = replace(self.usual, frames=min(_FRAMES, most), most_frames=most)

    def denoiser(self) -> Any:
        config = self.pipe.scheduler.config
        kinds = {"epsilon": "DiscreteEpsDDPMDenoiser", "v_prediction": "DiscreteVDDPMDenoiser"}
        kind, alphas = config.get("prediction_type", "epsilon"), getattr(self.pipe.scheduler, "alphas_cumprod", None)
        if kind not in kinds or alphas is None:
            raise ValueError(
                f"{self.name} predicts {kind!r} on the schedule of {type(self.pipe.scheduler).__name__}, for which "
                "k-diffusion's samplers are not made; use --scheduler"
            )
        wrapper = getattr(kdiffusion.load("external"), kinds[kind])
        alphas = alphas.float().clamp(_NEVER_CLEAN, 1 - _NEVER_CLEAN)
        wrapped = wrapper(_Call(self.module, self._is_pixart), alphas, quantize=False)
        return wrapped.to(self._device())

    def condition(self, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Any]:
        pipe, texts = self.pipe, list(prompts)
        given: dict[str, Any] = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1}
        with torch.no_grad():
            if self._is_pixart:
                embeds, mask, *_ = pipe.encode_prompt(texts, device=self._device(), **given)
                return {
                    "encoder_hidden_states": embeds,
                    "encoder_attention_mask": mask,
                    **self._sizes(size, len(texts)),
                }
            encoded = pipe.encode_prompt(texts, device=self._device(), **given)
            if not hasattr(pipe, "text_encoder_2"):
                return {"encoder_hidden_states": encoded[0]}
            embeds, _, pooled, _ = encoded
            if pipe.config.get("force_zeros_for_empty_prompt"):
                said = torch.tensor([bool(text) for text in texts], device=embeds.device)
                embeds, pooled = embeds * said[:, None, None], pooled * said[:, None]
        numbers = torch.tensor([[*size, 0, 0, *size]], dtype=embeds.dtype, device=embeds.device)
        added = {"text_embeds": pooled, "time_ids": numbers.expand(len(texts), -1)}
        return {"encoder_hidden_states": embeds, "added_cond_kwargs": added}

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        config: Any = self.module.config
        step = self._scale * (config.patch_size if self._is_pixart else 1)
        if any(side < 8 * step or side % step for side in size):
            raise ValueError(
                f"size is {size[0]}x{size[1]}; both sides must be multiples of {step}, at least {8 * step}"
            )
        return int(config.in_channels), size[0] // self._scale, size[1] // self._scale

    def pictures(self, latents: Tensor) -> Tensor:
        if latents.ndim == 5:
            frames = self.pictures(rearrange(latents, "b c f h w -> (b f) c h w"))
            return rearrange(frames, "(b f) c h w -> b f c h w", b=latents.shape[0])
        vae, scale, shift = self._vae()
        with torch.no_grad():  # one at a time: decoding takes more memory than sampling
            parts = [vae.decode((part / scale + shift).to(vae.dtype)).sample for part in latents.split(1)]
        return torch.cat(parts).float().cpu().clamp(-1, 1)

    def latents(self, pictures: Tensor) -> Tensor:
        vae, scale, shift = self._vae()
        with torch.no_grad():
            found: Tensor = vae.encode(pictures.to(self._device(), vae.dtype)).latent_dist.mode()
        return found.sub(shift).mul(scale).float()

    def _vae(self) -> tuple[Any, float | Tensor, float | Tensor]:
        """The VAE, and what latents are scaled and shifted by. In fp16 some overflow: these run in fp32."""
        vae = self.pipe.vae
        if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
            vae.to(torch.float32)
        scale, mean, std = (vae.config.get(name) for name in ("scaling_factor", "latents_mean", "latents_std"))
        if mean is None or std is None:
            return vae, scale, vae.config.get("shift_factor") or 0.0
        mean, std = (torch.tensor(each, device=vae.device).view(1, -1, 1, 1) for each in (mean, std))
        return vae, scale / std, mean  # each channel its own, as diffusers' SDXL pipeline has it

    def _sizes(self, size: tuple[int, int], rows: int) -> dict[str, Any]:
        """PixArt-alpha at 1024 pixels is told of the picture's size."""
        config: Any = self.module.config
        if config.sample_size != 128 or config.use_additional_conditions is False:
            return {}
        numbers = torch.tensor([[float(size[0]), float(size[1])]], device=self._device()).expand(rows, -1)
        ratio = torch.full((rows, 1), size[0] / size[1], device=self._device())
        return {"added_cond_kwargs": {"resolution": numbers, "aspect_ratio": ratio}}

    def _device(self) -> torch.device:
        return next(self.module.parameters()).device


def _check_refiner(pipe: Any, config: Any, name: str) -> None:
    """SDXL's refiner has the parts of SDXL, and is told of five numbers of a picture: one for how good it should be."""
    text = getattr(pipe, "text_encoder_2", None)
    inputs = getattr(config, "projection_class_embeddings_input_dim", None)
    if text is None or inputs is None:
        return
    numbers = (inputs - text.config.projection_dim) / config.addition_time_embed_dim
    if numbers != _NUMBERS:
        raise ValueError(
            f"{name} is a refiner of SDXL, or of another kind: its U-Net is told of {numbers:g} numbers of a picture, "
            f"and SDXL's of {_NUMBERS}"
        )


def _of_prompts(pipe: Any) -> Any:
    """The pipeline of the same parts that starts from no picture."""
    from diffusers import AutoPipelineForText2Image

    made = AutoPipelineForText2Image.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made


class _Call(nn.Module):
    """A denoiser as k-diffusion's wrappers call it: ``model(x, t, cond=keywords)``, in fp32 outside."""

    def __init__(self, denoiser: nn.Module, is_pixart: bool) -> None:
        super().__init__()
        self.denoiser = denoiser
        self._more = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if is_pixart else {}

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Any]) -> Tensor:
        named = {**self._more, **cond}
        if x.ndim == 5:  # pipelines of diffusers repeat the prompt for each frame, too
            named["encoder_hidden_states"] = named["encoder_hidden_states"].repeat_interleave(x.shape[2], 0)
        dtype = next(self.denoiser.parameters()).dtype
        out = prediction(self.denoiser(x.to(dtype), timestep=t, return_dict=False, **named))
        if out is None:
            raise ValueError(f"{type(self.denoiser).__name__} returned no picture")
        return out[:, : x.shape[1]].float()  # without a learned variance
