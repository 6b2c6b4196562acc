"""A running WebUI that has the extension, driven from outside: ``make test-webui URL=http://127.0.0.1:7860``.

Needs ``--api`` on the WebUI, and Chromium. Screenshots are kept in out/webui.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest

URL = os.environ.get("WEBUI_URL", "").rstrip("/")
if not URL:
    pytest.skip("WEBUI_URL names no running WebUI", allow_module_level=True)

import httpx
import webuiapi
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "out" / "webui"
STEPS = int(os.environ.get("WEBUI_STEPS", "3"))
SIZE = 256  # 1024 tokens at SD 1.5's finest level, just enough to be merged
TITLE = "ToMe Sampler"
ON = {"preset": "balanced"}


def post(path: str, **body: Any) -> httpx.Response:
    return httpx.post(URL + path, json=body, timeout=900)


def get(path: str) -> Any:
    answer = httpx.get(URL + path, timeout=60)
    answer.raise_for_status()
    return answer.json()


def is_forge() -> bool:
    return "forge_preset" in get("/sdapi/v1/options")


def generate(args: Any = None, kind: str = "txt2img", **settings: Any) -> tuple[list[bytes], str]:
    """Pixels of the pictures, and the first one's infotext."""
    body = {
        "prompt": "a red fox in the snow",
        "seed": 7,
        "steps": STEPS,
        "width": SIZE,
        "height": SIZE,
        "cfg_scale": 5,
        "sampler_name": "Euler",
        "do_not_save_samples": True,
        **settings,
    }
    if args is not None:
        body["alwayson_scripts"] = {TITLE: {"args": args}}
    answer = post(f"/sdapi/v1/{kind}", **body)
    assert answer.status_code == 200, answer.text[:500]
    found = answer.json()
    pictures = [Image.open(io.BytesIO(base64.b64decode(image))) for image in found["images"]]
    return [picture.tobytes() for picture in pictures], json.loads(found["info"])["infotexts"][0]


def last() -> dict[str, Any]:
    found: dict[str, Any] = get("/tome-sampler/v1/last")
    return found


OVERRIDDEN = (
    *("sd_model_checkpoint", "token_merging_ratio", "skip_early_cond", "s_min_uncond", "batch_cond_uncond"),
    "emphasis",
)


@pytest.fixture(scope="module", autouse=True)
def _options() -> None:
    """The hosts put back after a request only what their settings file holds: write what is overridden here into it."""
    options = get("/sdapi/v1/options")
    post("/sdapi/v1/options", **{name: options[name] for name in OVERRIDDEN if name in options})


@pytest.fixture(scope="module")
def plain() -> list[bytes]:
    """The picture without the extension's doing, made before anything else."""
    return generate()[0]


def test_off_is_the_plain_picture_byte_for_byte(plain: list[bytes]) -> None:
    for args in ([False], [{"preset": "off"}], [{"ratio": 0.0}]):
        assert generate(args)[0] == plain, args


def test_on_merges_and_repeats_itself(plain: list[bytes]) -> None:
    merged, text = generate([ON])
    assert merged != plain
    assert f"{TITLE}: Balanced" in text
    statistics = last()["passes"][0]["statistics"]
    assert statistics["tokens_after"] < statistics["tokens_before"]
    assert statistics["importance_merged"] is not None
    assert generate([ON])[0] == merged
    assert generate()[0] == plain


def test_the_early_part_has_its_own_ratio() -> None:
    fixed = {"preset": "balanced", "ratio": 0.5, "threshold": None, "early_ratio": 0.75, "min_tokens": 0}
    merged, text = generate([fixed])
    assert "ToMe presets: 2" in text
    steps = last()["passes"][0]["statistics"]["steps"]
    assert {step["sigma"] > 3 for step in steps} == {True, False}
    for step in steps:
        for layer in step["layers"].values():
            share = 1 - layer["tokens_after"] / layer["tokens_before"]
            assert share == pytest.approx(0.75 if step["sigma"] > 3 else 0.5, abs=0.01)
    without, text = generate([{**fixed, "early_ratio": None}])
    assert "ToMe early ratio: off" in text
    assert without != merged


