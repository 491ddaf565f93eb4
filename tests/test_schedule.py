"""The policies of a batch as tensors, and exits simulated by the rule itself."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tokenexit import ExitPolicy
from tokenexit.policy import UNBOUNDED
from tokenexit.schedule import Schedule, simulate_exits


def test_mixed_policies_must_share_their_kind():
    policies = [ExitPolicy(), ExitPolicy(copy="pre_norm")]
    with pytest.raises(ValueError, match="must share criterion, copy and neighbors"):
        Schedule.of(policies, 4, 2, torch.zeros(1))
    with pytest.raises(ValueError, match="got 2 policies for 3 sentences"):
        Schedule.of(policies, 4, 3, torch.zeros(1))


def test_a_layer_decides_if_it_does_for_any_sentence():
    policies = [ExitPolicy(threshold=(0.0, 0.2, 0.0, 0.0)), ExitPolicy.never(), ExitPolicy.never()]
    assert Schedule.of(policies, 4, 3, torch.zeros(1)).decides == (False, True, False, True)


@pytest.mark.parametrize(
    "policies", [ExitPolicy(), [ExitPolicy(), ExitPolicy(window=3)]], ids=["one", "two"]
)
def test_a_schedule_is_one_copy_that_nobody_waits_for(policies, monkeypatch):
    made, copies, tensor = [], [], torch.tensor

    def from_host(*args, pin_memory=False, **kwargs):
        made.append(pin_memory)
        return tensor(*args, **kwargs)

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if kwargs.get("device") is not None and args[0].device.type == "cpu":
                copies.append(kwargs.get("non_blocking"))
            return function(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", from_host)
    device = torch.device("meta")  # in place of a GPU
    like = SimpleNamespace(device=device, is_cuda=True, dtype=torch.float16)
    with Copies():
        schedule = Schedule.of(policies, 4, 2, like)
    assert made == [True] and copies == [True]
    values = schedule.window, schedule.min_active, schedule.threshold
    assert {(v.device, v.shape[-1]) for v in values} == {(device, 2)}


@pytest.mark.parametrize(
    "neighbors, expected", [("frozen", [1, 2, 2, 1]), ("recompute", [1, 3, 2, 1])]
)
def test_simulated_exits(neighbors, expected):
    """The first word leaves at once; what it would say later is asked only by "recompute"."""
    u = torch.tensor([[0.1, 0.1, 0.9, 0.1], [0.9, 0.1, 0.1, 0.9], [0.9, 0.9, 0.9, 0.9]])
    policy = ExitPolicy(threshold=0.2, window=1, neighbors=neighbors)
    left = simulate_exits(u, torch.tensor([0, 3, 4]), Schedule.of(policy, 3, 2, u))
    assert left.tolist() == expected


def test_simulated_exits_of_too_few():
    u = torch.tensor([[0.1, 0.9, 0.9, 0.1], [0.9, 0.9, 0.9, 0.9]])
    for least, expected in ((2, [1, 2, 2, 1]), (3, [1, 1, 1, 1])):
        schedule = Schedule.of(ExitPolicy(threshold=0.2, window=0, min_active=least), 2, 2, u)
        assert simulate_exits(u, torch.tensor([0, 3, 4]), schedule).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("least", [1, 4])
@pytest.mark.parametrize("level", ["token", "sentence"])
def test_simulated_exits_word_by_word(level, least, dtype):
    """Against the definition, with a sentence without words and a NaN."""
    generator = torch.Generator().manual_seed(0)
    u, cu_words = torch.rand(3, 12, generator=generator).to(dtype), [0, 5, 5, 12]
    u[1, 6] = torch.nan
    policy = ExitPolicy(level=level, threshold=(0.7, 0.8, 0.0), window=1, min_active=least)
    expected = [0] * 12
    for start, end in zip(cu_words, cu_words[1:], strict=False):
        known = [0.0] * 12
        for layer, limit in enumerate([0.7, 0.8, torch.inf], 1):
            words = range(start, end)
            for w in words:
                known[w] = known[w] if expected[w] else float(u[layer - 1, w])
            near = {w: [v for v in words if level == "sentence" or abs(v - w) <= 1] for w in words}
            sure = {w: limit == torch.inf or all(known[v] < limit for v in near[w]) for w in words}
            leaving = [w for w in words if not expected[w] and sure[w]]
            for w in leaving:
                expected[w] = layer
            rest = [w for w in words if not expected[w]]
            if len(rest) < min(least, end - start):
                for w in rest:
                    expected[w] = layer
    schedule = Schedule.of(policy, 3, 3, u)
    assert simulate_exits(u, torch.tensor(cu_words), schedule).tolist() == expected


def test_sentences_more():
    schedule = Schedule.of(ExitPolicy(threshold=0.25, window=3), 4, 2, torch.zeros(1))
    assert schedule.padded(2) is schedule
    more = schedule.padded(3)
    assert more.window.tolist() == [3, 3, 0] and more.min_active.tolist() == [1, 1, 0]
    assert more.threshold[0].tolist() == [0.25, 0.25, 0] and more.decides == schedule.decides
    room = schedule.like(5)
    assert [x.shape[-1] for x in room.tensors] == [5] * 3 and not any(x.any() for x in room.tensors)


def test_one_policy_s_is_kept_on_a_cpu_and_no_other():
    policy, like = ExitPolicy(threshold=0.3, window=1), torch.zeros(0)
    with torch.inference_mode():
        kept = Schedule.of(policy, 4, 3, like)
    assert Schedule.of(policy.replace(), 4, 3, like) is kept
    assert not any(tensor.is_inference() for tensor in kept.tensors)
    for others in (
        (policy.replace(window=2), 4, 3, like),
        (policy, 5, 3, like),
        (policy, 4, 2, like),
    ):
        assert Schedule.of(*others) is not kept
    assert Schedule.of(policy, 4, 3, like.double()).threshold.dtype == torch.float64
    with FakeTensorMode():
        traced = Schedule.of(policy, 4, 3, torch.zeros(0))
        fresh = Schedule.of(policy, 4, 7, torch.zeros(0))
    assert traced is not kept and isinstance(fresh.window, FakeTensor)
    assert type(Schedule.of(policy, 4, 7, like).window) is torch.Tensor


def test_another_thread_may_clear_what_is_kept(monkeypatch):
    class Cleared(dict):
        def __contains__(self, key):
            found = super().__contains__(key)
            self.clear()  # as another thread would between this and a look
            return found

    monkeypatch.setattr("tokenexit.schedule._KEPT", Cleared())
    made = [Schedule.of(ExitPolicy(), 4, 3, torch.zeros(0)) for _ in range(2)]
    assert made[0].window.tolist() == made[1].window.tolist()


def test_min_active_beyond_any_sentence():
    made = Schedule.of(ExitPolicy(min_active=10**30), 4, 1, torch.zeros(0))
    assert made.min_active.tolist() == [UNBOUNDED]


def test_a_schedule_follows_the_states():
    schedule = Schedule.of(ExitPolicy(threshold=0.25), 4, 2, torch.zeros(0))
    assert schedule.to(torch.zeros(1).half()) is schedule
    wide = schedule.to(torch.zeros(1).double())
    assert wide.threshold.dtype == torch.float64 and wide.window.dtype == torch.int64
    assert wide.threshold[0].tolist() == [0.25, 0.25]
    assert schedule.to(torch.zeros(1, device="meta")).window.is_meta
