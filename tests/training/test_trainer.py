"""Both stages run, learn, repeat themselves, and go on after a kill."""

import json
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset
from random_models import random_classifier
from transformers import TrainerCallback

import tokenexit
from tokenexit import Dial, ExitPolicy, Speed
from tokenexit.evaluate import evaluate
from tokenexit.text import scoring
from tokenexit.training.report import ReportExits
from tokenexit.training.self_sampling import Remembered, SelfSampling, cached_exits
from tokenexit.training.trainer import (
    ExitTrainer,
    check_same_run,
    last_checkpoint,
    training_arguments,
    write_record,
)

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


def test_other_mistakes_are_told_before_the_first_step(tiny_tokenizer, tmp_path):
    tokenizer = tiny_tokenizer()
    rows = data(4)

    def trainer(model=None, dev=None, settings=None, **kwargs):
        arguments = training_arguments(tmp_path, 32, 4, use_cpu=True, **(settings or {}))
        return ExitTrainer(model or model_for(tokenizer), arguments, tokenizer, rows, dev, **kwargs)

    for dev in (None, rows):
        with pytest.raises(ValueError, match="metric is 'f1'"):
            trainer(dev=dev, metric="f1")
        with pytest.raises(ValueError, match="word_f1 does not fit the labels: got 'B-LOC'"):
            trainer(dev=dev, metric="word_f1")
    with pytest.raises(ValueError, match="8-bit model to train"):
        trainer(tokenexit.quantize(model_for(tokenizer)))
    with pytest.raises(ValueError, match="head_learning_rate is -1"):
        trainer(head_learning_rate=-1)
    for name, value in (("neftune_noise_alpha", 5), ("train_sampling_strategy", "group_by_length")):
        with pytest.raises(ValueError, match=f"{name} is '?{value}'?; expected"):
            trainer(settings={name: value})
    with pytest.raises(ValueError, match="got a compute_loss_func; expected none"):
        trainer(compute_loss_func=lambda *_: None)
    with pytest.raises(ValueError, match="metric_for_best_model is 'loss'; expected one of"):
        trainer(settings={"metric_for_best_model": "eval_loss"})


def test_labels_of_development_data_may_be_new(tiny_tokenizer, tmp_path, caplog):
    tokenizer = tiny_tokenizer()
    dev = Dataset.from_dict({"words": [["john"], ["red"]], "labels": [["B-PER"], ["B-CAR"]]})
    arguments = training_arguments(tmp_path, 32, 4, use_cpu=True, disable_tqdm=True)
    scoring.warn_once.cache_clear()
    trainer = ExitTrainer(model_for(tokenizer), arguments, tokenizer, data(4), dev)
    for _ in range(2):
        assert trainer.evaluate()["eval_recall"] <= 0.5
    (record,) = caplog.records
    assert record.message.startswith("1 of 2 words have labels that the model does not know")
    assert record.message.endswith("count as wrong: 'B-CAR'")


def test_the_best_checkpoint_is_loaded_at_the_end(tiny_tokenizer, tmp_path):
    trainer = trainer_for(
        tiny_tokenizer(), tmp_path, load_best_model_at_end=True, eval_strategy="epoch"
    )
    scores = []
    evaluate_once = trainer.evaluate

    def scored(*args, **kwargs):
        metrics = evaluate_once(*args, **kwargs)
        scores.append(metrics["eval_score"] - len(scores))  # the first is the best
        return {**metrics, "eval_score": scores[-1]}

    trainer.evaluate = scored
    trainer.train()
    assert trainer.state.best_metric == scores[0] > scores[1]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-8")


def test_a_record_differs_with_what_decides(tiny_tokenizer, tmp_path, caplog):
    tokenizer = tiny_tokenizer()

    def record(sampling=None, **changes):
        return trainer_for(tokenizer, tmp_path, sampling, **changes).record()

    first = record()
    assert json.loads(json.dumps(first)) == record() == first
    trained = trainer_for(tokenizer, tmp_path)
    trained.train()
    changes = {
        "num_train_epochs": record(epochs=3),
        "learning_rate": record(learning_rate=1e-3),
        "seed": record(seed=8),
        "training data": record(count=63),
        "sampling": record(SelfSampling()),
        "weight_decay": record(weight_decay=0.0),
        "model": trainer_for(tokenizer, tmp_path, model=model_for(tokenizer, seed=1)).record(),
    }
    write_record(tmp_path, first)
    check_same_run(tmp_path, record(logging_steps=3, save_steps=7))
    for name, other in changes.items():
        assert {key for key in first if first[key] != other[key]} == {name}
        with pytest.raises(ValueError, match=f"started otherwise: {name.replace('_', ' ')} .*now"):
            check_same_run(tmp_path, other)
    check_same_run(tmp_path, {**first, "num_train_epochs": f"{float(first['num_train_epochs'])}"})
    assert not caplog.text
    check_same_run(tmp_path / "of an older version", first)
    assert "does not say with which data" in caplog.text


