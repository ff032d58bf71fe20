"""Hooks on the blocks and linear layers of a transformer, for programs beside the toolkit.

They are defined in w4a8/model/hooks.py.
"""

from w4a8.model.hooks import BlockHook, LiveHooksError, _HookedLayer, hooked_blocks, hooked_layers, substituted_layers

__all__ = ["BlockHook", "LiveHooksError", "_HookedLayer", "hooked_blocks", "hooked_layers", "substituted_layers"]
