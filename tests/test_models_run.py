"""One run of any model by k-diffusion: what a seed gives, whoever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tome_sampler.models import open_model
from tome_sampler.models.run import Noise, Settings, sample

PROMPTS = ["a large red ring in the middle on wavy navy", "a small white cross at the top on plain grey"]
SMALL = Settings(size=(32, 32), steps=2)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "dpm_fast"])
def test_a_seed_gives_the_same_picture_alone_and_in_a_batch(sampler: str) -> None:
    model, settings = open_model(None), replace(SMALL, sampler=sampler)
    both = sample(model, PROMPTS, [3, 4], settings).pictures
    for i, seed in enumerate((3, 4)):
        alone = sample(model, PROMPTS[i : i + 1], [seed], settings).pictures
        torch.testing.assert_close(alone[0], both[i], atol=1e-3, rtol=0)


def test_what_a_sampler_adds_is_not_the_start_again() -> None:
    noise = Noise([5, 6], (4, 8, 8))
    first, second = noise(), noise()
    assert torch.equal(first, Noise([5, 6], (4, 8, 8))())
    assert (first * second).mean().abs() < 0.2
    assert not torch.equal(first[0], second[0])


def test_a_sampler_that_chooses_its_steps_needs_two() -> None:
    settings = replace(SMALL, sampler="dpm_fast", steps=4)
    with pytest.raises(ValueError, match=r"strength is 0.25; for dpm_fast it must leave two"):
        sample(open_model(None), PROMPTS[:1], [0], settings, image=torch.zeros(1, 3, 32, 32), strength=0.25)
