"""When the library merges: between the host's hooks, a pass at a time. Nothing outlives a run but its record."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tome_sampler.config import MergeConfig
from tome_sampler.hosts.a1111 import A1111Pass
from tome_sampler.hosts.forge import ForgePass
from tome_sampler.matching import global_match, grid_dst
from tome_sampler.pairing import Pairing
from tome_sampler.session import MergeSession

from . import infotext
from .record import PassRecord, RunRecord
from .request import DEFAULT, DISABLED, Request, read_args

log = logging.getLogger("tome_sampler")
AXES = "tome_sampler_axes"  # attribute of p: fields that a grid's cell replaces
_ASKED = "tome_sampler_asked"  # attribute of p: what was asked of it


@dataclass
class _Asked:
    """What a processing was asked for. It is kept on it, as other scripts run processings of their own between its
    pictures. entries: of the infotext. said: reasons to stand aside that the log has."""

    request: Request = DISABLED
    entries: dict[str, str] = field(default_factory=dict)
    record: RunRecord = field(default_factory=RunRecord)
    said: set[str] = field(default_factory=set)
    over: bool = False


class Run:
    """What is under way, of which one pass at most is being sampled: hosts serialise their requests."""

    def __init__(self) -> None:
        self.record = RunRecord()  # of the processing whose pass was the last one
        self._at_work: A1111Pass | ForgePass | None = None
        self._keep_maps = True

    @property
    def at_work(self) -> bool:
        """Whether a pass is being merged."""
        return self._at_work is not None

    @staticmethod
    def wanted(p: Any) -> bool:
        """Whether a processing was asked to merge."""
        return _asked(p).request.on

    @staticmethod
    def owns(p: Any) -> bool:
        """Whether `p` is under way and was asked to merge: hosts save other pictures too."""
        return _asked(p).request.on and not _asked(p).over

    @staticmethod
    def record_of(p: Any) -> RunRecord:
        """What a processing leaves behind."""
        return _asked(p).record

    def prepare(
        self, p: Any, args: Sequence[Any], saved: Mapping[str, Mapping[str, Any]] | None, default: str = DEFAULT
    ) -> None:
        """``process``: read what is asked for, and write it into the picture's parameters.

        A request that cannot be understood stops the generation with a readable error: an unmerged picture would
        look like a merged one.
        """
        self.abort()
        setattr(p, _ASKED, _Asked())
        # a grid's cells share the dict, so what another cell wrote is taken out and the dict is not changed
        p.extra_generation_params = {k: v for k, v in p.extra_generation_params.items() if not _is_ours(k)}
        try:
            request = read_args(args, saved, default)
            axes = getattr(p, AXES, None)
            if axes:
                request = request.with_fields(axes)
        except ValueError as error:
            _refuse(p, f"{infotext.KEY}: {error}")
            return
        if request.on:
            asked = _Asked(request, infotext.written(request, saved), RunRecord(preset=request.preset))
            setattr(p, _ASKED, asked)
            self.record = asked.record
            p.extra_generation_params.update(asked.entries)

    def begin_pass(
        self, p: Any, latent: torch.Tensor, obstacle: str | None, least: int = 0, keep_maps: bool = True
    ) -> None:
        """``process_before_every_sampling``: a pass over `latent` (images c h w) starts.

        Args:
            obstacle: why merging should stand aside in this pass, or None.
            least: unless 0, layers with fewer tokens are left alone, instead of those that "auto" leaves alone.
            keep_maps: record where merging happened.
        """
        self.end_pass()
        is_hires, asked = bool(getattr(p, "is_hr_pass", False)), _asked(p)
        config = asked.request.of_pass(is_hires)
        if config is None:
            return
        self.record = asked.record
        if obstacle is None:
            obstacle = _unable(latent.device)
        if obstacle is not None:
            self._aside(p, config, is_hires, obstacle)
            return
        if least:
            own = config.min_tokens
            config = config.with_(min_tokens=least if own == "auto" else max(own, least))
        try:
            self._take_up(p, config, latent, is_hires)
            self._keep_maps = keep_maps
        except ValueError as error:  # nothing in the model matches
            self._aside(p, config, is_hires, str(error))
        except Exception as error:
            self.failed(error)

    def _take_up(self, p: Any, config: MergeConfig, latent: torch.Tensor, is_hires: bool) -> None:
        forge = getattr(p.sd_model, "forge_objects", None)
        if forge is not None:
            work: A1111Pass | ForgePass = ForgePass(config, latent, self.failed)
            forge.unet = work.patched(forge.unet)
        else:
            unet = _unet_of(p.sd_model)
            if not any(name.rsplit(".", 1)[-1] == "attn1" for name, _ in unet.named_modules()):
                raise ValueError(f"{type(unet).__name__} has no attention layers that could be merged")
            work = A1111Pass(config, self.failed)
        session = work.session or MergeSession(config)
        self._at_work = work
        self._add(p, PassRecord(is_hires, session, config.to_dict()))

    def before_call(self, params: Any, sd_model: Any) -> None:
        """``on_cfg_denoiser``."""
        work = self._at_work
        if isinstance(work, A1111Pass):
            try:
                work.cfg_denoiser(params, _unet_of(sd_model), getattr(sd_model, "alphas_cumprod", None))
            except Exception as error:
                self.failed(error)

    def after_call(self, params: Any) -> None:
        """``on_cfg_denoised``, which Forge does not call."""
        work = self._at_work
        if isinstance(work, A1111Pass):
            try:
                self._look(work)
                work.cfg_denoised(params)
            except Exception as error:
                self.failed(error)

    def after_guidance(self) -> None:
        """``on_cfg_after_cfg``."""
        work = self._at_work
        if isinstance(work, ForgePass):
            self._look(work)

    def _look(self, work: A1111Pass | ForgePass) -> None:
        session = work.session
        if self._keep_maps and session is not None and self.record.passes:
            self.record.passes[-1].look(session)

    def end_pass(self) -> None:
        """Take everything off the model, and read what was measured."""
        work, self._at_work = self._at_work, None
        if work is None:
            return
        work.close()
        try:
            self.record.passes[-1].finish(work.sessions)
        except Exception as error:
            self.failed(error)

    def abort(self) -> None:
        """Whatever an exception, an interrupt or a failed cell left at work."""
        self.end_pass()

    def over(self, p: Any) -> None:
        """``postprocess``, or `p` is closed: what the host does next is none of ours."""
        self.end_pass()
        if self.owns(p):
            self.record = self.record_of(p)
        _asked(p).over = True

    def failed(self, error: Exception) -> None:
        """An error of ours: go on unmerged, and say so once."""
        text = f"{type(error).__name__}: {error}"
        for session in self._at_work.sessions if self._at_work is not None else ():
            session.suspended = True  # hooks come off at the end of the pass: we may be inside one
        if not self.record.error:
            self.record.error = text
            log.warning("token merging failed, sampling goes on without it: %s", text, exc_info=error)

    def _aside(self, p: Any, config: MergeConfig, is_hires: bool, reason: str) -> None:
        one = PassRecord(is_hires, MergeSession(config), config.to_dict(), aside=reason)
        one.finish([])
        self._add(p, one)
        if reason not in _asked(p).said:
            _asked(p).said.add(reason)
            log.warning("token merging stands aside: %s", reason)

    def _add(self, p: Any, one: PassRecord) -> None:
        """A pass starts, and the parameters say of this picture's passes what has become of them."""
        self.record.add(one)
        entries = infotext.of_passes(_asked(p).entries, {one.title: one.aside for one in self.record.batch})
        told = {key: value for key, value in p.extra_generation_params.items() if _is_ours(key)}
        if told != entries:
            for key in told:
                del p.extra_generation_params[key]
            p.extra_generation_params.update(entries)


