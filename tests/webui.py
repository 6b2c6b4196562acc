"""A stand-in for the two WebUIs: their modules as far as the extension imports them, their order of calls, and their
traps. What it imitates was observed in AUTOMATIC1111 1.10.1 and in Forge (main, June 2025):

- hooks' exceptions are swallowed and logged; `postprocess` is skipped after an exception in sampling, `close` is not;
- `ui()` is called three times a tab; X/Y/Z cells are shallow copies of `p` and are never closed;
- AUTOMATIC1111 hands the U-Net [cond..., uncond], in one call or in several, and calls the three CFG callbacks;
- Forge hands it [uncond, cond], deep-copies model options when it clones, calls `process_before_every_sampling` twice
  for a hires pass, calls no `on_cfg_denoised`, and swaps the model patcher back before each pass. Prompts that it will
  not batch run cond first, and what memory does not suffice to batch uncond first.

The U-Nets are small real ones; nothing of the extension is replaced.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ldm import BasicTransformerBlock, LdmUNet
from PIL import Image
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
CALLBACKS = [
    *("ui_settings", "before_ui", "infotext_pasted", "cfg_denoiser", "cfg_denoised", "cfg_after_cfg"),
    *("after_component", "image_saved", "ui_tabs", "app_started", "script_unloaded"),
]
GRADIO = [
    *("Row", "Group", "Accordion", "HTML", "Dropdown", "Slider", "Checkbox", "CheckboxGroup", "Radio", "Number"),
    *("Button", "Textbox", "Tab", "Tabs", "Blocks"),
]


class Interrupted(BaseException):
    """What the hosts raise on Interrupt: no Exception."""


class Component:
    """A gradio component as far as a script sees it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kind = type(self).__name__
        self.args, self.kwargs = args, kwargs
        self.value = kwargs.get(
            "value", args[0] if args and self.kind not in ("Dropdown", "Radio", "CheckboxGroup") else None
        )
        self.elem_id, self.label = kwargs.get("elem_id"), kwargs.get("label")
        self.events: list[tuple[str, dict[str, Any]]] = []
        for callback in HOST.callbacks.get("after_component", []):
            callback(self, **kwargs)

    def __enter__(self) -> Component:
        return self

    def __exit__(self, *exc: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        if name in ("change", "input", "click", "release"):
            return lambda fn=None, **kwargs: self.events.append((name, {"fn": fn, **kwargs}))
        raise AttributeError(name)


class OptionInfo:
    def __init__(self, default: Any, label: str, component: Any = None, component_args: Any = None) -> None:
        self.default, self.label, self.section = default, label, None

    def info(self, text: str) -> OptionInfo:
        return self


class Options:
    def __init__(self) -> None:
        self.data: dict[str, Any] = {}

    def add_option(self, key: str, option: OptionInfo) -> None:
        assert option.section
        self.data.setdefault(key, option.default)


class PasteField(tuple):  # type: ignore[type-arg]
    def __new__(cls, component: Any, target: Any, *, api: Any = None) -> PasteField:
        return super().__new__(cls, (component, target))

    def __init__(self, component: Any, target: Any, *, api: Any = None) -> None:
        super().__init__()
        self.component, self.function = component, target if callable(target) else None
        self.label = None if callable(target) else target


class AxisOption:
    def __init__(self, label: str, type: Any, apply: Any, confirm: Any = None, choices: Any = None) -> None:
        self.label, self.type, self.apply, self.confirm, self.choices = label, type, apply, confirm, choices


class Script:
    """The base class of scripts."""

    infotext_fields: Any = None
    paste_field_names: Any = None

    def elem_id(self, name: str) -> str:
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_tome_sampler_{name}"

    is_img2img = False


class Processing:
    """StableDiffusionProcessing."""

    def __init__(self, host: Host, args: Any, **settings: Any) -> None:
        self.host, self.args = host, args
        self.batch_size, self.n_iter, self.steps, self.size, self.seed = 1, 1, 4, (32, 32), 1
        self.cfg_scale, self.conds, self.lengths_differ, self.enable_hr, self.edit = 5.0, 1, False, False, False
        self.is_api, self.is_hr_pass, self.sampler = True, False, "Euler"
        self.extra_generation_params: dict[str, Any] = {}
        self.closed = False
        self.__dict__.update(settings)

    @property
    def sd_model(self) -> Any:
        return self.host.shared.sd_model

    def get_token_merging_ratio(self, for_hr: bool = False) -> float:
        return float(self.host.shared.opts.data.get("token_merging_ratio_hr" if for_hr else "token_merging_ratio", 0))

    def sample(self) -> Tensor:
        return self.host.sample(self)

    def close(self) -> None:
        self.closed = True


class Host:
    """What both hosts share: loading, hooks, and the loop over batches."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Any]] = {}
        self.errors: list[BaseException] = []
        self.model_calls: list[tuple[int, int]] = []  # rows and width of each call
        self.fault: Callable[[int], None] | None = None  # is called before each model call, and may raise
        self.folder: Path | None = None  # where pictures are saved, if they are
        self.shared = types.SimpleNamespace(
            opts=Options(),
            OptionInfo=OptionInfo,
            sd_model=self.model(),
            cmd_opts=types.SimpleNamespace(api=True, nowebui=False, api_auth=None),
            state=types.SimpleNamespace(sampling_step=0, interrupted=False, begin=lambda job: None, end=lambda: None),
        )

    def model(self) -> Any:
        raise NotImplementedError

    def install(self, data_path: Path) -> None:
        """Put the host's modules where the extension imports them from."""
        global HOST
        HOST = self
        modules = types.ModuleType("modules")
        grid = types.SimpleNamespace(axis_options=[], AxisOption=AxisOption)
        self.grid = grid
        grid_class = type("Script", (), {"__module__": "xyz_grid.py"})
        parts = {
            "scripts": {
                "Script": Script,
                "AlwaysVisible": object(),
                "scripts_data": [types.SimpleNamespace(script_class=grid_class, module=grid)],
            },
            "shared": vars(self.shared),
            "script_callbacks": {f"on_{name}": self._registrar(name) for name in CALLBACKS},
            "ui_components": {"InputAccordion": lambda value, **k: _input_accordion(value, **k)},
            "paths": {"data_path": str(data_path)},
            "infotext_utils": {"PasteField": PasteField},
            "processing": {"get_fixed_seed": lambda seed: 1 if seed == -1 else seed},
            "call_queue": {"queue_lock": None},
            "sd_unet": {"current_unet": None},
        }
        sys.modules["modules"] = modules
        for name, members in parts.items():
            module = types.ModuleType(f"modules.{name}")
            module.__dict__.update(members)
            sys.modules[module.__name__] = module
            setattr(modules, name, module)
        sys.modules["modules.shared"].__dict__["opts"] = self.shared.opts
        gradio = types.ModuleType("gradio")
        for kind in GRADIO:
            setattr(gradio, kind, type(kind, (Component,), {}))
        gradio.update = lambda **values: values
        gradio.__version__ = "3.41.2"
        sys.modules["gradio"] = gradio
        self.modules = modules

    def _registrar(self, name: str) -> Callable[[Any], None]:
        return lambda callback: self.callbacks.setdefault(name, []).append(callback)

    def load(self) -> Any:
        """Execute the script as the hosts do: named after its file, not in sys.modules, its folder on sys.path only
        meanwhile. Again: Reload UI."""
        for callback in self.callbacks.get("script_unloaded", []):
            callback()
        self.callbacks.clear()
        self.grid.axis_options.clear()
        path = ROOT / "scripts" / "tome_sampler.py"
        before = list(sys.path)
        sys.path.insert(0, str(ROOT))
        try:
            spec = importlib.util.spec_from_file_location(path.name, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path[:] = before
        self.script = module.ToMeSampler()
        self.app = module.app
        for name in ("ui_settings", "before_ui"):
            self.tell(name)
        self.components = self.script.ui(False)
        self.fields = self.script.infotext_fields
        self.tell("ui_tabs")
        for _ in range(2):
            self.script.ui(False)  # the API's, thrown away
        return module

    def tell(self, name: str, *args: Any) -> None:
        for callback in self.callbacks.get(name, []):
            try:
                callback(*args)
            except Exception as error:
                self.errors.append(error)

    def hook(self, name: str, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(self.script, name)(*args, **kwargs)
        except Exception as error:
            self.errors.append(error)

    def generate(self, args: Any, **settings: Any) -> tuple[Tensor, dict[str, Any]]:
        """A whole run: the pictures, and what their infotext says."""
        p = Processing(self, args, **settings)
        self.hook("setup", p, *self._arguments(args))
        try:
            return self.process_images(p), p.extra_generation_params
        finally:
            p.close()

    def process_images(self, p: Processing) -> Tensor:
        args = self._arguments(p.args)
        self.hook("before_process", p, *args)
        self.hook("process", p, *args)
        batches = []
        for n in range(p.n_iter):
            p.iteration = n
            try:
                batches.append(p.sample())
            except Interrupted:
                break
            finally:
                p.is_hr_pass = False
            self.hook("post_sample", p, None, *args)
            for i in range(p.batch_size):
                p.batch_index = i
                self.save(p, f"{n}-{i}.png")
        self.save(p, "grid-0.png")
        pictures = torch.cat(batches) if batches else torch.zeros(0)
        self.hook("postprocess", p, types.SimpleNamespace(images=[]), *args)
        return pictures

    def cells(self, args: Any, axis: str, values: list[Any], **settings: Any) -> list[Tensor]:
        """An X/Y/Z grid: shallow copies, a failing cell is swallowed."""
        p = Processing(self, args, **settings)
        self.hook("setup", p, *self._arguments(args))
        option = next(o for o in self.grid.axis_options if o.label == axis)
        option.confirm(p, values)
        pictures = []
        for value in values:
            cell = copy.copy(p)
            option.apply(cell, value, values)
            try:
                pictures.append(self.process_images(cell))
            except Exception as error:
                self.errors.append(error)
        self.save(types.SimpleNamespace(images=[]), "xyz_grid-0.png")
        p.close()
        return pictures

    def save(self, p: Any, name: str) -> None:
        """A picture's file: of `p`, of a grid's `Processed`, or of none, as Extras saves it."""
        if self.folder is not None:
            image = Image.new("RGB", (64, 64))
            self.tell("image_saved", types.SimpleNamespace(filename=str(self.folder / name), image=image, p=p))

    def sample(self, p: Processing) -> Tensor:
        generator = torch.Generator().manual_seed(p.seed + getattr(p, "iteration", 0))
        x = torch.stack([torch.randn(4, *p.size, generator=generator) for _ in range(p.batch_size)])
        x = self.run_pass(p, x)
        if p.enable_hr:
            p.is_hr_pass = True
            x = nn.functional.interpolate(x, scale_factor=1.5) + torch.randn(
                p.batch_size, 4, *(side * 3 // 2 for side in p.size), generator=generator
            )
            x = self.run_pass(p, x)
        return x

    def run_pass(self, p: Processing, x: Tensor) -> Tensor:
        raise NotImplementedError

    def steps(self, p: Processing, x: Tensor, denoise: Callable[[Tensor, float], Tensor]) -> Tensor:
        """Euler; "Heun" calls the model twice a step, "Restart" goes back up once."""
        sigmas = [*torch.linspace(2.5, -2.5, p.steps).exp().tolist(), 0.0]
        x = x * sigmas[0]
        if p.sampler == "Restart":
            sigmas = [*sigmas[:-2], sigmas[0], *sigmas[1:]]
        for sigma, following in itertools.pairwise(sigmas):
            slope = (x - denoise(x, sigma)) / sigma
            moved = x + slope * (following - sigma)
            if p.sampler == "Heun" and following > 0:
                slope = (slope + (moved - denoise(moved, following)) / following) / 2
                moved = x + slope * (following - sigma)
            x = moved
        return x

    @staticmethod
    def _arguments(args: Any) -> list[Any]:
        """What the API makes of a request's args: the rest is filled from the components."""
        defaults = [c.value for c in HOST.components]
        given = list(args)[: len(defaults)]
        return given + defaults[len(given) :]


HOST: Any = types.SimpleNamespace(callbacks={})


def _input_accordion(value: bool, **kwargs: Any) -> Component:
    kwargs["elem_id"] += "-checkbox"
    return type("InputAccordion", (Component,), {})(value, **kwargs)


def cond_of(rows: int, length: int) -> Tensor:
    """Prompts, different for each row."""
    return torch.sin(torch.arange(rows * length * 8, dtype=torch.float32)).view(rows, length, 8)


class A1111(Host):
    """AUTOMATIC1111: an ldm U-Net, and CFG callbacks around it."""

    def __init__(self, optimisation: Any = None) -> None:
        super().__init__()
        self.batch_cond_uncond, self.skip_uncond_at = True, set()  # the latter: denoiser calls (NGMS)
        self.tiles = 1
        self.eps_valued = False  # DDIM, PLMS, UniPC: timesteps in the callbacks
        self.sigmas = torch.linspace(-3.5, 2.7, 1000).exp()

    def model(self) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = LdmUNet().eval().requires_grad_(False)
        wrapper = nn.Module()
        wrapper.diffusion_model = unet
        sigmas = torch.linspace(-3.5, 2.7, 1000).exp()
        return types.SimpleNamespace(model=wrapper, alphas_cumprod=1 / (1 + sigmas**2))

    def run_pass(self, p: Processing, x: Tensor) -> Tensor:
        self.hook("process_before_every_sampling", p, *self._arguments(p.args), x=x, noise=x, c=None, uc=None)
        inner = types.SimpleNamespace() if self.eps_valued else types.SimpleNamespace(sigmas=self.sigmas)
        denoiser = types.SimpleNamespace(inner_model=inner, p=p, step=0)
        return self.steps(p, x, lambda noisy, sigma: self._guided(p, denoiser, noisy, sigma))

    def _guided(self, p: Processing, denoiser: Any, x: Tensor, sigma: float) -> Tensor:
        b = x.shape[0]
        conds, uncond = cond_of(b * p.conds, 9 if p.lengths_differ else 5), cond_of(b, 5) * 0.1
        rows = torch.cat([x.repeat_interleave(p.conds, 0), x, *([x] if p.edit else [])])
        time = torch.full((len(rows),), sigma)
        if self.eps_valued:
            time = (self.sigmas - sigma).abs().argmin().float().expand(len(rows))
        params = types.SimpleNamespace(x=rows, sigma=time, text_cond=conds, text_uncond=uncond, denoiser=denoiser)
        self.tell("cfg_denoiser", params)
        unet = self.shared.sd_model.model.diffusion_model
        skip = denoiser.step in self.skip_uncond_at

        def call(part: Tensor, context: Tensor) -> Tensor:
            if self.fault is not None:
                self.fault(len(self.model_calls))
            self.model_calls.append((part.shape[0], part.shape[-1]))
            if self.tiles > 1:  # tiled diffusion: the U-Net sees one tile after the other
                whole, self.tiles = self.tiles, 1
                tiles = [call(tile, context) for tile in part.chunk(whole, -1)]
                self.tiles = whole
                return torch.cat(tiles, -1)
            return unet(part / (1 + sigma**2) ** 0.5, torch.full((len(part),), sigma), context=context)

        if skip:
            out = call(rows[: b * p.conds], conds)
            out = torch.cat([out, out[:: p.conds]])
        elif p.lengths_differ:
            out = torch.cat(
                [call(rows[: b * p.conds], conds), call(rows[b * p.conds :], torch.cat([uncond] * (1 + p.edit)))]
            )
        else:
            context = torch.cat([conds, *[uncond] * (1 + p.edit)])
            size = len(rows) if self.batch_cond_uncond else b
            out = torch.cat([call(rows[i : i + size], context[i : i + size]) for i in range(0, len(rows), size)])
        out = rows[: len(out)] - sigma * out * 0.3
        self.tell("cfg_denoised", types.SimpleNamespace(x=out))
        low = out[-b:]
        denoised = low + (out[: b * p.conds].view(b, p.conds, *low.shape[1:]).mean(1) - low) * p.cfg_scale
        self.tell("cfg_after_cfg", types.SimpleNamespace(x=denoised))
        denoiser.step += 1
        return denoised


class ForgeBlock(BasicTransformerBlock):
    """A block that hands its attention to patches, and adds to its tokens in place, as Forge's does."""

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:  # type: ignore[override]
        place, patches = transformer_options["block"], transformer_options.get("patches", {})
        replaced = transformer_options.get("patches_replace", {}).get("attn1", {})
        extra = {k: v for k, v in transformer_options.items() if k not in ("patches", "patches_replace")}
        extra |= {"n_heads": self.attn1.heads, "dim_head": 8}
        n = self.norm1(x)
        k = v = n
        for patch in patches.get("attn1_patch", []):
            n, k, v = patch(n, k, v, extra)
        q, k, v = self.attn1.to_q(n), self.attn1.to_k(k), self.attn1.to_v(v)
        n = replaced[place](q, k, v, extra) if place in replaced else attention_function(q, k, v, self.attn1.heads)
        n = self.attn1.to_out(n)
        for patch in patches.get("attn1_output_patch", []):
            n = patch(n, extra)
        x += n
        n = self.norm2(x)
        for patch in patches.get("attn2_patch", []):
            n, *_ = patch(n, context, context, extra)
        x += self.attn2(n, context=context)
        return self.ff(self.norm3(x)).add_(x)


class ForgeTransformer(nn.Module):
    """A spatial transformer of one block."""

    def __init__(self, block: nn.Module, place: tuple[str, int]) -> None:
        super().__init__()
        self.block, self.place = ForgeBlock(16, 8), place
        self.block.load_state_dict(block.state_dict())

    def forward(self, h: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        for modifier in options.get("inner_modifiers", []):
            h = modifier(h, "before", self, 0, None, options)
        options |= {"block": self.place, "block_index": 0}
        x = self.block(h.flatten(2).transpose(1, 2).contiguous(), context=context, transformer_options=options)
        return x.transpose(1, 2).view_as(h)


class ForgeUNet(nn.Module):
    """Two levels of transformers."""

    def __init__(self) -> None:
        super().__init__()
        ldm = LdmUNet()
        self.inwards, self.outwards = ldm.inwards, ldm.outwards
        self.input_blocks = nn.ModuleList([nn.Identity(), ForgeTransformer(ldm.first, ("input", 1))])
        self.middle_block = ForgeTransformer(ldm.deep, ("middle", 0))
        self.output_blocks = nn.ModuleList([ForgeTransformer(ldm.last, ("output", 0))])

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, options: dict[str, Any]) -> Tensor:
        options["original_shape"] = list(x.shape)
        h = self.input_blocks[1](self.inwards(x) + sigma.view(-1, 1, 1, 1).log() / 10, context, options)
        low = self.middle_block(nn.functional.avg_pool2d(h, 2, ceil_mode=True), context, options)
        h = h + nn.functional.interpolate(low, h.shape[-2:], mode="nearest")
        return self.outwards(self.output_blocks[0](h, context, options))


class UnetPatcher:
    """Forge's model patcher: a clone shares the model and deep-copies the options."""

    def __init__(self, model: Any, options: dict[str, Any] | None = None) -> None:
        self.model, self.model_options = model, options or {"transformer_options": {}}

    def clone(self) -> UnetPatcher:
        return UnetPatcher(self.model, copy.deepcopy(self.model_options))

    def _patch(self, name: str, patch: Any) -> None:
        self.model_options["transformer_options"].setdefault("patches", {}).setdefault(name, []).append(patch)

    def set_model_attn1_patch(self, patch: Any) -> None:
        self._patch("attn1_patch", patch)

    def set_model_attn1_output_patch(self, patch: Any) -> None:
        self._patch("attn1_output_patch", patch)

    def set_model_attn2_patch(self, patch: Any) -> None:
        self._patch("attn2_patch", patch)

    def set_model_attn1_replace(self, patch: Any, stage: str, number: int) -> None:
        replace = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replace.setdefault("attn1", {})[stage, number] = patch

    def set_model_sampler_post_cfg_function(self, function: Any) -> None:
        self.model_options.setdefault("post_cfg", []).append(function)

    def add_block_inner_modifier(self, modifier: Any) -> None:
        self.model_options["transformer_options"].setdefault("inner_modifiers", []).append(modifier)


def attention_function(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None) -> Tensor:
    """Forge's kernel."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Forge(Host):
    """Forge: patches on a clone of the model patcher."""

    def __init__(self) -> None:
        super().__init__()
        self.split = False  # low memory: uncond and cond in calls of their own, the uncond first
        self.later: Callable[[UnetPatcher], None] | None = None  # an extension that patches after ours

    def install(self, data_path: Path) -> None:
        super().install(data_path)
        backend = types.ModuleType("backend")
        backend.attention = types.ModuleType("backend.attention")
        backend.attention.attention_function = attention_function
        sys.modules["backend"], sys.modules["backend.attention"] = backend, backend.attention

    def model(self) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            unet = ForgeUNet().eval().requires_grad_(False)
        predictor = types.SimpleNamespace(sigmas=torch.linspace(-3.5, 2.7, 1000).exp())
        kmodel = types.SimpleNamespace(diffusion_model=unet, predictor=predictor)
        self.clean = UnetPatcher(kmodel)
        return types.SimpleNamespace(forge_objects=types.SimpleNamespace(unet=self.clean))

    def run_pass(self, p: Processing, x: Tensor) -> Tensor:
        objects = self.shared.sd_model.forge_objects
        for _ in range(2 if p.is_hr_pass else 1):  # the first one's patches are thrown away
            objects.unet = self.clean
            self.hook("process_before_every_sampling", p, *self._arguments(p.args), x=x, noise=x, c=None, uc=None)
        if self.later is not None:
            objects.unet = objects.unet.clone()
            self.later(objects.unet)
        options = objects.unet.model_options
        denoiser = types.SimpleNamespace(p=p, step=0)
        return self.steps(p, x, lambda noisy, sigma: self._guided(p, denoiser, options, noisy, sigma))

    def _guided(self, p: Processing, denoiser: Any, options: dict[str, Any], x: Tensor, sigma: float) -> Tensor:
        b = x.shape[0]
        params = types.SimpleNamespace(
            x=x, sigma=torch.full((b,), sigma), text_cond=None, text_uncond=None, denoiser=denoiser
        )
        self.tell("cfg_denoiser", params)
        uncond_runs = p.cfg_scale != 1
        marks = [1, *[0] * p.conds] if uncond_runs else [0]
        contexts = {0: cond_of(b, 5), 1: cond_of(b, 5) * 0.1}
        outs: list[tuple[int, Tensor]] = []
        groups = [[m] for m in marks] if self.split else [marks]
        if p.lengths_differ and uncond_runs:
            groups = [[0] * p.conds, [1]]
        for group in groups:
            if self.fault is not None:
                self.fault(len(self.model_calls))
            rows = x.repeat(len(group), 1, 1, 1)
            self.model_calls.append((rows.shape[0], rows.shape[-1]))
            per_call = {**options["transformer_options"], "cond_or_uncond": group, "sigmas": params.sigma}
            context = torch.cat([contexts[m] for m in group])
            scale = (1 + sigma**2) ** 0.5
            out = options_model(self)(rows / scale, params.sigma.repeat(len(group)), context, per_call)
            outs += list(zip(group, (rows - sigma * out * 0.3).chunk(len(group)), strict=True))
        cond = torch.stack([o for m, o in outs if m == 0]).mean(0)
        unconds = [o for m, o in outs if m == 1]
        uncond = unconds[0] if unconds else torch.zeros_like(cond)
        denoised = uncond + (cond - uncond) * p.cfg_scale if unconds else cond
        for function in options.get("post_cfg", []):
            denoised = function(
                {
                    "denoised": denoised,
                    "cond_denoised": cond,
                    "uncond_denoised": uncond,
                    "sigma": params.sigma,
                    "input": x,
                }
            )
        self.tell("cfg_after_cfg", types.SimpleNamespace(x=denoised))
        denoiser.step += 1
        return denoised


def options_model(host: Forge) -> nn.Module:
    return host.clean.model.diffusion_model


@contextmanager
def clean_modules() -> Iterator[None]:
    """Within it, modules may be put into sys.modules; leaving takes them out."""
    before, path = dict(sys.modules), list(sys.path)
    try:
        yield
    finally:
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in ("modules", "gradio", "backend", "tome_sampler_extension", "extension"):
                del sys.modules[name]
        sys.path[:] = path