def test_whole_blocks_in_all_of_a_run_and_in_its_early_part_alone(plain: list[bytes]) -> None:
    fixed = {"preset": "balanced", "ratio": 0.5, "threshold": None, "early_ratio": 0.75, "min_tokens": 0}
    pictures, names = [plain, generate([fixed])[0]], []
    for modules, early in ((["block"], None), (["attn1"], ["block"])):
        asked = {**fixed, "modules": modules, "early_modules": early}
        merged, text = generate([asked])
        assert f"ToMe {'modules' if early is None else 'early modules'}: block" in text
        steps = last()["passes"][0]["statistics"]["steps"]
        names.append({(step["sigma"] > 3, name.endswith("attn1")) for step in steps for name in step["layers"]})
        for step in steps:
            for layer in step["layers"].values():
                share = 1 - layer["tokens_after"] / layer["tokens_before"]
                assert share == pytest.approx(0.75 if step["sigma"] > 3 else 0.5, abs=0.01)
        assert not last()["passes"][0]["statistics"]["notes"]
        assert merged not in pictures
        assert generate([asked])[0] == merged
        pictures.append(merged)
    assert names == [{(True, False), (False, False)}, {(True, False), (False, True)}]
    assert generate()[0] == plain


def test_a_picture_is_the_same_alone_and_in_a_batch() -> None:
    # the host itself is not bit-exact here: its own batch of plain pictures says by how much
    alone, batch = generate()[0][0], generate(batch_size=2)[0]
    own = difference(alone, batch[-2])
    merged, together = generate([ON])[0][0], generate([ON], batch_size=2)[0]
    assert difference(merged, together[-2]) <= own + 1
    assert together[-1] != together[-2]


def difference(a: bytes, b: bytes) -> int:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def mean_difference(a: bytes, b: bytes) -> float:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) / len(a)


def test_every_sampler_of_the_host(plain: list[bytes]) -> None:
    failed = []
    for sampler in (s["name"] for s in get("/sdapi/v1/samplers")):
        if sampler == "DPM adaptive" and "adaptive" not in os.environ.get("WEBUI_SLOW", ""):
            continue  # a hundred calls
        body = {"sampler_name": sampler, "steps": 3}
        answer = post(
            "/sdapi/v1/txt2img",
            prompt="a fox",
            seed=7,
            width=SIZE,
            height=SIZE,
            cfg_scale=5,
            do_not_save_samples=True,
            alwayson_scripts={TITLE: {"args": [ON]}},
            **body,
        )
        found = last()
        merged = found["passes"][0]["statistics"]["merged_fraction"] if found["passes"] else 0
        if answer.status_code != 200 or found["error"] or found["stood_aside"] or not merged:
            failed.append((sampler, answer.status_code, found["summary"]))
    assert not failed
    assert generate()[0] == plain


def test_hires_fix(plain: list[bytes]) -> None:
    settings = {
        "enable_hr": True,
        "hr_scale": 1.5,
        "hr_upscaler": "Latent",
        "denoising_strength": 0.6,
        "hr_second_pass_steps": 2,
        "hr_cfg": 5,
        "hr_additional_modules": ["Use same choices"],
    }
    if not is_forge():
        settings = {k: v for k, v in settings.items() if k not in ("hr_cfg", "hr_additional_modules")}
    _, text = generate([{**ON, "hires": {"ratio": 0.3}}], **settings)
    first, second = last()["passes"]
    assert (first["hires"], second["hires"]) == (False, True)
    assert second["statistics"]["merged_fraction"] > 0
    assert "ToMe hires ratio: 0.3" in text
    assert generate()[0] == plain


def test_img2img_and_inpainting() -> None:
    picture = Image.new("RGB", (SIZE, SIZE), (90, 120, 60))
    mask = Image.new("L", (SIZE, SIZE), 0)
    mask.paste(255, (64, 64, 192, 192))
    settings: dict[str, Any] = {"init_images": [encoded(picture)], "denoising_strength": 0.7, "steps": 5}
    for more in ({}, {"mask": encoded(mask)}):
        generate(kind="img2img", **settings, **more)  # Forge's first one with a mask is another than the next, unmerged
        before = generate(kind="img2img", **settings, **more)[0]
        merged = generate([ON], kind="img2img", **settings, **more)[0]
        assert last()["passes"][0]["statistics"]["merged_fraction"] > 0
        assert merged != before
        assert generate(kind="img2img", **settings, **more)[0] == before


