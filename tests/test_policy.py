"""ExitPolicy: its values, its schedules, what it refuses."""

import json
import math

import pytest
import torch

from tokenexit import ExitPolicy


def test_constant_threshold_ends_in_every_word_leaving():
    assert ExitPolicy(threshold=0.2).thresholds(3) == [0.2, 0.2, math.inf]
    assert ExitPolicy(threshold=0.2).thresholds(1) == [math.inf]


@pytest.mark.parametrize(
    "delta, layers, expected",
    [
        (0.1, 4, [0.1, 0.1, 0.2]),
        (0.1, 5, [0.1, 0.1, 0.2, 0.2]),  # l = 3 > 5/2
        (0.4, 4, [0.4, 0.4, 0.5]),
        (0.8, 4, [0.8, 0.8, 0.5]),
    ],
)
def test_doubling_schedule(delta, layers, expected):
    policy = ExitPolicy(threshold=delta, schedule="doubling")
    assert policy.thresholds(layers)[:-1] == expected


def test_growing_thresholds():
    policy = ExitPolicy(threshold=0.1, growth=2)
    assert policy.thresholds(6) == [0.1, 0.2, 0.4, 0.8, 1.0, math.inf]
    assert ExitPolicy(threshold=0.0, growth=2).thresholds(3) == [0.0, 0.0, math.inf]
    for layers in (120, 1000):  # nothing overflows
        assert ExitPolicy(threshold=1e-9, growth=100).thresholds(layers)[-2] == 1.0


def test_list_of_thresholds():
    policy = ExitPolicy(threshold=[0.1, 0.2, 0.3])
    assert policy.thresholds(3) == [0.1, 0.2, math.inf]
    assert hash(policy) == hash(ExitPolicy(threshold=(0.1, 0.2, 0.3)))
    with pytest.raises(ValueError, match="3 values; expected one per layer, 4"):
        policy.thresholds(4)


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"threshold": 1.5}, ValueError, r"threshold has 1.5; expected values in \[0, 1\]"),
        ({"threshold": -0.1}, ValueError, r"-0.1; expected values in \[0, 1\]"),
        ({"threshold": math.nan}, ValueError, "nan"),
        ({"threshold": [0.1, 2.0]}, ValueError, "2.0"),
        ({"threshold": "high"}, TypeError, "'high'; expected a number"),
        ({"threshold": True}, TypeError, "True; expected a number"),
        ({"threshold": ["0.1"]}, TypeError, "expected a number"),
        ({"threshold": {0.1, 0.2}}, TypeError, "expected a number"),
        ({"threshold": None}, TypeError, "None; expected a number"),
        ({"threshold": []}, ValueError, "no values"),
        ({"window": -1}, ValueError, "-1; expected 0 or more"),
        ({"window": 1.0}, TypeError, "1.0; expected an int"),
        ({"window": True}, TypeError, "True; expected an int"),
        ({"min_active": 0}, ValueError, "0; expected 1 or more"),
        ({"min_active": 2.5}, TypeError, "2.5; expected an int"),
        ({"level": "document"}, ValueError, "'document'; expected one of"),
        ({"criterion": "margin"}, ValueError, "'margin'"),
        ({"schedule": "linear"}, ValueError, "'linear'"),
        ({"copy": "none"}, ValueError, "'none'"),
        ({"neighbors": "gone"}, ValueError, "'gone'"),
        ({"threshold": [0.1, 0.2], "schedule": "doubling"}, ValueError, "single threshold"),
        ({"threshold": [0.1, 0.2], "growth": 2}, ValueError, "one threshold per layer; expected"),
        ({"growth": 2, "schedule": "doubling"}, ValueError, "beside schedule 'doubling'; expected"),
        ({"growth": 0.5}, ValueError, "growth is 0.5; expected 1 to 100"),
        ({"growth": math.inf}, ValueError, "growth is inf; expected 1 to 100"),
        ({"growth": math.nan}, ValueError, "growth is nan; expected 1 to 100"),
        ({"growth": "2"}, TypeError, "growth is '2'; expected a number"),
        ({"growth": True}, TypeError, "growth is True; expected a number"),
    ],
)
def test_refuses(fields, error, message):
    with pytest.raises(error, match=message):
        ExitPolicy(**fields)


@pytest.mark.parametrize(
    "policy",
    [
        ExitPolicy(),
        ExitPolicy.paper(0.3, window=4),
        ExitPolicy.authors_code(0.3),
        ExitPolicy.sentence([0.1, 0.2]),
        ExitPolicy(growth=1.5),
        ExitPolicy.never(),
    ],
    ids=str,
)
def test_dict_round_trip(policy):
    assert ExitPolicy.from_dict(policy.to_dict()) == policy
    assert json.loads(json.dumps(policy.to_dict())) == policy.to_dict()


def test_unknown_field_is_named():
    with pytest.raises(ValueError, match=r"unknown fields \['patience'\]"):
        ExitPolicy.from_dict({"patience": 3})


def test_presets():
    assert ExitPolicy() == ExitPolicy(
        "token", 2, "entropy", 0.1, "constant", "post_norm", "frozen", 1, 1.0
    )
    assert ExitPolicy.paper(0.3, window=4) == ExitPolicy(threshold=0.3, window=4)
    authors = ExitPolicy.authors_code(0.2)
    assert (authors.schedule, authors.copy, authors.neighbors) == (
        "doubling",
        "pre_norm",
        "recompute",
    )
    assert ExitPolicy.sentence(0.2).reach > 10**9
    assert ExitPolicy.never().thresholds(3)[:-1] == [0.0, 0.0]


@pytest.mark.parametrize(
    "policy, text",
    [
        (ExitPolicy.never(), "full depth"),
        (ExitPolicy(), "token, window 2, threshold 0.1"),
        (ExitPolicy.sentence([0.25, 0.5]), "sentence, threshold [0.25, 0.5]"),
        (
            ExitPolicy.authors_code(0.3, window=4),
            "token, window 4, threshold 0.3, doubling, pre_norm, recompute",
        ),
        (
            ExitPolicy(criterion="max_prob", min_active=3),
            "token, window 2, threshold 0.1, max_prob, at least 3 active",
        ),
        (
            ExitPolicy(threshold=0.11 / 1.5, criterion="max_prob", growth=1.5),
            "token, window 2, threshold 0.0733 x 1.5 a layer, max_prob",
        ),
    ],
    ids=str,
)
def test_name(policy, text):
    assert str(policy) == text


def test_a_window_wider_than_any_number_fits_into_a_tensor():
    policy = ExitPolicy(window=2**70)
    assert torch.tensor([policy.reach]).item() > 10**18
