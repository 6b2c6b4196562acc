"""Tiny real models: what is tested is what users have, only smaller."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import HealthCheck, settings
from ldm import LdmUNet

from tome_sampler import gate

torch.set_num_threads(1)
settings.register_profile(
    "tests", deadline=None, derandomize=True, max_examples=40, suppress_health_check=list(HealthCheck), database=None
)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No test sees what this machine was calibrated to; where it would be."""
    path = tmp_path / "calibration" / "gate.json"
    monkeypatch.setattr(gate, "own_table", lambda: path)
    gate.forget()
    yield path
    gate.forget()


def tiny_unet(finest_has_attention: bool = True) -> UNet2DConditionModel:
    """A diffusers U-Net with real transformer blocks, two levels, weights from a fixed seed."""
    down, up = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D") if finest_has_attention else ("DownBlock2D", "UpBlock2D")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            down_block_types=(down, "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", up),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=8,
            norm_num_groups=8,
        )
    return unet.eval().requires_grad_(False)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """diffusers: attention on the full and on the half resolution, 4 channels in, contexts of 8 channels."""
    return tiny_unet()


@pytest.fixture
def coarse_unet() -> UNet2DConditionModel:
    """The same without attention on the full resolution, as SDXL is."""
    return tiny_unet(finest_has_attention=False)


@pytest.fixture
def ldm_unet() -> LdmUNet:
    """The ldm shape: ``model(x, timesteps, context)``, einsum and softmax attention, two resolutions."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LdmUNet().eval().requires_grad_(False)
