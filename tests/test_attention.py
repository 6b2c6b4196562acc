from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_unet
from ldm import CrossAttention, Unreachable
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from tome_sampler import MergeConfig, Pairing, merging
from tome_sampler.attention import Form, KeyBias, own_attention, proportional_attention
from tome_sampler.refresh import Always

FORMS: list[Form] = ["mask", "channel"]


def duplicates(b: int = 2, groups: int = 9, c: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Pairing]:
    """Tokens (b n c) of which many are exact copies, and the pairing of the copies, its second row padded."""
    target = torch.arange(3 * groups).repeat(b, 1)
    for row in range(b):
        heads = torch.randperm(3 * groups)[: groups - row].sort().values
        choice = heads[torch.randint(len(heads), (3 * groups,))]
        target[row] = choice.scatter(0, heads, heads)
    x = torch.randn(b, 3 * groups, c).to(dtype).gather(1, target[..., None].expand(-1, -1, c))
    return x, Pairing.from_target(target, groups, padded=True)


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)  # (b h n d)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["heads", "folded", "single"])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("channels", [16, 10])
def test_merged_duplicates_attend_as_they_did_in_sdpa(
    form: Form, layout: str, scale: float | None, channels: int
) -> None:
    x, pairing = duplicates(c=channels)
    make = {"heads": lambda t: heads_of(t, 2), "folded": lambda t: heads_of(t, 2).flatten(0, 1), "single": lambda t: t}
    shaped = make[layout]
    q = torch.randn(2, 5, channels)
    exact = F.scaled_dot_product_attention(shaped(q), shaped(x), shaped(x), scale=scale)
    y = pairing.merge(x)
    with proportional_attention(pairing.log_size, form) as mode:
        merged = F.scaled_dot_product_attention(shaped(q), shaped(y), shaped(y), scale=scale)
    assert mode.used
    assert merged.shape == exact.shape
    torch.testing.assert_close(merged, exact, atol=1e-5, rtol=1e-5)
    assert (F.scaled_dot_product_attention(shaped(q), shaped(y), shaped(y)) - exact).abs().max() > 1e-2  # without it


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [4, 16, 40])
def test_values_may_be_narrower_or_wider_than_keys(form: Form, width: int) -> None:
    x, pairing = duplicates()
    project, q = torch.randn(16, width), torch.randn(2, 5, 16)
    exact = F.scaled_dot_product_attention(q, x, x @ project)
    y = pairing.merge(x)
    with proportional_attention(pairing.log_size, form):
        merged = F.scaled_dot_product_attention(q, y, y @ project)
    torch.testing.assert_close(merged, exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["method", "torch", "functional"])
def test_merged_duplicates_attend_as_they_did_in_einsum_and_softmax(name: str) -> None:
    softmax = {"method": Tensor.softmax, "torch": torch.softmax, "functional": F.softmax}[name]
    x, pairing = duplicates()
    q, heads = torch.randn(4, 5, 8), lambda t: heads_of(t, 2).flatten(0, 1)

    def attend(k: Tensor) -> Tensor:
        return softmax(torch.einsum("bid,bjd->bij", q, heads(k)), dim=-1) @ heads(k)

    exact = attend(x)
    with proportional_attention(pairing.log_size) as mode:
        merged = attend(pairing.merge(x))
    assert mode.used
    torch.testing.assert_close(merged, exact, atol=1e-5, rtol=1e-5)


def test_many_logits_are_worked_off_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    y, bias = torch.randn(6, 7, 16), KeyBias(torch.tensor([0.0, 1.0, 2.0, 0.0, 0.5, 0.0, -torch.inf]).repeat(3, 1))
    logits = (y @ y.transpose(1, 2)).half()
    monkeypatch.setattr("tome_sampler.attention._PIECE", 10)
    with proportional_attention(bias, heads=2) as mode:
        found = logits.softmax(-1, dtype=torch.float32)
    assert mode.used
    added = logits + bias.values.clamp(min=-1e4).repeat_interleave(2, 0)[:, None].half()
    assert torch.equal(found, added.softmax(-1, dtype=torch.float32))


