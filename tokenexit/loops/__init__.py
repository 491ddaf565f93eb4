"""One door to the loops over layers: which of them runs a call, by one table of conditions.

All do what `tokenexit.reference.exit_forward` says; they differ in how, and in nothing else:

    reference   that function itself, all tokens in all layers
    eager       layer by layer in PyTorch, active tokens only: autograd, a trace of each layer
    cpu         all layers in one compiled op
    gpu         a few launches a layer, without a wait for the host; see `tokenexit.loops.graphs`
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from tokenexit.conditions import CALLS, COMMON, TENSORS, Condition, Reads, unmet
from tokenexit.layers import (
    HEADS,
    LAYERS,
    STATES,
    DisentangledLayer,
    ExitLayer,
    NormFirstLayer,
    reads,
)
from tokenexit.loops import cpu, eager, gpu
from tokenexit.loops.eager import ExitEncoder, Outcome
from tokenexit.loops.memory import Held
from tokenexit.packing import Packed
from tokenexit.schedule import Schedule


@dataclass
class Call:
    """What is to be run: all that conditions are asked of.

    Attributes:
        encoder: the layers with their heads.
        like: `[1, d]`, of the device and dtype that states will have.
        schedule: the policy of each sentence.
        around: gives the modules around the encoder and their classes, which a recorded loop does
            not call anew.
        wants_trace: whether the logits of each layer are asked for, as in training.
        wants_states: whether the states of each layer are asked for.
        is_recordable: whether all that is given is ids, on the device of `like`.
        memory: gives what the model holds, of which lists are kept for other calls; None: of none.
    """

    encoder: ExitEncoder
    like: torch.Tensor
    schedule: Schedule
    around: Callable[[], Reads] = lambda: Reads([], [])
    wants_trace: bool = False
    wants_states: bool = False
    is_recordable: Callable[[], bool] = lambda: True
    memory: Callable[[], Held] | None = None

    def __post_init__(self):
        # No cached_property, which torch.compile does not take.
        self._reads = self._outer = self._held = self._parts = None

    @property
    def held(self) -> Held:
        """What the model holds."""
        if self._held is None:
            self._held = self.memory()
        return self._held

    @property
    def layers(self) -> list[torch.nn.Module]:
        return self._lists[0]

    @property
    def heads(self) -> list[torch.nn.Module]:
        return self._lists[1]

    @property
    def _lists(self):
        if self._parts is None:
            parts = self.encoder._modules
            find = lambda: [_themselves(parts[name]) for name in ("layers", "heads")]  # noqa: E731
            self._parts = self._once("lists", find)
        return self._parts

    @property
    def reads(self) -> Reads:
        """What a fast loop reads of the encoder without calling it."""
        if self._reads is None:
            encoder = [self.encoder], [ExitEncoder]
            self._reads = self._once(
                (self.like.shape[-1], self.like.dtype, self.like.device),
                lambda: reads(self.layers, self.heads, self.like, *encoder),
            )
        return self._reads

    @property
    def outer(self) -> Reads:
        """What a recorded loop does not call anew beside the encoder."""
        if self._outer is None:
            self._outer = self._once("around", self.around)
        return self._outer

    def met(self, key: Hashable, find: Callable[[], str | None]) -> str | None:
        """What `find` says is not met: conditions on modules are asked until they are, once for all
        calls as long as the modules are the same."""
        if self.memory is None or torch.compiler.is_compiling():
            return find()
        return self.held.met(key, find)

    def _once(self, key, find):
        if self.memory is None or torch.compiler.is_compiling():
            return find()
        return self.held.once(key, find)


def _themselves(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """A list of them; torch.export has stand-ins for those of a model in which one stands twice."""
    if not torch.compiler.is_exporting():
        return [*modules]
    return [each.get_base() if hasattr(each, "get_base") else each for each in modules]


@dataclass(frozen=True)
class Loop:
    """A way to run the layers.

    Attributes:
        name: what `backend` calls it.
        run: of a call, states `[T, d]`, their layout, the schedule, a bias of relative positions
            and given exits `[W]` (each or None): what tokens leave with. Raises `eager.Unmet` where
            it finds out late that it can't.
        waits: whether the host waits for the device in it, and may as well look at values before.
        embed: in place of a call of the model's embeddings, which it is given with the call, the
            layout and the arguments.
        unpack: of a call, the layout, what `run` gave and whether rows are sound: logits
            `[B, N, C]`, layers `[B, N]`, and `[]` bool, whether all was sound.
        pack: lays out a padded batch where the host waits for nothing, see `gpu.pack`.
    """

    name: str
    run: Callable[..., Outcome]
    waits: bool = True
    embed: Callable[..., torch.Tensor] = eager.embed
    unpack: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = eager.unpack
    pack: Callable[..., tuple[Packed, list[torch.Tensor], torch.Tensor]] | None = None


LOOPS: Mapping[str, Loop] = MappingProxyType(
    {
        "gpu": Loop("gpu", gpu.run, False, gpu.embed, gpu.unpack, gpu.pack),
        "cpu": Loop("cpu", cpu.run, embed=cpu.embed),
        "eager": Loop("eager", eager.run),
        "reference": Loop("reference", eager.run_reference),
    }
)
BACKENDS = ("auto", *sorted(LOOPS))


def _of(part: Callable[[Call], object], conditions: Iterable[Condition]) -> list[Condition]:
    """Conditions on a part of a call, as such on the call."""
    return [(name, lambda call, holds=holds: holds(part(call))) for name, holds in conditions]


_NO_STATES: Condition = ("no states of each layer", lambda call: not call.wants_states)
_NO_DROPOUT: Condition = (
    "no dropout in layers",
    lambda call: not any(isinstance(x, ExitLayer) and x.drops() for x in call.layers),
)
_OF_A_CALL: list[Condition] = [
    ("no logits of each layer", lambda call: not call.wants_trace),
    _NO_STATES,
    ("copy 'post_norm'", lambda call: not call.schedule.pre_norm),
    ("neighbors 'frozen'", lambda call: not call.schedule.recompute),
]
_FAST: list[Condition] = [
    *_OF_A_CALL,
    (
        "layers as BERT's, without disentangled attention",
        lambda call: not any([isinstance(x, DisentangledLayer) for x in call.layers]),
    ),
    (
        "layers as BERT's, which normalise last, not first",
        lambda call: not any([isinstance(x, NormFirstLayer) for x in call.layers]),
    ),
    ("classifiers on the states themselves", lambda call: call.encoder.neck is None),
]
# The op of the CPU sees to tensors itself, but where it is only traced; see `conditions.refused`.
_TRACED: list[Condition] = [
    (name, lambda call, holds=holds: not torch.compiler.is_compiling() or holds(call.reads))
    for name, holds in TENSORS
]
# What each loop needs, beside right arguments: the first that is not met is told. Cheap ones first.
CONDITIONS: Mapping[str, list[Condition]] = MappingProxyType(
    {
        "gpu": [
            *_of(lambda call: call.like, gpu.STATES),
            *_FAST,
            ("all inputs on the GPU, as token ids", lambda call: call.is_recordable()),
            *_of(lambda call: call.reads, CALLS),
            *_of(lambda call: call.outer, CALLS),
            *_of(lambda call: call.reads, TENSORS),
            *_of(lambda call: call.layers, gpu.LAYERS),
            *_of(lambda call: call.heads, [*HEADS, *gpu.HEADS]),
            (gpu.INSTALLED, lambda call: gpu.lacks(call.like.device.type) is None),
        ],
        "cpu": [
            *_FAST,
            *_of(lambda call: call.like, STATES),
            *_of(lambda call: call.reads, CALLS),
            *_TRACED,
            *_of(lambda call: (call.like, call.layers), LAYERS),
            *_of(lambda call: call.heads, HEADS),
        ],
        "eager": [],
        "reference": [_NO_STATES, _NO_DROPOUT],
    }
)
# Of these, what hangs on more than the modules of a model: to be asked of each call.
_ANEW: Mapping[str, list[Condition]] = MappingProxyType(
    {
        "gpu": [
            *_of(lambda call: call.like, gpu.STATES),
            *_OF_A_CALL,
            *COMMON,
            ("all inputs on the GPU, as token ids", lambda call: call.is_recordable()),
        ],
        "cpu": [*_OF_A_CALL, *_of(lambda call: call.like, STATES), *COMMON],
    }
)
# And then, of modules that are as they should be.
_OF_TENSORS: Mapping[str, list[Condition]] = MappingProxyType(
    {
        "gpu": [
            *_of(lambda call: call.reads, TENSORS),
            *_of(lambda call: call.heads, gpu.HEADS),
            (gpu.INSTALLED, lambda call: gpu.lacks(call.like.device.type) is None),
        ]
    }
)
# What torch.export lacks of a call to make a program of it: only the compiled ops have sizes that
# hang on values.
_UNEXPORTED: Mapping[str, Callable[[Call], str | None]] = MappingProxyType(
    {
        "eager": lambda call: unmet((*_of(lambda call: call.like, STATES), _NO_DROPOUT), call),
        "reference": lambda call: "another backend",
    }
)


def pick(backend: str, call: Call) -> tuple[str | None, str | None]:
    """The name of the loop for a call, and what a faster one, or the one asked for, lacks.

    Args:
        backend: one of `BACKENDS`; "auto": the fastest that can.
    """
    if backend != "auto":
        failed = _lacks(backend, call)
        return backend if failed is None else None, failed
    fast = "gpu" if call.like.device.type in gpu.devices() else "cpu"
    failed = _lacks(fast, call)
    return (fast if failed is None else "eager"), failed


def _lacks(name, call):
    """The first condition of that loop that a call does not meet."""
    return (
        unmet(_ANEW.get(name, ()), call)
        or call.met((name, call.like.dtype), lambda: unmet(CONDITIONS[name], call))
        or unmet(_OF_TENSORS.get(name, ()), call)
    )


def choose(backend: str, call: Call) -> Loop:
    """The loop that runs a call; see `pick`.

    Raises:
        ValueError: the one asked for can't; torch.export of what it makes no program of.
    """
    name, failed = pick(backend, call)
    if name is None:
        raise cannot(backend, failed)
    if torch.compiler.is_exporting() and (lacks := _UNEXPORTED.get(name, lambda call: None)(call)):
        raise ValueError(
            f"torch.export met the loop {name!r}, of which there is no program; expected {lacks}"
        )
    if failed == gpu.INSTALLED:
        what = gpu.lacks(call.like.device.type)
        message = f"slow on this GPU: {what} is missing; see `tokenexit info`"
        gpu.fell_back("not installed", message)
    return LOOPS[name]


def tell(backend: str, call: Call) -> str:
    """In words, what would run a call: the name of a loop.

    Behind "eager" or "none" comes the first condition that is not met for a faster one, or for the
    one that is asked for.
    """
    name, failed = pick(backend, call)
    if name == "cpu" and (failed := unmet(TENSORS, call.reads)):  # which the op would find
        name = "eager" if backend == "auto" else None
    if failed is None:
        return name
    needs = "a fast loop" if backend == "auto" else f"the loop {backend!r}"
    return f"{name or 'none'}: {needs} needs {failed}"


def cannot(backend: str, failed: str) -> ValueError:
    """The error for a loop that was asked for and can't run a call."""
    return ValueError(
        f"backend is {backend!r}, whose loop needs {failed}; expected a call and a model with "
        "that, or the backend 'auto'"
    )
