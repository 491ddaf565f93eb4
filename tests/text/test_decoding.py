"""Which labels can stand, held against grammars; the best of them, against all sequences."""

import re
from itertools import combinations, product

import numpy as np
import pytest

from tokenexit.text import decoding
from tokenexit.text.decoding import broken, check_decoding, decode, transitions

# Of each scheme the sentences that can stand, each label followed by a blank.
GRAMMARS = {
    "O B-X I-X B-Y I-Y": "(O |B-X (I-X )*|B-Y (I-Y )*)*",
    "O B-X I-X E-X S-X S-Y": "(O |B-X (I-X )*E-X |S-X |S-Y )*",
    "O B-X M-X E-X S-X B-Y E-Y": "(O |B-X (M-X )*E-X |S-X |B-Y E-Y )*",
    "O B-X I-X L-X U-X": "(O |B-X (I-X )*L-X |U-X )*",
    "B M E S": "(B (M )*E |S )*",
    "B I": "(B (I )*)*",
    "O B I": "(O |B (I )*)*",
    "B-NN E-NN S-NN S-VV": "(B-NN E-NN |S-NN |S-VV )*",
    # What there is no label for is not asked for.
    "O I-X I-Y": "(O |I-X |I-Y )*",
    "O I-X B-Y I-Y": "(O |I-X |B-Y (I-Y )*)*",
    "O I-X E-X": "(O |(I-X )*E-X )*",
    "B M E": "(B ((M )*E )?)*",
    "O B-X I-X S-X B-Y E-Y": "(O |B-X (I-X )*|S-X |B-Y E-Y )*",
    "E S": "(E |S )*",
    # No chunks: all can stand.
    "NOUN VERB O": "(NOUN |VERB |O )*",
    "O B-X ?": r"(O |B-X |\? )*",
}


@pytest.mark.parametrize("scheme", GRAMMARS)
def test_labels_stand_by_the_grammar_of_their_scheme(scheme):
    names = scheme.split()
    for length in range(5 if len(names) < 6 else 4):
        for labels in product(names, repeat=length):
            stands = re.fullmatch(GRAMMARS[scheme], "".join(f"{label} " for label in labels))
            assert (broken([labels], names) == 0) == bool(stands), labels


@pytest.mark.parametrize(
    "names, labels, count",
    [
        ("O B-X I-X B-Y I-Y", "O B-X I-X O", 0),
        ("O B-X I-X B-Y I-Y", "I-X I-X B-X I-Y", 2),
        ("B M E S", "S B M E", 0),
        ("B M E S", "B S M E B", 3),
        ("O B-X E-X S-X", "O B-X O E-X B-X", 3),
        ("N V", "N V", 0),
    ],
)
def test_broken_labels_are_counted(names, labels, count):
    assert broken([labels.split()], names.split()) == count
    both = [labels.split(), [], labels.split()]  # a sentence ends where it does
    assert broken(both, names.split()) == 2 * count
    with pytest.raises(ValueError, match=r"got the label '\?'; expected one of '"):
        broken([["?"]], names.split())


def by_trying_all(scores, names):
    """The best by the sum; of equal ones that whose last label is the first, then last but one."""
    paths = product(range(len(names)), repeat=len(scores))
    stand = (path for path in paths if not broken([[names[i] for i in path]], names))
    best = min(
        stand,
        key=lambda path: (-sum(s[i] for s, i in zip(scores, path, strict=True)), path[::-1]),
    )
    return [names[i] for i in best]


SCHEMES = [
    *(" ".join(some) for size in range(1, 6) for some in combinations("OBIES", size)),
    *GRAMMARS,
]


@pytest.mark.parametrize("scheme", sorted({*SCHEMES}))
def test_the_best_that_can_stand(scheme):
    """Small numbers, so that sums are exact and many of them equal."""
    names = scheme.split()
    g = np.random.default_rng(len(scheme))
    longest = 4 if len(names) < 6 else 3
    scores = [g.integers(-3, 4, (n, len(names))).astype("f4") for n in [0, 1, 2, 1, *[longest] * 3]]
    found = decode(scores, names)
    assert found == [by_trying_all(each, names) for each in scores]
    assert found == [decode([each], names)[0] for each in scores]
    shifted = [each + g.integers(-9, 9, (len(each), 1)) for each in scores]  # of each word its own
    assert decode(shifted, names) == found
    for each, labels in zip(scores, found, strict=True):
        best = [names[i] for i in each.argmax(-1)]
        assert labels == best or broken([best], names)


def test_sentences_of_all_lengths_together(monkeypatch):
    names = [f"{tag}-{kind}" for kind in "XYZ" for tag in "BIES"] + ["O"]
    g = np.random.default_rng(0)
    scores = [g.normal(size=(n, len(names))) for n in g.integers(0, 40, 50)]
    alone = [decode([each], names)[0] for each in scores]
    assert decode(scores, names) == alone and not broken(alone, names)
    assert decode([[*each] for each in scores], names) == alone  # lists of words
    monkeypatch.setattr(decoding, "_MOST_PAIRS", 3 * len(names) ** 2)  # three at a time
    assert decode(scores, names) == alone
    assert decode([], names) == [] and broken([], names) == 0


def test_labels_that_stand_are_kept_and_their_scores_not_looked_at():
    names = "O B-X I-X".split()
    scores = [np.full((2, 3), np.nan), np.array([[0.0, 0.5, 2.0], [0.0, 0.0, 1.0]])]
    labels = [["B-X", "O"], ["I-X", "I-X"]]
    assert decode(scores, names, labels) == [["B-X", "O"], ["B-X", "I-X"]]
    assert labels[1] == ["I-X", "I-X"]  # the caller's own


def test_infinite_scores_do_not_lift_constraints():
    names, low = "O B-X I-X".split(), -np.inf
    for scores, labels in (
        ([[low, low, 0.0], [low, 0.0, low]], ["O", "B-X"]),
        ([[0.0, low, np.inf], [0.0, 1.0, np.inf]], ["O", "B-X"]),
        ([[low] * 3] * 3, ["O", "O", "O"]),
    ):
        assert decode([scores], names) == [labels]


def test_what_is_refused():
    names = "O B-X I-X".split()
    for scores, message in (
        (np.zeros((2, 4)), r"sentence 1: got scores of shape \(2, 4\); expected one for each "),
        (np.zeros(3), r"sentence 1: got scores of shape \(3,\)"),
        (np.array([[0.0, np.nan, 0.0]]), "sentence 1: got scores that are NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            decode([np.zeros((1, 3)), scores], names)
    with pytest.raises(ValueError, match="got no labels"):
        transitions([])
    with pytest.raises(ValueError, match=r"decoding is 'free'; expected one of \('argmax', "):
        check_decoding("free")