def test_softmax_that_goes_over_something_else_or_into_a_tensor_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tome_sampler.attention._PIECE", 1)
    logits, out = torch.randn(2, 5, 5), torch.empty(2, 5, 5)
    with proportional_attention(KeyBias(torch.zeros(2, 5))):
        over_queries = logits.softmax(-2)
        torch.softmax(logits, -1, out=out)
    assert torch.equal(over_queries, logits.softmax(-2))
    assert torch.equal(out, logits.softmax(-1))


def test_a_whole_ldm_attention_over_merged_duplicates_is_exact() -> None:
    x, pairing = duplicates()
    attention = CrossAttention(16).eval()
    with proportional_attention(pairing.log_size):
        merged = pairing.unmerge(attention(pairing.merge(x)))
    torch.testing.assert_close(merged, attention(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_that_is_there_already_holds_too(form: Form, kind: str) -> None:
    x, pairing = duplicates(b=1)
    y, q = pairing.merge(x)[:, None], torch.randn(1, 2, 5, 16)
    y = y.expand(-1, 2, -1, -1)
    seen = torch.rand(1, 1, 5, y.shape[2]) > 0.3
    seen[..., 0] = True
    bias = torch.randn(1, 1, 5, y.shape[2])
    mask = seen if kind == "bool" else bias
    added = torch.where(seen, 0.0, -torch.inf) if kind == "bool" else bias
    logits = q @ y.transpose(-1, -2) * 16**-0.5 + pairing.log_size.values[:, None, None] + added
    with proportional_attention(pairing.log_size, form):
        merged = F.scaled_dot_product_attention(q, y, y, attn_mask=mask)
    torch.testing.assert_close(merged, logits.softmax(-1) @ y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("c", [40, 64, 80, 160])
def test_half_precision_stays_finite_and_close_padding_included(form: Form, dtype: torch.dtype, c: int) -> None:
    x, pairing = duplicates(c=c, dtype=dtype)
    q, y = torch.randn(2, 1, 5, c).to(dtype), pairing.merge(x)[:, None]
    with proportional_attention(pairing.log_size, form):
        merged = F.scaled_dot_product_attention(q, y, y)
    assert merged.dtype == dtype
    assert torch.isfinite(merged).all()
    exact = F.scaled_dot_product_attention(q.float(), x[:, None].float(), x[:, None].float())
    torch.testing.assert_close(merged.float(), exact, atol=5e-2, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [None, 0.05, 1.0])
@pytest.mark.parametrize("c", [40, 64, 160])
def test_what_kernels_are_given_of_padding_is_finite(form: Form, c: int, scale: float | None) -> None:
    """A kernel that meets blocks of keys whose logits are all minus infinity may give NaN."""
    given: list[Tensor] = []

    class Kernel(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention:
                given.extend(t for t in (*args, *(kwargs or {}).values()) if isinstance(t, Tensor))
            return func(*args, **(kwargs or {}))

    x, pairing = duplicates(c=c, dtype=torch.float16)
    y = pairing.merge(x)[:, None]
    assert (pairing.size == 0).any()
    with Kernel(), proportional_attention(pairing.log_size, form):
        F.scaled_dot_product_attention(y, y, y, scale=scale)
    assert len(given) == 3 + (form == "mask")
    assert all(torch.isfinite(t).all() for t in given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("proportional", [True, False])
def test_padding_is_never_attended_to(form: Form, proportional: bool) -> None:
    x, pairing = duplicates()
    bias = pairing.log_size if proportional else pairing.log_mask
    y, q = pairing.merge(x), torch.randn(2, 5, 16)
    poisoned = y.masked_fill((pairing.size == 0)[..., None], 1e3)
    assert not torch.equal(poisoned, y)
    with proportional_attention(bias, form):
        assert torch.equal(*(F.scaled_dot_product_attention(q, k, k) for k in (y, poisoned)))
        assert torch.equal(*((q @ k.transpose(1, 2)).softmax(-1) @ k for k in (y, poisoned)))
    rows = [slice(0, int((s > 0).sum())) for s in pairing.size]
    with proportional_attention(pairing.log_mask, form):
        masked = F.scaled_dot_product_attention(q, y, y)
    for i, row in enumerate(rows):
        torch.testing.assert_close(masked[i], F.scaled_dot_product_attention(q[i], y[i, row], y[i, row]))


def test_attention_over_other_keys_is_left_alone() -> None:
    _, pairing = duplicates()
    q, k = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    exact = F.scaled_dot_product_attention(q, k, k)
    with proportional_attention(pairing.log_size) as mode:
        assert torch.equal(F.scaled_dot_product_attention(q, k, k), exact)
        assert torch.equal((q @ k.transpose(1, 2)).softmax(-1), (q @ k.transpose(1, 2)).softmax(-1))
    assert not mode.used


@pytest.mark.parametrize("weights", [True, False])
def test_multihead_attention_of_torch_is_not_reached_and_says_so(weights: bool) -> None:
    x, pairing = duplicates()
    attention, y = nn.MultiheadAttention(16, 2, batch_first=True).eval(), pairing.merge(x)
    with torch.no_grad():
        plain = attention(y, y, y, need_weights=weights)[0]
        with proportional_attention(pairing.log_size) as mode:
            torch.testing.assert_close(attention(y, y, y, need_weights=weights)[0], plain)
    assert not mode.used


def test_the_mode_leaves_nothing_behind_after_an_exception() -> None:
    assert _get_current_function_mode_stack() == []
    with pytest.raises(RuntimeError, match="inside"), proportional_attention(KeyBias(torch.zeros(1, 3))):
        raise RuntimeError("inside")
    assert _get_current_function_mode_stack() == []


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6])
def test_logits_worked_off_in_slices_of_the_folded_heads_get_their_own_rows_sizes(rows: int) -> None:
    """As memory-saving attention in the WebUIs does: two heads at a time, or a few, in order."""
    x, pairing = duplicates()
    q, heads = torch.randn(2, 5, 16), 4
    fold = lambda t: heads_of(t, heads).flatten(0, 1)  # noqa: E731

    def sliced(q: Tensor, k: Tensor) -> Tensor:
        parts = [
            (a @ b.transpose(1, 2) * 0.5).softmax(dim=-1) @ b
            for a, b in zip(fold(q).split(rows), fold(k).split(rows), strict=True)
        ]
        return torch.cat(parts)

    y = pairing.merge(x)
    with proportional_attention(pairing.log_size, heads=heads) as mode:
        merged = [sliced(q, y), sliced(q, y)]  # a second layer call starts over
    assert mode.used
    for found in merged:
        torch.testing.assert_close(found, sliced(q, x), atol=1e-5, rtol=1e-5)


def test_attention_that_cannot_be_reached_is_computed_by_its_own_projections() -> None:
    x, _ = duplicates(b=1, groups=16)
    x = x[:, torch.arange(64) % 48][:, :36]
    block = nn.Module()
    block.attn1 = Unreachable(16)
    config = MergeConfig(
        ratio=0.6, threshold=0.999, floor=0.0, min_tokens=0, share_branches=False, refresh=Always(), importance=0.0
    )
    exact = block.attn1(x)
    with merging(block, config) as session:
        first, second = block.attn1(x), block.attn1(x)
    assert session.stats.to_dict()["merged_fraction"] > 0
    assert not session.stats.notes
    torch.testing.assert_close(first, exact, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(second, exact, atol=1e-5, rtol=1e-5)


def test_own_attention_declines_layers_that_are_not_plain() -> None:
    x, pairing = duplicates()
    merged = pairing.merge(x)
    plain = CrossAttention(16)
    assert own_attention(plain, merged, pairing.log_size) is not None
    for name, value in (("norm_q", nn.LayerNorm(8)), ("residual_connection", True), ("rescale_output_factor", 2.0)):
        special = CrossAttention(16)
        setattr(special, name, value)
        assert own_attention(special, merged, pairing.log_size) is None
    assert own_attention(nn.Linear(16, 16), merged, pairing.log_size) is None


@pytest.mark.parametrize("form", FORMS)
def test_batch_rows_attended_apart_get_their_own_sizes(form: Form) -> None:
    """As guidance by perturbed attention and reference attention do: some rows in a call of their own."""
    x, pairing = duplicates()
    q, y = torch.randn(2, 1, 5, 16), pairing.merge(x)[:, None]
    exact = F.scaled_dot_product_attention(q, x[:, None], x[:, None])
    with proportional_attention(pairing.log_size, form) as mode:
        for _ in range(2):  # a second layer call starts over
            parts = [F.scaled_dot_product_attention(q[i : i + 1], y[i : i + 1], y[i : i + 1]) for i in range(2)]
            torch.testing.assert_close(torch.cat(parts), exact, atol=1e-5, rtol=1e-5)
    assert mode.used


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("own", ["whole", "rows"])
def test_keys_after_the_merged_ones_count_once(form: Form, own: str) -> None:
    x, pairing = duplicates()
    more, q, y = torch.randn(2, 7, 16), torch.randn(2, 1, 5, 16), pairing.merge(x)
    exact = F.scaled_dot_product_attention(q, *(torch.cat([x, more], 1)[:, None],) * 2)
    with proportional_attention(pairing.log_size, form, tokens=y) as mode:
        if own == "whole":
            keys = torch.cat([y, more], dim=1)[:, None]
            found = F.scaled_dot_product_attention(q, keys, keys)
        else:
            keys_of = [torch.cat([y[i:][:1], more[i:][:1]], 1)[:, None] for i in range(2)]
            found = torch.cat([F.scaled_dot_product_attention(q[i:][:1], k, k) for i, k in enumerate(keys_of)])
    assert mode.used
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


def test_keys_that_the_merged_ones_come_after_are_left_alone() -> None:
    x, pairing = duplicates()
    more, q, y = torch.randn(2, 7, 16), torch.randn(2, 5, 16), pairing.merge(x)
    with proportional_attention(pairing.log_size, tokens=y) as mode:
        for parts, dim in (([more, y], 1), ([y.clone(), more], 1)):
            keys = torch.cat(parts, dim)
            assert torch.equal(
                F.scaled_dot_product_attention(q, keys, keys), F.scaled_dot_product_attention(q, keys.clone(), keys)
            )
    assert not mode.used


def test_own_attention_does_not_stand_in_for_a_processor_of_another_kind(unet: nn.Module) -> None:
    attention = next(m for m in unet.modules() if hasattr(m, "attn1")).attn1
    x = torch.randn(1, 9, attention.to_q.in_features)
    with torch.no_grad():
        assert own_attention(attention, x, KeyBias(torch.zeros(1, 9))) is not None
        attention.set_processor(type("Perturbed", (), {"__call__": lambda *args, **kwargs: x})())
        assert own_attention(attention, x, KeyBias(torch.zeros(1, 9))) is None


def test_another_kernel_in_the_place_of_torch_s_is_stood_in_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torchs = F.scaled_dot_product_attention

    def another(  # the signature of SageAttention's, whose documentation says to put it there
        q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND", is_causal: bool = False, **rest: Any
    ) -> Tensor:
        assert tensor_layout in ("HND", "NHD")
        with torch._C.DisableTorchFunction():
            return torchs(q, k, v)

    unet = tiny_unet()
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 8)

    def call() -> Tensor:
        with torch.no_grad():
            return unet(x, torch.tensor(500), encoder_hidden_states=context, return_dict=False)[0]

    pictures = []
    for kernel in (torchs, another):
        monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
        with merging(unet, MergeConfig(min_tokens=0, threshold=None)) as session:
            pictures.append(call())
        assert session.stats.to_dict()["merged_fraction"] > 0
        assert not session.stats.notes
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-5, rtol=1e-5)
    assert not torch.equal(call(), pictures[1])
