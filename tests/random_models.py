"""Small random taggers and ragged batches for tests."""

import torch
import transformers

import tokenexit
from tokenexit.models import families

FAMILIES = ("bert", "mpnet")  # those whose layers differ
ALL_FAMILIES = tuple(families.FAMILIES)
# BERTs whose heads hear their neighbours: those below the last, or all.
HEARING = {"bert, hearing": True, "bert, all hearing": "all"}
# What has a family's code run that its defaults leave out.
SETTINGS = {
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    "modernbert": {
        "local_attention": 8,
        "norm_bias": True,
        "pad_token_id": 0,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
    },
}

# DeBERTa's convolution behind the first layer, which v3 has not.
CONVOLVED = {"conv_kernel_size": 3, "conv_groups": 2, "conv_act": "gelu"}


def random_classifier(family="bert", layers=4, labels=5, hidden=32, heads=4, seed=0, **changes):
    """A tiny Hugging Face token classifier with lively random weights."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 60,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        ("hidden_dim" if family == "distilbert" else "intermediate_size"): 2 * hidden,
        "max_position_embeddings": 160,
        **({} if labels is None else {"num_labels": labels}),
        "initializer_range": 0.4,
        **SETTINGS.get(family, {}),
        **changes,
    }
    config = transformers.AutoConfig.for_model(family, **settings)
    model = transformers.AutoModelForTokenClassification.from_config(config).eval()
    for p in model.parameters():
        if p.dim() == 1:  # biases and LayerNorms start at 0 and 1
            p.data.add_(0.2 * torch.randn_like(p))
    return model


def random_tagger(family="bert", dtype=torch.float64, seed=0, **kwargs):
    """A converted one whose heads disagree enough for words to leave at every layer.

    Args:
        family: of Hugging Face's, or of `HEARING`.
    """
    hears = HEARING.get(family, False)
    theirs = random_classifier("bert" if hears else family, seed=seed, **kwargs)
    model = tokenexit.convert(theirs, neighbor_heads=hears).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for head in model.exit_heads:
            head.weight.normal_(0, 0.5, generator=generator)
            head.bias.normal_(0, 0.5, generator=generator)
    return model


def random_batch(lengths, seed=0, special=True, vocab=60):
    """input_ids, attention_mask, word_ids of ragged sentences; words have 1 to 3 pieces."""
    generator = torch.Generator().manual_seed(seed)
    rows, words = [], []
    for n in lengths:
        rows.append(torch.randint(4, vocab, (n,), generator=generator))
        word, ids = -1, []
        while len(ids) < n:
            word += 1
            pieces = int(torch.randint(1, 4, (), generator=generator))
            ids += [word] * pieces
        ids = torch.tensor(ids[:n])
        if special and n > 2:
            ids[0] = ids[-1] = -1
        words.append(ids)
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(r) for r in rows], batch_first=True)
    return {
        "input_ids": pad(rows, batch_first=True),
        "attention_mask": mask,
        "word_ids": pad(words, batch_first=True, padding_value=-1),
    }