def encoded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    "settings",
    [
        {"prompt": "a fox AND the snow :0.5"},
        {"prompt": "a fox " * 80},
        {"prompt": "[a fox:the snow:0.5]"},
        {"cfg_scale": 1},
        {"n_iter": 2},
        {"override_settings": {"batch_cond_uncond": False}},
        {"override_settings": {"s_min_uncond": 3.0}},
        {"override_settings": {"skip_early_cond": 0.5}},
    ],
)
def test_prompts_and_guidance_of_all_kinds(settings: dict[str, Any]) -> None:
    if is_forge() and "batch_cond_uncond" in settings.get("override_settings", {}):
        pytest.skip("Forge decides that by memory")
    merged, _ = generate([ON], **settings)
    found = last()
    assert not found["error"]
    assert not found["stood_aside"]
    assert found["passes"][0]["statistics"]["merged_fraction"] > 0
    assert generate([ON], **settings)[0] == merged


def test_cond_and_uncond_in_calls_of_their_own() -> None:
    settings = {"prompt": "a fox " * 200}  # more than four times as long as the empty one, which Forge will not batch
    before = generate(**settings)[0]
    merged, _ = generate([ON], **settings)
    statistics = last()["passes"][0]["statistics"]
    assert len(statistics["steps"]) == 2 * STEPS
    assert statistics["merged_fraction"] > 0
    assert statistics["importance_merged"] is not None
    assert mean_difference(merged[0], before[0]) > 0
    assert generate([ON], **settings)[0] == merged
    assert generate(**settings)[0] == before


def test_every_checkpoint_and_back(plain: list[bytes]) -> None:
    names = [model["model_name"] for model in get("/sdapi/v1/sd-models")]
    for name in names[:4]:
        override = {"override_settings": {"sd_model_checkpoint": name}, "width": 512, "height": 512}
        before = generate(**override)[0]
        merged, _ = generate([{**ON, "min_tokens": 0}], **override)
        assert last()["passes"][0]["statistics"]["merged_fraction"] > 0, name
        assert merged != before, name
        assert generate(**override)[0] == before, name
    assert generate()[0] == plain


def test_a_refiner() -> None:
    names = [model["model_name"] for model in get("/sdapi/v1/sd-models")]
    if len(names) < 2:
        pytest.skip("one checkpoint only")
    settings = {"refiner_checkpoint": names[1], "refiner_switch_at": 0.5, "steps": 4}
    before = generate(**settings)[0]
    merged, _ = generate([ON], **settings)
    assert not last()["error"]
    steps = last()["passes"][0]["statistics"]["steps"]
    assert len(steps) >= 4
    assert all(step["merged_fraction"] > 0 for step in steps)  # the refiner's too
    assert merged != before
    assert generate([ON], **settings)[0] == merged
    assert generate(**settings)[0] == before


def test_loras_and_switching_them(plain: list[bytes]) -> None:
    names = [lora["name"] for lora in get("/sdapi/v1/loras")][:2]
    if len(names) < 2:
        pytest.skip("needs two LoRAs for the checkpoint in the host's models/Lora")
    prompts = [f"a red fox in the snow <lora:{name}:1>" for name in names]
    first, second = (generate(prompt=prompt)[0] for prompt in prompts)
    assert len({first[0], second[0], plain[0]}) == 3  # they act without us
    later = {**ON, "early_ratio": None}  # random weights make no picture that merging early would leave alone
    merged = [generate([later], prompt=prompt)[0] for prompt in (*prompts, "a red fox in the snow")]
    for picture, before in zip(merged, (first, second, plain), strict=True):
        others = [mean_difference(picture[0], other[0]) for other in (first, second, plain) if other is not before]
        assert 0 < mean_difference(picture[0], before[0]) < 0.5 * min(others)  # each stays near its own
    assert generate([later], prompt=prompts[0])[0] == merged[0]
    assert generate(prompt=prompts[1])[0] == second
    assert generate()[0] == plain


BUILT_IN = ("freeu", "perturbed", "selfattention", "multidiffusion", "stylealign", "kohya", "latentmod", "dynamicthres")


