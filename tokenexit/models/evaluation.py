"""A model in evaluation mode, whatever others do with its mode meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tokenexit.int8 import Int8Embedding, Int8Linear

_OF_NO_MODE = {nn.Linear, nn.LayerNorm, nn.Embedding, Int8Linear, Int8Embedding}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it is in evaluation mode; it keeps its own, as another thread may train it.

    That is a second tree of modules on the same weights, buffers and hooks, made in some 50 us. A
    module with a forward of its own (as accelerate and torch.compile put there) would run the first
    tree through it: a model that has one is switched, and switched back module by module at the
    end; only beside a thread that trains it at that moment, this is not enough.
    """
    try:
        twin = _twin(model, {})
    except _OwnForward:
        modes = [(module, module.training) for module in model.modules()]
        try:
            yield model.eval()
        finally:
            for module, training in modes:
                module.training = training
    else:
        yield twin


class _OwnForward(Exception):
    """A module has a forward of its own, in place of its class's."""


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    own = module.__dict__
    if "forward" in own or own.get("_compiled_call_impl") is not None:
        raise _OwnForward
    if type(module) in _OF_NO_MODE and not own["_modules"]:
        return module
    if module not in twins:  # a part may stand in several places
        twins[module] = twin = type(module).__new__(type(module))
        parts = {name: part and _twin(part, twins) for name, part in own["_modules"].items()}
        twin.__dict__.update(own, training=False, _modules=parts)
    return twins[module]
