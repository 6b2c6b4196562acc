"""Reading checkpoints: a diffusers folder, a single file, a name on the hub. Says in a line what is wrong with one."""

from __future__ import annotations

import json
import re
import struct
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tome_sampler.bench.memory import require_memory

PICKLED = (".ckpt", ".pt", ".pth", ".bin")
_PICKLED = (
    "is pickled: reading such a file can run code that somebody put into it. Get the model as safetensors, or, if you "
    "trust its maker, give --allow-pickle"
)
# what diffusers and transformers load where no variant is asked for: not model.fp16.safetensors, nor anything beside it
_LOADED = re.compile(r"(diffusion_pytorch_model|pytorch_model|model)(-\d+-of-\d+)?\.(safetensors|bin)")
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}  # bytes, of what is cast when read
# Guo et al. (2023) trained on a linear schedule, where Stable Diffusion has a scaled linear one
_MOTION_SCHEDULE = {
    "beta_schedule": "linear",
    "timestep_spacing": "linspace",
    "clip_sample": False,
    "steps_offset": 1,
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_PIPELINES = {  # what a key of a single file begins with, and the pipeline that such a file is
    "conditioner.embedders.": "StableDiffusionXLPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
}
_OTHERS = {
    "model.diffusion_model.joint_blocks.": "a Stable Diffusion 3 checkpoint, whose attention cannot be merged",
    "model.diffusion_model.double_blocks.": "a Flux checkpoint, whose attention cannot be merged",
    "double_blocks.": "a Flux transformer, whose attention cannot be merged",
    "lora_": "a LoRA, and no checkpoint",
    "control_model.": "a ControlNet, and no checkpoint",
    "first_stage_model.": "a VAE, or a checkpoint without a text encoder",
    "model.diffusion_model.": "a U-Net alone, without text encoder",
    "down_blocks.": "a U-Net alone; --model must name the diffusers folder that it lies in",
}


def load_pipeline(
    source: str,
    *,
    dtype: torch.dtype,
    device: str,
    config: str | None = None,
    allow_pickle: bool = False,
    motion: str | None = None,
) -> Any:
    """The diffusers pipeline that a path or a name on the hub stands for, on its device.

    Args:
        config: of a single file: a diffusers folder, or name on the hub, with the configuration and the tokenizer of
            its kind, which such files lack. By default diffusers asks the hub for one.
        allow_pickle: read pickled weights too.
        motion: AnimateDiff's motion modules for a Stable Diffusion 1.x model: the folder, or name on the hub, of a
            diffusers `MotionAdapter`.

    Raises:
        ValueError: there is nothing, it is of another kind, it is pickled, memory does not suffice, or a configuration
            is given for what has its own.
        ImportError: there is no diffusers or no transformers.
    """
    try:
        import diffusers
        import transformers  # noqa: F401  (text encoders)
    except ImportError as error:
        raise ImportError(f"checkpoints need {error.name}: pip install 'tome-sampler[generate]'") from None
    path = Path(source).expanduser()
    where = source if path.exists() else f"{source} is no file or folder here, and from the hub it"
    options: dict[str, Any] = {"torch_dtype": dtype}
    on_hub = not path.exists() and _HUB_NAME.fullmatch(source) and path.suffix not in (".safetensors", *PICKLED)
    try:
        if path.is_file():
            kind = _kind_of_file(path, allow_pickle)
            need = max(_size_of([path], dtype), path.stat().st_size)  # all of it is held until it is cast
            require_memory(need, torch.device("cpu"), f"reading {path.name}", _less(dtype))
            if config is not None:
                options |= {"config": config, "local_files_only": Path(config).is_dir()}
            pipe = getattr(diffusers, kind).from_single_file(str(path), **options)
        elif config is not None and (path.is_dir() or on_hub):
            raise ValueError(f"--model-config is {config!r}; it is for a single file, and {source} has its own")
        elif path.is_dir():
            _check_folder(path, dtype, allow_pickle)
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                path, local_files_only=True, use_safetensors=None if allow_pickle else True, **options
            )
        elif on_hub:
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                source, use_safetensors=None if allow_pickle else True, **options
            )
        else:
            raise ValueError(f"there is no {source}; a model is a safetensors file, a diffusers folder or a hub name")
    except ValueError as error:
        raise ValueError(_first_line(error)) from error
    except Exception as error:  # diffusers and the hub raise all sorts of them, with pages of advice
        raise ValueError(f"{where} cannot be read: {_first_line(error)}") from error
    if motion is not None:
        pipe = _moving(pipe, motion, dtype, allow_pickle)
    pipe.set_progress_bar_config(disable=True)
    _check_device(pipe, device, dtype)
    return pipe.to(device)


