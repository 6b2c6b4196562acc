"""AUTOMATIC1111: one sampling pass, told of by its CFG callbacks and merged by hooks on the U-Net.

Nothing here imports the webui: the callbacks' parameter objects are taken as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tome_sampler.config import MergeConfig
from tome_sampler.hosts.modules import attach
from tome_sampler.session import MergeSession, ModelCall

OTHER_CALL = "the model was called with a part of the picture, or by another extension: passed through"


class A1111Pass:
    """Merging in one sampling pass. `session` is the current one, `sessions` all: a refiner gets one of its own.

    Args:
        config: how to merge.
        failed: is told of an error of ours; the pass goes on unmerged.
    """

    def __init__(self, config: MergeConfig, failed: Callable[[Exception], None]) -> None:
        self.config = config
        self.sessions: list[MergeSession] = []
        self._failed = failed
        self._unet: nn.Module | None = None
        self._attention: list[tuple[nn.Module, list[nn.Module]]] = []  # its blocks, and the layers of their attn1
        self._cross: list[nn.Module] = []  # their attn2, if it runs on merged tokens
        self._detach: Callable[[], None] | None = None
        # of the guidance under way: its noise level, latent size, and the rows that the U-Net will be called with
        self._sigma: float | None = None
        self._size: tuple[int, int] | None = None
        self._branches: tuple[str, ...] = ()
        self._images: tuple[int, ...] = ()
        self._owners: tuple[int, ...] = ()  # the image of each cond row
        self._conds = self._next = 0

    @property
    def session(self) -> MergeSession | None:
        """The session at work, or None before the first call and after the end."""
        return self.sessions[-1] if self._detach is not None else None

    def cfg_denoiser(self, params: Any, unet: nn.Module, alphas_cumprod: Tensor | None) -> None:
        """``on_cfg_denoiser``: guidance is about to call `unet`, in one call or several.

        Args:
            params: the callback's; x is (rows c h w), conds first, image by image, then unconds.
            alphas_cumprod: of the model; for samplers whose callbacks tell timesteps (DDIM, PLMS, UniPC).

        Raises:
            ValueError: the U-Net has no attention to merge.
        """
        self.forget_call()
        inner = params.denoiser.inner_model
        sigmas = getattr(inner, "sigmas", None)
        table = sigmas if isinstance(sigmas, Tensor) else None
        if table is None and alphas_cumprod is not None:
            table = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        if unet is not self._unet:
            self._take(unet, table)
        time = float(params.sigma.max())
        if sigmas is None:
            time = float(table[min(round(time), len(table) - 1)]) if table is not None else time + 1
        conds, images = int(params.text_cond.shape[0]), int(params.text_uncond.shape[0])
        self._sigma = time
        self._size = (int(params.x.shape[-2]), int(params.x.shape[-1]))
        owners = _owners(params.x, conds, images)
        unconds = params.x.shape[0] - conds  # twice the images for InstructPix2Pix
        if owners is not None and unconds % images == 0:
            self._images = owners + tuple(range(images)) * (unconds // images)
            self._branches = ("cond",) * conds + ("uncond",) * unconds
            self._conds, self._owners = conds, owners

    def cfg_denoised(self, params: Any) -> None:
        """``on_cfg_denoised``: what the U-Net made of the rows. Without uncond rows in them there is no importance."""
        if self.session is None or self._next < len(self._branches) or not self._conds:
            return
        uncond = params.x[-(max(self._owners) + 1) :]
        cond = params.x[: self._conds]
        if self._conds != uncond.shape[0]:  # several conds an image: their mean
            cond = _mean_of_images(cond, uncond, self._owners)
        self.session.observe(cond, uncond)

    def close(self) -> None:
        """Take everything off the model; statistics stay."""
        if self._detach is not None:
            self._detach()
        self._detach = self._unet = None
        self._attention, self._cross = [], []
        self.forget_call()

    def _take(self, unet: nn.Module, table: Tensor | None) -> None:
        self.close()
        session = MergeSession(self.config, restarts=True, timed=True)
        if table is not None:
            session.know_table(sorted(table.flatten().tolist(), reverse=True))
        self._detach = attach(unet, session, self._describe, self._fail)
        self._unet = unet
        self._attention = [
            (block, [layer for layer in attention.modules() if layer is not attention])
            for block in unet.modules()
            if isinstance(attention := getattr(block, "attn1", None), nn.Module)
        ]
        if not self.config.all_modules.isdisjoint({"attn2", "block"}):
            layers = (getattr(block, "attn2", None) for block, _ in self._attention)
            self._cross = [layer for layer in layers if isinstance(layer, nn.Module)]
        self.sessions.append(session)

    def _fail(self, error: Exception) -> None:
        for session in self.sessions:
            session.suspended = True
        self._failed(error)

    def _describe(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
        """The next rows of what guidance told of. A tile, or a call that guidance knows nothing of, passes through."""
        x = args[0] if args else kwargs.get("x")
        first, foreign = self._next, _foreign(root, self._attention, self._cross)
        if foreign is None and isinstance(x, Tensor) and tuple(x.shape[-2:]) == self._size:
            end = first + x.shape[0]
            if end <= len(self._branches):
                self._next = end
                return ModelCall(self._sigma, self._size, self._branches[first:end], self._images[first:end], first > 0)
        self.sessions[-1].note(foreign or OTHER_CALL)
        return ModelCall(None, self._size, (), ())

    def forget_call(self) -> None:
        """What guidance told of is over: calls of the U-Net pass through."""
        self._sigma, self._size = None, None
        self._branches, self._images, self._owners = (), (), ()
        self._conds = self._next = 0


def _foreign(unet: nn.Module, attention: list[tuple[nn.Module, list[nn.Module]]], cross: list[nn.Module]) -> str | None:
    """Who else works inside the attention of a U-Net that is about to run, so that it needs all its tokens; or None.
    cross: cross-attention layers that would run on merged tokens.

    ControlNet replaces methods of the modules themselves, and hands most of them back as bound methods when it is done.
    """
    if any(_replaced(layer, "forward") for layer in cross):
        return "another extension replaces attn2 (Regional Prompter does), so merge in attn1 alone: passed through"
    driven = _replaced(unet, "forward")
    for block, layers in attention:
        if driven and _replaced(block, "_forward"):  # the reference's own pass would be merged, and the picture's not
            return "another extension drives the blocks (ControlNet's reference mode does): passed through"
        for layer in layers:
            own = vars(layer).get("forward")
            if own is not None and getattr(own, "__self__", None) is not layer:
                return "another extension replaces attention's projections (ControlNet-LLLite does): passed through"
    return None


def _replaced(module: nn.Module, method: str) -> bool:
    own = vars(module).get(method)
    return own is not None and getattr(own, "__func__", None) is not getattr(type(module), method, None)


def _mean_of_images(cond: Tensor, uncond: Tensor, owners: tuple[int, ...]) -> Tensor:
    """The mean of each image's cond rows; an image that has none gets its uncond row, which says nothing. On CUDA
    `mean` adds in a fixed order, which `index_add_` does not, and counting rows there would wait for the device."""
    rows: list[list[Tensor]] = [[] for _ in uncond]
    for row, owner in zip(cond, owners, strict=True):
        rows[owner].append(row)
    means = [torch.stack(own).mean(0) if own else alone for own, alone in zip(rows, uncond, strict=True)]
    return torch.stack(means)


def _owners(x: Tensor, conds: int, images: int) -> tuple[int, ...] | None:
    """The image of each cond row. With AND an image has several; each row is a copy of its image's latent."""
    if conds == images:
        return tuple(range(images))
    if images == 1:
        return (0,) * conds
    own = x[-images:]
    same = (x[:conds, None] == own[None]).flatten(2).all(2).tolist()
    owners: Sequence[int] = [row.index(True) if True in row else -1 for row in same]
    return None if -1 in owners else tuple(owners)
