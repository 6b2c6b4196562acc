"""What the README says is run: its Python snippets, its settings, its commands."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from tome_sampler import PRESETS, MergeConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_snippets_run_one_after_the_other() -> None:
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) >= 2
    namespace: dict[str, object] = {}
    for snippet in snippets:
        exec(snippet, namespace)
    session = namespace["session"]
    assert namespace["x"].isfinite().all()  # type: ignore[attr-defined]
    assert session.importance is None, "a session that was left holds no tensor"  # type: ignore[attr-defined]


def test_every_setting_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", README, re.MULTILINE))
    default = MergeConfig()
    for field in fields(MergeConfig):
        assert field.name in rows, f"{field.name} is not in the README's table"
        value = getattr(default, field.name)
        shown = ", ".join(value) if isinstance(value, tuple) else str(value)
        assert rows[field.name].strip("`") == shown, field.name


def test_every_preset_and_command_is_named() -> None:
    for name in PRESETS:
        assert f"`{name}`" in README
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make (\w+)`?", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"python (benchmarks/\w+\.py)", README):
        assert (ROOT / path).exists(), path


def test_nothing_is_left_to_fill_in() -> None:
    assert "@" not in re.sub(r"```bibtex.*?```", "", README, flags=re.DOTALL)
