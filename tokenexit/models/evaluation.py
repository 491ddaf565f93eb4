"""A model in evaluation mode, whatever others do with its mode meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tokenexit.int8 import Int8Embedding, Int8Linear
from tokenexit.loops.memory import Memory

# Models that are switched now: by how many threads, and the mode of each module before.
_SWITCHED: dict[nn.Module, tuple[int, list[tuple[nn.Module, bool]]]] = {}
_LOCK = threading.Lock()
_OF_NO_MODE = {nn.Linear, nn.LayerNorm, nn.Embedding, Int8Linear, Int8Embedding}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it is in evaluation mode; it keeps its own, as another thread may train it.

    That is a second tree of modules on the same weights, buffers and hooks, which is kept for as
    long as the model holds the same. A module with a forward of its own (as accelerate and
    torch.compile put there) would run the first tree through it: a model that has one is switched,
    and switched back module by module once no thread evaluates it; only beside a thread that trains
    it at that moment, this is not enough.
    """
    try:
        twin = _kept_twin(model)
    except _OwnForward:
        with _switched(model):
            yield model
    else:
        yield twin


@contextmanager
def _switched(model: nn.Module) -> Iterator[None]:
    with _LOCK:
        count, modes = _SWITCHED.get(model, (0, []))
        modes = modes or [(module, module.training) for module in model.modules()]
        _SWITCHED[model] = count + 1, modes
        model.eval()
    try:
        yield
    finally:
        with _LOCK:
            count, modes = _SWITCHED.pop(model)
            if count > 1:
                _SWITCHED[model] = count - 1, modes
            else:
                for module, training in modes:
                    module.training = training


class _OwnForward(Exception):
    """A module has a forward of its own, in place of its class's."""


def _kept_twin(model: nn.Module) -> nn.Module:
    """`_twin`, of parts that were made before; what the parts hold is found once, too."""
    memory = model.__dict__.get("_memory")
    held = None if memory is None else memory.of(model)
    if held is None or not held.is_all:
        return _twin(model, {})
    parts, of_twin = held.once("twin", lambda: (_twin(model, {})._modules, Memory()))
    return _alike(model, parts, _memory=of_twin)  # of the model itself, attributes come and go


def _alike(module: nn.Module, parts: dict[str, nn.Module | None], **own) -> nn.Module:
    if "forward" in module.__dict__ or module.__dict__.get("_compiled_call_impl") is not None:
        raise _OwnForward
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__, training=False, _modules=parts, **own)
    return twin


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    if module not in twins:  # a part may stand in several places
        parts = module.__dict__["_modules"]
        twin = _alike(module, {name: part and _twin(part, twins) for name, part in parts.items()})
        asks = module._forward_hooks or module._forward_pre_hooks  # maybe for its mode
        shared = type(module) in _OF_NO_MODE and not parts and not asks
        twins[module] = module if shared else twin
    return twins[module]
