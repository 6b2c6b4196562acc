"""Forge and its relatives: patches on a clone of the model patcher, for one sampling pass.

Patches are closures over the pass: a patcher that is cloned again deep-copies bound methods and callable objects, but
leaves functions alone. None is undone: :meth:`ForgePass.close` puts the patcher back that the clone was made from, and
takes away what the model itself has: the hooks of blocks, for which there is no patch, and the feed-forward's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from tome_sampler.attention import counted_attention
from tome_sampler.config import MergeConfig
from tome_sampler.hosts.a1111 import OTHER_CALL
from tome_sampler.hosts.feedforward import HalvedFeedForward
from tome_sampler.pairing import Pairing
from tome_sampler.session import Layer, MergeSession, ModelCall

_STAGES = ("input", "middle", "output")
_MERGEABLE = frozenset({"attn1", "block"})
_INSIDE = ("attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch")
"""Patches that are given the tokens of a block."""
_GRID = "tome_sampler_grid"
_ATTENTION = (  # where the hosts keep the attention kernel that they have chosen
    ("backend.attention", "attention_function"),
    ("ldm_patched.ldm.modules.attention", "optimized_attention"),
)


@dataclass
class _OpenBlock:
    """A block that is running on merged tokens, and the tokens that it was given."""

    pairing: Pairing
    merged: Tensor
    tokens: Tensor


@dataclass
class _OpenAttention:
    """Attention that runs on merged tokens. counted: its keys' sizes matter. in_block: its block unmerges."""

    pairing: Pairing
    counted: bool
    in_block: bool = False


