"""Other ways to run the same tagger on a CPU, all with one signature.

A peer that is not installed, or does not load, is `Unavailable`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import numpy
import texts
import torch
import transformers
from transformers import BertForTokenClassification, PreTrainedTokenizerBase

OPSET = 17


class Unavailable(Exception):
    """Why a peer cannot be measured."""


@dataclass(frozen=True)
class Peer:
    """A way to run a tagger.

    Attributes:
        prepare: turns a padded batch into the inputs that `run` takes; not timed.
        run: inputs to logits, something `torch.as_tensor` takes, `[B, N, C]`.
    """

    prepare: Callable[[texts.Batch], object]
    run: Callable[[object], object]


def export(
    model: BertForTokenClassification,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[texts.Sentence],
    folder: Path,
    wanted: Sequence[str] | None = None,
) -> dict[str, str]:
    """Write a model in every form that peers load; return why some could not be written.

    Args:
        tokenizer: CTranslate2 wants a vocabulary of the model's size.
        samples: text like that to come, from which OpenVINO takes the ranges of its bytes.
        folder: gets `hf`, `model.onnx`, `fused.onnx`, `int8.onnx`, `openvino-int8.xml`,
            `ct2-float32`, `ct2-int8`.
        wanted: peers to write for. None: all.

    Returns:
        Of each failed form, its name to the error.
    """
    failed = {}
    with _quiet():
        model.save_pretrained(folder / "hf")
    for name, write in (
        ("model.onnx", lambda: _export_onnx(model, folder / "model.onnx")),
        ("fused.onnx", lambda: _fuse(model.config, folder)),
        ("int8.onnx", lambda: _quantize(folder)),
        ("openvino-int8.xml", lambda: _quantize_openvino(samples, folder)),
        ("ct2", lambda: _export_ctranslate2(model, tokenizer, folder)),
    ):
        if wanted is not None and not any(name in PEERS[peer][2] for peer in wanted):
            continue
        try:
            with _quiet():
                write()
        except Exception as error:  # a peer of any kind of trouble is left out, with the reason
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return failed


class _Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def _export_onnx(model, path):
    import onnx  # noqa: F401 (its absence is told before the work begins)

    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")  # the form whose attention the optimizer knows
    ids, mask = torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
    names = ["input_ids", "attention_mask"]
    axes = {name: {0: "sentences", 1: "tokens"} for name in [*names, "logits"]}
    torch.onnx.export(
        _Logits(model),
        (ids, mask),
        str(path),
        opset_version=OPSET,
        dynamo=False,
        input_names=names,
        output_names=["logits"],
        dynamic_axes=axes,
    )


def _fuse(config, folder):
    from onnxruntime.transformers.optimizer import optimize_model

    fused = optimize_model(
        str(folder / "model.onnx"),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=0,
    )
    attention = fused.get_fused_operator_statistics()["Attention"]
    if attention != config.num_hidden_layers:
        raise RuntimeError(f"the optimizer fused {attention} layers' attention")
    fused.save_model_to_file(str(folder / "fused.onnx"))


def _quantize(folder):
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(
        folder / "fused.onnx", folder / "int8.onnx", extra_options={"DefaultTensorType": 1}
    )


def _quantize_openvino(samples, folder, size=4):
    import nncf
    import openvino

    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    inputs = [_named_arrays(texts.batch(batch)) for batch in batches]
    quantized = nncf.quantize(
        openvino.Core().read_model(folder / "model.onnx"),
        nncf.Dataset(inputs),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(inputs),
    )
    openvino.save_model(quantized, folder / "openvino-int8.xml")


def _export_ctranslate2(model, tokenizer, folder):
    from ctranslate2.converters import TransformersConverter

    bert = copy.deepcopy(model.bert)
    bert.config.position_embedding_type = "absolute"  # as it always is; the converter asks
    bert.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    for kind in ("float32", "int8"):
        converter = TransformersConverter(str(folder / "bert"))
        converter.convert(str(folder / f"ct2-{kind}"), quantization=kind, force=True)


def hugging_face(folder: Path, dtype: torch.dtype = torch.float32) -> Peer:
    """Hugging Face's model with torch's fused attention."""
    return _torch_peer(_load(folder, dtype))


def compiled(folder: Path, dtype: torch.dtype = torch.float32) -> Peer:
    """The same under torch.compile, for any length; its layers share one compilation."""
    model = _load(folder, dtype)
    for layer in model.bert.encoder.layer:
        layer.compile(dynamic=True)
    return _torch_peer(model)


def _load(folder, dtype=torch.float32):
    with _quiet():
        return BertForTokenClassification.from_pretrained(
            folder / "hf", attn_implementation="sdpa", dtype=dtype
        ).eval()


def _torch_peer(model):
    return Peer(
        lambda b: (b.input_ids, b.attention_mask), lambda inputs: model(*inputs).logits.float()
    )


def onnxruntime(folder: Path, file: str) -> Peer:
    """ONNX Runtime; its threads do not go on spinning after a call, when others are timed."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        str(folder / file), options, providers=["CPUExecutionProvider"]
    )
    return Peer(_named_arrays, lambda inputs: session.run(["logits"], inputs)[0])