def test_beside_the_hosts_own_extensions(plain: list[bytes]) -> None:
    scripts = get("/sdapi/v1/script-info")
    found = [s for s in scripts if s["is_alwayson"] and not s["is_img2img"] and s["name"].lower().startswith(BUILT_IN)]
    if not found:
        pytest.skip("this host has none of them built in")
    usual = mean_difference(generate([ON])[0][0], plain[0])
    acted: dict[str, bool] = {}
    for script in found:
        theirs = {script["name"]: {"args": [True, *(a["value"] for a in script["args"][1:])]}}
        if script["name"].lower().startswith("multidiffusion"):
            theirs[script["name"]]["args"][2:4] = [192, 192]  # smaller than the picture, or there are no tiles
        before = generate(alwayson_scripts=theirs)[0]
        acted.update({script["name"]: before != plain})  # StyleAlign does only in a batch
        merged = generate(alwayson_scripts={**theirs, TITLE: {"args": [ON]}})[0]
        assert not last()["error"], script["name"]
        theirs_alone = mean_difference(before[0], plain[0])
        assert mean_difference(merged[0], before[0]) <= max(theirs_alone, 2 * usual), script["name"]
        assert generate(alwayson_scripts=theirs)[0] == before, script["name"]
    assert sum(acted.values()) >= len(acted) - 1
    assert generate()[0] == plain


def rotated(pixels: bytes) -> str:
    return encoded(Image.frombytes("RGB", (SIZE, SIZE), pixels).transpose(Image.Transpose.ROTATE_90))


def always_on() -> dict[str, Any]:
    """The txt2img scripts of the host and its extensions, by name."""
    return {s["name"]: s for s in get("/sdapi/v1/script-info") if s["is_alwayson"] and not s["is_img2img"]}


def test_beside_a_reference_of_controlnet(plain: list[bytes]) -> None:
    if "controlnet" not in always_on():
        pytest.skip("this host has no ControlNet")
    unit = {
        "enabled": True,
        "module": "reference_only",
        "model": "None",
        "image": rotated(plain[0]),
        "processor_res": SIZE,
        "threshold_a": 0.5,
    }
    theirs = {"ControlNet": {"args": [unit]}}
    before = generate(alwayson_scripts=theirs)[0]
    assert before[0] != plain[0]
    merged = generate(alwayson_scripts={**theirs, TITLE: {"args": [ON]}})[0]
    assert not last()["error"]
    assert mean_difference(merged[0], before[0]) <= mean_difference(merged[0], plain[0])
    if not is_forge():  # the reference's pass is part of the model's call there
        assert merged[0] == before[0]
        assert "nothing was merged; another extension drives the blocks" in last()["summary"]
    assert generate(alwayson_scripts=theirs)[0] == before
    assert generate()[0] == plain


def models_of_controlnet(kind: str) -> list[str]:
    if "controlnet" not in always_on():
        return []
    return [name for name in get("/controlnet/model_list")["model_list"] if kind in name.lower()]


@pytest.mark.parametrize("kind", ["lllite", "canny"])
def test_beside_models_of_controlnet(plain: list[bytes], kind: str) -> None:
    names = models_of_controlnet(kind)
    if not names:
        pytest.skip(f"needs a model of ControlNet for the checkpoint, with {kind} in its name")
    unit = {"enabled": True, "module": "None" if is_forge() else "none", "model": names[0], "image": rotated(plain[0])}
    theirs = {"ControlNet": {"args": [unit]}}
    before = generate(alwayson_scripts=theirs)[0]
    assert before[0] != plain[0]
    merged = generate(alwayson_scripts={**theirs, TITLE: {"args": [ON]}})[0]
    found = last()
    assert not found["error"]
    if kind == "lllite":
        assert any("LLLite" in note for note in found["passes"][0]["statistics"]["notes"])
    if kind != "lllite" or is_forge():  # where it has none of the layers, there is merging
        assert found["passes"][0]["statistics"]["merged_fraction"] > 0
        assert merged[0] != before[0]
    assert mean_difference(merged[0], before[0]) <= mean_difference(merged[0], plain[0])
    assert generate(alwayson_scripts=theirs)[0] == before
    assert generate()[0] == plain


@pytest.mark.parametrize("method", ["MultiDiffusion", "Mixture of Diffusers"])
def test_beside_tiled_diffusion(plain: list[bytes], method: str) -> None:
    if "tiled diffusion" not in always_on():
        pytest.skip("this host has no Tiled Diffusion")
    tile = SIZE // 16
    theirs = {"Tiled Diffusion": {"args": [True, method, False, True, SIZE, SIZE, tile, tile, 4, 4]}}
    before = generate(alwayson_scripts=theirs)[0]
    assert before != plain
    assert generate(alwayson_scripts={**theirs, TITLE: {"args": [ON]}})[0] == before
    assert "a part of the picture" in last()["summary"]
    assert generate()[0] == plain


