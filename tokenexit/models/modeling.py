"""The token classifier whose tokens exit early."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tokenexit.files import write_folder_aside
from tokenexit.int8 import Int8Embedding, is_quantized, quantize
from tokenexit.layers import NeighborHead
from tokenexit.loops import BACKENDS, tell
from tokenexit.loops.eager import ExitEncoder, padded_logits
from tokenexit.loops.graphs import Graphs
from tokenexit.loops.memory import Memory
from tokenexit.models.assembly import check_parts, head_of, layers_of, neck_of, other_names
from tokenexit.models.configuration import TokenExitConfig, check_config, settings_of
from tokenexit.models.embeddings import ExitEmbeddings
from tokenexit.models.loading import load_tagger
from tokenexit.models.loss import check_labels, exit_loss, final_loss
from tokenexit.models.output import TokenExitOutput
from tokenexit.models.pipeline import call_of, run
from tokenexit.models.relative import RelativeStates
from tokenexit.models.rows import Rows, check_others
from tokenexit.models.steering import Steered
from tokenexit.packing import STARTS_WORD
from tokenexit.policy import ExitPolicy
from tokenexit.schedule import Schedule


class TokenExitForTokenClassification(Steered, PreTrainedModel):
    """A BERT-family tagger whose tokens leave as soon as they are settled.

    Stands where a Hugging Face token classifier stood. Made by `tokenexit.convert` or
    `from_pretrained`; `policy` says when tokens leave and may be changed at any time.
    """

    config_class = TokenExitConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # forward takes num_items_in_batch
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = [
        "ConvolvedLayer",
        "DisentangledLayer",
        "ExitEmbeddings",
        "ExitLayer",
        "ExitNeck",
        "NormFirstLayer",
    ]

    def __init__(self, config: TokenExitConfig):
        check_config(config)
        super().__init__(copy.deepcopy(config))  # the policy in it is this model's alone
        self.num_labels = config.num_labels
        self.embeddings = ExitEmbeddings(config)
        layers = layers_of(config)
        heads = [head_of(config, number) for number, _ in enumerate(layers, 1)]
        self.encoder = ExitEncoder(layers, heads, neck_of(config), config.num_neighbor_heads)
        if config.relative_attention_buckets:
            self.relative_bias = nn.Embedding(
                config.relative_attention_buckets, config.num_attention_heads
            )
        else:
            self.relative_bias = None
        self.relative_states = RelativeStates(config) if config.relative_attention else None
        kinds = torch.full((config.vocab_size,), STARTS_WORD, dtype=torch.uint8)
        self.register_buffer("token_kinds", kinds)
        self._backend = "auto"
        self._graphs, self._memory = Graphs(), Memory()
        self.cuda_graphs = True
        self.policy = self.policy
        self.post_init()
        if config.int8:
            quantize(self, config.int8_embeddings)
            self.all_tied_weights_keys = other_names(self, buffers=False)

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        """Of layers that stand several times: they are saved once, and one again when loaded."""
        return other_names(self)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        return other_names(self, buffers=False)  # of those, it takes none

    @property
    def backend(self) -> str:
        """What runs the layers: "auto", the fastest loop that can, or one by its name.

        See `tokenexit.loops` for their names. A call that the one asked for can't run is an error.
        """
        return self._backend

    @backend.setter
    def backend(self, name: str):
        if name not in BACKENDS:
            raise ValueError(f"backend is {name!r}; expected one of {BACKENDS}")
        self._backend = name

    @property
    def loop(self) -> str:
        """What would run a call as the model is now: its policy and its mode, without gradients.

        The name of a loop, see `tokenexit.loops.tell`.
        """
        with torch.no_grad():
            schedule = self._schedule(None, self.embeddings.norm.weight[:1])
            return tell(self._backend, call_of(self, schedule, wants_trace=self.training))

    @property
    def exit_heads(self) -> nn.ModuleList:
        """L classifiers, Linear(d, C); the last is that of the model converted from.

        The first `config.num_neighbor_heads` are `tokenexit.layers.NeighborHead`.
        """
        return self.encoder.heads

    def __setattr__(self, name, value):
        if name != "exit_heads":
            return super().__setattr__(name, value)
        shapes = [(head.in_features, head.out_features) for head in value]
        config, labels = self.config, self.num_labels
        expected = [
            (config.hidden_size, 3 * labels if number < config.num_neighbor_heads else labels)
            for number in range(config.num_hidden_layers)
        ]
        if shapes != expected:
            raise ValueError(f"got exit heads of shapes {shapes}; expected {expected}")
        self.encoder.heads = nn.ModuleList(value)
        self._new_heads = {}
        self.dial = config.temperatures = None  # they say what the heads of before did

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, NeighborHead):
            module.quiet()

    def _apply(self, fn, *args, **kwargs):
        if self.config.int8:
            dtype = fn(self.embeddings.norm.weight.detach()[:0]).dtype
            if dtype != torch.float32:
                raise ValueError(f"got {dtype} for 8-bit weights; expected float32, as all else is")
        self._graphs.forget()  # as they keep the weights that they read
        self._memory.forget()
        return super()._apply(fn, *args, **kwargs)

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
        policy: ExitPolicy | None = None,
        neighbor_heads: bool | str = False,
        **kwargs,
    ) -> TokenExitForTokenClassification:
        """Load a saved tagger, or any supported Hugging Face encoder or token classifier.

        Args:
            name: a folder or a name on the hub.
            tokenizer: used when `name` is not a saved tagger, to mark words; see
                `tokenexit.convert`. None: the one saved beside it.
            policy: in place of the saved one.
            neighbor_heads: of a tagger that is made here, see `tokenexit.convert`; a saved one has
                the heads that it was trained with.
            args, kwargs: of `PreTrainedModel.from_pretrained`: `num_labels`, `dtype` (None for
                that of the checkpoint), ...

        Raises:
            ValueError: an unsupported architecture; a checkpoint that is damaged or incomplete; a
                dtype for one with 8-bit weights.
            OSError: no such folder or hub name.
        """
        load_saved, which = super().from_pretrained, {"tokenizer": tokenizer, "policy": policy}
        which["neighbor_heads"] = neighbor_heads
        return load_tagger(cls, load_saved, name, *args, **which, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs):
        """Save weights (safetensors), configuration and policy; see `PreTrainedModel`.

        Files are written aside and then renamed, the weights before the configuration: a
        failure leaves no half-written file.
        """
        check_parts(self)
        self.config.int8 = is_quantized(self)
        self.config.int8_embeddings = isinstance(self.embeddings.word, Int8Embedding)
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
        *,
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
        output_hidden_states: bool | None = None,
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
            output_hidden_states: return the states before the first layer and after each, too.
            others: further arguments of Hugging Face's models, such as `output_attentions`: None or
                False.

        Raises:
            TypeError: an argument of the wrong type, or of a name that no model has.
            ValueError: one of Hugging Face's that asks for what there is not; an empty batch,
                shapes that do not fit, a sentence longer than the model's positions, ids or labels
                out of range, NaN logits (in evaluation).
        """
        check_others(others)
        rows = Rows.of(
            self.config,
            input_ids,
            attention_mask,
            labels,
            inputs_embeds,
            word_ids=word_ids,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            exit_layers=exit_layers,
        )
        schedule = self._schedule(policy, rows.input_ids)
        wants = {"wants_trace": output_layer_logits or self.training}
        wants["wants_states"] = bool(output_hidden_states)
        found = run(self, rows, schedule, **wants)

        num_layers, loss = settings_of(self.config)["num_hidden_layers"], None
        if labels is not None:
            check_labels(labels, rows.real, self.config.num_labels)
        if labels is not None and self.training:
            expected = (*labels.shape, num_layers)
            if loss_floor is not None and loss_floor.shape != expected:
                raise ValueError(
                    f"loss_floor has shape {tuple(loss_floor.shape)}; expected {expected}"
                )
            floor = None if loss_floor is None else found.packed.pack(loss_floor)
            wanted = found.packed.pack(labels).long()
            loss = exit_loss(found.trace, wanted, num_layers, num_items_in_batch, floor)
        elif labels is not None:
            loss = final_loss(found.logits, labels.long(), num_items_in_batch)
        layer_logits = None
        if output_layer_logits:
            layer_logits = padded_logits(found.trace, found.packed, num_layers)
        states = None
        if output_hidden_states:
            states = tuple(map(found.packed.unpack, found.states))
        output = TokenExitOutput.of(
            loss=loss,
            logits=found.logits,
            exit_layers=found.exit_layers,
            hidden_states=states,
            layer_logits=layer_logits,
        )
        if return_dict is None:
            return_dict = settings_of(self.config)["return_dict"]
        return output if return_dict else output.to_tuple()

    def _schedule(self, policy, ids) -> Schedule:
        policy = self.policy if policy is None else policy
        # Weights may be on no device yet.
        like = ids.new_empty(0, dtype=self.embeddings.norm.weight.dtype)
        num_layers = settings_of(self.config)["num_hidden_layers"]
        return Schedule.of(policy, num_layers, len(ids), like)


AutoConfig.register(TokenExitConfig.model_type, TokenExitConfig)
AutoModelForTokenClassification.register(TokenExitConfig, TokenExitForTokenClassification)