def _asked(p: Any) -> _Asked:
    """Of a processing that nobody has prepared, nothing was."""
    return getattr(p, _ASKED, None) or _Asked()


def _is_ours(key: str) -> bool:
    return key.startswith("ToMe ")


def _unet_of(sd_model: Any) -> Any:
    """AUTOMATIC1111's U-Net, looked up anew each time: checkpoints and refiners replace it."""
    unet = getattr(getattr(sd_model, "model", None), "diffusion_model", None)
    if not isinstance(unet, torch.nn.Module):
        raise ValueError(f"{type(sd_model).__name__} has no U-Net with attention that could be merged")
    return unet


def _refuse(p: Any, message: str) -> None:
    """Make the generation end with `message`: errors in a script's own hooks are swallowed by the hosts."""

    def sample(*args: Any, **kwargs: Any) -> Any:
        if getattr(p, "is_api", False):
            from fastapi.exceptions import HTTPException

            raise HTTPException(status_code=422, detail=message)
        raise ValueError(message)

    p.sample = sample


_ABLE: dict[str, str | None] = {}


def _unable(device: torch.device) -> str | None:
    """Why this kind of device cannot merge, or None; tried once, on a handful of tokens."""
    if device.type not in _ABLE:
        try:
            x = torch.linspace(0, 1, 32, device=device).view(1, 16, 2)
            _, target = global_match(x, grid_dst((4, 4), 2, device, None))
            pairing = Pairing.from_target(target, 4)
            assert torch.isfinite(pairing.unmerge(pairing.merge(x))).all()
            _ABLE[device.type] = None
        except Exception as error:
            _ABLE[device.type] = f"this device ({device}) cannot do it: {type(error).__name__}: {error}"
    return _ABLE[device.type]