@pytest.mark.parametrize("mode", ["Attention", "Latent"])
def test_beside_a_regional_prompter(plain: list[bytes], mode: str) -> None:
    if "regional prompter" not in always_on():
        pytest.skip("this host has no Regional Prompter")
    layout = [True, False, "Matrix", "Columns", "Mask", "Prompt", "1,1", "0.2", False, False, False, mode, [False]]
    theirs = {"Regional Prompter": {"args": [*layout, "0", "0", "0.4", None, "0", "0", False]}}
    settings = {"prompt": "a fox BREAK the sea", "override_settings": {"emphasis": "No norm"}}
    before = generate(alwayson_scripts=theirs, **settings)[0]
    assert before != generate(**settings)[0]
    merged = generate(alwayson_scripts={**theirs, TITLE: {"args": [ON]}}, **settings)[0]
    assert last()["passes"][0]["statistics"]["merged_fraction"] > 0
    assert 0 < mean_difference(merged[0], before[0]) < mean_difference(merged[0], plain[0])
    assert generate(alwayson_scripts=theirs, **settings)[0] == before
    assert generate()[0] == plain


def test_hypertile_goes_first() -> None:
    if "hypertile_enable_unet" not in get("/sdapi/v1/options"):
        pytest.skip("this host has no Hypertile")
    generate([ON], override_settings={"hypertile_enable_unet": True})
    assert "Hypertile" in last()["stood_aside"]
    post("/sdapi/v1/options", hypertile_enable_unet=False)
    generate([ON])
    assert last()["stood_aside"] is None


def test_the_hosts_own_token_merging_goes_first(plain: list[bytes]) -> None:
    _, text = generate([ON], override_settings={"token_merging_ratio": 0.5})
    assert "token merging" in last()["stood_aside"]
    assert "stood aside" in text
    # where the host's settings file lacks the key the override sticks, with or without us
    post("/sdapi/v1/options", token_merging_ratio=0)
    assert generate()[0] == plain


@pytest.mark.parametrize(
    ("args", "message"),
    [([{"ratoi": 1}], "no argument 'ratoi'"), ([{"ratio": 2}], "ratio is 2"), ([True, "Best"], "preset is 'Best'")],
)
def test_what_is_wrong_is_said(args: list[Any], message: str) -> None:
    answer = post(
        "/sdapi/v1/txt2img", prompt="x", steps=1, width=64, height=64, alwayson_scripts={TITLE: {"args": args}}
    )
    assert answer.status_code == 422
    assert message in answer.text


def test_an_interrupt_leaves_nothing(plain: list[bytes]) -> None:
    answers: list[httpx.Response] = []
    body = {"prompt": "a fox", "steps": 60, "width": SIZE, "height": SIZE, "alwayson_scripts": {TITLE: {"args": [ON]}}}
    thread = threading.Thread(target=lambda: answers.append(post("/sdapi/v1/txt2img", **body)))
    thread.start()
    for _ in range(300):
        if get("/sdapi/v1/progress?skip_current_image=true")["state"]["sampling_step"] >= 2:
            break
        time.sleep(0.3)
    post("/sdapi/v1/interrupt")
    thread.join()
    assert answers[0].status_code == 200
    assert len(last()["passes"][0]["statistics"]["steps"]) < 60
    assert generate()[0] == plain


def test_an_exception_in_sampling_leaves_nothing(plain: list[bytes]) -> None:
    # the second pass has no denoising strength, which the API lets through and sampling does not
    answer = post(
        "/sdapi/v1/txt2img",
        prompt="a fox",
        seed=7,
        steps=2,
        width=SIZE,
        height=SIZE,
        enable_hr=True,
        hr_upscaler="Latent",
        alwayson_scripts={TITLE: {"args": [ON]}},
    )
    assert answer.status_code == 500
    assert generate()[0] == plain


