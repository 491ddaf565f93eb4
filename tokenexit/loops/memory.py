"""What a model holds, and what was found out of it, for as long as it is so: conditions need not be
asked, nor lists be made, at every call."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from itertools import chain
from operator import attrgetter, is_, itemgetter

import torch
from torch import nn

from tokenexit.ops import are, facts


class Held:
    """What a module holds, with all modules within it: found once, as long as it `still` is so.

    Attributes:
        tensors: all parameters and buffers.
        is_all: whether their attributes are seen, too, and how many hooks there are: then what
            hangs on modules alone is so as long. The compiled part does, ten times as fast.
    """

    def __init__(self, root: nn.Module):
        modules = [root]
        for module in modules:
            modules += [x for x in module.__dict__["_modules"].values() if x is not None]
        self._modules = modules[1:]  # the root may hold this
        self._facts = facts(modules)
        self.is_all = self._facts is not None
        self._types, own = self._found(root)
        self._names = [*chain.from_iterable(own)]
        self._values = [*chain.from_iterable(map(dict.values, own))]
        self.tensors = [x for x in self._values if isinstance(x, torch.Tensor)]
        self._kept = {}

    def still(self, root: nn.Module) -> bool:
        """Whether it holds the same modules and tensors, by the same names and of those classes."""
        if self.is_all:
            return are([root, *self._modules], self._facts)
        types, own = self._found(root)
        if types != self._types or [*chain.from_iterable(own)] != self._names:
            return False
        values = [*chain.from_iterable(map(dict.values, own))]
        return len(values) == len(self._values) and all(map(is_, values, self._values))

    def once(self, key: Hashable, find: Callable[[], object]) -> object:
        """What `find` gave the first time."""
        if key not in self._kept:
            self._kept[key] = find()
        return self._kept[key]

    def met(self, key: Hashable, find: Callable[[], str | None]) -> str | None:
        """What `find` says is not met, of conditions on modules alone; asked until they are."""
        if key in self._kept:
            return None
        failed = find()
        if failed is None and self.is_all:
            self._kept[key] = True
        return failed

    def _found(self, root):
        """The modules' classes, and those of their dictionaries in which there is something."""
        modules = [root, *self._modules]
        own = [*filter(None, chain.from_iterable(map(_OWN, map(_DICT, modules))))]
        if not _DICTS.issuperset(map(type, own)):  # a scripted module's only look like those
            own = [dict(x.items()) for x in own]
        return [*map(type, modules)], own


_OWN, _DICT = itemgetter("_parameters", "_buffers", "_modules"), attrgetter("__dict__")
_DICTS = {dict, OrderedDict}


class Memory:
    """What a module was last found to hold. Copies and pickles start with nothing."""

    def __init__(self):
        self._last = None

    def __reduce__(self):
        return type(self), ()

    def forget(self):
        """Hold nothing: what was found keeps the tensors that were there."""
        self._last = None

    def of(self, root: nn.Module) -> Held:
        """What it holds now."""
        last = self._last  # which another thread may replace
        if last is None or not last.still(root):
            last = self._last = Held(root)
        return last