class ForgePass:
    """Merging in one sampling pass. `session` is the current one, `sessions` all: a refiner gets one of its own.

    Args:
        config: how to merge; of the modules only "attn1" and "block" can be.
        latent: the latent that will be sampled (images c h w); calls of another size, such as tiles, pass through.
        failed: is told of an error of ours; the pass goes on unmerged.
    """

    def __init__(self, config: MergeConfig, latent: Tensor, failed: Callable[[Exception], None]) -> None:
        self.config = config
        self.sessions: list[MergeSession] = []
        self._model: Any = None  # that is patched
        self._images, self._size = latent.shape[0], (latent.shape[-2], latent.shape[-1])
        self._failed = failed
        self._open: _OpenAttention | None = None
        self._open_block: _OpenBlock | None = None
        self._block_input: Tensor | None = None  # where similarity is taken of it
        self._entered: tuple[str, int] | None = None  # the block that is running, if its hooks have told of it
        self._hooks = ExitStack()
        self._reached = False
        self._feed_forward: HalvedFeedForward | None = None
        self._begin_session()

    def _begin_session(self) -> None:
        self.session = MergeSession(self.config, restarts=True, timed=True)
        self.sessions.append(self.session)
        self._place: tuple[int, ...] = ()
        self._own: list[Callable[..., Any]] = []  # our patches
        self._started = self._uncond = False  # whether a call has been made in this step, and one of uncond rows
        self._foreign: set[tuple[str, int]] = set()  # blocks whose attention another extension replaces

    def take(self, objects: Any) -> None:
        """Put a clone that merges in the place of `objects.unet`, the host's ``forge_objects``, until closed. Errors
        are those of :meth:`patched`; then all is as it was."""
        before = objects.unet
        try:
            ours = self.patched(before)
        except BaseException:
            self.close()
            raise

        def put_back() -> None:
            if objects.unet is ours:  # the host, or another extension's clone, may have taken its place
                objects.unet = before

        objects.unet = ours
        self._hooks.callback(put_back)

    def follow(self, objects: Any) -> None:
        """Guidance is about to read the host's ``forge_objects``: a refiner's, if one has taken over, are patched then.
        Errors are as of :meth:`take`."""
        if objects.unet.model is not self._model:
            self.close()
            self._begin_session()
            self.take(objects)

    def patched(self, unet: Any) -> Any:
        """A clone of the host's ``UnetPatcher`` that merges; `unet` itself is left as it was.

        Raises:
            ValueError: the model has no attention to merge, or none of what should be merged can be here.
        """
        self._model = unet.model
        modules = self.session.config.modules
        if _MERGEABLE.isdisjoint(modules):
            raise ValueError(f"modules is {'+'.join(modules)}, and this host lets only attn1 and block be merged")
        if self.session.config.all_modules - _MERGEABLE:
            self.session.note("this host lets only attn1 and block be merged: other modules run on all tokens")
        model: Any = getattr(unet.model, "diffusion_model", None)
        names = [name for name, _ in model.named_modules()] if isinstance(model, nn.Module) else []
        if not any(name.rsplit(".", 1)[-1] == "attn1" for name in names):
            raise ValueError(
                f"{type(model).__name__} has nothing to merge: no module in it has an attention layer named 'attn1'"
            )
        sampling = getattr(unet.model, "predictor", None) or getattr(unet.model, "model_sampling", None)
        sigmas = getattr(sampling, "sigmas", None)
        if isinstance(sigmas, Tensor):
            self.session.know_table(sorted(sigmas.flatten().tolist(), reverse=True))
        unet = unet.clone()
        replaced = unet.model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn1", {})
        self._foreign |= {(key[0], key[1]) for key in replaced}
        blocks = _blocks(model)
        if blocks and self._foreign.issuperset(blocks):
            raise ValueError("another extension replaces the attention of all blocks")
        if hasattr(unet, "add_block_inner_modifier"):
            unet.add_block_inner_modifier(_grid_of_layer)
        unet.set_model_attn1_patch(self._ours(lambda n, context, value, extra: self._merge(n, context, value, extra)))
        unet.set_model_attn1_output_patch(self._ours(lambda n, extra: self._unmerge(n, extra)))
        unet.set_model_sampler_post_cfg_function(lambda args: self._observe(args))
        attention = _host_attention()
        if attention is not None:
            attend = self._ours(lambda q, k, v, extra: self._attend(q, k, v, extra, attention))
            for key in blocks:
                if key not in self._foreign:
                    unet.set_model_attn1_replace(attend, key[0], key[1])
        else:
            self.session.note("this host's attention was not found: merged keys count once each")
        if "block" in self.session.config.all_modules or self.session.config.metric == "block":
            for block in (module for module in model.modules() if "attn1" in module._modules):
                self._hooks.enter_context(block.register_forward_pre_hook(self._before_block, with_kwargs=True))
                self._hooks.enter_context(block.register_forward_hook(self._after_block, always_call=True))
        self._feed_forward = HalvedFeedForward(model, self.session)
        return unet

    def close(self) -> None:
        """Stop merging, take everything off the model and let go of all tensors; statistics stay."""
        self.session.suspended = True
        self._open, self._open_block, self._block_input = None, None, None
        self._hooks.close()
        if self._feed_forward is not None:
            self._feed_forward.remove()
        self.session.release()

    def _ours(self, patch: Callable[..., Any]) -> Callable[..., Any]:
        self._own.append(patch)
        return patch

    def _enter(self, extra: dict[str, Any]) -> tuple[str, int] | None:
        """The name and number of the block that runs, with which a model call may begin; None: it is left alone."""
        block = extra.get("block", ("input", 0))
        stage, number, inner = block[0], int(block[1]), int(extra.get("block_index", 0))
        if stage not in _STAGES or (stage, number) in self._foreign:
            return None
        place = (_STAGES.index(stage), number, inner)
        if place <= self._place or self.session.current is None:
            self._begin(extra)
        self._place = place
        return f"{stage}.{number}.{inner}", place[0] << 16 | number << 8 | inner

    def _shares(self, options: dict[str, Any]) -> bool:
        """Whether other extensions' patches see the tokens of the block that runs: they may need all of them."""
        patches, replaced = options.get("patches", {}), options.get("patches_replace", {})
        inside = [patch for name in _INSIDE for patch in patches.get(name, ())]
        own_block = tuple(options["block"][:2])
        for name in ("attn1", "attn2"):
            inside += [patch for key, patch in replaced.get(name, {}).items() if tuple(key[:2]) == own_block]
        return any(patch not in self._own for patch in inside)

    def _before_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._open_block = self._entered = self._block_input = None
        options, x = kwargs.get("transformer_options", args[2] if len(args) > 2 else {}), args[0] if args else None
        if self.session.suspended or "block" not in options or not isinstance(x, Tensor):
            return None
        if self.session.config.metric == "block":
            self._block_input = x
        layer, pairing = None, None
        try:
            self._entered = self._enter(options)
            if self._entered is None or "block" not in self.session.modules:
                return None
            if self._shares(options):
                self.session.note("other extensions see the tokens of blocks: only self-attention is merged there")
                return None
            layer = Layer(*self._entered)
            pairing = self.session.merge(layer, x, grid=_grid(options))
            if pairing is None:
                return None
            with self.session.timed("merging", x.device):
                merged = pairing.merge(x)
        except Exception as error:
            self._fail(error, layer, x, pairing)
            return None
        self._open_block = _OpenBlock(pairing, merged, x)
        if self._feed_forward is not None:
            self._feed_forward.enter_block()
        return (merged.clone(), *args[1:]), kwargs  # a copy: blocks add to what they are given in place

    def _after_block(self, module: nn.Module, args: Any, output: Any) -> Any:
        opened, self._open_block, self._entered, self._block_input = self._open_block, None, None, None
        if self._feed_forward is not None:
            self._feed_forward.leave_block()
        if opened is None or not isinstance(output, Tensor):
            return None
        with self.session.timed("merging", output.device):
            return opened.pairing.unmerge(output - opened.merged).add_(opened.tokens)

    def _merge(self, n: Tensor, context: Tensor, value: Tensor, extra: dict[str, Any]) -> Any:
        self._open, self._reached = None, False
        counts = self.session.config.proportional
        around = self._open_block
        if around is not None:
            self._open = _OpenAttention(around.pairing, counts or around.pairing.padded, in_block=True)
            return n, context, value
        layer, pairing = None, None
        try:
            entered = self._entered or self._enter(extra)
            if entered is None or _MERGEABLE.isdisjoint(self.session.modules):
                return n, context, value
            if context is not n or value is not n:
                self.session.note("another extension changes attention's q, k or v (LLLite does): passed through")
                return n, context, value
            layer = Layer(f"{entered[0]}.attn1", entered[1])
            pairing = self.session.merge(layer, n, self._block_input, _grid(extra))
            if pairing is None:
                return n, context, value
            with self.session.timed("merging", n.device):
                merged = pairing.merge(n)
            if self._feed_forward is not None:
                self._feed_forward.follow()
        except Exception as error:
            self._fail(error, layer, n, pairing)
            return n, context, value
        self._open = _OpenAttention(pairing, counts or pairing.padded)
        return merged, merged, merged

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, extra: dict[str, Any], attention: Callable[..., Tensor]) -> Any:
        heads = extra["n_heads"]
        self._reached = True
        if self._open is None or not self._open.counted or k.shape[1] != self._open.pairing.size.shape[1]:
            return attention(q, k, v, heads, mask=None)
        pairing = self._open.pairing
        q, k, v = (rearrange(x, "b m (h d) -> b h m d", h=heads) for x in (q, k, v))
        bias = pairing.log_size if self.session.config.proportional else pairing.log_mask
        return rearrange(counted_attention(q, k, v, bias), "b h m d -> b m (h d)")

    def _unmerge(self, n: Tensor, extra: dict[str, Any]) -> Tensor:
        if self._open is None:
            return n
        opened, self._open = self._open, None
        if opened.counted and not self._reached:
            block = extra.get("block", ("input", 0))
            self._foreign.add((block[0], int(block[1])))
            self.session.note(f"another extension replaces the attention of {block[0]} block {block[1]}: left to it")
        if opened.in_block:
            return n
        with self.session.timed("merging", n.device):
            return opened.pairing.unmerge(n)

    def _observe(self, args: dict[str, Any]) -> Tensor:
        """After guidance. Where the uncond did not run, Forge hands over zeros for it, and reForge None."""
        self._place, seen = (), self._uncond
        self._started = self._uncond = False
        self.session.end()
        cond, uncond = args.get("cond_denoised"), args.get("uncond_denoised")
        if seen and isinstance(cond, Tensor) and isinstance(uncond, Tensor) and not self.session.suspended:
            try:
                self.session.observe(cond, uncond)
            except Exception as error:
                self._fail(error)
        denoised: Tensor = args["denoised"]
        return denoised

    def _begin(self, extra: dict[str, Any]) -> None:
        """A model call starts: its rows are chunks of all images, in any order of branches."""
        rows, _, h, w = extra["original_shape"]
        chunks = [("cond", "uncond")[mark] for mark in extra["cond_or_uncond"]]
        self._uncond |= "uncond" in chunks
        call = ModelCall(None, self._size, (), ())
        if (h, w) == self._size and rows == self._images * len(chunks):
            sigma = float(extra["sigmas"].max())
            call = ModelCall.chunked(sigma, self._size, chunks, self._images, further=self._started)
            self._started = True
        else:
            self.session.note(OTHER_CALL)
        self.session.begin(call)
        if self._feed_forward is not None:
            self._feed_forward.follow()

    def _fail(
        self, error: Exception, layer: Layer | None = None, x: Tensor | None = None, pairing: Pairing | None = None
    ) -> None:
        """The rest of the pass runs on all tokens, and so does the layer whose x was to be merged, if it is named."""
        if layer is not None and x is not None and pairing is not None:
            self.session.take_back(layer, x, pairing)
        self.session.suspended = True
        self._failed(error)


