"""Both stages run, learn, repeat themselves, and go on after a kill."""

import json

import pytest
import torch
from datasets import Dataset
from random_models import random_classifier
from transformers import TrainerCallback

import tokenexit
from tokenexit import ExitPolicy
from tokenexit.evaluate import evaluate
from tokenexit.training.self_sampling import SelfSampling
from tokenexit.training.trainer import ExitTrainer, last_checkpoint, training_arguments

LABEL_OF = {"john": "B-PER", "smith": "I-PER", "paris": "B-LOC", "york": "I-LOC", "new": "B-LOC"}
NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


def data(count, seed=0):
    """Sentences whose labels the words alone tell."""
    words = ["john", "smith", "lives", "in", "new", "york", "paris", "the", "red", "xy"]
    g = torch.Generator().manual_seed(seed)
    rows = [
        [words[i] for i in torch.randint(len(words), (int(n),), generator=g)]
        for n in torch.randint(1, 12, (count,), generator=g)
    ]
    labels = [[LABEL_OF.get(word, "O") for word in row] for row in rows]
    return Dataset.from_dict({"words": rows, "labels": labels})


def model_for(tokenizer, seed=0, **changes):
    config = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    return tokenexit.convert(
        random_classifier(
            vocab_size=len(tokenizer), seed=seed, initializer_range=0.1, **config, **changes
        ),
        tokenizer,
    )


def trainer_for(tokenizer, folder, sampling=None, model=None, seed=7, count=64, **settings):
    torch.manual_seed(0)
    model = model or model_for(tokenizer)
    settings = {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "use_cpu": True, **settings}
    arguments = training_arguments(folder, 32, count, seed=seed, disable_tqdm=True, **settings)
    return ExitTrainer(
        model,
        arguments,
        tokenizer,
        data(count),
        data(16, seed=1),
        sampling,
        head_learning_rate=1e-2,
    )


def state(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_both_stages_learn(tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer()
    stage1 = trainer_for(tokenizer, tmp_path, count=256, epochs=4)
    before = stage1.evaluate()["eval_score"]
    stage1.train()
    after = stage1.evaluate()["eval_score"]
    assert before < 0.5 < 0.9 < after
    policy = ExitPolicy(threshold=0.5, window=0)
    for sampling in (
        SelfSampling(),
        SelfSampling(exits="cached", flooding=True),
        SelfSampling(ExitPolicy(copy="pre_norm", criterion="max_prob"), flooding=True),
    ):
        stage2 = trainer_for(tokenizer, tmp_path, sampling, stage1.model)
        stage2.train()
        result = evaluate(stage2.tagger, data(32, seed=2), policy)
        assert result.score > 0.9
        assert result.flops_speedup > 1.5


@pytest.mark.parametrize(
    "sampling",
    [None, SelfSampling(), SelfSampling(exits="cached", flooding=True)],
    ids=["stage 1", "online", "cached, flooding"],
)
def test_seeds_and_resume_after_a_kill(tiny_tokenizer, tmp_path, sampling):
    tokenizer = tiny_tokenizer()

    def run(name, sampling=sampling, resume=None, kill_at=None, **kwargs):
        trainer = trainer_for(tokenizer, tmp_path / name, sampling, **kwargs)
        if kill_at:
            trainer.add_callback(Kill(kill_at))
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        else:
            trainer.train(resume_from_checkpoint=resume)
        return state(trainer)

    whole = run("whole", save_strategy="steps", save_steps=5)
    assert equal(whole, run("again", save_strategy="no"))
    assert not equal(whole, run("other seed", seed=8, save_strategy="no"))

    killed = run("killed", kill_at=12, save_strategy="steps", save_steps=5)
    assert not equal(whole, killed)
    (tmp_path / "killed" / "checkpoint-15").mkdir()  # the kill came while writing this one
    checkpoint = last_checkpoint(tmp_path / "killed")
    assert checkpoint.name == "checkpoint-10"
    resumed = run("killed", resume=str(checkpoint), save_strategy="steps", save_steps=5)
    assert equal(whole, resumed)


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_long_sentences_are_trained_on_whole(tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer()
    long = Dataset.from_dict({"words": [["john"] * 90], "labels": [["B-PER"] * 90]})
    model = model_for(tokenizer, max_position_embeddings=40)
    arguments = training_arguments(tmp_path, 32, 1, use_cpu=True, save_strategy="no")
    trainer = ExitTrainer(model, arguments, tokenizer, long)
    batch = trainer.data_collator(
        [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    )
    assert len(batch["input_ids"]) > 2
    assert int((batch["labels"] != -100).sum()) == 90


def test_heads_have_their_learning_rate(tiny_tokenizer, tmp_path):
    trainer = trainer_for(tiny_tokenizer(), tmp_path)
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    heads = {id(p) for p in trainer.model.exit_heads.parameters()}
    assert {rates[i] for i in heads} == {1e-2}
    assert {rate for i, rate in rates.items() if i not in heads} == {3e-3}
    assert len(rates) == len(list(trainer.model.parameters()))


def test_an_unknown_label_is_named(tiny_tokenizer, tmp_path):
    wrong = Dataset.from_dict({"words": [["a"], ["b"]], "labels": [["O"], ["B-CAR"]]})
    tokenizer = tiny_tokenizer()
    arguments = training_arguments(tmp_path, 32, 2, use_cpu=True)
    with pytest.raises(ValueError, match="B-CAR"):
        ExitTrainer(model_for(tokenizer), arguments, tokenizer, wrong)


def test_default_settings():
    def settings(d, n, **kwargs):
        arguments = training_arguments("unused", d, n, use_cpu=True, **kwargs)
        return arguments.learning_rate, arguments.num_train_epochs

    assert settings(768, 16000) == (5e-5, 3)
    assert settings(384, 1000) == (2e-4, 8)
    assert settings(384, 16) == (2e-4, 20)
    assert settings(384, 1000, epochs=1.5, learning_rate=1e-3) == (1e-3, 1.5)


def test_last_checkpoint_skips_unfinished_ones(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step, text in ((9, json.dumps({"global_step": 9})), (80, "{half"), (100, "{}")):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    (tmp_path / "checkpoint-200").mkdir()
    assert last_checkpoint(tmp_path).name == "checkpoint-9"
