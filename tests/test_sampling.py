"""k-diffusion is found lazily: the host's copy, the whole package, or its submodules alone, or one clear error."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tome_sampler import kdiffusion, sampling


def python(code: str, *paths: Path) -> str:
    """What a fresh interpreter prints."""
    prefix = f"import sys; sys.path[:0] = {[str(p) for p in paths]!r}\n"
    done = subprocess.run([sys.executable, "-c", prefix + code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


WITHOUT_KDIFFUSION = """
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "k_diffusion":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
"""


def test_names_are_the_packages_own_objects() -> None:
    for name in sampling.sampler_names():
        assert getattr(sampling, name) is getattr(kdiffusion.load("sampling"), name)
        assert name in dir(sampling)
    assert {"sample_euler", "sample_heun", "sample_dpmpp_2m", "sample_dpmpp_3m_sde"} <= set(sampling.sampler_names())
    assert sampling.get_sigmas_karras is kdiffusion.load("sampling").get_sigmas_karras


def test_a_sampler_that_k_diffusion_gains_appears_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample_new() -> None: ...

    monkeypatch.setattr(kdiffusion.load("sampling"), "sample_new", sample_new, raising=False)
    assert sampling.sample_new is sample_new
    assert "sample_new" in sampling.sampler_names()


def test_an_unknown_name_is_told_with_the_nearest_ones() -> None:
    with pytest.raises(AttributeError, match="sample_dpmpp_2m"):
        _ = sampling.sample_dpmpp_2n
    with pytest.raises(ImportError):
        from tome_sampler.sampling import sample_nothing  # noqa: F401


def test_importing_tome_sampler_imports_no_host() -> None:
    code = "import tome_sampler, tome_sampler.sampling\nprint([m for m in sys.modules if m.split('.')[0] in "
    assert python(code + "('k_diffusion', 'diffusers', 'torchvision', 'gradio', 'modules')])") == "[]"


def test_without_k_diffusion_there_is_one_clear_error_and_nothing_is_left() -> None:
    code = """
import tome_sampler.sampling
try:
    tome_sampler.sampling.sample_euler
except ImportError as error:
    print(error)
print([m for m in sys.modules if m.startswith(('k_diffusion', 'torchvision'))])
"""
    message, left = python(WITHOUT_KDIFFUSION + code).splitlines()
    assert "pip install 'tome-sampler[k-diffusion]'" in message
    assert left == "[]"


def test_the_rest_works_without_k_diffusion() -> None:
    code = """
import torch, tome_sampler
class Model:
    def __call__(self, x, sigma, cond):
        return x * 0.5
out = tome_sampler.CFGDenoiser(Model())(torch.ones(1, 4, 8, 8), torch.ones(1), torch.zeros(1, 2), torch.zeros(1, 2), 3)
print(float(out.mean()))
"""
    assert python(WITHOUT_KDIFFUSION + code) == "0.5"


def test_no_false_torchvision_is_left() -> None:
    code = """
from tome_sampler import kdiffusion
kdiffusion.load("sampling"), kdiffusion.load("external")
print(all(getattr(m, "__file__", None) for n, m in sys.modules.items() if n.split(".")[0] == "torchvision"))
"""
    assert python(code) == "True"


@pytest.mark.parametrize("loaded_by_host", [True, False])
def test_a_hosts_bare_copy_is_used(tmp_path: Path, loaded_by_host: bool) -> None:
    """Forge's k_diffusion has no __init__.py; an installed package would otherwise take its place."""
    bare = tmp_path / "k_diffusion"
    bare.mkdir()
    for file in importlib.metadata.files("k-diffusion") or []:
        if file.parts[0] == "k_diffusion" and file.name in ("sampling.py", "utils.py"):
            shutil.copy(str(file.locate()), bare / file.name)
    with (bare / "sampling.py").open("a") as sampler:
        sampler.write("\ndef sample_of_the_host(): ...\n")
    host = """
import types
for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules.setdefault(name, types.ModuleType(name)).__path__ = []
sys.modules["torchvision.transforms"].functional = sys.modules["torchvision.transforms.functional"]
sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
import importlib.machinery
package = types.ModuleType("k_diffusion"); package.__path__ = [HERE]; sys.modules["k_diffusion"] = package
""".replace("HERE", repr(str(bare)))
    if loaded_by_host:
        host += "import k_diffusion.sampling\n"
    use = "from tome_sampler.sampling import sample_of_the_host\nprint(sample_of_the_host.__module__)"
    assert python(host + use) == "k_diffusion.sampling"
