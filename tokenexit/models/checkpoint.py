"""What a folder or a name on the hub holds, and loading it whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig

from tokenexit.models.configuration import TokenExitConfig

HUB_ARGUMENTS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def check_dtype_of_int8(dtype: torch.dtype | str | None):
    """Raise ValueError if an 8-bit tagger is to compute in a dtype: what is not bytes is fp32."""
    if dtype not in (None, "auto", "float32", torch.float32):
        raise ValueError(f"got dtype {dtype} for 8-bit weights; expected None (all else is fp32)")


def saved_kind(folder: str | os.PathLike) -> str | None:
    """The `model_type` of the model that a folder holds; None if it holds none."""
    config = Path(folder) / "config.json"
    if not config.is_file():
        return None
    try:
        return str(json.loads(config.read_text(encoding="utf-8"))["model_type"])
    except (ValueError, KeyError, TypeError):
        return "unknown"


def check_tagger_folder(name: str | os.PathLike):
    """Raise ValueError unless `name` is a folder that holds a saved tagger, and may be written to.

    To be asked before a part of a tagger is written: beside another model, or alone, no one could
    load it.
    """
    if not Path(name).is_dir():
        raise ValueError(
            f"{name} is no folder; expected that of a tagger (one on the hub has to be saved to a "
            f"folder first: Tagger.from_pretrained({str(name)!r}).save_pretrained(FOLDER))"
        )
    kind = saved_kind(name)
    if kind != TokenExitConfig.model_type:
        what = "no model" if kind is None else f"a model of type {kind!r}"
        raise ValueError(
            f"{name} holds {what}; expected a tagger that `tokenexit train` wrote (or "
            "tokenexit.convert and save_pretrained, and training)"
        )


def check_output_folder(folder: str | os.PathLike):
    """Tell before the work that a tagger can't be saved to `folder`.

    Raises:
        OSError: a file is there or on the way there, or nothing may be written to it.
        ValueError: a model is there that is no tagger.
    """
    path = Path(folder).absolute()
    there = next(one for one in (path, *path.parents) if one.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file; expected a folder to write")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"{there} is read-only; expected a folder that may be written to")
    kind = saved_kind(folder)
    if kind not in (None, TokenExitConfig.model_type):
        raise ValueError(
            f"{folder} holds a model of type {kind!r}; expected a new folder, or one of a tagger"
        )


def load_config(name: str | os.PathLike, **kwargs) -> PreTrainedConfig:
    """The configuration at a folder or hub name; errors as in `from_pretrained`."""
    if Path(name).is_dir() and not kwargs.get("subfolder") and saved_kind(name) is None:
        raise FileNotFoundError(f"{name} holds no model, as it has no config.json")
    try:
        return load(AutoConfig.from_pretrained, name, **kwargs)
    except (AttributeError, TypeError) as error:  # of a field that is something else
        raise ValueError(f"the configuration of {name} does not fit: {error}") from error


def load(loader, name, *args, **kwargs):
    """Call a Hugging Face loader; a damaged file becomes one clear ValueError."""
    try:
        return loader(name, *args, **kwargs)
    except (SafetensorError, UnpicklingError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(f"the checkpoint {name} is damaged: {error}") from error
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the configuration of {name} does not fit: {reason}") from error
    except OSError as error:
        if isinstance(error.__cause__, HFValidationError):  # a path
            raise FileNotFoundError(f"{name} is neither a folder nor a name on the hub") from None
        raise


def made_anew(info: dict) -> set[str]:
    """Weights that loading, which told `info`, made: they lacked, or did not fit."""
    return {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


def load_whole(loader, name, may_be_new, may_be_left, *args, **kwargs):
    """A model and its loading info.

    Args:
        loader: of Hugging Face; name, args, kwargs: its arguments.
        may_be_new: weights that the checkpoint may lack.
        may_be_left: whether it may have some that the model has not.

    Raises:
        ValueError: weights that lack, are left over or do not fit; a damaged file.
    """
    lenient = kwargs.get("ignore_mismatched_sizes", False)
    kwargs.update(output_loading_info=True, ignore_mismatched_sizes=True)
    model, info = load(loader, name, *args, **kwargs)
    if info["mismatched_keys"] and not lenient:
        weight, got, expected = sorted(info["mismatched_keys"])[0]
        raise ValueError(
            f"the checkpoint {name} has {weight} of shape {tuple(got)}; its configuration expects "
            f"{tuple(expected)}"
        )
    missing = sorted(set(info["missing_keys"]) - set(may_be_new))
    if missing:
        raise ValueError(f"the checkpoint {name} lacks {len(missing)} weights: {missing[:3]}")
    if info["unexpected_keys"] and not may_be_left:
        extra = sorted(info["unexpected_keys"])
        raise ValueError(f"the checkpoint {name} has {len(extra)} unknown weights: {extra[:3]}")
    return model, info
