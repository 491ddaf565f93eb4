"""What a call gives is Hugging Face's kind of output, however it was made."""

import copy
import pickle

import pytest
import torch

from tokenexit.models.output import TokenExitOutput

LOGITS, LAYERS = torch.arange(6.0).view(1, 3, 2), torch.tensor([[1, 2, 1]])


@pytest.mark.parametrize("more", [{}, {"loss": torch.tensor(2.0)}, {"hidden_states": (LOGITS,)}])
def test_the_quick_way_makes_the_same(more):
    values = {"logits": LOGITS, "exit_layers": LAYERS, "layer_logits": None, **more}
    quick, made = TokenExitOutput.of(**values), TokenExitOutput(**values)
    assert vars(quick) == vars(made) and [*quick] == [*made]
    assert quick.attentions is None and "attentions" not in quick
    assert [*map(id, quick.to_tuple())] == [*map(id, made.to_tuple())]
    assert quick["logits"] is quick[len(more.keys() & {"loss"})] is LOGITS
    for other in (copy.copy(quick), pickle.loads(pickle.dumps(quick))):
        assert type(other) is TokenExitOutput and [*other] == [*made]
    assert repr(quick) == repr(made)


def test_what_is_set_later_is_there():
    output = TokenExitOutput.of(logits=LOGITS)
    output.loss = torch.tensor(1.0)
    output["exit_layers"] = LAYERS
    assert output["loss"] == 1 and output.exit_layers is LAYERS
    flat, spec = torch.utils._pytree.tree_flatten(output)
    again = torch.utils._pytree.tree_unflatten(flat, spec)
    assert type(again) is TokenExitOutput and again.logits is LOGITS