def test_the_infotext_reproduces_the_picture() -> None:
    if is_forge():
        pytest.skip("Forge's request field `infotext` is broken")
    args = [{"preset": "fast", "ratio": 0.7, "threshold": None, "early_ratio": 0.5, "early_sigma": 2, "start": 0.1}]
    merged, text = generate(args)
    answer = post("/sdapi/v1/txt2img", infotext=text, do_not_save_samples=True)
    assert Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).tobytes() == merged[0]
    config = last()["passes"][0]["config"]
    assert (config["ratio"], config["early_ratio"], config["early_sigma"]) == (0.7, 0.5, 2)


def test_an_infotext_of_before_the_early_part_reproduces_the_picture() -> None:
    if is_forge():
        pytest.skip("Forge's request field `infotext` is broken")
    then = {"ratio": 0.5, "threshold": 0.9, "floor": 0.3, "refresh": "sigma ratio 6", "early_ratio": None}
    merged, text = generate([{"preset": "balanced", **then}])
    old = re.sub(r", ToMe (?!Sampler)[^,]+", "", text)
    assert "ToMe Sampler: Balanced, " in old
    answer = post("/sdapi/v1/txt2img", infotext=old, do_not_save_samples=True)
    assert Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]))).tobytes() == merged[0]
    assert last()["passes"][0]["config"]["early_ratio"] is None
    assert generate([ON])[0] != merged


def test_a_grid(plain: list[bytes]) -> None:
    options = get("/sdapi/v1/script-info")
    grid = next(s for s in options if s["name"] == "x/y/z plot" and not s["is_img2img"])
    choices = grid["args"][0]["choices"]

    def cells(axis: str, text: str, chosen: list[str]) -> list[bytes]:
        number = choices.index(f"[{TITLE}] {axis}")
        args = [number, text, chosen, 0, "", [], 0, "", [], False, True, False, False, False, False, False, 0, False]
        found, _ = generate([ON], script_name="x/y/z plot", script_args=args[: len(grid["args"])])
        return [picture for picture in found if len(picture) == len(plain[0])]

    pictures = cells("Merge ratio", "0, 0.5", [])
    assert plain[0] in pictures
    assert len(set(pictures)) >= 2
    assert len(set(cells("Early ratio", "off, 0.9", ["off", "0.9"]))) >= 2
    assert generate()[0] == plain


def test_the_documentations_examples(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "api.md").read_text("utf-8")
    url = urlparse(URL)
    shell = re.findall(r"```bash\n(.*?)```", text, re.S)
    assert len(shell) == 2
    for block in shell:
        done = subprocess.run(
            ["bash", "-ec", block.replace("http://127.0.0.1:7860", URL)], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "ToMe Sampler: Balanced" in done.stdout or "Last run" in done.stdout
    assert Image.open(tmp_path / "groups.png").size[0] > 100
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    code = block.replace('"127.0.0.1"', repr(url.hostname)).replace("7860", str(url.port))
    exec(compile(code, "docs/api.md", "exec"), {"webuiapi": webuiapi})
    assert last()["preset"] == "Fast"


def test_routes() -> None:
    assert get("/tome-sampler/v1/version")["title"] == TITLE
    assert "ratio" in get("/tome-sampler/v1/schema")["properties"]
    assert get("/tome-sampler/v1/presets")["Fast"]["early_ratio"] == 0.9
    generate([ON])
    for kind in ("groups", "importance"):
        number = len(last()["passes"][0:1]) and last()["passes"][0]["maps"] - 1
        answer = httpx.get(f"{URL}/tome-sampler/v1/last/overlay/{number}/{kind}", timeout=60)
        assert answer.headers["content-type"] == "image/png"
        assert Image.open(io.BytesIO(answer.content)).size[0] > 100
    for wrong in ("999/groups", "0/other", "-1/groups"):
        assert httpx.get(f"{URL}/tome-sampler/v1/last/overlay/{wrong}", timeout=60).status_code == 404


# -- in the browser


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
        )
        found = browser.new_page(viewport={"width": 1400, "height": 1800})
        found.set_default_timeout(120_000)
        found.goto(URL)
        found.wait_for_selector("#txt2img_prompt textarea")
        # small and quick pictures
        for name, value in (("width", SIZE), ("height", SIZE), ("steps", STEPS)):
            field = found.locator(f"#txt2img_{name} input[type=number]")
            field.fill(str(value))
            field.press("Tab")
        found.locator("#txt2img_prompt textarea").fill("a red fox in the snow")
        yield found
        browser.close()