def openvino(folder: Path, file: str, precision: str) -> Peer:
    """OpenVINO, tuned for latency.

    Args:
        precision: of what is not in bytes, "f32" or "bf16".
    """
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.compile_model(core.read_model(folder / file), "CPU", settings)
    # Its buffers are used again by the next call.
    return Peer(_named_arrays, lambda inputs: model(inputs)["logits"].copy())


def ctranslate2(folder: Path, kind: str) -> Peer:
    """CTranslate2's encoder, with the classifier in torch."""
    import ctranslate2

    encoder = ctranslate2.Encoder(
        str(folder / f"ct2-{kind}"),
        device="cpu",
        compute_type=kind,
        inter_threads=1,
        intra_threads=torch.get_num_threads(),
    )
    classifier = _load(folder).classifier

    def prepare(b):
        arrays = b.input_ids.int().numpy(), b.attention_mask.sum(1).int().numpy()
        # A view does not keep its array alive.
        return arrays, [ctranslate2.StorageView.from_array(a) for a in arrays]

    def run(inputs):
        states = encoder.forward_batch(*inputs[1]).last_hidden_state
        return classifier(torch.as_tensor(numpy.asarray(states)))

    return Peer(prepare, run)


def _named_arrays(b):
    return {"input_ids": b.input_ids.numpy(), "attention_mask": b.attention_mask.numpy()}


def _in_bf16(load: Callable[[Path], Peer]) -> Callable[[Path], Peer]:
    def checked(folder: Path) -> Peer:
        if "bf16" not in harness.features():
            raise Unavailable("this processor does not compute in bf16")
        return load(folder)

    return checked


# name: (dtype, what loads it, what of `export` it needs). ONNX Runtime has no bf16 on x86.
PEERS = {
    "Hugging Face sdpa": ("fp32", hugging_face, ()),
    "Hugging Face sdpa bf16": ("bf16", _in_bf16(lambda f: hugging_face(f, torch.bfloat16)), ()),
    "torch.compile": ("fp32", compiled, ()),
    "torch.compile bf16": ("bf16", _in_bf16(lambda f: compiled(f, torch.bfloat16)), ()),
    "ONNX Runtime": ("fp32", lambda f: onnxruntime(f, "fused.onnx"), ("model.onnx", "fused.onnx")),
    "ONNX Runtime int8": (
        "int8",
        lambda f: onnxruntime(f, "int8.onnx"),
        ("model.onnx", "fused.onnx", "int8.onnx"),
    ),
    "OpenVINO": ("fp32", lambda f: openvino(f, "model.onnx", "f32"), ("model.onnx",)),
    "OpenVINO bf16": (
        "bf16",
        _in_bf16(lambda f: openvino(f, "model.onnx", "bf16")),
        ("model.onnx",),
    ),
    "OpenVINO int8": (
        "int8",
        lambda f: openvino(f, "openvino-int8.xml", "f32"),
        ("model.onnx", "openvino-int8.xml"),
    ),
    "CTranslate2": ("fp32", lambda f: ctranslate2(f, "float32"), ("ct2",)),
    "CTranslate2 int8": ("int8", lambda f: ctranslate2(f, "int8"), ("ct2",)),
}


def load(name: str, folder: Path, failed: dict[str, str]) -> Peer:
    """A peer, from what `export` wrote.

    Args:
        failed: of `export`.

    Raises:
        Unavailable: it is not installed, or does not load.
    """
    _, loader, needs = PEERS[name]
    for form in needs:
        if form in failed:
            raise Unavailable(failed[form])
    try:
        return loader(folder)
    except Exception as error:  # as in export
        raise Unavailable(f"{type(error).__name__}: {error}".splitlines()[0]) from error


@contextlib.contextmanager
def _quiet():
    """Without the notes, bars and warnings of exporters."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(level)
        transformers.logging.enable_progress_bar()