def _moving(pipe: Any, motion: str, dtype: torch.dtype, allow_pickle: bool) -> Any:
    """A pipeline with AnimateDiff's motion modules put in, and the noise levels that these were trained on."""
    from diffusers import AnimateDiffPipeline, DDIMScheduler, MotionAdapter

    if type(pipe).__name__ != "StableDiffusionPipeline":
        raise ValueError(f"--motion is for Stable Diffusion 1.x models, and this is a {type(pipe).__name__}")
    folder = Path(motion).expanduser()
    if folder.is_dir():
        _check_weights({"": folder}, motion, dtype, allow_pickle)
    elif folder.exists():
        raise ValueError(f"{motion} is a file; motion modules are the folder or the hub name of a MotionAdapter")
    elif not _HUB_NAME.fullmatch(motion):
        raise ValueError(f"there is no {motion}; motion modules are the folder or the hub name of a MotionAdapter")
    try:
        adapter = MotionAdapter.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            local_files_only=folder.is_dir(),
        )
        parts = {**pipe.components, "motion_adapter": adapter}
        for unused in ("safety_checker", "image_encoder"):
            parts.pop(unused, None)
        parts["scheduler"] = DDIMScheduler.from_config(pipe.scheduler.config, **_MOTION_SCHEDULE)
        return AnimateDiffPipeline(**parts)
    except Exception as error:  # as above; modules of another width are told of by torch
        raise ValueError(f"motion modules {motion} cannot be used: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return textwrap.shorten(str(error).strip().partition("\n")[0], 300) or type(error).__name__


def _check_device(pipe: Any, device: str, dtype: torch.dtype) -> None:
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    need = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    if not device.startswith("cpu"):
        require_memory(need, torch.device(device), "the weights", _less(dtype))


def _less(dtype: torch.dtype) -> str:
    """What takes less memory than reading weights as a dtype."""
    return "; --dtype bf16 takes half" if dtype == torch.float32 else ""


def _kind_of_file(path: Path, allow_pickle: bool) -> str:
    """The name of the pipeline class that a single file holds."""
    if path.suffix in PICKLED:
        if not allow_pickle:
            raise ValueError(f"{path.name} {_PICKLED}")
        held = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)  # str: torch 2.1 maps no Path
        names = list(held.get("state_dict", held))
    else:
        names = list(_header(path))
    for start, kind in _PIPELINES.items():
        if any(name.startswith(start) for name in names):
            wrong = next((what for key, what in _OTHERS.items() if "blocks" in key and _any(names, key)), None)
            if wrong is None:
                return kind
    what = next((what for start, what in _OTHERS.items() if _any(names, start)), "nothing that is known")
    raise ValueError(f"{path.name} holds {what}; single files may be Stable Diffusion 1.x, 2.x or SDXL checkpoints")


def _any(names: list[str], start: str) -> bool:
    return any(name.startswith(start) for name in names)


def _header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors, by their names."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError
            return {name: said for name, said in json.loads(file.read(length)).items() if name != "__metadata__"}
    except (ValueError, AttributeError, struct.error):
        raise ValueError(f"{path.name} is no safetensors file, or is cut short") from None


def _size_of(files: Sequence[Path], dtype: torch.dtype) -> float:
    """Bytes that weights take once they are read as a dtype. Of pickled ones nobody knows what they are."""
    size = 0.0
    for file in files:
        if file.suffix != ".safetensors":
            size += file.stat().st_size
            continue
        for said in _header(file).values():
            start, end = said["data_offsets"]
            width = _FLOATS.get(said["dtype"])
            size += (end - start) * (dtype.itemsize / width if width else 1)
    return size


def _check_folder(path: Path, dtype: torch.dtype, allow_pickle: bool) -> None:
    index = path / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{path} has no model_index.json: it is not the folder of a diffusers pipeline")
    try:
        said = json.loads(index.read_text())
        parts = [name for name, value in said.items() if isinstance(value, list) and value[:1] != [None]]
    except (ValueError, AttributeError):
        raise ValueError(f"{index} is damaged: it does not hold what diffusers writes") from None
    _check_weights({f"{name}/": path / name for name in parts}, path.name, dtype, allow_pickle)


def _check_weights(folders: Mapping[str, Path], what: str, dtype: torch.dtype, allow_pickle: bool) -> None:
    """Of the folders of a model's parts, that their weights can be read: those that will be, and nothing beside them.
    A folder that somebody cloned holds the same weights several times over."""
    read: list[Path] = []
    for start, folder in folders.items():
        found = [file for file in sorted(folder.glob("*")) if _LOADED.fullmatch(file.name)]
        safe = [file for file in found if file.suffix == ".safetensors"]
        if found and not safe and not allow_pickle:
            raise ValueError(f"{start}{found[0].name} {_PICKLED}")
        read += safe or found
    require_memory(_size_of(read, dtype), torch.device("cpu"), f"reading {what}", _less(dtype))
