"""Graphs of padded batches: told apart by all that they hang on, and shared by what they do not."""

import contextlib
import gc
import threading
import time
import warnings

import pytest
import torch
from recording import Stream, pretend
from torch.multiprocessing.reductions import StorageWeakRef

from tokenexit import ExitPolicy
from tokenexit.loops import gpu, graphs
from tokenexit.loops.memory import Held
from tokenexit.schedule import Schedule


def test_buckets():
    assert [graphs.bucket(n) for n in (1, 16, 17, 100, 129)] == [16, 16, 32, 112, 160]
    for size in range(1, 3000):
        assert size <= graphs.bucket(size) <= max(16, 1.25 * size + 16)
        assert graphs.bucket(graphs.bucket(size)) == graphs.bucket(size)


def test_no_bucket_has_more_sentences_than_the_loop_takes():
    most = gpu.MOST_SENTENCES
    for sentences, expected in ((most - 1, most), (most, most), (most + 1, most + 1)):
        mask = torch.ones(sentences, 1)
        assert graphs._size({"attention_mask": mask})[0] == expected


def test_few_sentences_have_buckets_of_their_own(recorded):
    recorded.module = module = Sums()
    recorder = graphs.Graphs()
    with torch.no_grad():
        for sentences in (1, 2, 3, 4, 5, 8, 9, 10, 16):
            rows, schedule = rows_of(sentences), schedule_of(sentences=sentences)
            got = recorder(module, rows, schedule, held(module))
            assert all(map(torch.equal, got, module(rows, schedule)))
    assert len(recorded) == 5


def test_buffers_made_in_inference_mode_are_filled_in_any():
    for number, mode in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode]):
        with mode():
            rows = {"attention_mask": torch.ones(2, 3, dtype=torch.bool), "word_ids": None}
            rows["input_ids"] = torch.full((2, 3), number)
            schedule = Schedule.of(ExitPolicy(threshold=0.1 * number), 4, 2, torch.zeros(0))
            if number == 0:
                inputs = graphs.Inputs((8, 16), rows, schedule)
            inputs.fill(rows, schedule)
            assert inputs.rows["attention_mask"].sum() == 6 and inputs.rows["word_ids"] is None
            assert torch.equal(inputs.rows["input_ids"][:2, :3], rows["input_ids"])
            assert torch.equal(inputs.schedule.threshold[:, :2], schedule.threshold)


def test_buffers_hold_nothing_of_those_before():
    inputs = graphs.Inputs((8, 16), rows_of(), schedule_of())
    for sentences, tokens, threshold in [(8, 16, 0.5), (3, 5, 0.25), (3, 5, 0.25), (4, 2, 0.75)]:
        rows = rows_of(sentences, tokens)
        schedule = schedule_of(ExitPolicy(threshold=threshold), sentences)
        inputs.fill(rows, schedule)
        assert torch.equal(
            inputs.rows["attention_mask"][:sentences, :tokens], rows["attention_mask"]
        )
        assert inputs.rows["attention_mask"].sum() == rows["attention_mask"].sum()
        assert torch.equal(inputs.rows["input_ids"][:sentences, :tokens], rows["input_ids"])
        assert torch.equal(inputs.schedule.threshold[:, :sentences], schedule.threshold)