def _grid_of_layer(x: Tensor, when: str, layer: Any, layer_index: int, ts: Any, options: dict[str, Any]) -> Tensor:
    """Leaves the size of a spatial transformer's input where its attention patches find it."""
    if when == "before" and x.ndim == 4:
        options[_GRID] = (x.shape[-2], x.shape[-1])
    return x


def _grid(extra: dict[str, Any]) -> tuple[int, int] | None:
    if _GRID in extra:
        return extra[_GRID]  # type: ignore[no-any-return]
    shape = extra.get("activations_shape")  # reForge
    return None if shape is None else (int(shape[-2]), int(shape[-1]))


def _blocks(model: Any) -> list[tuple[str, int]]:
    """The (stage, number) of the blocks that have attention, as the hosts name them."""
    found = []
    for stage in _STAGES:
        blocks = getattr(model, f"{stage}_blocks" if stage != "middle" else "middle_block", None)
        for number, block in enumerate([blocks] if stage == "middle" else list(blocks or ())):
            if isinstance(block, nn.Module) and any(n.rsplit(".", 1)[-1] == "attn1" for n, _ in block.named_modules()):
                found.append((stage, number))
    return found


def _host_attention() -> Callable[..., Tensor] | None:
    for module, name in _ATTENTION:
        try:
            return getattr(import_module(module), name)  # type: ignore[no-any-return]
        except (ImportError, AttributeError):
            continue
    return None
