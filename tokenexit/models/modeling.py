"""The token classifier whose tokens exit early."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import TokenClassifierOutput

from tokenexit.conditions import TENSORS, unmet
from tokenexit.files import write_folder_aside
from tokenexit.int8 import is_quantized, quantize
from tokenexit.layers import ExitHead, ExitLayer
from tokenexit.loops import cpu, gpu
from tokenexit.loops.eager import ExitEncoder, Trace, last_of
from tokenexit.loops.graphs import Graphs
from tokenexit.models.checkpoint import (
    HUB_ARGUMENTS,
    check_dtype_of_int8,
    load_config,
    load_whole,
)
from tokenexit.models.configuration import TokenExitConfig, check_sizes, label_maps
from tokenexit.models.embeddings import ExitEmbeddings, relative_buckets
from tokenexit.models.loss import exit_loss, final_loss
from tokenexit.models.translation import check_checkpoint, config_of, copy_weights, family_of
from tokenexit.ops.pack_tokens import pack
from tokenexit.packing import STARTS_WORD, Packed, word_ids_from_kinds
from tokenexit.policy import ExitPolicy
from tokenexit.reference import exit_forward
from tokenexit.schedule import Schedule
from tokenexit.text.vocabulary import marks_of, token_kinds

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "reference")
# Arguments of Hugging Face's models that ask for what only a computation of all tokens has.
_OTHERS = frozenset(
    (
        "cache_position",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "head_mask",
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "use_cache",
    )
)
_INTEGERS = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))


@dataclass
class TokenExitOutput(TokenClassifierOutput):
    """Padded results of a batch.

    Attributes:
        loss: in training, `exit_loss`; in evaluation, cross-entropy of `logits`. None without
            labels.
        logits: `[B, N, C]`, those each token left with; 0 at padding.
        exit_layers: `[B, N]` int64, the layer each token left at, from 1; 0 at padding.
        layer_logits: with `output_layer_logits`, `[L, B, N, C]`: each layer's logits for the
            tokens computed in it, NaN for the others.
    """

    exit_layers: torch.Tensor | None = None
    layer_logits: torch.Tensor | None = None


class TokenExitForTokenClassification(PreTrainedModel):
    """A BERT-family tagger whose tokens leave as soon as they are settled.

    Stands where a Hugging Face token classifier stood. Made by `tokenexit.convert` or
    `from_pretrained`; `policy` says when tokens leave and may be changed at any time.
    """

    config_class = TokenExitConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # forward takes num_items_in_batch

    def __init__(self, config: TokenExitConfig):
        _check_config(config)
        super().__init__(copy.deepcopy(config))  # the policy in it is this model's alone
        self.num_labels = config.num_labels
        self.embeddings = ExitEmbeddings(config)
        layers = [
            ExitLayer(
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                F.gelu if config.hidden_act == "gelu" else ACT2FN[config.hidden_act],
                config.layer_norm_eps,
                config.hidden_dropout_prob,
                config.attention_probs_dropout_prob,
            )
            for _ in range(config.num_hidden_layers)
        ]
        heads = [
            ExitHead(config.hidden_size, config.num_labels, config.classifier_dropout)
            for _ in layers
        ]
        self.encoder = ExitEncoder(layers, heads)
        if config.relative_attention_buckets:
            self.relative_bias = nn.Embedding(
                config.relative_attention_buckets, config.num_attention_heads
            )
        else:
            self.relative_bias = None
        kinds = torch.full((config.vocab_size,), STARTS_WORD, dtype=torch.uint8)
        self.register_buffer("token_kinds", kinds)
        self._backend = "auto"
        self._graphs = Graphs()
        self.cuda_graphs = True
        self._new_heads: dict[int, torch.Tensor] = {}  # what was never trained, by layer
        self._warned = False
        self._policy = None, None  # what the configuration said, and the policy of it
        self.policy = self.policy
        self.post_init()
        if config.int8:
            quantize(self)

    @property
    def policy(self) -> ExitPolicy:
        """When tokens leave. Assigning one takes effect at the next call; it is saved along.

        It is what `config.exit_policy` says, which may be assigned as well.

        Raises:
            TypeError, ValueError: `config.exit_policy` is not the fields of a policy for the model.
        """
        said, policy = self._policy
        if policy is None or said != self.config.exit_policy:
            said = self.config.exit_policy
            if isinstance(said, ExitPolicy):
                said = self.config.exit_policy = said.to_dict()  # as JSON has it
            policy = ExitPolicy.never() if said is None else ExitPolicy.from_dict(said)
            policy.thresholds(self.config.num_hidden_layers)  # a list of the wrong length
            self._policy = copy.deepcopy(said), policy
        return policy

    @policy.setter
    def policy(self, policy: ExitPolicy):
        if not isinstance(policy, ExitPolicy):
            raise TypeError(f"policy is a {type(policy).__name__}; expected an ExitPolicy")
        policy.thresholds(self.config.num_hidden_layers)  # a list of the wrong length
        self.config.exit_policy = policy.to_dict()
        self._warn_of_untrained_heads()

    def untrained_heads(self, policy: ExitPolicy | None = None) -> list[int]:
        """Layers, from 1, whose classifiers are as they were initialised: they know nothing yet.

        Whatever changes a classifier trains it: a Trainer, a loop of one's own, an assignment. Of
        a tagger saved by a version that did not keep count, all are trained.

        Args:
            policy: only those that decide labels under it. None: all.
        """
        weights = {number: self.exit_heads[number - 1].weight for number in self._new_heads}
        heads = [
            number
            for number, weight in weights.items()
            if not weight.is_meta and torch.equal(self._new_heads[number].to(weight), weight)
        ]
        if policy is None:
            return heads
        thresholds = policy.thresholds(self.config.num_hidden_layers)
        return [number for number in heads if thresholds[number - 1] > 0]

    def mark_untrained(self, heads: Iterable[int]):
        """Take the classifiers of these layers, from 1, for untrained as they are now."""
        self._new_heads = {n: self.exit_heads[n - 1].weight.detach().clone() for n in heads}
        self.config.untrained_heads = list(self._new_heads)

    def _warn_of_untrained_heads(self):
        """Say once that the policy reads what nobody trained."""
        if not self._new_heads or self._warned:
            return
        heads = self.untrained_heads(self.policy)
        if heads and heads[0] < self.config.num_hidden_layers:
            self._warned = True
            logger.warning(
                "the policy is to let words leave at classifiers that were never trained, those of "
                "layers %s: labels mean nothing there; train them first",
                ", ".join(map(str, heads)),
            )

    @property
    def backend(self) -> str:
        """What runs the layers: "auto", or "reference", the plain-PyTorch truth."""
        return self._backend

    @backend.setter
    def backend(self, name: str):
        if name not in BACKENDS:
            raise ValueError(f"backend is {name!r}; expected one of {BACKENDS}")
        self._backend = name

    @property
    def loop(self) -> str:
        """What would run a call as the model is now: its policy and its mode, without gradients.

        "cpu" and "gpu" are the fast loops, "reference" is the backend of that name; "eager: ..." is
        layer by layer in PyTorch, with the first condition for a fast loop that is not met.
        """
        if self._backend == "reference":
            return "reference"
        like = self.embeddings.norm.weight
        h = like.new_empty(1, self.config.hidden_size)
        with torch.no_grad():
            schedule = self._schedule(None, 1, h)
            if h.is_cuda:
                layers = [*self.encoder.layers], [*self.encoder.heads]
                return "gpu" if gpu.applies(*layers, h, *self._around()) else "eager"
            found = cpu.reads(self.encoder, h, schedule)
            failed = found if isinstance(found, str) else unmet(TENSORS, found)
        return "cpu" if failed is None else f"eager: a fast loop needs {failed}"

    @property
    def exit_heads(self) -> nn.ModuleList:
        """L classifiers, Linear(d, C); the last is that of the model converted from."""
        return self.encoder.heads

    def __setattr__(self, name, value):
        if name != "exit_heads":
            return super().__setattr__(name, value)
        shapes = [(head.in_features, head.out_features) for head in value]
        expected = [(self.config.hidden_size, self.num_labels)] * self.config.num_hidden_layers
        if shapes != expected:
            raise ValueError(f"got exit heads of shapes {shapes}; expected {expected}")
        self.encoder.heads = nn.ModuleList(value)
        self._new_heads = {}

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word

    def set_input_embeddings(self, value: nn.Embedding):
        self.embeddings.word = value

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As in `PreTrainedModel`; new vocabulary entries start words."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        grown = embeddings.num_embeddings - len(self.token_kinds)
        self.token_kinds = F.pad(self.token_kinds, (0, grown), value=STARTS_WORD)
        return embeddings

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike,
        *args,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs,
    ) -> TokenExitForTokenClassification:
        """Load a saved tagger, or any supported Hugging Face encoder or token classifier.

        Args:
            name: a folder or a name on the hub.
            tokenizer: used when `name` is not a saved tagger, to mark words; see
                `tokenexit.convert`. None: the one saved beside it.
            args, kwargs: of `PreTrainedModel.from_pretrained`: `num_labels`, `dtype` (None for
                that of the checkpoint), ...

        Raises:
            ValueError: an unsupported architecture; a checkpoint that is damaged or incomplete; a
                dtype for one with 8-bit weights.
            OSError: no such folder or hub name.
        """
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        config = kwargs.get("config", name)
        if not isinstance(config, PreTrainedConfig):
            config = load_config(config, **hub)
        if config.model_type == TokenExitConfig.model_type:
            # Weights come from safetensors only: no pickle is ever opened.
            kwargs["use_safetensors"] = True
            if config.int8:
                check_dtype_of_int8(kwargs.get("dtype"))
                kwargs["dtype"] = torch.float32
            model, info = load_whole(super().from_pretrained, name, (), False, *args, **kwargs)
            model.mark_untrained(model.config.untrained_heads or ())
            model._warn_of_untrained_heads()
        else:
            family_of(config)
            check_sizes(config)
            new = ("classifier.weight", "classifier.bias")  # of an encoder without a classifier
            loader = AutoModelForTokenClassification.from_pretrained
            theirs, info = load_whole(loader, name, new, True, *args, **kwargs)
            check_checkpoint(name, config, info)
            model = cls.from_hugging_face(theirs, tokenizer)
            if set(new) & {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}:
                model.mark_untrained(range(1, model.config.num_hidden_layers + 1))
            if tokenizer is None:
                model.token_kinds.copy_(marks_of(name, model.config.vocab_size, **hub))
        return (model, info) if kwargs.get("output_loading_info") else model

    @classmethod
    def from_hugging_face(
        cls, theirs: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> TokenExitForTokenClassification:
        """See `tokenexit.convert`."""
        config = config_of(theirs)
        with torch.device("cpu"):  # whatever the user's default is
            model = cls(config).to(theirs.dtype)
        model.mark_untrained(range(1, config.num_hidden_layers))
        copy_weights(theirs, model.state_dict())
        if tokenizer is not None:
            model.token_kinds.copy_(token_kinds(tokenizer, config.vocab_size))
        return model.to(theirs.device).train(theirs.training)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save weights (safetensors), configuration and policy; see `PreTrainedModel`.

        Files are written aside and then renamed, the weights before the configuration: a
        failure leaves no half-written file.
        """
        self.config.int8 = is_quantized(self)
        self.config.exit_policy = self.policy.to_dict()
        self.config.untrained_heads = self.untrained_heads()
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with write_folder_aside(save_directory) as aside:
            super().save_pretrained(aside, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        word_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        policy: ExitPolicy | Sequence[ExitPolicy] | None = None,
        exit_layers: torch.Tensor | None = None,
        loss_floor: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        output_layer_logits: bool = False,
        return_dict: bool | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **others,
    ) -> TokenExitOutput | tuple[torch.Tensor, ...]:
        """Tag a padded batch of B rows of N tokens.

        Args:
            input_ids: `[B, N]` int.
            attention_mask: `[B, N]`, 0 at padding, on whichever side. None: no padding.
            word_ids: `[B, N]` int, the word of each token (a run of equal ids), -1 for none.
                None: as the tokenizer's vocabulary marks them, where the model was converted
                with its tokenizer; else each token is a word.
            labels: `[B, N]` int, -100 where there is none.
            token_type_ids, position_ids: `[B, N]` int, or None for the family's default;
                positions count real tokens only.
            policy: in place of the model's, or one for each row.
            exit_layers: `[B, N]` int, layers 1..L at which words leave whatever they decide;
                read at each word's first token.
            loss_floor: `[B, N, L]`, see `exit_loss`; in training only.
            num_items_in_batch: what the loss's sum is divided by. None: the number of labels.
            output_layer_logits: return every layer's logits too.
            return_dict: False for a tuple. None: as the configuration says.
            inputs_embeds: `[B, N, d]` in place of `input_ids` and their embeddings; each token is
                a word where no `word_ids` are given.
            others: further arguments of Hugging Face's models, such as `output_attentions`: None or
                False.

        Raises:
            TypeError: an argument of the wrong type, or of a name that no model has.
            ValueError: one of Hugging Face's that asks for what there is not; an empty batch,
                shapes that do not fit, a sentence longer than the model's positions, ids or labels
                out of range, NaN logits (in evaluation).
        """
        _check_others(others)
        if inputs_embeds is not None:
            input_ids, word_ids = self._stand_ins(input_ids, inputs_embeds, word_ids)
        rows = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "word_ids": word_ids,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "exit_layers": exit_layers,
        }
        _check_rows({**rows, "labels": labels})
        rows = {name: _as_int64(value) for name, value in rows.items()}
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows["attention_mask"] = mask = mask != 0

        every_layer = output_layer_logits or self.training
        if inputs_embeds is not None:
            rows["inputs_embeds"] = inputs_embeds
        found = None if every_layer else self._run_static(rows, policy)
        if found is None:
            packed, ids = self._pack(rows)
            trace, left_with = self._run(ids, rows, packed, policy, every_layer)
            left_with = left_with or last_of(trace, len(packed.slots))
            if not self.training and any(values.isnan().any() for _, values in trace):
                raise ValueError(self._explain_nan(trace, packed))
            found = [packed.unpack(values) for values in left_with]
        logits, layers = found

        loss = None
        if labels is not None:
            used = labels != -100
            if (used & ~mask).any():
                raise ValueError("labels has a label at padding; expected -100 there")
            _check_range("labels", labels[used], 0, self.config.num_labels - 1)
        if labels is not None and self.training:
            wanted = packed.pack(labels).long()
            floor = None if loss_floor is None else packed.pack(loss_floor)
            if floor is not None and floor.shape[1:] != (len(self.encoder.layers),):
                raise ValueError(
                    f"loss_floor has shape {tuple(loss_floor.shape)}; expected "
                    f"{(*packed.shape, len(self.encoder.layers))}"
                )
            loss = exit_loss(trace, wanted, len(self.encoder.layers), num_items_in_batch, floor)
        elif labels is not None:
            loss = final_loss(logits, labels.long(), num_items_in_batch)
        layer_logits = None
        if output_layer_logits:
            shape = (len(self.encoder.layers), packed.shape[0] * packed.shape[1], logits.shape[-1])
            layer_logits = logits.new_full(shape, math.nan)
            for layer, (active, values) in enumerate(trace):
                layer_logits[layer, packed.slots[active]] = values
            layer_logits = layer_logits.unflatten(1, packed.shape)
        output = TokenExitOutput(
            loss=loss,
            logits=logits,
            exit_layers=layers,
            layer_logits=layer_logits,
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def _stand_ins(self, input_ids, inputs_embeds, word_ids):
        """Ids that no one looks up, `[B, N]`, and the words, of what comes as embeddings."""
        if input_ids is not None:
            raise ValueError("got both input_ids and inputs_embeds; expected one of them")
        d = self.embeddings.word.embedding_dim
        if not isinstance(inputs_embeds, torch.Tensor) or not inputs_embeds.is_floating_point():
            raise TypeError(f"inputs_embeds is {inputs_embeds!r:.40}; expected a float tensor")
        if inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != d:
            raise ValueError(
                f"inputs_embeds has shape {tuple(inputs_embeds.shape)}; expected [B, N, {d}]"
            )
        # Not the padding id, which has no position in some families.
        stand_in = int(self.config.position_padding_id == 0)
        ids = torch.full(inputs_embeds.shape[:2], stand_in, device=inputs_embeds.device)
        if word_ids is None:
            word_ids = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return ids, word_ids

    def _run_static(self, rows, policy) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Padded logits and layers, by what waits for the host but once, at its end.

        None where that is not possible, or not for these rows: `_pack` and `_run` tell why.
        """
        like, (num_rows, longest) = self.embeddings.word.weight, rows["input_ids"].shape
        encoder = self.encoder
        if (
            self._backend == "reference"
            or "inputs_embeds" in rows
            or not gpu.applies([*encoder.layers], [*encoder.heads], like, *self._around())
            or longest > self.config.max_tokens
            or any(v is not None and v.device != like.device for v in rows.values())
        ):
            return None
        schedule = self._schedule(policy, num_rows, like)
        if schedule.pre_norm or schedule.recompute:
            return None
        with torch.autocast(like.device.type, enabled=False):  # all is in the weights' dtype
            if self.cuda_graphs:
                found = self._graphs(self._tag_static, rows, schedule, self)
            else:
                found = self._tag_static(rows, schedule)
        *results, sound = found
        if sound:
            return tuple(results)
        gpu.fell_back(
            "unsound", "the GPU loop met a NaN or a value out of range: the slower one looks for it"
        )
        return None

    def _around(self) -> tuple[list[nn.Module], list[type]]:
        """What a recorded loop does not call anew, besides layers and heads; and their classes."""
        kinds = {self.encoder: ExitEncoder, self.embeddings: ExitEmbeddings}
        classes = {"norm": nn.LayerNorm, "dropout": nn.Dropout, "projection": nn.Linear}
        for name, part in self.embeddings.named_children():
            kinds[part] = classes.get(name, nn.Embedding)
        if self.relative_bias is not None:
            kinds[self.relative_bias] = nn.Embedding
        return [*kinds], [*kinds.values()]

    def _tag_static(self, rows, schedule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Padded logits, layers, and whether all was as it has to be; without a wait."""
        mask = rows["attention_mask"]
        sound, inside = mask.any(), {**rows}
        for name, limits in self._limits().items():
            if rows[name] is not None:
                inside[name] = rows[name].long().clamp(*limits)
                sound = sound & ((inside[name] == rows[name]) | ~mask).all()
        word_ids = rows["word_ids"]
        if word_ids is None:
            word_ids = word_ids_from_kinds(self.token_kinds[inside["input_ids"]], mask)
        packed, place = gpu.pack(mask, word_ids.long())
        schedule = schedule.padded(packed.num_sentences)  # with the empty one
        exit_layers = rows["exit_layers"]
        if exit_layers is not None:
            chosen = packed.pack(exit_layers)[packed.first_token].long()
            exit_layers = chosen.clamp(1, self.config.num_hidden_layers)
            words = torch.arange(len(chosen), device=chosen.device) < packed.cu_words[-1]
            sound = sound & ((chosen == exit_layers) | ~words).all()
        h = self._embed(packed.pack(inside["input_ids"]), inside, packed)
        modules = self.encoder.layers, self.encoder.heads
        logits, layers = gpu.exit_loop(
            *modules, h, packed, schedule, self._bias(h.device), exit_layers
        )
        sound = sound & gpu.is_sound(self.encoder.heads, logits)
        return logits[place].where(mask[..., None], 0), layers[place].where(mask, 0), sound

    def _run(
        self, ids, rows, packed, policy, every_layer
    ) -> tuple[Trace, tuple[torch.Tensor, torch.Tensor] | None]:
        """The trace; or, of a loop that keeps none, what tokens left with."""
        h = self._embed(ids, rows, packed)
        schedule = self._schedule(policy, packed.num_sentences, h)
        bias, exit_layers = self._bias(h.device), rows["exit_layers"]
        if exit_layers is not None:
            exit_layers = packed.pack(exit_layers)[packed.first_token].long()
            _check_range("exit_layers", exit_layers, 1, self.config.num_hidden_layers)
        if self._backend == "reference":
            if self.training and max(
                self.config.hidden_dropout_prob, self.config.attention_probs_dropout_prob
            ):
                raise ValueError(
                    "the reference backend has no dropout; got a model in training mode with "
                    "dropout, expected model.eval() or dropout 0"
                )
            modules = self.encoder.layers, self.encoder.heads
            return exit_forward(h, *modules, packed, schedule, bias, exit_layers), None
        call = self.encoder, h, packed, schedule, bias, exit_layers
        left_with = "" if every_layer else cpu.run(*call)
        if not isinstance(left_with, str) and not left_with[0].isnan().any():
            return [], left_with  # of NaN, the trace tells
        return self.encoder(*call[1:]), None

    def _embed(self, ids, rows, packed) -> torch.Tensor:
        """States `[T, d]` before the first layer."""
        last = self.config.max_position_embeddings - 1
        if rows["position_ids"] is not None:
            positions = packed.pack(rows["position_ids"])
        elif (padding := self.config.position_padding_id) is not None:
            counted = ids != padding
            before = F.pad(counted.cumsum(0), (1, 0))[packed.cu_tokens[:-1]]
            within = counted.cumsum(0) - before[packed.sentence_of_token]
            # What `pack_static` has in excess may come to lie behind the last position.
            positions = torch.where(counted, padding + within, padding).clamp(max=last)
        else:
            positions = packed.positions
        types = rows["token_type_ids"]
        types = torch.zeros_like(ids) if types is None else packed.pack(types)
        words = packed.pack(rows["inputs_embeds"]) if "inputs_embeds" in rows else None
        return self.embeddings(ids, positions, types, words)

    def _bias(self, device) -> torch.Tensor | None:
        """`[H, 2R+1]`, added to the scores by relative position, where the family has it."""
        if self.relative_bias is None:
            return None
        return self.relative_bias(relative_buckets(device)).T

    def _schedule(self, policy, num_sentences, like) -> Schedule:
        policy = self.policy if policy is None else policy
        return Schedule.of(policy, self.config.num_hidden_layers, num_sentences, like)

    def _limits(self) -> dict[str, tuple[int, int]]:
        """Of integers that are looked up: the least and the largest."""
        limits = {
            "input_ids": (0, self.config.vocab_size - 1),
            "position_ids": (0, self.config.max_position_embeddings - 1),
            "word_ids": (-1, torch.iinfo(torch.int64).max),
        }
        if self.config.type_vocab_size:
            limits["token_type_ids"] = (0, self.config.type_vocab_size - 1)
        return limits

    def _pack(self, rows) -> tuple[Packed, torch.Tensor]:
        """Reject what cannot be tagged; the layout of the rest and its packed ids."""
        real, limits = rows["attention_mask"], self._limits()
        known = rows["input_ids"].masked_fill(~real, 0)
        _check_range("input_ids", known, *limits.pop("input_ids"))
        word_ids = rows["word_ids"]
        if word_ids is None:
            word_ids = word_ids_from_kinds(self.token_kinds[known], real)
        packed = pack(real, word_ids)
        ids = packed.pack(known)
        if not len(ids):
            raise ValueError("attention_mask is 0 everywhere; expected at least one token")
        longest = int(packed.positions.max()) + 1
        if longest > self.config.max_tokens:
            row = int(packed.sentence_of_token[packed.positions.argmax()])
            raise ValueError(
                f"sentence {row} has {longest} tokens; expected at most {self.config.max_tokens} "
                "(tokenexit.Tagger cuts longer sentences into overlapping windows)"
            )
        for name, (low, high) in limits.items():
            if rows[name] is not None:
                _check_range(name, rows[name][real], low, high)
        return packed, ids

    def _explain_nan(self, trace, packed) -> str:
        layer, (active, values) = next(
            (number, step) for number, step in enumerate(trace, 1) if step[1].isnan().any()
        )
        bad = values.isnan().any(-1)
        sentence = int(packed.sentence_of_token[active[bad][0]])
        weights = [name for name, p in self.named_parameters() if p.isnan().any()]
        cause = (
            f"NaN in the weights {weights[:3]}" if weights else "no weight is NaN (an overflow?)"
        )
        return (
            f"{int(bad.sum())} of {len(bad)} tokens have NaN logits at layer {layer}, first in "
            f"sentence {sentence}; expected finite logits; {cause}"
        )


def _check_others(others):
    """Reject all but arguments of Hugging Face's that ask for nothing."""
    for name, value in others.items():
        if name not in _OTHERS:
            raise TypeError(f"forward got an unexpected keyword argument {name!r}")
        if value is not None and value is not False:
            got = value if isinstance(value, bool) else f"a {type(value).__name__}"
            raise ValueError(
                f"{name} is {got}; expected None or False: a tagger whose tokens exit early has "
                "no such thing"
            )


def _as_int64(value):
    """Integers as such, whatever their width; masks of other types as they are."""
    narrow = value is not None and value.dtype in _INTEGERS and value.dtype != torch.int64
    return value.long() if narrow else value


def _check_rows(rows):
    """Reject what is no `[B, N]` of the right type; without a look at values."""
    for name, value in rows.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}; expected a tensor")
        if value is not None and value.dtype not in _INTEGERS and name != "attention_mask":
            raise TypeError(f"{name} is of {value.dtype}; expected integers")
    input_ids = rows["input_ids"]
    if input_ids is None:
        raise ValueError("got neither input_ids nor inputs_embeds; expected one of them")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; expected [B, N] with at least one "
            "sentence and one token"
        )
    for name, value in rows.items():
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected that of input_ids, "
                f"{tuple(input_ids.shape)}"
            )


def _check_config(config):
    check_sizes(config)
    if not isinstance(config.hidden_act, str) or config.hidden_act not in ACT2FN:
        raise ValueError(f"config.hidden_act is {config.hidden_act!r}; expected one of {[*ACT2FN]}")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"config.{name} is {value!r}; expected a number from 0 to 1")
    if not isinstance(config.int8, bool):
        raise ValueError(f"config.int8 is {config.int8!r}; expected true or false")
    if config.max_tokens < 1:
        raise ValueError(
            f"config.max_position_embeddings is {config.max_position_embeddings}; expected more "
            f"than position_padding_id, {config.position_padding_id}, takes up"
        )
    config.id2label, config.label2id = label_maps(config.id2label, config.label2id)


def _check_range(name, values, low, high):
    if values.numel():
        smallest, largest = (int(x) for x in values.aminmax())
        if smallest < low or largest > high:
            got = smallest if smallest < low else largest
            raise ValueError(f"{name} has {got}; expected values from {low} to {high}")


AutoConfig.register(TokenExitConfig.model_type, TokenExitConfig)
AutoModelForTokenClassification.register(TokenExitConfig, TokenExitForTokenClassification)