class Sums(torch.nn.Module):
    """All that graphs are told apart by goes into its result; its sums are exact in fp32."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.tensor(3.0))
        self.inner = torch.nn.ModuleList([torch.nn.Linear(1, 1, bias=False)])
        torch.nn.init.ones_(self.inner[0].weight)

    def forward(self, rows, schedule):
        value = self.weight * rows["input_ids"] + self.shift + self.inner[0].weight
        for name, part in self.named_children():
            value = value + sum(p.sum() for p in part.parameters()) * (1 + len(name))
        if rows["word_ids"] is not None:
            value = value + rows["word_ids"] / 16
        value = value + sum(schedule.decides) / 4 + schedule.max_prob / 8
        value = value + (graphs.float32_precision() == "ieee") / 32
        b = len(value)  # a schedule may have room for more
        value = value + schedule.threshold[0, :b, None] + schedule.window[:b, None]
        value = value.where(rows["attention_mask"], 0)
        return value, value.sum()


@pytest.fixture
def recorded(monkeypatch):
    """The recordings so far."""
    return pretend(monkeypatch)


def rows_of(sentences=3, tokens=5, **more):
    ids = torch.arange(sentences * tokens).view(sentences, tokens)
    return {"input_ids": ids, "attention_mask": ids % 4 > 0, "word_ids": None, **more}


def held(module):
    """Gives what `module` holds now."""
    return lambda: Held(module).tensors


def schedule_of(policy=None, sentences=3):
    return Schedule.of(policy or ExitPolicy(threshold=0.25), 4, sentences, torch.zeros(0))


def other_parameter(module):
    module.weight = torch.nn.Parameter(torch.tensor(5.0))


def other_data(module):
    module.inner[0].weight.data = torch.tensor([[7.0]])


def other_buffer(module):
    module.shift = torch.tensor(1.0)


def more_modules(module):
    module.new = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.ones_(module.new.weight)


CHANGES = [other_parameter, other_data, other_buffer, more_modules]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_other_weights_get_another_graph(change, recorded):
    recorded.module = module = Sums()
    recorder = graphs.Graphs()
    for step in ("as made", "replayed", change, "replayed"):
        if callable(step):
            step(module)
        got = recorder(module, rows_of(), schedule_of(), held(module))
        assert all(map(torch.equal, got, module(rows_of(), schedule_of()))), step
    assert recorded == [1, 2] and len(recorded.alive) == 1  # pools
    module.weight.fill_(9)  # in place, which the graph reads
    got = recorder(module, rows_of(), schedule_of(), held(module))
    assert all(map(torch.equal, got, module(rows_of(), schedule_of())))
    assert len(recorded) == 2 and not gpu.FALLBACKS


@pytest.mark.parametrize("change", CHANGES[:3], ids=lambda change: change.__name__)
@torch.no_grad()
def test_what_a_graph_reads_is_kept_until_it_is_forgotten(change, recorded, monkeypatch):
    recorded.module = module = Sums()
    recorder = graphs.Graphs()
    assert recorder.ahead(rows_of(), schedule_of()) is None
    recorder(module, rows_of(), schedule_of(), held(module))
    read = [StorageWeakRef(x.untyped_storage()) for x in held(module)()]
    change(module)
    gc.collect()
    assert not any(storage.expired() for storage in read)
    elsewhere = {name: x if x is None else x.to("meta") for name, x in rows_of().items()}
    with monkeypatch.context() as patch:
        patch.delattr(torch.cuda, "device")  # which takes none but a GPU
        assert recorder.ahead(elsewhere, schedule_of()) is None
    ahead = recorder.ahead(rows_of(), schedule_of())
    got = recorder(module, rows_of(), schedule_of(), held(module), ahead)
    assert got is not ahead[1] and all(map(torch.equal, got, module(rows_of(), schedule_of())))
    recorded.clear()
    del ahead
    gc.collect()
    assert sum(storage.expired() for storage in read) == 1
    ahead = recorder.ahead(rows_of(), schedule_of())
    assert recorder(module, rows_of(), schedule_of(), held(module), ahead) is ahead[1]
    assert not recorded


BASE = ExitPolicy(threshold=0.25)
INPUTS = {
    "decides": (rows_of(), schedule_of(ExitPolicy(threshold=(0.25, 0, 0.25, 0.25)))),
    "max_prob": (rows_of(), schedule_of(ExitPolicy(threshold=0.25, criterion="max_prob"))),
    "row": (rows_of(word_ids=torch.ones(3, 5).long()), schedule_of()),
    "dtype": (rows_of(input_ids=torch.ones(3, 5).int()), schedule_of()),
    "bucket": (rows_of(9, 5), schedule_of(sentences=9)),
}


@pytest.mark.parametrize("name", INPUTS)
@torch.no_grad()
def test_other_options_get_another_graph(name, recorded):
    recorded.module = module = Sums()
    recorder = graphs.Graphs()
    for rows, schedule in (both := [(rows_of(), schedule_of()), INPUTS[name]]) * 2:
        got = recorder(module, rows, schedule, held(module))
        assert all(map(torch.equal, got, module(rows, schedule)))
    assert recorded == [1] * len(both)  # in one pool


@torch.no_grad()
def test_one_graph_serves_values_sizes_and_thresholds(recorded):
    recorded.module = module = Sums()
    recorder = graphs.Graphs()
    for sentences, tokens, threshold in [(3, 5, 0.25), (4, 16, 0.5), (4, 1, 0.75), (3, 5, 0.25)]:
        policies = [ExitPolicy(threshold=threshold, window=i) for i in range(sentences)]
        rows, schedule = rows_of(sentences, tokens), schedule_of(policies, sentences)
        got = recorder(module, rows, schedule, held(module))
        assert all(map(torch.equal, got, module(rows, schedule)))
    assert len(recorded) == 1


@torch.no_grad()
def test_precision_gets_another_graph(recorded):
    recorded.module = module = Sums()
    recorder, before = graphs.Graphs(), torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            got = recorder(module, rows_of(), schedule_of(), held(module))
            assert all(map(torch.equal, got, module(rows_of(), schedule_of())))
    finally:
        torch.set_float32_matmul_precision(before)
    assert len(recorded) == 2


@torch.no_grad()
def test_where_recording_fails_all_is_run_directly_and_told_once(recorded, monkeypatch):
    def fails(run, pool=None):
        recorded.append(run)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "record", fails)
    module, recorder = Sums(), graphs.Graphs()
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted") as told:
        for sentences in (3, 3, 3, 3, 3, 9):
            rows, schedule = rows_of(sentences), schedule_of(sentences=sentences)
            got = recorder(module, rows, schedule, held(module))
            assert all(map(torch.equal, got, module(rows, schedule)))
    assert len(recorded) == 3 + 1  # of a key no more
    assert len(told) == 1 and gpu.FALLBACKS == {"not recorded": 4}


@torch.no_grad()
def test_a_recording_that_failed_once_is_made_the_next_time(recorded, monkeypatch):
    """As where another thread's wait for the device forbade it."""
    record, recorder = graphs.record, graphs.Graphs()
    recorded.module = module = Sums()

    def fails(run, pool=None):
        raise RuntimeError("operation not permitted when stream is capturing")

    for way in (fails, record, fails):
        monkeypatch.setattr(graphs, "record", way)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = recorder(module, rows_of(), schedule_of(), held(module))
        assert all(map(torch.equal, got, module(rows_of(), schedule_of())))
    assert len(recorded) == 1 and gpu.FALLBACKS == {"not recorded": 1}


