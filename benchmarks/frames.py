"""Would frames of a clip do with one frame's pairs? Own pairs against those of the first frame, on the embedded model.

Nothing here draws clips, so a clip is a batch of pictures of one caption whose noise is the same but for a part: the
smaller that part, the more alike the frames. Sharing is the session's own: it is told that all frames are one image.

    python benchmarks/frames.py
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch import Tensor

import tome_sampler
from tome_sampler import MergeConfig, ModelCall, demo
from tome_sampler.demo.command import PROMPTS
from tome_sampler.demo.model import LATENT_CHANNELS, LATENT_SIZE, to_picture
from tome_sampler.demo.report import fidelity
from tome_sampler.sampling import sample_dpmpp_2m
from tome_sampler.session import MergeSession

SIZE = (LATENT_SIZE, LATENT_SIZE)


class Denoiser:
    """Guidance; tells the session that each frame is an image of its own, or that all are one."""

    def __init__(self, wrapped: Any, session: MergeSession | None, shared: bool) -> None:
        self.wrapped, self.session, self.shared = wrapped, session, shared

    def __call__(self, x: Tensor, sigma: Tensor, cond: Tensor, uncond: Tensor, cond_scale: float) -> Tensor:
        frames = x.shape[0]
        rows, text = torch.cat([x, x]), torch.cat([uncond, cond])
        if self.session is None:
            out_uncond, out_cond = self.wrapped(rows, sigma.repeat(2), cond=text).chunk(2)
        else:
            images = (0,) * frames if self.shared else tuple(range(frames))
            branches = ("uncond",) * frames + ("cond",) * frames
            with self.session.call(ModelCall(float(sigma[0]), SIZE, branches, images * 2)):
                out_uncond, out_cond = self.wrapped(rows, sigma.repeat(2), cond=text).chunk(2)
            seen = slice(0, 1) if self.shared else slice(None)
            self.session.observe(out_cond[seen], out_uncond[seen])
        return out_uncond + cond_scale * (out_cond - out_uncond)


def clip(start: Tensor, caption: str, config: MergeConfig | None, shared: bool, steps: int) -> tuple[Tensor, float]:
    """Frames (frames 3 h w), and seconds of CPU time."""
    model, wrapped = demo.load_model(), demo.denoiser()
    sigmas, frames = wrapped.get_sigmas(steps), start.shape[0]
    cond, uncond = demo.encode([caption] * frames), demo.encode([""] * frames)
    extra = {"cond": cond, "uncond": uncond, "cond_scale": 3.0}
    began = time.process_time()
    with (
        torch.no_grad(),
        tome_sampler.merging(model, config or MergeConfig(ratio=0), sigmas=sigmas.tolist()) as session,
    ):
        denoiser = Denoiser(wrapped, None if config is None else session, shared)
        latents = sample_dpmpp_2m(denoiser, start * sigmas[0], sigmas, extra_args=extra, disable=True)
    return to_picture(latents), time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--captions", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--preset", default="default")
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = MergeConfig.preset(args.preset)
    print("| part of the noise that is a frame's own | frames to each other, dB | own pairs | first frame's pairs |")
    print("|---|---|---|---|")
    for own in (0.5, 0.1, 0.01, 0.001):
        found: list[tuple[float, ...]] = []
        for number, caption in enumerate(PROMPTS[: args.captions]):
            generator = torch.Generator().manual_seed(number)
            common = torch.randn(1, LATENT_CHANNELS, *SIZE, generator=generator)
            each = torch.randn(args.frames, LATENT_CHANNELS, *SIZE, generator=generator)
            start = math.sqrt(1 - own) * common + math.sqrt(own) * each
            plain, _ = clip(start, caption, None, False, args.steps)
            alike = fidelity(plain[1:], plain[:-1])[0]
            runs = [clip(start, caption, config, shared, args.steps) for shared in (False, True)]
            found.append((alike, *(x for frames, seconds in runs for x in (fidelity(frames, plain)[0], seconds))))
        alike, psnr, seconds, shared_psnr, shared_seconds = (sum(v) / len(found) for v in zip(*found, strict=True))
        print(
            f"| {own:g} | {alike:.1f} | {psnr:.1f} dB, {seconds:.1f} s "
            f"| {shared_psnr:.1f} dB, {shared_seconds:.1f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
