"""The card of a saved tagger, and what goes to the hub."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from hub import hub
from huggingface_hub import ModelCard
from random_models import random_classifier
from test_dial import DIAL

import tokenexit
from tokenexit import ExitPolicy, Tagger
from tokenexit.models.card import card


@pytest.fixture
def tagger(tiny_tokenizer):
    tokenizer = tiny_tokenizer()
    hf = random_classifier(vocab_size=len(tokenizer))
    hf.config._name_or_path = "owner/my-tagger"
    model = tokenexit.convert(hf, tokenizer)
    with torch.no_grad():
        for head in model.exit_heads[:-1]:
            head.weight.normal_(0, 0.5)
    return Tagger(model.eval(), tokenizer)


def test_what_it_says(tagger):
    text = card(tagger.model)
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("tokenexit", "token-classification")
    assert data.base_model == "owner/my-tagger"
    assert "Made from `owner/my-tagger`: bert, 4 layers of 32, labels" in text
    assert "Not calibrated with a promise. Policy: full depth." in text

    tagger.model.dial = DIAL
    text = card(tagger.model)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(DIAL.speeds) and {row.count("|") for row in rows} == {5 + 1}
    assert [row.endswith("| promised |") for row in rows[2:]] == [True, True, True, False]
    for row, speed in zip(rows[2:], DIAL.speeds, strict=True):
        assert f"| {speed.policy} | {speed.speedup:.2f}x | {speed.disagreement:.2%} |" in row
    assert f"Promised: {DIAL.promise}. It is about\ntext like that" in text
    assert "with a confidence of 90%" in DIAL.promise and "fewer than 1.00%" in DIAL.promise

    by_type = {"LOC": 0.25, "PER": 0.5}  # in another order than labels
    speeds = tuple(dataclasses.replace(speed, by_type=by_type) for speed in DIAL.speeds)
    tagger.model.dial = dataclasses.replace(DIAL, speeds=speeds, per_type=("PER", "LOC"))
    text = card(tagger.model)
    sure = dataclasses.replace(DIAL, confidence=0.999)
    tagger.model.dial, before = sure, tagger.model.dial
    assert "| with 99.9% below |" in card(tagger.model)
    tagger.model.dial = before
    assert "| of PER | of LOC |" in text and text.count("| 50.00% | 25.00% |") == len(speeds)

    speeds = tuple(dataclasses.replace(speed, score=0.5) for speed in DIAL.speeds)
    changes = {"speeds": speeds, "metric": "entity_f1", "promised": None}
    tagger.model.dial = dataclasses.replace(DIAL, **changes)
    text = card(tagger.model)
    assert "| entity F1 |" in text and text.count("| 0.5000 |") == len(speeds)
    assert "Nothing is promised" in text and "Promised:" not in text


@pytest.mark.parametrize(
    ("name", "known"),
    [("", None), ("bert-base-cased", "bert-base-cased"), ("a/b", "a/b"),
     ("/home/me/secret/tagger", "./tagger"), ("{here}", "./here")],
)  # fmt: skip
def test_where_a_folder_lay_is_not_told(tmp_path, name, known):
    (tmp_path / "here").mkdir()
    hf = random_classifier()
    hf.config._name_or_path = name.format(here=tmp_path / "here")
    model = tokenexit.convert(hf)
    assert model.config.made_from == known
    assert str(tmp_path) not in card(model) and "secret" not in card(model)
    assert ModelCard(card(model)).data.base_model == (None if known and "./" in known else known)
    assert "made_from" not in tokenexit.to_hugging_face(model).config.to_dict()


def test_a_card_is_renewed_and_that_of_others_stays(tagger, tmp_path):
    tagger.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card(tagger.model)
    again = Tagger.from_pretrained(tmp_path)
    assert again.model.config.made_from == "owner/my-tagger"
    again.model.policy = ExitPolicy(threshold=0.25)
    again.save_pretrained(tmp_path)
    assert "threshold 0.25" in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("# Mine\n")
    again.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


PUSH = """
import sys
from tokenexit import ExitPolicy, Tagger
tagger = Tagger.from_pretrained(sys.argv[1])
print(tagger.push_to_hub("me/fast", private=True, token="hf_x"))
tagger.model.policy = ExitPolicy(threshold=0.125)
tagger.push_to_hub("me/fast", revision="bold", token="hf_x")
texts = ["John lives in Paris.", "red"]
again = Tagger.from_pretrained("me/fast", revision="bold", token="hf_y")
assert again.model.policy == ExitPolicy(threshold=0.125)
assert again.tag(texts) == tagger.tag(texts)
assert Tagger.from_pretrained("me/fast", token="hf_y").model.policy == ExitPolicy.never()
"""


@pytest.mark.slow
def test_what_is_pushed_is_loaded_from_the_hub(tagger, tmp_path):
    tagger.save_pretrained(tmp_path / "tagger")
    names = {path.name for path in (tmp_path / "tagger").iterdir()}
    with hub() as server:
        server.repos["me/fast", "bold"] = {"README.md": b"# Mine\n"}
        env = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home")}
        env |= {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", PUSH, tmp_path / "tagger"], env=env, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{server.address}/me/fast/commit/")
    main, bold = server.repos["me/fast", "main"], server.repos["me/fast", "bold"]
    assert set(main) == set(bold) == names > {"README.md", "config.json", "model.safetensors"}
    assert main["README.md"].decode() == card(tagger.model) and bold["README.md"] == b"# Mine\n"
    assert main["model.safetensors"] == (tmp_path / "tagger" / "model.safetensors").read_bytes()
    assert ["private" in str(asked) for asked in server.asked] == [True, False]
    written = [token for path, token in server.seen if "/commit/" in path or "/create" in path]
    assert set(written) == {"Bearer hf_x"} and len(written) == 4
    read = [token for path, token in server.seen if path.endswith("/tokenizer.json")]
    assert set(read) == {"Bearer hf_y"}
