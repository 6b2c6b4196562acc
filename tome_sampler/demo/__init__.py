"""The embedded model: a real, trained text-to-image diffusion model small enough to ship, and the demonstration.

It draws one to three coloured shapes on a textured background, as its caption says, 128 x 128 pixels, with the 4096
tokens at its finest attention that Stable Diffusion 1.5 has at 512 x 512. Needs ``tome-sampler[demo]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from tome_sampler.demo.model import SceneModel

WEIGHTS = Path(__file__).with_name("weights.safetensors")


class WeightsError(RuntimeError):
    """The embedded model's weight file is missing or broken."""


def load_model(path: Path = WEIGHTS, device: str = "cpu") -> SceneModel:
    """The embedded model, in fp32 and evaluation mode; the same object at each call.

    Raises:
        WeightsError: the file is missing, is no safetensors file, or holds another model.
    """
    return _load(path, device)


@lru_cache(maxsize=2)
def _load(path: Path, device: str) -> SceneModel:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tome_sampler.demo.model import SceneModel

    try:
        weights = load_file(path)
    except FileNotFoundError:
        raise WeightsError(
            f"the embedded model's weights are missing: {path.name} is not in {path.parent.name}/; reinstall "
            "tome-sampler, or train them with python -m tome_sampler.demo.train"
        ) from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{path.name} is not a readable safetensors file ({error}); reinstall tome-sampler"
        ) from None
    with torch.random.fork_rng(devices=[]):  # making a model draws initial weights, from the caller's generator
        model = SceneModel()
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise WeightsError(f"{path.name} does not hold the embedded model's weights: {first}") from None
    return model.to(device).eval().requires_grad_(False)


def denoiser(model: SceneModel | None = None) -> Any:
    """The embedded model as a k-diffusion denoiser: ``denoiser()(x, sigma, cond=encode(prompts))``.

    It has ``sigmas``, ``sigma_min``, ``sigma_max`` and ``get_sigmas(n)``, which gives the schedule of Karras et al.
    (2022). x is a latent (b 12 64 64).

    Raises:
        ImportError: there is no k-diffusion.
    """
    from tome_sampler import kdiffusion
    from tome_sampler.demo.model import SIGMA_MAX, SIGMA_MIN, alphas_cumprod

    model = load_model() if model is None else model
    device = next(model.parameters()).device
    wrapped = kdiffusion.load("external").DiscreteVDDPMDenoiser(model, alphas_cumprod(), quantize=False).to(device)
    # steps equal in the timestep would be too wide at the low end for second-order samplers
    karras = kdiffusion.load("sampling").get_sigmas_karras
    wrapped.get_sigmas = partial(karras, sigma_min=SIGMA_MIN, sigma_max=SIGMA_MAX, device=device)
    return wrapped


def encode(prompts: Sequence[str], model: SceneModel | None = None) -> Tensor:
    """Conditioning (b 24 128) of captions such as "a large red circle at the top left, a small blue ring in the
    middle on striped teal"; "" is the unconditional one.

    Raises:
        CaptionError: a word is unknown to the model; the message lists those it knows.
    """
    import torch

    with torch.no_grad():
        return (load_model() if model is None else model).encode(prompts)
