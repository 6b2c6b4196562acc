from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tome_sampler import PRESETS, MergeConfig
from tome_sampler.refresh import Always, Checkpoints, Drift, EverySteps, Once, Refresh, SigmaRatio, refresh_from_dict
from tome_sampler.spelling import read_config, read_refresh, refresh_text

POLICIES = st.one_of(
    st.just(Always()),
    st.just(Once()),
    st.floats(1.01, 50).map(SigmaRatio),
    st.integers(1, 60).map(EverySteps),
    st.lists(st.floats(0, 1), max_size=5).map(lambda f: Checkpoints(tuple(f))),
    st.floats(0, 2).map(Drift),
)


MODULES = st.just(("block",)) | st.lists(st.sampled_from(["attn1", "attn2", "ff"]), min_size=1, unique=True).map(tuple)


@st.composite
def configs(draw: st.DrawFn) -> MergeConfig:
    stride = draw(st.integers(2, 5))
    start, end = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
    destinations = draw(st.sampled_from(["grid", "cell", "pool"]))
    return MergeConfig(
        stride=stride,
        ratio=draw(st.floats(0, 1 - 1 / stride**2)),
        threshold=draw(st.none() | st.floats(-1, 1)),
        floor=draw(st.floats(0, 1)),
        early_ratio=draw(st.none() | st.floats(0, 0.99)),
        early_sigma=draw(st.floats(0.01, 100)),
        batch_rule=draw(st.sampled_from(["row", "max"])),
        destinations=destinations,
        search="global" if destinations == "pool" else draw(st.sampled_from(["global", "local"])),
        random=draw(st.booleans()),
        pool=draw(st.floats(0.25, 100)),
        importance=draw(st.floats(0, 2)),
        protect=draw(st.floats(0, 1)),
        levels=draw(st.integers(1, 9)),
        modules=draw(MODULES),
        early_modules=draw(st.none() | MODULES),
        min_tokens=draw(st.just("auto") | st.integers(0, 1 << 20)),
        neighbourhood=draw(st.integers(1, 9)),
        metric=draw(st.sampled_from(["attention", "block"])),
        share_branches=draw(st.booleans()),
        share_layers=draw(st.booleans()),
        refresh=draw(POLICIES),
        start=start,
        end=end,
        prune_until=draw(st.floats(0, 1)),
        proportional=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 64)),
    )


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    config = MergeConfig.preset(name)
    assert MergeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(configs())
def test_any_valid_config_survives_json(config: MergeConfig) -> None:
    assert MergeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_default_preset_is_the_default_and_is_balanced() -> None:
    assert MergeConfig() == PRESETS["default"] == PRESETS["balanced"]
    assert MergeConfig.from_dict({}) == MergeConfig()


OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("ratio", -0.1, "0 to 0.75"),
    ("ratio", 0.76, "0 to 0.75"),
    ("ratio", math.nan, "0 to 0.75"),
    ("ratio", "much", "0 to 0.75"),
    ("ratio", True, "0 to 0.75"),
    ("threshold", 1.1, "-1 to 1"),
    ("threshold", -1.1, "-1 to 1"),
    ("threshold", math.inf, "-1 to 1"),
    ("floor", -0.1, "0 to 1"),
    ("floor", 1.1, "0 to 1"),
    ("batch_rule", "mean", "row, max"),
    ("stride", 1, "at least 2"),
    ("stride", 2.0, "at least 2"),
    ("destinations", "corner", "grid, cell, pool"),
    ("random", 1, "True or False"),
    ("pool", 0.2, "0.25 to 100"),
    ("pool", math.inf, "0.25 to 100"),
    ("importance", 2.1, "0 to 2"),
    ("importance", None, "0 to 2"),
    ("protect", 1.5, "0 to 1"),
    ("early_ratio", 1.0, "0 to 0.99"),
    ("early_ratio", True, "0 to 0.99"),
    ("early_sigma", 0, "above 0"),
    ("early_sigma", math.inf, "above 0"),
    ("early_sigma", None, "above 0"),
    ("levels", 0, "at least 1"),
    ("levels", True, "at least 1"),
    ("modules", (), "attn1, attn2, ff"),
    ("modules", ("attn3",), "attn1, attn2, ff"),
    ("modules", 5, "attn1, attn2, ff"),
    ("modules", "attn1", "attn1, attn2, ff"),
    ("modules", ("attn1", "attn1"), "once"),
    ("modules", ("attn1", "block"), "the only one"),
    ("early_modules", (), "attn1, attn2, ff"),
    ("early_modules", "block", "attn1, attn2, ff"),
    ("early_modules", ("block", "block"), "once"),
    ("early_modules", ("block", "ff"), "the only one"),
    ("min_tokens", -1, "at least 0"),
    ("min_tokens", "all", "'auto' or a whole number"),
    ("search", "far", "global, local"),
    ("neighbourhood", 0, "at least 1"),
    ("metric", "keys", "attention, block"),
    ("share_branches", "yes", "True or False"),
    ("share_layers", None, "True or False"),
    ("refresh", "always", "tome_sampler.refresh"),
    ("start", -0.1, "0 to 1"),
    ("end", 1.1, "0 to 1"),
    ("prune_until", math.nan, "0 to 1"),
    ("proportional", 0, "True or False"),
    ("seed", -1, "at least 0"),
    ("seed", 1.5, "at least 0"),
]


