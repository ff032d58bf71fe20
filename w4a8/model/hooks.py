"""Proxies that stand in for a block or a linear layer, and the context managers that install and restore them.

A proxy only records and delegates. `record` is given unevaluated MLX arrays; the recorder gives all pending arrays to
one `mx.eval` per forward pass. MLX only.

Python looks `Module.__call__` up on the class, so setting it on an instance does not hook a layer; a proxy in the
layer's place does. The proxy is stored as a dictionary (or list) item: assigning an attribute would drop the layer from
its parent's parameters and put it back in another order.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from w4a8.model.layers import model_blocks, model_layers

LayerRecord = Callable[[str, mx.array], mx.array | None]
BlockRecord = Callable[[str, tuple, Any], None]


class LiveHooksError(RuntimeError):
    """Hooks are live where none may be: at a second install, or a weight reload. TROUBLESHOOTING_GUIDE Issue 11."""

    def __init__(self, action: str):
        super().__init__(f"{action} while hooks are live: leave their `with` block first (Issue 11)")


class _Proxy:
    """A stand-in for `_wrapped`: public attributes are read from and written to the wrapped object."""

    def __init__(self, wrapped: Any, name: str, record: Callable | None):
        vars(self).update(_wrapped=wrapped, _name=name, _record=record)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # else copy.copy asks an object without _wrapped for _wrapped, endlessly
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._wrapped, name, value)  # a FLUX block assigns to mlp.fc2.bias in every call

    def __contains__(self, key: str) -> bool:
        raise LiveHooksError("weights are updated")  # nn.Module.update asks this before it writes


class _HookedLayer(_Proxy):
    """A stand-in for a linear layer: it calls record(name, input), then the layer.

    record returns None, or the input again, tied by `mx.depends` to work that must be done before the layer runs.
    """

    def __call__(self, x: mx.array) -> mx.array:
        if self._record is not None:
            tied = self._record(self._name, x)
            x = x if tied is None else tied
        return self._wrapped(x)


class _SubstitutedLayer(_Proxy):
    """A stand-in that computes in place of a linear layer: record(name, layer, input) gives the output."""

    def __call__(self, x: mx.array) -> mx.array:
        return self._record(self._name, self._wrapped, x)


class BlockHook(_Proxy):
    """A stand-in in a list of blocks: it calls the block, then record(name, positional arguments, outputs).

    A multimodal block takes (image tokens, text tokens, timestep) and gives (image tokens, text tokens or
    None); a unified block takes (tokens, timestep) and gives tokens. Tokens are (R, tokens, 1, hidden).
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block, record its arguments and outputs, and return the outputs."""
        outputs = self._wrapped(*args, **kwargs)
        if self._record is not None:
            self._record(self._name, args, outputs)
        return outputs


Locations = dict[str, tuple[Any, Any]]  # name -> the list or module that holds the object, and its index or key there


def _block_locations(mmdit: nn.Module) -> Locations:
    return {name: (block.blocks, block.index) for name, block in model_blocks(mmdit).items()}


def _layer_locations(mmdit: nn.Module) -> Locations:
    return {name: (layer.parent, layer.key) for name, layer in model_layers(mmdit).items()}


@contextlib.contextmanager
def hooked_layers(
    mmdit: nn.Module, record: LayerRecord | None, names: Sequence[str] | None = None
) -> Iterator[list[str]]:
    """Install a _HookedLayer at the linear layers `names` (default: all) and restore them on exit.

    Yields the names, in the order of the forward pass of each stream. q_proj, k_proj and v_proj of a stream are
    called with the same array object: compute once, report three times. Raises LiveHooksError when hooks are
    already live; so does `mmdit.load_weights` inside the block.
    """
    with _installed(mmdit, _HookedLayer, _layer_locations(mmdit), record, names) as installed:
        yield installed


@contextlib.contextmanager
def substituted_layers(
    mmdit: nn.Module, compute: Callable[[str, nn.Module, mx.array], mx.array], names: Sequence[str] | None = None
) -> Iterator[list[str]]:
    """Let compute(name, layer, input) stand in for the linear layers `names` (default: all) until exit.

    Yields the names. Raises LiveHooksError as `hooked_layers` does.
    """
    with _installed(mmdit, _SubstitutedLayer, _layer_locations(mmdit), compute, names) as installed:
        yield installed


@contextlib.contextmanager
def hooked_blocks(
    mmdit: nn.Module, record: BlockRecord | None, names: Sequence[str] | None = None
) -> Iterator[list[str]]:
    """Install a BlockHook at the blocks `names` (default: all) and restore them on exit.

    Yields the names. Raises LiveHooksError as `hooked_layers` does.
    """
    with _installed(mmdit, BlockHook, _block_locations(mmdit), record, names) as installed:
        yield installed


@contextlib.contextmanager
def _installed(
    mmdit: nn.Module, proxy: type, locations: Locations, record: Callable | None, names: Sequence[str] | None
) -> Iterator[list[str]]:
    if "load_weights" in vars(mmdit):
        raise LiveHooksError("hooks are installed a second time")
    names = list(locations) if names is None else list(names)
    originals = {name: locations[name][0][locations[name][1]] for name in names}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise LiveHooksError("weights are reloaded")

    try:
        vars(mmdit)["load_weights"] = refuse  # an attribute of the instance hides the method of the class
        for name, original in originals.items():
            container, key = locations[name]
            container[key] = proxy(original, name, record)
        yield names
    finally:
        for name, original in originals.items():
            container, key = locations[name]
            container[key] = original
        del vars(mmdit)["load_weights"]
