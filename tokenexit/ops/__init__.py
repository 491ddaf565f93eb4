"""One file an op: a user function, its checks, its fake, and the choice of what runs it."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F

try:
    _LOADED = importlib.import_module("tokenexit._C")  # which registers torch.ops.tokenexit
    _ERROR = None
except ModuleNotFoundError:
    _ERROR = "tokenexit._C was not built; the installation's log says why (pip install -v)"
except ImportError as error:
    _ERROR = f"tokenexit._C was built, but does not load: {error}"


def _load_cuda():
    """Register the ops for CUDA, where they were built; a torch without CUDA cannot load them."""
    if _ERROR is None and torch.version.cuda and (spec := find_spec("tokenexit._C_cuda")):
        try:
            torch.ops.load_library(spec.origin)
        except OSError as error:
            message = f"tokenexit._C_cuda was built, but does not load: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


_load_cuda()


def extension_available() -> bool:
    """Whether the compiled ops are loaded; without them the reference runs, only slower."""
    return _ERROR is None


def extension_error() -> str | None:
    """Why the compiled ops are not loaded; None if they are."""
    return _ERROR


# Instruction sets by which models in 8 bits and bf16 attend in products of bf16.
ATTEND_IN_BF16 = ("avx512_bf16", "amx")


def instruction_sets() -> list[str]:
    """Those of this processor that the compiled ops know, each for `TOKENEXIT_CPU` to ask for.

    From the least to the best, which is taken if nothing is asked for; none without compiled ops.
    """
    return _LOADED.instruction_sets if extension_available() else []


def instruction_set() -> str | None:
    """The one that the compiled ops take in this process; None without compiled ops."""
    return _LOADED.instruction_set if extension_available() else None


def facts(modules: list[torch.nn.Module]) -> tuple | None:
    """What modules are: classes, attributes, tensors, how many hooks; None if that can't be told.

    Another object for the same value is another fact. What is within an attribute, but for the
    parameters, buffers and modules of a module, is not looked at; nor are attributes of the first.
    """
    look = getattr(_LOADED, "facts", None) if extension_available() else None
    return None if look is None else look(modules)


def are(modules: list[torch.nn.Module], found: tuple) -> bool:
    """Whether modules are still as `facts` found them."""
    return _LOADED.are(modules, found)


def compiled_devices(op: str) -> frozenset[str]:
    """The types of device that `tokenexit::op` is compiled for."""
    packet = getattr(torch.ops.tokenexit, op, None) if extension_available() else None
    if packet is None:
        return frozenset()
    return frozenset(
        key.lower()
        for key in ("CPU", "CUDA")
        if packet.default.has_kernel_for_dispatch_key(getattr(torch._C.DispatchKey, key))
    )


def register_fake(op: str) -> Callable:
    """Decorator: what `tokenexit::op` gives on the meta device, as `torch.library.register_fake`.

    Where one of a call's tensors is on that device and others elsewhere, PyTorch asks the fake; it
    would give memory that nobody has written. So it refuses.
    """

    def register(fake):
        @functools.wraps(fake)
        def checked(*args):
            given = [x for arg in args for x in (arg if isinstance(arg, list | tuple) else [arg])]
            devices = {str(x.device) for x in given if isinstance(x, torch.Tensor)}
            if len(devices) > 1:
                raise ValueError(f"{op}: got tensors on {sorted(devices)}; expected one device")
            return fake(*args)

        torch.library.register_fake(f"tokenexit::{op}", checked)
        return fake

    return register


def use_compiled(backend: str, device: torch.device, devices: frozenset[str]) -> bool:
    """Whether a call on that device takes the compiled op.

    Raises:
        ValueError: backend is neither "auto" nor "reference".
    """
    if backend not in ("auto", "reference"):
        raise ValueError(f'got backend {backend!r}; expected "auto" or "reference"')
    return backend == "auto" and device.type in devices


@torch.compiler.assume_constant_result
def float32_precision() -> str:
    """Of Triton's fp32 products, as PyTorch is set: "ieee", or "tf32" unless it is "highest"."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def use_triton(backend: str, *tensors: torch.Tensor) -> bool:
    """Whether a call takes the Triton op: on a GPU with triton installed, one dtype that it has."""
    dtype = tensors[0].dtype
    return (
        backend == "auto"
        and all(tensor.is_cuda and tensor.dtype == dtype for tensor in tensors)
        and dtype in (torch.float16, torch.bfloat16, torch.float32)
        and _load_kernels()
    )


