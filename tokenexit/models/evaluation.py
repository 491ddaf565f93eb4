"""A model in evaluation mode, whatever others do with its mode meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tokenexit.int8 import Int8Linear

_OF_NO_MODE = {nn.Linear, nn.LayerNorm, nn.Embedding, Int8Linear}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model as it is in evaluation mode; it keeps its own, as another thread may train it.

    That is a second tree of modules on the same weights, buffers and hooks, made in some 50 us. A
    module with a forward of its own (as accelerate and torch.compile put there) would run the first
    tree through it: a model that has one is switched, and switched back module by module at the
    end; only beside a thread that trains it at that moment, this is not enough.
    """
    twins = {}
    if not _has_own_forward(model):
        yield _twin(model, twins)
        return
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


def _twin(module: nn.Module, twins: dict[nn.Module, nn.Module]) -> nn.Module:
    if type(module) in _OF_NO_MODE:
        return module
    if module not in twins:  # a part may stand in several places
        twins[module] = twin = type(module).__new__(type(module))
        parts = {name: part and _twin(part, twins) for name, part in module._modules.items()}
        twin.__dict__.update(module.__dict__, training=False, _modules=parts)
    return twins[module]


def _has_own_forward(module: nn.Module) -> bool:
    own = module.__dict__
    return (
        "forward" in own
        or own.get("_compiled_call_impl") is not None
        or any([_has_own_forward(part) for part in module._modules.values() if part is not None])
    )