def shot(page: Page, name: str) -> None:
    page.screenshot(path=SHOTS / f"{'forge' if is_forge() else 'a1111'}-{name}.png")


def press_generate(page: Page) -> None:
    """Until the host's log line has changed."""
    before = (
        page.locator("#html_info_txt2img").first.inner_text() + page.locator("#html_log_txt2img").first.inner_html()
    )
    page.locator("#txt2img_generate").click()
    page.wait_for_function(
        "before => document.querySelector('#html_info_txt2img').innerText +"
        " document.querySelector('#html_log_txt2img').innerHTML !== before"
        " && !document.querySelector('#txt2img_results .progressDiv')",
        arg=before,
        timeout=600_000,
    )
    time.sleep(1)


def open_accordion(page: Page) -> None:
    accordion = page.locator("#script_txt2img_tome_sampler_enabled")
    if not page.locator("#script_txt2img_tome_sampler_ratio").is_visible():
        accordion.locator("> .label-wrap").click()
    page.locator("#script_txt2img_tome_sampler_ratio").wait_for(state="visible")


def test_page_accordion_and_generate(page: Page) -> None:
    open_accordion(page)
    shot(page, "accordion")
    press_generate(page)
    expect(page.locator("#html_info_txt2img").first).to_contain_text("ToMe Sampler: Balanced")
    expect(page.locator("#script_txt2img_tome_sampler_status").first).to_contain_text("of the tokens merged")
    seen = "e => { let o = 1; for (; e; e = e.parentElement) o *= getComputedStyle(e).opacity; return o }"
    assert page.locator(".tome-sampler-status:visible").first.evaluate(seen) > 0.5
    shot(page, "generated")


def test_page_a_control_moved_by_hand_makes_the_preset_custom(page: Page) -> None:
    field = page.locator("#script_txt2img_tome_sampler_ratio input[type=number]")
    field.fill("0.25")
    field.press("Tab")
    expect(page.locator("#script_txt2img_tome_sampler_preset input")).to_have_value("Custom")
    early = page.locator("#script_txt2img_tome_sampler_early_ratio input")
    early.fill("0.6")
    early.press("Enter")
    hint = page.locator("#script_txt2img_tome_sampler_hint").first
    expect(hint).to_contain_text("Merges 60% of the tokens of a layer while sigma is above 3, then 20% to 25%")
    press_generate(page)
    expect(page.locator("#html_info_txt2img").first).to_contain_text("ToMe ratio: 0.25")
    expect(page.locator("#html_info_txt2img").first).to_contain_text("ToMe early ratio: 0.6")
    early.click()
    page.locator("ul.options li", has_text=re.compile(r"off\s*$")).first.click()
    expect(hint).to_contain_text("Merges 20% to 25% of the tokens of a layer.")


def test_page_a_preset_writes_the_controls(page: Page) -> None:
    chosen = page.locator("#script_txt2img_tome_sampler_preset input")
    chosen.click()
    page.locator("ul.options li", has_text=re.compile(r"Fast\s*$")).first.click()
    expect(page.locator("#script_txt2img_tome_sampler_ratio input[type=number]")).to_have_value("0.75")
    expect(page.locator("#script_txt2img_tome_sampler_early_ratio input")).to_have_value("0.9")
    expect(page.locator("#script_txt2img_tome_sampler_hint").first).to_contain_text("90%")


def test_page_paste(page: Page) -> None:
    text = page.locator("#txt2img_prompt textarea")
    text.fill(
        "a blue fox\nSteps: 3, Sampler: Euler, CFG scale: 5, Seed: 3, Size: 256x256, "
        "ToMe Sampler: Quality, ToMe presets: 2, ToMe importance: 0.4, ToMe modules: attn1+ff"
    )
    page.locator("#txt2img_tools #paste").click()
    expect(page.locator("#script_txt2img_tome_sampler_importance input[type=number]")).to_have_value("0.4")
    expect(page.locator("#script_txt2img_tome_sampler_preset input")).to_have_value("Quality")
    expect(page.locator("#script_txt2img_tome_sampler_early_ratio input")).to_have_value("0.5")
    expect(text).to_have_value("a blue fox")
    text.fill("a fox\nSteps: 3, Sampler: Euler, CFG scale: 5, Seed: 3, Size: 256x256, ToMe Sampler: Fast")
    page.locator("#txt2img_tools #paste").click()  # of before there was an early part
    expect(page.locator("#script_txt2img_tome_sampler_ratio input[type=number]")).to_have_value("0.9")
    expect(page.locator("#script_txt2img_tome_sampler_early_ratio input")).to_have_value("off")
    expect(page.locator("#script_txt2img_tome_sampler_preset input")).to_have_value("Custom")
    text.fill("a fox\nSteps: 3, Sampler: Euler, CFG scale: 5, Seed: 3, Size: 256x256")
    page.locator("#txt2img_tools #paste").click()
    expect(page.locator("#script_txt2img_tome_sampler_ratio")).not_to_be_visible()
    open_accordion(page)


