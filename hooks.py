"""Proxies that stand in for a block or a linear layer, and the context managers that install and restore them.

A proxy only records and delegates. It records lazily: what `record` gets are unevaluated MLX arrays, and
whoever records gives everything pending to one `mx.eval` per forward pass. MLX only.

`Module.__call__` is looked up on the class, so a layer cannot be hooked by setting it on an instance; a proxy in
the layer's place can. It is put there as a dictionary (or list) item: assigning an attribute would drop the
layer from its parent's parameters and put it back in another order.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

ATTENTION_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_LINEARS = ("fc1", "fc2")

LayerRecord = Callable[[str, mx.array], mx.array | None]
BlockRecord = Callable[[str, tuple, Any], None]


class LiveHooksError(RuntimeError):
    """Hooks are installed where none may be: a second install, or a weight reload. TROUBLESHOOTING_GUIDE Issue 11."""

    def __init__(self, action: str):
        super().__init__(
            f"{action} while hooks are live: leave their `with` block first (TROUBLESHOOTING_GUIDE Issue 11)"
        )


class _Proxy:
    """Stands for `_wrapped`: public attributes are read from and written to it."""

    def __init__(self, wrapped: Any, name: str, record: Callable | None):
        vars(self).update(_wrapped=wrapped, _name=name, _record=record)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # else copy.copy asks an object without _wrapped for _wrapped, for ever
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped, name, value)  # a FLUX block assigns to mlp.fc2.bias in every call

    def __contains__(self, key: str) -> bool:
        raise LiveHooksError("weights are updated")  # nn.Module.update asks this before it writes


class _HookedLayer(_Proxy):
    """Stands for a linear layer: calls record(name, input), then the layer.

    record returns None, or the input again, tied by `mx.depends` to work that must be done before the layer runs.
    """

    def __call__(self, x: mx.array) -> mx.array:
        if self._record is not None:
            tied = self._record(self._name, x)
            x = x if tied is None else tied
        return self._wrapped(x)


class _SubstitutedLayer(_Proxy):
    """Stands for a linear layer and computes in its place: record(name, layer, input) gives the output."""

    def __call__(self, x: mx.array) -> mx.array:
        return self._record(self._name, self._wrapped, x)


class BlockHook(_Proxy):
    """Stands in a block list: calls the block, then record(name, positional arguments, outputs).

    A multimodal block takes (image tokens, text tokens, timestep) and gives (image tokens, text tokens or
    None); a unified block takes (tokens, timestep) and gives tokens. Tokens are (R, tokens, 1, hidden).
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._wrapped(*args, **kwargs)
        if self._record is not None:
            self._record(self._name, args, outputs)
        return outputs


def block_slots(mmdit: nn.Module) -> dict[str, tuple[list, int]]:
    """Where each block lives, in the order of the forward pass: name (mm0 …, uni0 …) -> (list, index)."""
    slots = {}
    for prefix, attribute in (("mm", "multimodal_transformer_blocks"), ("uni", "unified_transformer_blocks")):
        blocks = mmdit.get(attribute, [])
        slots |= {f"{prefix}{index}": (blocks, index) for index in range(len(blocks))}
    return slots


def layer_slots(mmdit: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where each linear layer of the blocks lives: name (mm0.img.attn.q_proj …) -> (parent module, key).

    The last multimodal block of SD3 has no text o_proj (an Identity stands there) and no text mlp: they are left out.
    """
    slots = {}
    for name, (blocks, index) in block_slots(mmdit).items():
        block = blocks[index]
        streams = (
            {f"{name}.img": block.image_transformer_block, f"{name}.txt": block.text_transformer_block}
            if name.startswith("mm")
            else {name: block.transformer_block}
        )
        for prefix, stream in streams.items():
            for part, keys in (("attn", ATTENTION_LINEARS), ("mlp", MLP_LINEARS)):
                parent = getattr(stream, part, {})
                for key in keys:
                    if key in parent and not isinstance(parent[key], nn.Identity):
                        slots[f"{prefix}.{part}.{key}"] = (parent, key)
    return slots


@contextlib.contextmanager
def hooked_layers(
    mmdit: nn.Module, record: LayerRecord | None, names: Sequence[str] | None = None
) -> Iterator[list[str]]:
    """Install a _HookedLayer at the linear layers `names` (default: all) and restore them on exit.

    Yields the names, in the order of the forward pass of each stream. q_proj, k_proj and v_proj of a stream are
    called with the same array object: compute once, report three times. Raises LiveHooksError when hooks are
    live already; so does `mmdit.load_weights` inside the block.
    """
    with _installed(mmdit, _HookedLayer, layer_slots, record, names) as installed:
        yield installed


@contextlib.contextmanager
def substituted_layers(
    mmdit: nn.Module, compute: Callable[[str, nn.Module, mx.array], mx.array], names: Sequence[str] | None = None
) -> Iterator[list[str]]:
    """Let compute(name, layer, input) stand in for the linear layers `names` (default: all), until exit; yields the names.

    Raises LiveHooksError as `hooked_layers` does.
    """
    with _installed(mmdit, _SubstitutedLayer, layer_slots, compute, names) as installed:
        yield installed


@contextlib.contextmanager
def hooked_blocks(
    mmdit: nn.Module, record: BlockRecord | None, names: Sequence[str] | None = None
) -> Iterator[list[str]]:
    """Install a BlockHook at the blocks `names` (default: all) and restore them on exit; yields the names.

    Raises LiveHooksError as `hooked_layers` does.
    """
    with _installed(mmdit, BlockHook, block_slots, record, names) as installed:
        yield installed


@contextlib.contextmanager
def _installed(mmdit, proxy: type, find_slots: Callable, record, names) -> Iterator[list[str]]:
    if "load_weights" in vars(mmdit):
        raise LiveHooksError("hooks are installed a second time")
    slots = find_slots(mmdit)
    names = list(slots) if names is None else list(names)
    originals = {name: slots[name][0][slots[name][1]] for name in names}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise LiveHooksError("weights are reloaded")

    try:
        mmdit.load_weights = refuse  # on the instance, before the method of the class
        for name, original in originals.items():
            container, key = slots[name]
            container[key] = proxy(original, name, record)
        yield names
    finally:
        for name, original in originals.items():
            container, key = slots[name]
            container[key] = original
        del mmdit.load_weights
