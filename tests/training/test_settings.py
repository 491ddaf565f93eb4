"""Settings of the Trainer: text to the type of the field, and what is refused before any work."""

import pytest

from tokenexit.training.settings import OURS, parse_setting
from tokenexit.training.trainer import training_arguments


@pytest.mark.parametrize("text", ["False", "false", "FALSE", "no", "off", "0"])
@pytest.mark.parametrize("name", ["bf16", "use_cpu", "torch_compile", "load_best_model_at_end"])
def test_false_is_false(name, text):
    assert parse_setting(name, text) is False


@pytest.mark.parametrize("text", ["True", "true", "yes", "On", "1"])
def test_true_is_true(text):
    assert parse_setting("use_cpu", text) is True
    assert parse_setting("greater_is_better", text) is True  # bool or None


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("save_total_limit", "None", None),
        ("save_total_limit", "3", 3),
        ("run_name", "none", None),
        ("run_name", "7", "7"),
        ("weight_decay", "1e-2", 0.01),
        ("warmup_steps", "5", 5.0),
        ("max_steps", "-1", -1),
        ("eval_strategy", "no", "no"),
        ("optim", "adamw_torch", "adamw_torch"),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', {"num_cycles": 2}),
        ("include_for_metrics", '["loss"]', ["loss"]),
        ("include_num_input_tokens_seen", "off", False),
        ("include_num_input_tokens_seen", "non_padding", "non_padding"),
    ],
)
def test_values_are_of_the_type_of_the_field(name, text, value):
    got = parse_setting(name, text)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("bf16", "maybe", "bf16 is 'maybe'; expected bool"),
        ("max_steps", "many", "expected int"),
        ("max_steps", "1.5", "expected int"),
        ("save_total_limit", "x", "expected int or None"),
        ("weight_decay", "nan", "expected float"),
        ("weight_decay", "", "expected float"),
        ("label_names", "a,b", "expected list or None"),
        ("no_such_thing", "1", "no_such_thing is no setting of transformers.TrainingArguments"),
        ("weight_decays", "1", "close are weight_decay"),
        ("remove_unused_columns", "true", "is no setting"),
    ],
)
def test_refused(name, text, message):
    with pytest.raises(ValueError, match=message):
        parse_setting(name, text)


@pytest.mark.parametrize("name", OURS)
def test_settings_that_have_an_option_name_it(name):
    with pytest.raises(ValueError, match=f"--{OURS[name].replace('_', '-')}$"):
        parse_setting(name, "1")


@pytest.mark.parametrize("name", sorted(set(OURS) - {"learning_rate", "seed"}))
def test_settings_that_are_arguments_name_them(name):
    with pytest.raises(ValueError, match=f"expected it as {OURS[name]}"):
        training_arguments("unused", 32, 10, **{name: 1})


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"epochs": 0}, "epochs is 0; expected more than 0"),
        ({"epochs": -1}, "epochs is -1"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"epochs": 1e9}, "at most 10000"),
        ({"learning_rate": -1e-5}, "learning_rate is -1e-05; expected 0 to 1"),
        ({"learning_rate": 5e5}, "learning_rate is 500000.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        training_arguments("unused", 32, 10, use_cpu=True, **settings)
    assert training_arguments("unused", 32, 10, use_cpu=True, learning_rate=0).learning_rate == 0


def test_the_best_model_is_the_one_that_scores_best():
    best = training_arguments(
        "unused", 32, 10, use_cpu=True, load_best_model_at_end=True, eval_strategy="epoch"
    )
    assert (best.metric_for_best_model, best.greater_is_better) == ("score", True)
    assert training_arguments("unused", 32, 10, use_cpu=True).metric_for_best_model is None
    assert training_arguments("unused", 32, 10, use_cpu=True, report_to=None).report_to == []