def test_page_interrupt(page: Page) -> None:
    steps = page.locator("#txt2img_steps input[type=number]")
    steps.fill("60")
    steps.press("Tab")
    page.locator("#txt2img_generate").click()
    page.locator("#txt2img_interrupt").wait_for(state="visible")
    time.sleep(4)
    page.locator("#txt2img_interrupt").click()
    page.locator("#txt2img_generate").wait_for(state="visible")
    steps.fill(str(STEPS))
    steps.press("Tab")
    time.sleep(2)
    press_generate(page)


def test_page_tab_and_measure(page: Page) -> None:
    page.locator("#tabs > .tab-nav button", has_text=TITLE).click()
    page.locator("#tome_sampler_refresh").click()
    expect(page.locator("#tome_sampler_summary svg").first).to_be_visible()
    expect(page.locator("#tome_sampler_map img").first).to_be_visible()
    over = page.locator(".tome-sampler-over").first
    over.hover()
    expect(page.locator(".tome-sampler-group").first).to_contain_text(re.compile("merged into|kept by itself"))
    assert over.locator("canvas").evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)"
    )
    shot(page, "last-run")
    page.locator("#tome_sampler_tabs > .tab-nav button", has_text="Measure").click()
    page.locator("#tome_sampler_measure").click()
    expect(page.locator("#tome_sampler_measured").first).to_contain_text("%", timeout=120_000)
    expect(page.locator("#tome_sampler_measured").first).to_contain_text("PSNR", timeout=900_000)
    text = page.locator("#tome_sampler_measured").first.inner_text()
    assert 30 < float(re.findall(r"([\d.]+) dB", text)[0]) < 99  # the same seed, and merged
    slider = page.locator(".tome-sampler-compare input")
    slider.evaluate("e => { e.value = 20; e.dispatchEvent(new Event('input', {bubbles: true})); }")
    assert page.locator(".tome-sampler-compare").get_attribute("style") == "--split: 20%;"
    shot(page, "measure")


def test_page_presets(page: Page) -> None:
    page.locator("#tabs > .tab-nav button", has_text=TITLE).click()
    page.locator("#tome_sampler_tabs > .tab-nav button", has_text="Presets").click()
    page.locator("#tome_sampler_own_name textarea, #tome_sampler_own_name input").first.fill("e2e preset")
    page.locator("#tome_sampler_own_save").click()
    expect(page.locator("#tome_sampler_own_said").first).to_contain_text("Saved")
    assert "e2e preset" in get("/tome-sampler/v1/presets")
    page.locator("#tome_sampler_own_export").click()
    expect(page.locator("#tome_sampler_own_json textarea")).to_have_value(re.compile("e2e preset"))
    shot(page, "presets")
    page.locator("#tome_sampler_own_delete").click()
    expect(page.locator("#tome_sampler_own_said").first).to_contain_text("Deleted")
    assert "e2e preset" not in get("/tome-sampler/v1/presets")


def test_page_reload_leaves_pictures_as_they_were(page: Page, plain: list[bytes]) -> None:
    page.goto(URL)
    page.wait_for_selector("#txt2img_prompt textarea")
    page.locator("#tabs > .tab-nav button", has_text="Settings").click()
    page.locator("#settings_restart_gradio").click()
    time.sleep(5)
    for _ in range(200):
        try:
            if get("/tome-sampler/v1/version"):
                break
        except (httpx.HTTPError, ValueError):
            time.sleep(1)
    time.sleep(5)
    assert generate()[0] == plain
    assert generate([ON])[0] != plain
    assert generate()[0] == plain
