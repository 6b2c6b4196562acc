"""Measures that need weights which cannot ship here. The user gives them as files, and nothing is downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tome_sampler.eval.pictures import path_of, read_picture, read_pictures
from tome_sampler.overlay import to_bytes

if TYPE_CHECKING:
    from tome_sampler.eval.measure import Extra, Plan


_BROKEN = (RuntimeError, OSError, EOFError, KeyError, TypeError, AttributeError, UnpicklingError)
"""What loading a file of something else raises."""


def _line(error: Exception) -> str:
    """The first line of what it says that says anything."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _there(path: Path, option: str, what: str) -> None:
    """Raises ValueError where there is no such path, or where a file holds more than tensors: the libraries below load
    whatever is in it."""
    if not path.exists():
        raise ValueError(f"{option} is {path}, which does not exist; it must be {what}")
    if path.is_file():
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except _BROKEN as error:
            raise ValueError(f"{option} is {path}, which does not hold weights: {_line(error)}") from None


def lpips(weights: Path) -> Extra:
    """LPIPS to the plain picture (Zhang et al. 2018), by torchmetrics, on torchvision's AlexNet.

    Raises:
        ValueError: the file is not there, or holds other weights. ImportError: torchvision is not installed.
    """
    _there(weights, "--lpips", "torchvision's AlexNet weights (alexnet-owt-7be5be79.pth)")
    try:
        from torchvision.models import AlexNet_Weights
    except ImportError as error:
        raise ImportError(f"--lpips needs torchvision, which cannot be imported ({error})") from None
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    home = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:  # torchvision takes weights from there before it downloads any
        checkpoints = Path(folder) / "checkpoints"
        checkpoints.mkdir()
        (checkpoints / Path(AlexNet_Weights.DEFAULT.url).name).symlink_to(weights.resolve())
        torch.hub.set_dir(folder)
        try:
            metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", sync_on_compute=False)
        except _BROKEN as error:
            raise ValueError(f"--lpips is {weights}, which does not hold AlexNet's weights: {_line(error)}") from None
        finally:
            torch.hub.set_dir(home)

    @torch.no_grad()
    def measure(picture: Tensor, plain: Tensor, prompt: str) -> dict[str, float]:
        del prompt
        metric.reset()
        return {"lpips": float(metric(picture[None].clamp(-1, 1), plain[None].clamp(-1, 1)))}

    return measure


def clip_score(folder: Path) -> Extra:
    """CLIP score (Hessel et al. 2021): 100 times the cosine of picture and prompt, at least 0, by transformers.

    Raises:
        ValueError: the folder holds no CLIP model. ImportError: transformers is not installed.
    """
    _there(folder, "--clip", "a folder with a CLIP model and its processor, as transformers saves them")
    try:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel
    except ImportError as error:
        raise ImportError(f"--clip needs transformers, which cannot be imported ({error})") from None
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (ValueError, *_BROKEN) as error:
        raise ValueError(f"--clip is {folder}, which holds no CLIP model with its processor: {_line(error)}") from None

    @torch.no_grad()
    def measure(picture: Tensor, plain: Tensor, prompt: str) -> dict[str, float]:
        del plain
        inputs: dict[str, Any] = dict(tokenizer([prompt], return_tensors="pt", truncation=True))
        inputs |= dict(processor(images=to_bytes(picture).numpy(), return_tensors="pt"))
        out = model(**inputs)
        return {"clip": max(100 * float(torch.cosine_similarity(out.image_embeds, out.text_embeds)), 0.0)}

    return measure


def inception_distances(weights: Path) -> Callable[[Plan, Path | None], str]:
    """FID and KID by torchmetrics, on torch-fidelity's Inception: a function from a plan whose pictures are saved to a
    sentence.

    Raises:
        ValueError: the file is not there. ImportError: torch-fidelity is not installed.
    """
    _there(weights, "--inception", "torch-fidelity's weights (weights-inception-2015-12-05-6726825d.pth)")
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
        from torchmetrics.image.kid import KernelInceptionDistance

        network = NoTrainInceptionV3(
            name="inception-v3-compat", features_list=["2048"], feature_extractor_weights_path=str(weights)
        )
    except ImportError as error:
        raise ImportError(f"--inception needs torch-fidelity ({error}); pip install --no-deps torch-fidelity") from None
    except _BROKEN as error:
        raise ValueError(f"--inception is {weights}, which does not hold Inception's weights: {_line(error)}") from None
    network.num_features = 2048

    def measure(plan: Plan, reference: Path | None) -> str:
        assert plan.pictures is not None
        folder = plan.pictures
        plain = (read_picture(path_of(folder, plan.plain, case)) for case in plan.cases)
        real = plain if reference is None else iter(read_pictures(reference))
        features = _features(network, real)
        found = []
        for method in plan.methods[0 if reference is not None else 1 :]:
            fake = _features(network, (read_picture(path_of(folder, method, case)) for case in plan.cases))
            fid = FrechetInceptionDistance(feature=_Given(2048), sync_on_compute=False)
            # half of the pictures, or subsets would be the set again and again, and their spread nothing
            subset = min(max(min(len(features), len(fake)) // 2, 1), 1000)
            kid = KernelInceptionDistance(feature=_Given(2048), subset_size=subset, sync_on_compute=False)
            for metric in (fid, kid):
                metric.update(features, real=True)
                metric.update(fake, real=False)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # of the subsets
                mean, spread = kid.compute()
            found.append(f"{method.label} {float(fid.compute()):.2f}, {float(mean):.5f} ± {float(spread):.5f}")
        of = "the plain pictures" if reference is None else str(reference)
        return f"FID, KID to {of}: " + "; ".join(found) + "."

    return measure


class _Given(torch.nn.Module):
    """Features instead of a network that makes them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


@torch.no_grad()
def _features(network: Any, pictures: Iterable[Tensor]) -> Tensor:
    return torch.cat([network(picture[None]) for picture in pictures])