@pytest.mark.parametrize(("field", "value", "range_"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_one_line_with_field_value_and_range(field: str, value: Any, range_: str) -> None:
    with pytest.raises(ValueError, match=field) as error:
        MergeConfig(**{field: value})
    message = str(error.value)
    assert "\n" not in message
    assert range_ in message
    shown = value[0] if isinstance(value, tuple) and value else value
    assert repr(shown) in message or field == "modules"


def test_every_field_is_checked() -> None:
    assert {field for field, _, _ in OUT_OF_RANGE} == {field.name for field in fields(MergeConfig)}


def test_combinations_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match=r"start is 0\.6 and end is 0\.5"):
        MergeConfig(start=0.6, end=0.5)
    with pytest.raises(ValueError, match=r"search is 'local'.*destinations 'pool'"):
        MergeConfig(destinations="pool", search="local")
    assert MergeConfig(ratio=0.93, stride=4).ratio == 0.93  # a larger stride can give more


@given(st.floats(0, 0.99))
def test_the_early_part_has_the_smallest_cells_that_can_give_it(early_ratio: float) -> None:
    config = MergeConfig(ratio=0.3, early_ratio=early_ratio, proportional=False)
    assert config.early is not None
    assert config.early == config.with_(ratio=early_ratio, threshold=None, stride=config.early.stride, early_ratio=None)
    assert config.all_modules == {"attn1"}
    with_blocks = config.with_(early_modules=("block",))
    assert with_blocks.early == config.early.with_(modules=("block",))
    assert with_blocks.all_modules == {"attn1", "block"}
    assert config.early.stride == 2 or early_ratio > 1 - 1 / (config.early.stride - 1) ** 2
    assert config.is_early(3.1)
    assert not config.is_early(3.0)


def test_without_an_early_part_there_is_none() -> None:
    for config in (MergeConfig(early_ratio=None), MergeConfig(ratio=0), MergeConfig.preset("tomesd")):
        assert config.early is None
        assert config.with_(early_modules=("block",)).all_modules == {"attn1"}
        assert not config.is_early(10.0)


def test_unknown_fields_and_presets_are_named() -> None:
    for make in (lambda: MergeConfig.from_dict({"rato": 1}), lambda: MergeConfig().with_(rato=1)):
        with pytest.raises(ValueError, match="no field 'rato'; it has ratio, "):
            make()
    with pytest.raises(ValueError, match="preset is 'fats'; it must be one of tomesd"):
        MergeConfig.preset("fats")
    with pytest.raises(ValueError, match="ratio is 2"):
        MergeConfig.preset("fast", ratio=2)


def test_a_config_is_frozen_hashable_and_prints_what_makes_it_again() -> None:
    config = MergeConfig(ratio=0.5, refresh=Checkpoints((0.0, 0.5)), modules=("attn1", "ff"))
    with pytest.raises(FrozenInstanceError):
        config.ratio = 0.2  # type: ignore[misc]
    assert hash(config) == hash(eval(repr(config)))
    assert eval(repr(config)) == config


@given(POLICIES)
def test_a_policy_survives_json(policy: Refresh) -> None:
    assert refresh_from_dict(json.loads(json.dumps(policy.to_dict()))) == policy


@pytest.mark.parametrize(
    "data",
    [
        {"kind": "sigma_ratio", "ratio": 1.0},
        {"kind": "sigma_ratio", "ratio": math.nan},
        {"kind": "sigma_ratio", "ratio": "2"},
        {"kind": "every_steps", "steps": 0},
        {"kind": "every_steps", "steps": 1.5},
        {"kind": "checkpoints", "fractions": [0.5, 1.5]},
        {"kind": "checkpoints", "fractions": 3},
        {"kind": "drift", "tolerance": -1},
        {"kind": "drift", "tolerance": math.nan},
        {"kind": "always", "ratio": 2},
        {"kind": "sometimes"},
        {"kind": []},
        {},
    ],
)
def test_a_bad_policy_is_refused_in_one_line(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"refresh|of (SigmaRatio|EverySteps|Checkpoints|Drift)") as error:
        MergeConfig.from_dict({"refresh": data})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["name", "cls", "self"])
def test_a_field_that_is_named_as_an_argument_is_unknown(name: str) -> None:
    with pytest.raises(ValueError, match=f"MergeConfig has no field '{name}'"):
        read_config(f"fast:{name}=3")


@pytest.mark.parametrize("refresh", [Checkpoints((1 / 3, 0.1)), SigmaRatio(1 + 1e-11), SigmaRatio(4.0), Drift(1e-12)])
def test_words_give_the_policy_back_exactly(refresh: Refresh) -> None:
    assert read_refresh(refresh_text(refresh)) == refresh


@pytest.mark.parametrize(("text", "value"), [("false", False), ("False", False), ("TRUE", True)])
def test_true_and_false_may_be_written_small(text: str, value: bool) -> None:
    assert read_config(f"default:proportional={text}").proportional is value
    assert read_config("default:early_ratio=none,early_modules=none").early is None