@functools.cache
def _load_kernels():
    """Import what registers torch.ops.tokenexit_triton, on first use; whether triton is there."""
    if find_spec("triton") is None:
        return False
    for name in ("attention", "decision", "norm"):
        importlib.import_module(f"tokenexit.kernels.{name}")
    return True


def check_vector(
    name: str, tensor: torch.Tensor, size: int, device: torch.device, dtype=torch.int64
) -> None:
    """Hold an argument against what an op expects; looks at no value, so the host never waits.

    Raises:
        TypeError: not of that dtype.
        ValueError: not of shape `[size]`, or on another device.
    """
    if tensor.dtype != dtype:
        raise TypeError(f"got {name} of {tensor.dtype}; expected {dtype}")
    if tensor.dim() != 1 or tensor.shape[0] != size:
        raise ValueError(f"got {name} {list(tensor.shape)}; expected [{size}]")
    if tensor.device != device:
        raise ValueError(f"got {name} on {tensor.device}; expected {device}")


def check_bias(bias: torch.Tensor | None, positions: torch.Tensor | None, q: torch.Tensor) -> None:
    """Hold a relative-position bias against queries `[A, H, ...]`.

    Raises:
        ValueError: not `[H, 2R+1]`; no positions, or not one a query.
    """
    if bias is None:
        return
    if positions is None or positions.shape != q.shape[:1]:
        got = None if positions is None else tuple(positions.shape)
        raise ValueError(f"got positions {got} with a bias; expected [{len(q)}]")
    if bias.dim() != 2 or len(bias) != q.shape[1] or bias.shape[1] % 2 == 0:
        raise ValueError(f"got bias {tuple(bias.shape)}; expected [{q.shape[1]}, 2R+1]")


def attention_by_sentence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    scale: float,
    mask: Callable[[slice, slice], torch.Tensor | None],
) -> torch.Tensor:
    """Attention within packed sentences by a call of PyTorch's for each: `[A, H, D]`.

    Args:
        q, k, v, cu_q, cu_k, scale: see `tokenexit.ops.exit_attention`.
        mask: of a sentence's rows in q and in k, what is added to its scores, `[H, a, k]`, or None.
    """
    parts, first_q, first_k = [], 0, 0
    for num_q, num_k in zip(cu_q.diff().tolist(), cu_k.diff().tolist(), strict=True):
        mine, seen = slice(first_q, first_q + num_q), slice(first_k, first_k + num_k)
        first_q, first_k = mine.stop, seen.stop
        if num_q:
            rows = (x.transpose(0, 1)[None] for x in (q[mine], k[seen], v[seen]))
            added = mask(mine, seen)
            out = F.scaled_dot_product_attention(*rows, attn_mask=added, scale=scale)
            parts.append(out[0].transpose(0, 1))
    return torch.cat(parts) if parts else q.clone()


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    dropout_p: float,
) -> None:
    """Hold what every attention over packed sentences takes against each other.

    Raises:
        ValueError: not `[A, H, D]`, `[K, H, D]`, `[K, H, D]` and `[B+1]` of both offsets; a
            probability outside [0, 1).
    """
    if q.dim() != 3 or k.shape != v.shape or k.dim() != 3 or q.shape[1:] != k.shape[1:]:
        raise ValueError(
            f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "expected [A, H, D], [K, H, D], [K, H, D]"
        )
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            f"got {len(cu_q)} offsets of queries and {len(cu_k)} of keys; expected B + 1 of both"
        )
    if not 0 <= dropout_p < 1:
        raise ValueError(f"got dropout_p={dropout_p}; expected a probability below 1")