@torch.no_grad()
def test_calls_on_another_stream_wait_for_those_before(recorded, monkeypatch):
    recorded.module = module = Sums()
    recorder, a, b = graphs.Graphs(), Stream(), Stream()
    for stream in (a, a, b, b, a):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda stream=stream: stream)
        recorder(module, rows_of(), schedule_of(), held(module))
    assert b.waited == [a] and a.waited == [b]


@torch.no_grad()
def test_where_memory_is_short_all_graphs_are_forgotten(recorded, monkeypatch):
    recorded.module = module = Sums()
    recorder, record = graphs.Graphs(), graphs.record

    def fails(run, pool=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for sentences, way in ((3, record), (9, fails), (9, record), (3, record)):
        monkeypatch.setattr(graphs, "record", way)
        rows, schedule = rows_of(sentences), schedule_of(sentences=sentences)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = recorder(module, rows, schedule, held(module))
        assert all(map(torch.equal, got, module(rows, schedule)))
    assert recorded == [1, 2, 2] and gpu.FALLBACKS == {"not recorded": 1}  # pools


class Cuda:
    """Of torch.cuda what recordings ask for: streams, and captures, of which one at a time may be,
    and one that fails leaves the stream and the pool as they are."""

    def __init__(self, monkeypatch):
        self.streams, self.open, self.recorded, self.fails = [Stream()], [], [], False
        for name, value in {
            "Stream": lambda device: Stream(),
            "current_device": lambda: 0,
            "current_stream": lambda: self.streams[0],
            "set_stream": lambda new: self.streams.__setitem__(0, new),
            "stream": self.stream,
            "CUDAGraph": lambda: None,
            "graph": self.graph,
            "graph_pool_handle": lambda: f"pool {len(self.recorded)}",
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        end = lambda device, pool: self.open.remove(pool)  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
        graphs._stream_beside.cache_clear()

    @contextlib.contextmanager
    def stream(self, new):
        old, self.streams[0] = self.streams[0], new
        yield
        self.streams[0] = old

    @contextlib.contextmanager
    def graph(self, _, pool, stream, capture_error_mode):
        if self.open:
            raise RuntimeError(f"already recording to {self.open}")
        self.open.append(pool)
        self.recorded.append((pool, stream))
        self.streams[0] = stream
        yield
        if self.fails:
            raise RuntimeError("the capture was invalidated")
        self.open.remove(pool)


@pytest.fixture
def cuda(monkeypatch):
    yield Cuda(monkeypatch)
    graphs._stream_beside.cache_clear()


def test_a_failed_recording_leaves_the_stream_and_the_pool_as_they_were(cuda):
    """torch.cuda.graph does not, where its end raises: no graph could be recorded any more."""
    before, cuda.fails = cuda.streams[0], True
    with pytest.raises(RuntimeError, match="invalidated"):
        graphs.record(lambda: None)
    assert cuda.streams == [before] and not cuda.open
    cuda.fails = False
    graphs.record(lambda: None, cuda.recorded[0][0])
    assert cuda.streams == [before] and len(cuda.recorded) == 2


def test_graphs_of_a_device_are_recorded_on_one_stream(cuda):
    for _ in range(2):
        graphs.record(lambda: None)
    (_, first), (_, second) = cuda.recorded
    assert first is second and first not in cuda.streams


def test_one_graph_is_recorded_at_a_time(cuda):
    """Of two models by two threads; a second capture would be refused."""
    met, errors = threading.Barrier(2), []

    def work():
        met.wait()
        try:
            graphs.record(lambda: time.sleep(0.05))  # while the other is at the door
        except RuntimeError as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(cuda.recorded) == 2
