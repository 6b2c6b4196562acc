from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tome_sampler import Pairing


@st.composite
def targets(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Random valid targets (b n) and a length m that fits them, some of it padding."""
    b, n = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 32)))
    target = torch.arange(n).repeat(b, 1)
    for row in target:
        kept = torch.rand(n, generator=generator) < draw(st.floats(0, 1))
        kept[torch.randint(n, (1,), generator=generator)] = True
        heads = kept.nonzero()[:, 0]
        row[~kept] = heads[torch.randint(len(heads), (int((~kept).sum()),), generator=generator)]
    m = int((target == torch.arange(n)).sum(1).max())
    return target, min(m + draw(st.integers(0, 2)), n) if m < n else m


def groups(target: Tensor) -> list[dict[int, list[int]]]:
    """For each batch row, the tokens of each head, heads in order."""
    found: list[dict[int, list[int]]] = []
    for row in target.tolist():
        found.append({head: [i for i, t in enumerate(row) if t == head] for head in sorted(set(row))})
    return found


@given(targets())
def test_merged_rows_are_the_means_of_their_groups_and_padding_is_zero(case: tuple[Tensor, int]) -> None:
    target, m = case
    x = torch.randn(*target.shape, 3)
    merged = Pairing.from_target(target, m).merge(x)
    for row, of_head in enumerate(groups(target)):
        for place, tokens in enumerate(of_head.values()):
            slow = sum(x[row, t].double() for t in tokens) / len(tokens)
            torch.testing.assert_close(merged[row, place].double(), slow, atol=1e-6, rtol=1e-5)
        assert (merged[row, len(of_head) :] == 0).all()


@given(targets())
def test_sizes_count_the_tokens_of_each_row_and_sum_to_all(case: tuple[Tensor, int]) -> None:
    target, m = case
    pairing = Pairing.from_target(target, m)
    assert (pairing.size.sum(1) == target.shape[1]).all()
    for row in range(target.shape[0]):
        assert torch.equal(pairing.row[row].bincount(minlength=m).float(), pairing.size[row])


@given(targets())
def test_a_targets_inverse_gives_it_back(case: tuple[Tensor, int]) -> None:
    assert torch.equal(Pairing.from_target(*case).target, case[0])


@given(targets())
def test_what_is_constant_in_each_group_survives_merging_and_unmerging(case: tuple[Tensor, int]) -> None:
    target, m = case
    x = torch.randn(*target.shape, 3).gather(1, target[..., None].expand(-1, -1, 3))
    pairing = Pairing.from_target(target, m)
    torch.testing.assert_close(pairing.unmerge(pairing.merge(x)), x)
    y = torch.randn(target.shape[0], m, 3)
    assert torch.equal(pairing.unmerge(y), torch.stack([y[i, pairing.row[i]] for i in range(len(y))]))


@given(targets())
def test_pruning_takes_the_heads_value(case: tuple[Tensor, int]) -> None:
    target, m = case
    x = torch.randn(*target.shape, 3)
    merged = Pairing.from_target(target, m, prune=True).merge(x)
    for row, of_head in enumerate(groups(target)):
        assert torch.equal(merged[row, : len(of_head)], x[row, list(of_head)])


@given(targets(), st.randoms(use_true_random=False))
def test_renaming_the_tokens_renames_the_result(case: tuple[Tensor, int], random: object) -> None:
    target, m = case
    n = target.shape[1]
    new = torch.randperm(n, generator=torch.Generator().manual_seed(random.randrange(1 << 32)))  # type: ignore[attr-defined]
    x = torch.randn(*target.shape, 3)
    renamed = torch.empty_like(target)
    renamed[:, new] = new[target]
    moved = torch.empty_like(x)
    moved[:, new] = x
    before, after = Pairing.from_target(target, m), Pairing.from_target(renamed, m)
    torch.testing.assert_close(after.unmerge(after.merge(moved))[:, new], before.unmerge(before.merge(x)))


@pytest.mark.parametrize(
    ("dtype", "value", "count"),
    [(torch.float16, 100.0, 1024), (torch.float16, 60000.0, 2), (torch.bfloat16, 100.0, 1024)],
)
def test_half_precision_sums_do_not_overflow(dtype: torch.dtype, value: float, count: int) -> None:
    x = torch.full((1, count, 2), value, dtype=dtype)
    merged = Pairing.from_target(torch.zeros(1, count, dtype=torch.long), 1).merge(x)
    assert merged.dtype == dtype
    assert torch.equal(merged, x[:, :1])


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64])
def test_nothing_merged_and_everything_merged(n: int) -> None:
    x = torch.randn(2, n, 5)
    alone = Pairing.from_target(torch.arange(n).repeat(2, 1), n)
    assert torch.equal(alone.merge(x), x)
    assert torch.equal(alone.unmerge(alone.merge(x)), x)
    last = Pairing.from_target(torch.full((2, n), n - 1), 1)
    torch.testing.assert_close(last.merge(x), x.mean(1, keepdim=True))


def test_rows_can_be_taken_for_a_larger_batch() -> None:
    target = torch.tensor([[0, 0, 2], [1, 1, 2]])
    taken = Pairing.from_target(target, 2, prune=True, padded=True).take(torch.tensor([1, 0, 1]))
    assert torch.equal(taken.target, target[[1, 0, 1]])
    assert (taken.prune, taken.padded) == (True, True)


def test_log_sizes_are_what_a_key_stands_for_and_minus_infinity_for_padding() -> None:
    pairing = Pairing.from_target(torch.tensor([[0, 0, 0, 0], [0, 0, 2, 2]]), 2)
    torch.testing.assert_close(pairing.log_size.values.exp(), torch.tensor([[4.0, 0.0], [2.0, 2.0]]))
    assert torch.equal(pairing.log_mask.values, torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]))


def test_a_tensor_that_is_not_contiguous_merges_alike() -> None:
    x = torch.randn(3, 4, 2).transpose(1, 2)  # (3 2 4)
    pairing = Pairing.from_target(torch.zeros(3, 2, dtype=torch.long), 1)
    torch.testing.assert_close(pairing.merge(x), x.mean(1, keepdim=True))