def test_development_data_is_scored_at_full_depth(tiny_tokenizer, tmp_path):
    trainer = trainer_for(tiny_tokenizer(), tmp_path)
    for head in trainer.model.exit_heads[:-1]:
        torch.nn.init.normal_(head.weight)
    trainer.model.policy = ExitPolicy(threshold=1.0, window=0)
    dev = trainer.eval_dataset
    metrics = trainer.evaluate()
    never, exits = (evaluate(trainer.tagger, dev, p) for p in (ExitPolicy.never(), None))
    assert never.scores["accuracy"] != exits.scores["accuracy"]
    assert metrics["eval_accuracy"] == never.scores["accuracy"]


def test_a_batch_holds_what_stage_1_said_at_first_pieces(tiny_tokenizer, tmp_path):
    trainer = trainer_for(tiny_tokenizer(), tmp_path)
    windows = trainer.tagger.windows([["john", "xyz"], ["paris"]])
    told = [
        Remembered(torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])),
        Remembered(torch.tensor([[0.5, 0.6]]), torch.tensor([[5.0, 6.0]])),
    ]
    batch = trainer.data_collator(list(zip(windows, [[1, 0], [3]], told, strict=True)))
    # [CLS] john x ##y ##z [SEP]; [CLS] paris [SEP] and padding
    assert batch["labels"].tolist() == [[-100, 1, 0, -100, -100, -100], [-100, 3, *[-100] * 4]]
    nan = [float("nan")] * 2
    uncertainty = [[nan, [0.1, 0.2], [0.3, 0.4], nan, nan, nan], [nan, [0.5, 0.6], *[nan] * 4]]
    floor = [[[0, 0], [1, 2], [3, 4], *[[0, 0]] * 3], [[0, 0], [5, 6], *[[0, 0]] * 4]]
    torch.testing.assert_close(
        batch["uncertainty"], torch.tensor(uncertainty), rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(batch["loss_floor"], torch.tensor(floor, dtype=torch.float32))


@pytest.mark.parametrize("exits", ["online", "cached"])
@pytest.mark.parametrize("flooding", [False, True])
@pytest.mark.parametrize("criterion", ["entropy", "max_prob"])
def test_the_loss_of_a_step_number_by_number(tiny_tokenizer, tmp_path, exits, flooding, criterion):
    """As the definition has it, from the logits of each layer and what stage 1 said."""
    tokenizer = tiny_tokenizer()
    sampling = SelfSampling(
        ExitPolicy(criterion=criterion), (0, 1), (0.3, 0.9), exits=exits, flooding=flooding
    )
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = model_for(tokenizer, **still)
    for head in model.exit_heads[:-1]:
        torch.nn.init.normal_(head.weight, std=0.5)
    trainer = trainer_for(tokenizer, tmp_path, sampling, model, count=8)
    rows = [trainer.train_dataset[i] for i in range(8)]
    # Not what the model says now, so that cached exits are others than online ones.
    generator = torch.Generator().manual_seed(0)
    rows = [
        (
            window,
            labels,
            Remembered(
                torch.rand(len(labels), 4, generator=generator),
                3 * torch.rand(len(labels), 4, generator=generator),
            ),
        )
        for window, labels, _ in rows
    ]
    batch = trainer.data_collator(rows)
    torch.manual_seed(3)
    loss = trainer.compute_loss(model.train(), dict(batch)).item()

    torch.manual_seed(3)
    policies = sampling.draw(8)
    known, floor = batch.pop("uncertainty"), batch.pop("loss_floor")
    given = {}
    if exits == "cached":
        words = batch["attention_mask"], batch["word_ids"]
        given["exit_layers"] = cached_exits(known, *words, policies)
        given["exit_layers"] = given["exit_layers"].clamp(min=1)
    out = model.eval()(**batch, policy=policies, output_layer_logits=True, **given)
    total, words = 0.0, 0
    for row, column in (batch["labels"] != -100).nonzero().tolist():
        words += 1
        for layer in range(int(out.exit_layers[row, column])):
            p = out.layer_logits[layer, row, column].log_softmax(-1)
            ce = -p[batch["labels"][row, column]]
            if flooding:
                ce = (ce - floor[row, column, layer]).abs()
            total += (layer + 1) * ce
    assert set(out.exit_layers[batch["labels"] != -100].tolist()) >= {1, 2, 4}
    assert loss == pytest.approx(float(total.detach()) / (1 + 2 + 3 + 4) / words, rel=1e-5)


def test_stage_1_is_at_full_depth_whatever_the_policy(tiny_tokenizer, tmp_path):
    trainer = trainer_for(tiny_tokenizer(), tmp_path)
    model, batch = trainer.model.eval(), trainer.data_collator([trainer.train_dataset[0]])
    model.policy = ExitPolicy(threshold=1.0, window=0)
    _, out = trainer.compute_loss(model, batch, return_outputs=True)
    assert set(out.exit_layers[batch["attention_mask"] != 0].tolist()) == {4}


def test_what_was_measured_of_older_weights_is_gone(tiny_tokenizer, tmp_path):
    trainer = trainer_for(tiny_tokenizer(), tmp_path, epochs=1, count=8)
    trainer.model.dial = Dial((Speed(ExitPolicy.never(), 1, 0, 0, 4),), 0, 0.01, 0.9, 500)
    trainer.model.config.temperatures = [0.5] * 4
    trainer.train()
    assert trainer.model.dial is None and trainer.model.config.temperatures is None


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_trains_in_a_mode_without_gradients(tiny_tokenizer, tmp_path, mode):
    tokenizer = tiny_tokenizer()
    sampling = SelfSampling(exits="cached", flooding=True)  # what it remembers is made within
    trained = []
    for number, around in enumerate((nullcontext, mode)):
        model = model_for(tokenizer)
        with around():
            trainer = trainer_for(tokenizer, tmp_path / f"{number}", sampling, model, count=8)
            trainer.train()
        trained.append(state(trainer))
    assert equal(*trained) and not equal(trained[0], model_for(tokenizer).state_dict())
    assert not any(value.is_inference() for value in trainer.model.parameters())
    with torch.inference_mode():
        model = model_for(tokenizer)
    with pytest.raises(ValueError, match="got a model made in torch.inference_mode; expected one"):
        trainer_for(tokenizer, tmp_path / "made", model=model, count=8).train()


def test_weights_that_are_not_finite_are_told(tiny_tokenizer, tmp_path):
    trainer = trainer_for(tiny_tokenizer(), tmp_path, epochs=1, count=16)
    with torch.no_grad():
        trainer.model.embeddings.position.weight[-1] = torch.nan  # that no sentence reads
    with pytest.raises(ValueError, match="weights of embeddings.position.weight that are not fin"):
        trainer.train()


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
        (tmp_path / f"checkpoint-{step}" / "scheduler.pt").touch()
    (tmp_path / "checkpoint-200").mkdir()
    weights = tmp_path / "checkpoint-300"  # as `save_only_model` leaves it
    weights.mkdir()
    (weights / "trainer_state.json").write_text(json.dumps({"global_step": 300}))
    assert last_checkpoint(tmp_path).name == "checkpoint-9"


@pytest.mark.parametrize("policy", [None, ExitPolicy(threshold=0.5, window=0)])
def test_exits_are_told_after_each_epoch(tiny_tokenizer, tmp_path, policy):
    """As tagging tells them; the run itself is what it is without."""
    tokenizer, told = tiny_tokenizer(), ExitPolicy(threshold=0.6, window=1)
    words, plain = data(20, seed=5)["words"], trainer_for(tokenizer, tmp_path / "plain")
    plain.train()
    trainer = trainer_for(tokenizer, tmp_path / "told")
    trainer.model.policy = told
    trainer.add_callback(ReportExits(trainer, tokenizer, words, policy))
    trainer.train()
    assert equal(state(trainer), state(plain))
    logs = [row for row in trainer.state.log_history if "exit_speedup" in row]
    assert [row["epoch"] for row in logs] == [1, 2]
    labels = [sum((t.labels for t in trainer.tagger.tag(words, p)), [])
              for p in (policy or told, ExitPolicy.never())]  # fmt: skip
    exits = [x for t in trainer.tagger.tag(words, policy or told) for x in t.exit_layers]
    last = logs[-1]
    agree = sum(a == b for a, b in zip(*labels, strict=True)) / len(exits)
    assert last["exit_agreement"] == pytest.approx(agree)
    assert last["exit_mean_layer"] == pytest.approx(sum(exits) / len(exits))
    for layer in range(1, 5):
        assert last[f"exit_layer_{layer}"] == pytest.approx(exits.count(layer) / len(exits))
    real = evaluate(trainer.tagger, data(20, seed=5), policy or told)
    assert last["exit_speedup"] == pytest.approx(real.flops_speedup)
    with pytest.raises(ValueError, match="sentences without a word"):
        ReportExits(trainer, tokenizer, [[]])


def test_a_record_has_what_the_best_is_chosen_by(tiny_tokenizer, tmp_path):
    tokenizer, rows = tiny_tokenizer(), data(8)

    def best(dev, **settings):
        arguments = training_arguments(tmp_path, 32, 8, use_cpu=True, **settings)
        trainer = ExitTrainer(model_for(tokenizer), arguments, tokenizer, rows, dev)
        return trainer.record()["best"]

    wanted = {"load_best_model_at_end": True, "eval_strategy": "epoch"}
    assert best(data(4)) is None  # as older runs have it
    found = best(data(4), **wanted)
    assert found == best(data(4), **wanted) != best(data(5), **wanted)
    assert found != best(data(4), **wanted, metric_for_best_model="accuracy")


def test_default_epochs_count_steps_not_batches(tmp_path):
    def epochs(**settings):
        return training_arguments(tmp_path, 768, 1000, use_cpu=True, **settings).num_train_epochs

    assert epochs() == 8  # 63 steps each
    assert (
        epochs(gradient_accumulation_steps=2) == 16 and epochs(gradient_accumulation_steps=8) == 20
    )
    with pytest.raises(ValueError, match="batch_size is 0; expected 1 or more"):
        training_arguments(tmp_path, 768, 1000, batch_size=0)
