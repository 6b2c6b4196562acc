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
        self._p: Any = None  # whose pass it is
        self._failed = False  # whether the rest of it is sampled unmerged
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
        self,
        p: Any,
        args: Sequence[Any],
        saved: Mapping[str, Mapping[str, Any]] | None,
        default: str = DEFAULT,
        least: int = 0,
    ) -> None:
        """``process``: read what is asked for, and write it into the picture's parameters.

        A request that cannot be understood stops the generation with a readable error: an unmerged picture would
        look like a merged one.

        Args:
            saved: the user's own presets. default: the preset of who names none.
            least: unless 0, layers with fewer tokens are left alone, instead of those that "auto" leaves alone. It is
                part of the request, as another picture comes of it.
        """
        self.abort()
        setattr(p, _ASKED, _Asked())
        # a grid's cells share the dict, so what another cell wrote is taken out and the dict is not changed
        p.extra_generation_params = {k: v for k, v in p.extra_generation_params.items() if not _is_ours(k)}
        try:
            request = read_args(args, saved, default)
            axes = getattr(p, AXES, None)
            if axes:
                request = request.with_fields(axes, saved)
            request = request.of_at_least(least)
        except ValueError as error:
            _refuse(p, f"{infotext.KEY}: {error}")
            return
        if request.on:
            asked = _Asked(request, infotext.written(request, saved), RunRecord(preset=request.preset))
            setattr(p, _ASKED, asked)
            self.record = asked.record
            p.extra_generation_params.update(asked.entries)

    def begin_pass(self, p: Any, latent: torch.Tensor, obstacle: str | None, keep_maps: bool = True) -> None:
        """``process_before_every_sampling``: a pass over `latent` (images c h w) starts.

        Args:
            obstacle: why merging should stand aside in this pass, or None.
            keep_maps: record where merging happened.
        """
        self.end_pass()
        is_hires, asked = bool(getattr(p, "is_hr_pass", False)), _asked(p)
        config = asked.request.of_pass(is_hires)
        if config is None:
            return
        self.record, self._failed, self._keep_maps = asked.record, False, keep_maps
        reason = obstacle or _unable(latent.device)
        if reason is None:
            try:
                self._take_up(p, config, latent, is_hires)
                return
            except ValueError as error:  # nothing in the model matches
                reason = str(error)
            except Exception as error:
                self._say(error)
                self._aside(p, config, is_hires, _failure(error))
                return
        if reason not in asked.said:
            asked.said.add(reason)
            log.warning("token merging stands aside: %s", reason)
        self._aside(p, config, is_hires, reason)

    def _take_up(self, p: Any, config: MergeConfig, latent: torch.Tensor, is_hires: bool) -> None:
        forge = getattr(p.sd_model, "forge_objects", None)
        if forge is not None:
            work: A1111Pass | ForgePass = ForgePass(config, latent, self.failed)
            work.take(forge)
        else:
            unet = _unet_of(p.sd_model)
            if not any(name.rsplit(".", 1)[-1] == "attn1" for name, _ in unet.named_modules()):
                raise ValueError(f"{type(unet).__name__} has no attention layers that could be merged")
            work = A1111Pass(config, self.failed)
        session = work.session or MergeSession(config)
        self._at_work, self._p = work, p
        self._add(p, PassRecord(is_hires, session, config.to_dict()))

    def before_call(self, params: Any, sd_model: Any) -> None:
        """``on_cfg_denoiser``, of a step of ours or of a picture that another script samples between our passes."""
        if self._failed:  # a refiner would be merged again
            return
        work, whose = self._at_work, getattr(params.denoiser, "p", None)
        ours = whose is None or whose is self._p  # not ==, which would compare what they hold
        try:
            if isinstance(work, A1111Pass):
                if ours:
                    work.cfg_denoiser(params, _unet_of(sd_model), getattr(sd_model, "alphas_cumprod", None))
                else:
                    work.forget_call()
            elif isinstance(work, ForgePass) and ours:
                work.follow(sd_model.forge_objects)
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
        work, self._at_work, self._p = self._at_work, None, None
        if work is None:
            return
        work.close()
        try:
            self.record.passes[-1].finish(work.sessions)
        except Exception as error:
            self._say(error, "the statistics of a merged pass could not be read")

    def abort(self) -> None:
        """Whatever an exception, an interrupt or a failed cell left at work."""
        self.end_pass()

    def unloaded(self) -> None:
        """The UI is reloaded, in a thread of its own: a model call under way is not to be taken apart. What is left of
        its pass is sampled unmerged, and the hooks of its run end it."""
        if self._at_work is not None:
            self._give_up("merging ended (the UI was reloaded)")
            if all(session.current is None for session in self._at_work.sessions):
                self.end_pass()

    def over(self, p: Any) -> None:
        """``postprocess``, or `p` is closed: what the host does next is none of ours."""
        self.end_pass()
        if self.owns(p):
            self.record = self.record_of(p)
        _asked(p).over = True

    def failed(self, error: Exception) -> None:
        """An error of ours: the rest of the pass is sampled unmerged, which the log, the record and the picture's
        parameters say."""
        self._say(error)
        if self._at_work is not None and not self._failed:
            self._give_up(_failure(error))

    def _give_up(self, why: str) -> None:
        sessions, one = self._at_work.sessions if self._at_work is not None else [], self.record.passes[-1]
        self._failed = True
        for session in sessions:
            session.suspended = True  # hooks come off at the end of the pass: we may be inside one
        if any(session.stats.merged for session in sessions):
            one.failed = f"{why} on the way, and the rest was made without it"
        else:
            one.aside = why
        self._tell(self._p)

    def _say(self, error: Exception, what: str = "token merging failed, sampling goes on without it") -> None:
        if not self.record.error:
            self.record.error = f"{type(error).__name__}: {error}"
            log.warning("%s: %s", what, self.record.error, exc_info=error)

    def _aside(self, p: Any, config: MergeConfig, is_hires: bool, reason: str) -> None:
        one = PassRecord(is_hires, MergeSession(config), config.to_dict(), aside=reason)
        one.finish([])
        self._add(p, one)

    def _add(self, p: Any, one: PassRecord) -> None:
        """A pass starts."""
        self.record.add(one)
        self._tell(p)

    def _tell(self, p: Any) -> None:
        """The parameters say of this picture's passes what has become of them."""
        entries = infotext.of_passes(_asked(p).entries, self.record.batch)
        told = {key: value for key, value in p.extra_generation_params.items() if _is_ours(key)}
        if told != entries:
            for key in told:
                del p.extra_generation_params[key]
            p.extra_generation_params.update(entries)


def _asked(p: Any) -> _Asked:
    """Of a processing that nobody has prepared, nothing was."""
    return getattr(p, _ASKED, None) or _Asked()


def _failure(error: Exception) -> str:
    """In a picture's parameters, which are passed on: what an error says may name folders."""
    return f"merging failed ({type(error).__name__})"


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
    """Why this kind of device cannot merge, or None; tried on a handful of tokens until the answer is known for good,
    which it is not where memory has run out."""
    if device.type in _ABLE:
        return _ABLE[device.type]
    try:
        x = torch.linspace(0, 1, 32, device=device).view(1, 16, 2)
        _, target = global_match(x, grid_dst((4, 4), 2, device, None))
        pairing = Pairing.from_target(target, 4)
        assert torch.isfinite(pairing.unmerge(pairing.merge(x))).all()
        _ABLE[device.type] = None
    except Exception as error:
        log.info("token merging was tried on %s", device, exc_info=error)
        if not isinstance(error, (NotImplementedError, TypeError)):  # an operator or a type that the device lacks
            return f"this device ({device}) could not do it now: {type(error).__name__}"
        _ABLE[device.type] = f"this device ({device}) cannot do it: {type(error).__name__}"
    return _ABLE[device.type]
