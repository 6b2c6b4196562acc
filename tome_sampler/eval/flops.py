"""Floating-point operations by count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def flops_of(call: Callable[[], Any]) -> int:
    """Operations of a call: two for each multiply-add of its matrix products, convolutions and attention.

    What torch's counter has no formula for counts nothing: norms, softmax, activations, sums, and the gathers that
    merging and unmerging are. Attention on a CPU has none either, so it gets the one that torch has for the GPU's.
    """
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    )
    with counter:
        call()
    return int(counter.get_total_flops())


def _attention(
    query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    del args, out_shape, kwargs
    return int(sdpa_flop_count(query_shape, key_shape, value_shape))
