"""What a fast loop needs of all that it reads: one table, asked whenever that may have changed.

A fast loop takes the tensors of modules and calls none of them. So it may run only where calling
them would do what their classes say, and no more, on tensors as they were made. All else goes the
plain way, layer by layer through calls in PyTorch, where hooks run and parts may be anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules import module as _torch_module

# Of each class that may be passed over, what its call ran when it was imported.
_FORWARDS = {cls: cls.forward for cls in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Embedding)}
_CALL = nn.Module.__call__
_PLAIN = {torch.Tensor, nn.Parameter}


def passable(cls: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: a fast loop may do what the class's forward does in place of a call."""
    _FORWARDS[cls] = cls.forward
    return cls


@dataclass
class Reads:
    """What a loop reads of a model without calling it.

    Attributes:
        modules: whose calls it passes over.
        kinds: the class that each has to be of.
        weights, scales, classifiers: what it takes of the layers, of those of int8, of the heads;
            None for what is not there.
        copied: the products, if the weights of all have a second copy, see `tokenexit.prepack`.
        device: where all these have to be.
        shapes, dtypes: functions that give theirs, as they have to be.
    """

    modules: list[nn.Module]
    kinds: list[type]
    weights: list[torch.Tensor | None] = field(default_factory=list)
    scales: list[torch.Tensor | None] = field(default_factory=list)
    classifiers: list[torch.Tensor | None] = field(default_factory=list)
    copied: list[nn.Module] = field(default_factory=list)
    device: torch.device | None = None
    shapes: Callable[[], list[Sequence[int]]] | None = None
    dtypes: Callable[[], list[torch.dtype]] | None = None

    def __post_init__(self):
        self.tensors = self.weights + self.scales + self.classifiers


def _classes_own():
    return (
        nn.Module.__call__ is _CALL or torch.compiler.is_exporting()  # which puts its own there
    ) and all([cls.forward is forward for cls, forward in _FORWARDS.items()])


def _own_forward(reads):
    return _classes_own() and not any(["forward" in m.__dict__ for m in reads.modules])


def _no_hooks(reads):
    return not _torch_module._has_any_global_hook() and not any(
        [m._forward_hooks or m._forward_pre_hooks for m in reads.modules]
    )


def _plain(reads):
    # torch.export puts stand-ins in all places.
    return _PLAIN.issuperset(map(type, reads.tensors)) or torch.compiler.is_exporting()


def _no_backward_hooks(reads):
    return not any([m._backward_hooks or m._backward_pre_hooks for m in reads.modules])


def _contiguous(reads):
    try:
        return all([x.is_contiguous() for x in reads.tensors])
    except RuntimeError:  # of a sparse one
        return False


# In words, and whether it holds of a subject.
Condition = tuple[str, Callable[[object], bool]]

# Lists are made whole and compared whole: of a model some 150 modules and 200 tensors.
CALLS = (
    ("modules of the classes they were made of", lambda r: [*map(type, r.modules)] == r.kinds),
    ("forwards that are their classes' own", _own_forward),
    ("no hooks", _no_hooks),
    ("a weight and a bias in each part", lambda r: not any([x is None for x in r.tensors])),
    ("weights that are plain tensors", _plain),
)
# What of these is of no module.
COMMON = (
    ("forwards that are their classes' own", lambda _: _classes_own()),
    ("no hooks", lambda _: not _torch_module._has_any_global_hook()),
)
# These, the compiled ops see to themselves in each layer that is reached; see `refused`.
TENSORS = (
    ("weights where the states are", lambda r: all([x.device == r.device for x in r.tensors])),
    ("contiguous weights", _contiguous),
    ("weights of shapes that fit", lambda r: [x.shape for x in r.tensors] == r.shapes()),
    ("weights of the states' dtype", lambda r: [x.dtype for x in r.tensors] == r.dtypes()),
)


def unmet(conditions: Iterable[Condition], subject) -> str | None:
    """The first condition that does not hold of the subject; None if all do."""
    for name, holds in conditions:
        if not holds(subject):
            return name
    return None


def refused(reads: Reads) -> str:
    """In the handler of an op's error: the condition on tensors that it may have stopped at.

    To ask for all of them at every call would take as long as a small model does.

    Raises:
        RuntimeError, ValueError: that error, if all are met.
    """
    failed = unmet(TENSORS, reads)
    if failed is None:
        raise  # noqa: PLE0704
    return failed


def check_loaded(root: nn.Module, device: torch.device):
    """Raise ValueError for a weight within `root` that is elsewhere, and that no hook brings.

    A product without a bias takes one on the meta device, and gives what lay in memory.
    """
    if torch.compiler.is_compiling() or _torch_module._has_any_global_hook():
        return
    found = [("", root)]
    for name, module in found:
        if module._forward_pre_hooks or "forward" in module.__dict__:
            continue
        for kind, weight in module._parameters.items():
            if weight is not None and weight.device != device:
                raise ValueError(
                    f"{name}{kind} is on {weight.device}; expected it on {device}, as the states"
                )
        children = module._modules.items()
        found += [(f"{name}{part}.", child) for part, child in children if child is not None]


def is_plain(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether `module` is a `cls` with weight and bias, of which nothing has been changed.

    Then an op may do in its place what a call would do, gradients included.
    """
    if type(module) is not cls:
        return False
    reads = Reads([module], [cls], [module._parameters.get(name) for name in ("weight", "bias")])
    return unmet(CALLS, reads) is None and _no_backward_hooks(reads)
