"""What callers and pages send, and what pictures say: the extension's table, requests and infotext, without a host."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tome_sampler.config import PRESETS, MergeConfig
from tome_sampler.profiles import FORMAT, write_profile
from tome_sampler.refresh import Always, Checkpoints, Drift, EverySteps, Once, SigmaRatio

NAME = "tome_sampler_extension"


def load(part: str) -> Any:
    """A module of the extension, as its script loads it."""
    if NAME not in sys.modules:
        folder = Path(__file__).resolve().parent.parent / "extension"
        spec = importlib.util.spec_from_file_location(
            NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[NAME])
    return importlib.import_module(f"{NAME}.{part}")


table, request, infotext, presets = load("fields"), load("request"), load("infotext"), load("presets")

refreshes = st.one_of(
    st.just(Always()),
    st.just(Once()),
    st.builds(SigmaRatio, st.floats(1.01, 50)),
    st.builds(EverySteps, st.integers(1, 100)),
    st.builds(Drift, st.floats(0, 2)),
    st.builds(Checkpoints, st.lists(st.floats(0, 1), max_size=4).map(tuple)),
)
configs = st.builds(
    MergeConfig,
    ratio=st.floats(0, 0.75),
    threshold=st.none() | st.floats(0.001, 1),
    floor=st.floats(0, 0.9375),
    early_ratio=st.none() | st.floats(0, 0.99),
    early_sigma=st.floats(0.1, 15),
    stride=st.integers(2, 8),
    destinations=st.sampled_from(["grid", "cell"]),
    importance=st.floats(0, 2),
    levels=st.integers(1, 4),
    modules=st.sampled_from([("attn1",), ("attn1", "ff"), ("attn1", "attn2", "ff")]),
    early_modules=st.sampled_from([None, ("block",), ("attn1",), ("attn1", "ff")]),
    refresh=refreshes,
    start=st.floats(0, 0.5),
    end=st.floats(0.5, 1),
    random=st.booleans(),
    pool=st.floats(0.25, 4),
    protect=st.floats(0, 1),
    search=st.sampled_from(["global", "local"]),
    neighbourhood=st.integers(1, 8),
    metric=st.sampled_from(["attention", "block", "position"]),
    batch_rule=st.sampled_from(["row", "max"]),
    share_branches=st.booleans(),
    share_layers=st.booleans(),
    prune_until=st.floats(0, 1),
    proportional=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
    min_tokens=st.just("auto") | st.integers(0, 65536),
)


def test_the_table_covers_the_configuration_both_ways() -> None:
    assert sorted(table.BY_NAME) == sorted(field.name for field in dataclass_fields(MergeConfig))
    assert (
        len({field.key for field in table.FIELDS}) == len({field.label for field in table.FIELDS}) == len(table.FIELDS)
    )
    for name, config in PRESETS.items():
        for field in table.FIELDS:
            value = getattr(config, field.name)
            assert field.read(field.shown(config)) == value, (name, field.name)
            assert field.read(field.text(config)) == value, (name, field.name)


def test_the_documented_arguments_and_controls_agree() -> None:
    defaults = request.default_args()
    assert len(defaults) == 2 + len(table.FIELDS) + 2 + len(table.HIRES) + 1
    assert request.read_args([True]).config == MergeConfig() == request.read_args([True, *defaults[1:]]).config
    assert request.read_args([]).on is False
    assert request.read_args([True, "fast"]).config == MergeConfig.preset("fast")
    assert request.read_args([True, "quality"], default="Fast").config == MergeConfig.preset("quality")
    assert request.read_args([True], default="Fast").config == MergeConfig.preset("fast")
    moved = [True, *defaults[1:]]
    moved[2] = 0.25
    assert request.read_args(moved).config == MergeConfig(ratio=0.25)
    assert request.read_args(moved).preset == "Custom"
    schema = request.schema()
    assert sorted(schema["properties"]) == sorted(request.KEYS)
    json.dumps(schema)


def test_hires_overrides() -> None:
    defaults = request.default_args()
    args = [True, *defaults[1:]]
    args[2 + len(table.FIELDS)] = True
    found = request.read_args(args)
    assert found.of_pass(False) == MergeConfig()
    assert found.of_pass(True) == MergeConfig.preset("fast")
    args[3 + len(table.FIELDS) :] = ["Custom", 0.9, 4, 0.0, 2, 0.3, "off"]
    hires = request.read_args(args).of_pass(True)
    assert hires == MergeConfig(ratio=0.9, stride=4, threshold=None, levels=2, floor=0.3, early_ratio=None)
    others = " refresh=sigma ratio 3,random = true, modules=attn1+ff,min_tokens=auto , "
    hires_others = hires.with_(refresh=SigmaRatio(3.0), random=True, modules=("attn1", "ff"))
    assert request.read_args([*args, others]).of_pass(True) == hires_others
    for wrong, message in (
        ("refresh", "hires_others has 'refresh'; it must be field=value"),
        ("refersh=once", "there is no field 'refersh'; there are ratio, "),
        ("pool=10", "pool is 10.0; it must be a number from 0.25 to 4"),
        (7, "hires_others is 7; it must be text like 'refresh=always, start=0.1'"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            request.read_args([*args, wrong])
    found = request.read_dict({"preset": "quality", "hires": {"ratio": 0.4}})
    assert found.of_pass(True) == MergeConfig.preset("quality", ratio=0.4)
    assert request.read_dict({"hires": "off"}).of_pass(True) is None


def test_controls_as_a_host_fills_them_in_leave_a_callers_preset_alone() -> None:
    for built_with in table.PRESETS:
        for default in ("Balanced", "Quality"):
            args = [True, "Fast", *request.default_args(built_with)[2:]]
            found = request.read_args(args, default=default)
            assert (found.preset, found.config) == ("Fast", MergeConfig.preset("fast"))
            args[1] = "Custom"
            assert request.read_args(args).config == MergeConfig.preset(table.PRESETS[built_with])


def test_hires_values_that_say_something_else_than_their_preset_count() -> None:
    defaults = request.default_args()
    at = 2 + len(table.FIELDS)

    def read(first: dict[str, Any], name: str, *values: Any) -> Any:
        controls = [field.shown(MergeConfig(**first)) for field in table.FIELDS]
        return request.read_args([True, "Custom", *controls, True, name, *values])

    for name, library in table.PRESETS.items():  # left as they come, or as the page fills them in
        config = MergeConfig.preset(library)
        for values in ([], defaults[at + 2 :], request.hires_controls(config, MergeConfig())):
            for first in ({}, {"seed": 5}, {"destinations": "pool"}, {"search": "local"}):
                found = read(first, name, *values)
                assert (found.hires_preset, found.hires) == (name, config), (name, values, first)
    moved = read({"seed": 5}, "Fast", 0.25)
    assert moved.hires_preset == "Custom"
    assert moved.hires == read({"seed": 5}, "Custom", 0.25).hires
    assert (moved.hires.ratio, moved.hires.seed, moved.hires.early_ratio) == (0.25, 5, 0.9)
    worded = read({}, "Fast", *defaults[at + 2 : -1], "levels=2, seed=3")
    assert (worded.hires_preset, worded.hires.seed, worded.hires.levels) == ("Custom", 3, 2)
    assert read({}, "Off", 0.25).hires is None
    with pytest.raises(ValueError, match=r"^ratio is 0\.9; it must be a number from 0 to 0\.75"):
        read({}, "Fast", 0.9)


@given(config=configs, hires=st.none() | configs, least=st.integers(0, 65536))
@settings(max_examples=100)
def test_a_request_that_leaves_short_layers_alone_round_trips(
    config: MergeConfig, hires: MergeConfig | None, least: int
) -> None:
    meant = request.Request("Balanced", config, hires is None, "Quality", hires).of_at_least(least)
    for found, asked in ((meant.config, config), (meant.hires, hires)):
        if asked is None:
            assert found is None
        elif not least:
            assert found == asked
        else:
            own = 0 if asked.min_tokens == "auto" else asked.min_tokens
            assert found == asked.with_(min_tokens=max(own, least))
    read = pasted(infotext.written(meant))
    assert (read.config, read.hires) == (meant.config, meant.hires)


@given(
    config=configs,
    hires=st.none() | configs,
    name=st.sampled_from(["Balanced", "Fast", "Custom"]),
    hires_name=st.sampled_from(["Quality", "Custom"]),
)
@settings(max_examples=300)
def test_the_infotext_round_trips(config: MergeConfig, hires: MergeConfig | None, name: str, hires_name: str) -> None:
    written = infotext.written(request.Request(name, config, hires is None, hires_name, hires))
    assert written["ToMe Sampler"] == name
    read = pasted(written)
    assert (read.config, read.same, read.hires) == (config, hires is None, hires)


def pasted(written: dict[str, str]) -> Any:
    """What the page asks for when these entries have been pasted into it."""
    return request.read_args(infotext.control_values(json.loads(json.dumps(written))))


@pytest.mark.parametrize(
    ("asked", "hires"),
    [
        ({"hires": {"preset": "quality", "ratio": 0.4}}, MergeConfig.preset("quality", ratio=0.4)),
        (
            {"preset": "tomesd", "hires": {"ratio": 0.4, "start": 0.1}},
            MergeConfig.preset("tomesd", ratio=0.4, start=0.1),
        ),
        ({"preset": "fast", "hires": "ca_tome"}, MergeConfig.preset("ca_tome")),
        ({"preset": "off", "hires": {"preset": "importance", "seed": 5}}, MergeConfig.preset("importance", seed=5)),
        ({"hires": {"threshold": -0.5, "ratio": 1 / 3}}, MergeConfig(threshold=-0.5, ratio=1 / 3)),
        ({"hires": "mine"}, MergeConfig(ratio=0.3, refresh=Always())),
        ({"preset": "mine", "hires": {"levels": 2}}, MergeConfig(ratio=0.3, refresh=Always(), levels=2)),
        ({"preset": "mine", "hires": "off"}, None),
    ],
)
def test_the_hires_override_round_trips_with_all_its_fields(asked: dict[str, Any], hires: MergeConfig | None) -> None:
    saved = {"mine": MergeConfig(ratio=0.3, refresh=Always()).to_dict()}
    meant = request.read_dict(asked, saved)
    assert meant.hires == hires
    read = pasted(infotext.written(meant, saved))
    assert (read.config, read.same, read.hires) == (meant.config, False, hires)
    again = pasted(infotext.written(read))
    assert (again.config, again.hires) == (meant.config, hires)


def test_the_infotext_is_compact_and_says_nothing_when_off() -> None:
    assert infotext.written(request.read_args([])) == {}
    assert infotext.written(request.read_args([True])) == {"ToMe Sampler": "Balanced", "ToMe presets": "2"}
    assert infotext.written(request.read_dict({"preset": "fast", "ratio": 0.7, "early_ratio": None})) == {
        "ToMe Sampler": "Fast",
        "ToMe presets": "2",
        "ToMe ratio": "0.7",
        "ToMe early ratio": "off",
    }
    for nothing in ({}, {"ToMe Sampler": "stood aside: because"}):
        assert infotext.control_values(nothing) == request.default_args()
    broken = {"ToMe Sampler": "Balanced", "ToMe presets": "2", "ToMe ratio": "a lot"}
    assert infotext.control_values(broken)[1] == "Balanced"


def test_what_an_infotext_says_wrongly_is_left_out_and_the_rest_holds() -> None:
    one = {"ToMe Sampler": "Custom", "ToMe presets": "2", "ToMe pool": "10", "ToMe ratio": "0.3", "ToMe levels": "2"}
    assert pasted(one).config == MergeConfig(ratio=0.3, levels=2)
    # that ratio cannot be had without that stride
    two = {"ToMe Sampler": "Custom", "ToMe presets": "2", "ToMe stride": "9", "ToMe ratio": "0.9", "ToMe levels": "2"}
    assert pasted(two).config == MergeConfig(levels=2)


# the default preset as it was saved as one of the user's own, before runs had an early part
OLD: dict[str, Any] = json.loads("""{
  "ratio": 0.5, "threshold": 0.9, "floor": 0.3, "batch_rule": "row", "stride": 2, "destinations": "cell",
  "random": false, "pool": 1.4, "importance": 0.1, "protect": 0.0, "levels": 1, "modules": ["attn1"],
  "min_tokens": "auto", "search": "global", "neighbourhood": 1, "metric": "attention", "share_branches": true,
  "share_layers": false, "refresh": {"kind": "sigma_ratio", "ratio": 6.0}, "start": 0.0, "end": 1.0,
  "prune_until": 0.0, "proportional": true, "seed": 0
}""")


@pytest.mark.parametrize(
    ("told", "meant"),
    [
        ({"ToMe Sampler": "Balanced"}, {}),
        ({"ToMe Sampler": "Custom", "ToMe threshold": "off", "ToMe levels": "2"}, {"threshold": None, "levels": 2}),
        ({"ToMe Sampler": "Quality"}, {"floor": 0.25, "refresh": SigmaRatio(4.0)}),
        ({"ToMe Sampler": "Fast", "ToMe ratio": "0.8"}, {"ratio": 0.8, "floor": 0.75, "stride": 4}),
    ],
)
def test_an_infotext_of_before_the_early_part_reproduces_that_run(told: dict[str, str], meant: dict[str, Any]) -> None:
    values = infotext.control_values(told)
    read = request.read_args(values)
    assert read.config == MergeConfig.from_dict({**OLD, "early_ratio": None, **meant})
    assert values[1] == read.preset == "Custom"
    read = request.read_args(infotext.control_values({**told, "ToMe hires": "Fast"}))
    then = {"early_ratio": None, "ratio": 0.9, "stride": 4, "floor": 0.75}
    assert read.hires == MergeConfig.from_dict({**OLD, **then})
    rewritten = infotext.written(read)  # and today's keeps it
    assert request.read_args(infotext.control_values(rewritten)) == read


def test_published_methods_keep_their_names_in_an_old_infotext() -> None:
    for name in ("ToMe-SD", "CA-ToMe", "Importance"):
        read = request.read_args(infotext.control_values({"ToMe Sampler": name}))
        assert read == request.read_dict({"preset": name})
        assert read.config.early is None


PARTS = "attn1, attn2, ff, block, or be null: as later"


def test_no_early_part_and_nothing_merged_early_are_two_things() -> None:
    field = table.BY_NAME["early_ratio"]
    for off in (None, "off", " Off", "none"):
        assert field.read(off) is None
    for zero in (0, 0.0, "0"):
        assert field.read(zero) == 0
        assert field.read(zero) is not None
    for config in (MergeConfig(early_ratio=None), MergeConfig(early_ratio=0.0)):
        assert request.read_dict({"early_ratio": config.early_ratio}).config == config
        written = infotext.written(request.Request("Balanced", config))
        assert request.read_args(infotext.control_values(written)).config == config


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"early_ratio": 1}, "early_ratio is 1; it must be a number from 0 to 0.99, or null for off"),
        ({"early_ratio": "much"}, "early_ratio is 'much'; it must be a number from 0 to 0.99, or null for off"),
        ({"early_modules": ["attn3"]}, f"early_modules is ['attn3']; it must name at least one of {PARTS}"),
        ({"early_modules": "blocks"}, f"early_modules is ['blocks']; it must name at least one of {PARTS}"),
        ({"early_modules": 3}, f"early_modules is 3; it must name at least one of {PARTS}"),
        ({"early_ratio": True}, "early_ratio is True; it must be a number from 0 to 0.99, or null for off"),
        ({"early_sigma": 0}, "early_sigma is 0; it must be a number from 0.1 to 15"),
        ({"early_sigma": "off"}, "early_sigma is 'off'; it must be a number from 0.1 to 15"),
        ({"hires": {"early_ratio": -1}}, "early_ratio is -1; it must be a number from 0 to 0.99, or null for off"),
    ],
)
def test_an_early_part_out_of_range_is_said_in_one_line(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        request.read_dict(asked)


def test_early_modules_are_read_in_every_spelling_and_none_is_as_later() -> None:
    field = table.BY_NAME["early_modules"]
    for none in (None, [], "off", " None", ""):
        assert field.read(none) is None
    for block in (["block"], ("block",), "block"):
        assert field.read(block) == ("block",)
    assert field.read("ff+attn1") == ("attn1", "ff")
    config = MergeConfig(early_modules=("block",))
    assert infotext.written(request.Request("Balanced", config)) == {
        "ToMe Sampler": "Balanced", "ToMe presets": "2", "ToMe early modules": "block"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"^early_modules is \('ff', 'block'\); 'block' holds the others already"):
        request.read_dict({"early_modules": ["ff", "block"]})


def test_presets_saved_before_the_early_part_have_none(tmp_path: Path) -> None:
    store = presets.Presets(tmp_path / "presets.json")
    store.path.write_text(json.dumps({"mine": {**OLD, "ratio": 0.3}}))
    before = MergeConfig.from_dict({**OLD, "ratio": 0.3, "early_ratio": None})
    assert request.read_dict({"preset": "mine"}, store.saved()).config == before
    store.load(json.dumps({"format": FORMAT, "model": "a.safetensors", "config": OLD, "measured": {}}))
    assert store.saved()["a.safetensors"]["early_ratio"] is None
    store.save("new", MergeConfig())
    assert store.saved()["new"]["early_ratio"] == MergeConfig().early_ratio


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
keys = st.sampled_from([*request.KEYS, "ratoi", "Ratio"])
likely = st.one_of(
    junk,
    st.floats(-1, 2),
    st.integers(-1, 8),
    st.sampled_from(
        ["Balanced", "fast", "off", "grid", "pool", "row", "attn1", "once", "sigma ratio 2", "drift 9", "0.5"]
    ),
    st.lists(st.sampled_from(["attn1", "attn2", "ff", "x"]), max_size=3),
    st.fixed_dictionaries({"kind": st.sampled_from(["once", "drift", "x"]), "tolerance": junk}),
)
pieces = st.builds(lambda name, value: f"{name}={value}", keys, likely)
others = junk | st.lists(pieces | st.text(max_size=8), max_size=4).map(",".join)
payloads = st.one_of(
    others.map(
        lambda text: [True, *[None] * (1 + len(table.FIELDS)), True, "Custom", *[None] * len(table.HIRES), text]
    ),
    st.lists(likely, max_size=40),
    st.dictionaries(keys, likely, max_size=8).map(lambda d: [d]),
    st.builds(
        lambda d, h: [{**d, "hires": h}], st.dictionaries(keys, likely, max_size=4), st.dictionaries(keys, likely)
    ),
)


@given(payload=payloads)
@settings(max_examples=10_000)
def test_ten_thousand_payloads_end_in_a_request_or_a_readable_error(payload: list[Any]) -> None:
    message = None
    try:
        found = request.read_args(payload)
    except ValueError as error:  # and no other kind
        message = str(error)
    if message is not None:
        assert message
        assert "\n" not in message
        return
    for config in (found.config, found.hires):
        assert config is None or MergeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    infotext.written(found)


def test_presets_of_the_users_own(tmp_path: Path) -> None:
    store = presets.Presets(tmp_path / "deep" / "presets.json")
    assert store.all() == {}
    config = MergeConfig(ratio=0.3, refresh=Drift(0.1))
    store.save("mine", config)
    assert request.read_dict({"preset": "mine"}, store.saved()).config == config
    assert (
        infotext.written(request.read_dict({"preset": "mine"}, store.saved()), store.saved())["ToMe Sampler"]
        == "Custom"
    )
    store.rename("mine", "ours")
    assert store.names() == ["ours"]
    text = store.exported()
    store.delete("ours")
    assert store.load(text) == (["ours"], [])
    write_profile(tmp_path / "profile.json", config, model="folder/model.safetensors", measured={})
    assert store.load((tmp_path / "profile.json").read_text()) == (["model.safetensors"], [])
    assert store.load((tmp_path / "profile.json").read_text()) == ([], ["model.safetensors"])
    assert request.read_dict({"preset": "model.safetensors"}, store.saved()).config == config
    for action, message in (
        (lambda: store.save("Fast", config), "built-in"),
        (lambda: store.save(" ", config), "printable characters"),
        (lambda: store.rename("none", "x"), "no preset 'none'"),
        (lambda: store.delete("none"), "no preset 'none'"),
        (lambda: store.load("{"), "not JSON"),
        (lambda: store.load('{"a": {"ratio": 7}}'), "ratio is 7"),
        (lambda: store.load('{"a": {"pool": 10}}'), "preset 'a': pool is 10; it must be a number from 0.25 to 4"),
        (lambda: store.save("a", MergeConfig(pool=10)), "pool is 10; it must be a number from 0.25 to 4"),
        (lambda: store.save("Ours", config), "name is 'Ours', which differs from the preset 'ours' in case only"),
        (lambda: store.load('{"OURS": {}}'), "preset 'OURS': name is 'OURS', which differs from the preset 'ours'"),
        (lambda: store.load('{"a": {}, "A": {}}'), "name is 'A', which differs from the preset 'a' in case only"),
        (lambda: store.rename("model.safetensors", "Ours"), "name is 'Ours', which differs from the preset 'ours'"),
        (lambda: store.load('{"a": 1}'), "must be an object"),
        (lambda: store.load(json.dumps({"format": FORMAT, "model": "a"})), "must be an object"),
    ):
        with pytest.raises(ValueError, match=message):
            action()
    assert store.names() == ["model.safetensors", "ours"]
    store.rename("ours", "Ours")
    store.save("Ours", MergeConfig(threshold=0.0))
    assert store.saved()["Ours"]["threshold"] is None  # as the controls have it
    store.path.write_text("broken")
    assert store.saved() == {}
    with pytest.raises(ValueError, match="not JSON"):
        store.save("other", config)
    assert store.path.read_text() == "broken"


def test_presets_whose_names_differ_in_case_are_told_apart() -> None:
    saved = {name: MergeConfig(ratio=ratio).to_dict() for name, ratio in (("Mine", 0.1), ("mine", 0.2))}
    for name, ratio in (("Mine", 0.1), ("mine", 0.2), (" Mine ", 0.1)):
        assert request.read_dict({"preset": name}, saved).config == MergeConfig(ratio=ratio)


def test_a_grids_axes_replace_fields() -> None:
    on, off = request.read_args([True]), request.read_args([])
    assert on.with_fields({"ratio": "0.3"}).config == MergeConfig(ratio=0.3)
    assert on.with_fields({"preset": "Fast", "ratio": 0.3}).config == MergeConfig.preset("fast", ratio=0.3)
    for one in (on, off):
        assert not one.with_fields({"preset": "Off", "ratio": 0.3}).on
        assert not one.with_fields({"ratio": 0.3, "preset": "off"}).on
    turned_on = off.with_fields({"ratio": 0.3})
    assert (turned_on.preset, turned_on.config) == ("Custom", MergeConfig(ratio=0.3))
    assert pasted(infotext.written(turned_on)).config == turned_on.config
    assert off.with_fields({"preset": "Fast", "ratio": 0.3}).preset == "Fast"
    page = [False, "Custom", *(field.shown(MergeConfig(levels=2)) for field in table.FIELDS)]
    for one in (request.read_args(page), request.read_args([True, *page[1:]])):
        assert one.with_fields({"preset": "custom"}).config == MergeConfig(levels=2)
        assert one.with_fields({"ratio": 0.3}).config == MergeConfig(levels=2, ratio=0.3)
        assert one.with_fields({"preset": "Custom", "ratio": 0.3}).config == MergeConfig(levels=2, ratio=0.3)
        assert one.with_fields({"preset": "Fast"}).config == MergeConfig.preset("fast")
    saved = {"mine": MergeConfig(ratio=0.1).to_dict()}
    own = off.with_fields({"preset": "Mine", "levels": 2}, saved)
    assert (own.preset, own.config) == ("mine", MergeConfig(ratio=0.1, levels=2))
    with pytest.raises(ValueError, match="preset is 'mine'; it must be one of Off"):
        off.with_fields({"preset": "mine"})
