"""First questions to a GPU, each within its time: does it run, is it right, how fast, and why?

    python benchmarks/gpu_check.py [STAGE ...] [--out FOLDER] [--budget SECONDS]

Stages, in this order; all but the last five where none is named:

    env       versions, the GPU, its rate of products
    build     the package with its CUDA op, aside; tokenexit/_C.abi3.so as it is if that serves here
    smoke     a tiny tagger, directly and in a graph, against the reference: is it right?
    speed     BERT-base, 64 x 128, held against Hugging Face in fp32 and timed beside it, with and
              without exits; microseconds of each launch of a layer
    products  those of a layer alone, beside cuBLAS and others
    tests     all tests that run on a GPU
    peers     packed with varlen or flexible attention, Hugging Face in a CUDA graph, torch.compile
    goals     one sentence of 32 tokens, 256 x 128, sentences of many lengths, a training step
    sizes     few sentences, long ones, bf16
    exits     what the exits kept in build/gpu/*.npz are worth to BERT-base (gpu_exits.py)
    teach     trains a tagger into build/gpu-tagger; wants build/gpu-evidence, which
              `python -m experiments pack PLAN FOLDER` makes
    evidence  what that tagger's exits are worth
    sanitize  the CUDA op, a product and an exit step under compute-sanitizer, all at once
    warm      compiles what speed, goals, peers, exits and products launch; times nothing

Stages joined by + run at once (`build tests+warm+sanitize speed`): what is timed runs alone.
A stage gets what its own limit and the budget leave; one that fails or is cut off keeps no other
from running. Torch, triton, transformers and pytest are all it wants. The folder gets summary.txt,
under 12,000 characters and also the end of the output, gpu_check.jsonl with a row for each number,
and a log of each stage. The exit status is 1 if anything failed. `--device cpu --tiny` tries the
program.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
import zipfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MOST = 11800  # characters of the summary
# Of each stage: seconds at most, and characters of the summary.
LIMITS = {
    "env": (90, 500),
    "build": (170, 300),
    "smoke": (90, 700),
    "speed": (150, 3700),
    "products": (75, 1500),
    "tests": (140, 1000),
    "peers": (45, 1100),
    "goals": (75, 2000),
    "sizes": (60, 600),
    "exits": (45, 1800),
    "teach": (80, 1500),
    "evidence": (60, 6000),
    "sanitize": (150, 300),
    "warm": (100, 600),
}
GOALS = ("one", "large", "ragged", "train")  # parts of one process, which imports once
WARMED = (("speed", "products"), GOALS, ("peers",))  # in a process each, and another for exits
LEAST = 8  # seconds, for which no stage begins
SANITIZED = [
    ("memcheck", "tests/ops/test_compact_active.py", "cuda and (no_sentences or matches_a_loop)"),
    ("racecheck", "tests/ops/test_compact_active.py", "cuda and special_tokens"),
    ("memcheck", "tests/kernels/test_linear.py", "few_programs and float16 and 128"),
    ("racecheck", "tests/kernels/test_decision.py", "exit_step_decides_as and entropy"),
]

VERSIONS = """
import importlib.metadata as metadata, os, platform, shutil
import torch
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"
names = "torch triton transformers numpy ninja pytest pytest-xdist hypothesis datasets seqeval"
print("python", platform.python_version(), *(f"{n} {version(n)}" for n in names.split()))
tools = "nvcc g++ git compute-sanitizer"
print(os.cpu_count(), "cores;", *(f"{t}: {shutil.which(t) or 'missing'}" for t in tools.split()))
print("cuda", torch.version.cuda, torch.cuda.is_available())
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(f"{p.name} sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors,",
          f"{p.total_memory >> 30} GiB, {p.L2_cache_size >> 20} MiB L2")
"""
HAS_OP = """
import sys
from tokenexit import ops
from tokenexit.loops import gpu  # and all that it needs
devices = sorted(ops.compiled_devices("compact_active"))
print("compact_active is compiled for", *devices, "", ops.extension_error() or "")
sys.exit(not {device!r} in devices)
"""


class Check:
    """The stages of one run."""

    def __init__(self, options: argparse.Namespace, work: Path):
        self.options, self.work, self.began = options, work, time.monotonic()
        self.out = options.out
        self.logs, self.site = self.out / "logs", work / "site"
        self.told, self.failed = {}, []
        self.logs.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.out / "notes", ignore_errors=True)
        paths = map(str, (self.site, ROOT / "benchmarks", ROOT / "tests"))
        self.env = os.environ | {
            "PYTHONSAFEPATH": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }

    def left(self) -> float:
        """Seconds of the budget."""
        return self.options.budget - (time.monotonic() - self.began)

    def run(self, name: str, command: list, limit: float, **env) -> int | None:
        """A command into the log of that name; its status, None where its time was over."""
        with open(self.logs / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=self.env | env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that all it started can be ended
            )
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def stage(self, name: str):
        """Run it within its time; how it ended and what it told go to the summary."""
        limit, characters = LIMITS[name]
        limit, start = min(limit, self.left()), time.monotonic()
        if limit < LEAST:
            self.told[name] = f"== {name}: not run, the budget is spent\n"
            self.failed.append(name)
            return
        (self.logs / f"{name}.log").unlink(missing_ok=True)
        self.told[name] = f"== {name}: begun, not ended\n"  # if all is ended from without
        (self.out / "summary.txt").write_text(self.summary())
        print(f"== {name}, at most {limit:.0f} s", flush=True)
        text = ""
        try:
            status = getattr(self, f"run_{name}")(limit)
            how = {0: "ok", None: "CUT OFF"}.get(status, f"FAILED with status {status}")
            text = self.tell(name).strip()[:characters]
        except Exception as error:  # the others are to run all the same
            status, how = 1, f"FAILED by {type(error).__name__}: {error}"[:200]
        if status != 0:
            self.failed.append(name)
        self.told[name] = f"== {name}: {how}, {time.monotonic() - start:.0f} s\n{text}\n"
        print(self.told[name], flush=True)
        (self.out / "summary.txt").write_text(self.summary())

    def stages(self, joined: str):
        """Stages joined by +, at once."""
        names = joined.split("+")
        with ThreadPoolExecutor(len(names)) as at_once:
            [*at_once.map(self.stage, names)]

    def summary(self) -> str:
        return "".join([*self.told.values()])[:MOST]

    def log(self, name: str) -> str:
        path = self.logs / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def tell(self, name: str) -> str:
        """What of a stage is worth a place in the summary."""
        notes = self.out / "notes" / f"{name}.txt"
        if notes.exists():
            return notes.read_text()
        if name == "tests" and (junit := self.logs / "tests.xml").exists():
            return failures(junit)
        lines = self.log(name).splitlines()
        if name == "tests":  # cut off
            bad = {line[:120] for line in lines if re.search(r"(FAILED|ERROR) tests/", line)}
            return "\n".join(
                [f"{self.log(name).count(' PASSED ')} passed until then", *sorted(bad)]
            )
        if name == "build":
            bad = [line[:160] for line in lines if re.search(r"rror|cannot find", line)][:5]
            return "\n".join([*bad, *lines[-1:]])
        return "\n".join(line[:200] for line in lines)

    def probes(self, name: str, limit: float, *what: str) -> int | None:
        """Parts of gpu_probes.py."""
        return self.program("gpu_probes.py", name, limit, *what)

    def program(self, file: str, name: str, limit: float, *what) -> int | None:
        """One of the benchmarks, which begins nothing that would end after its time."""
        command = [sys.executable, ROOT / "benchmarks" / file, *what, "--stage", name]
        command += ["--out", self.out, "--device", self.options.device, "--seconds", limit - 10]
        return self.run(name, command + ["--tiny"] * self.options.tiny, limit)

    def run_env(self, limit):
        if self.options.device == "cuda":
            query = "name,driver_version,clocks.sm,clocks.max.sm,temperature.gpu,power.draw"
            command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
            if shutil.which(command[0]):
                self.run("env", command, 20)
        return self.run("env", [sys.executable, "-c", VERSIONS], limit)

    def run_build(self, limit):
        target, package = self.work / "built", self.site / "tokenexit"
        shutil.copytree(ROOT / "tokenexit", package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "kernels", package / "kernels")
        serves = [sys.executable, "-c", HAS_OP.format(device=self.options.device)]
        if any(package.glob("_C*.so")) and self.run("build", serves, limit) == 0:
            return 0
        for old in package.glob("_C*.so"):
            old.unlink()
        command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", target]
        command += ["--build-temp", self.work / "objects"]
        status = self.run("build", command, limit, TOKENEXIT_BUILD_EXT="1")
        for built in target.glob("tokenexit/_C*.so"):
            shutil.copy(built, package)
        return status or self.run("build", serves, limit)

    def run_smoke(self, limit):
        return self.probes("smoke", limit, "smoke")

    def run_speed(self, limit):
        return self.probes("speed", limit, "speed", "launches")

    def run_products(self, limit):
        return self.probes("products", limit, "products")

    def run_goals(self, limit):
        return self.probes("goals", limit, *GOALS)

    def run_sizes(self, limit):
        return self.probes("sizes", limit, "sizes")

    def run_peers(self, limit):
        return self.probes("peers", limit, "peers")

    def run_exits(self, limit):
        return self.exits("exits", limit)

    def exits(self, name: str, limit: float, *more: str) -> int | None:
        """gpu_exits.py with the files that are there."""
        files = sorted((ROOT / "build/gpu").glob("*.npz"))
        if not files:
            self.note(name, "no build/gpu/*.npz: `python -m experiments save-exits` writes such")
            return 1
        return self.program("gpu_exits.py", name, limit, *files, *more)

    def run_warm(self, limit):
        """As processes of their own, so that compilations do not wait for one another."""
        run = partial(self.probes, "warm", limit)
        jobs = [partial(run, *parts, "--warm") for parts in WARMED]
        if any((ROOT / "build/gpu").glob("*.npz")):
            jobs.append(partial(self.exits, "warm", limit, "--warm"))
        return self.at_once(lambda job: job(), jobs)

    @staticmethod
    def at_once(run, given):
        """run of each, at the same time; the first status that is not 0."""
        with ThreadPoolExecutor(len(given)) as pool:
            statuses = [*pool.map(run, given)]
        return next((status for status in statuses if status != 0), 0)

    def experiments(self, what: str, stage: str, limit: float):
        """A command for a GPU of the experiments, with what it carries of other packages."""
        packed = ROOT / "build/gpu-evidence"
        for wheel in (packed / "wheels").glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(self.site)
        plan = ROOT / "benchmarks/experiments/plans/gpu-e5.yaml"
        command = [sys.executable, "-m", "experiments", what, plan, "--texts", packed]
        command += ["--work", ROOT / "build/gpu-tagger", "--out", self.out]
        command += ["--device", self.options.device, "--seconds", limit - 5]
        return self.run(stage, command + ["--tiny"] * self.options.tiny, limit)

    def run_teach(self, limit):
        return self.experiments("gpu-train", "teach", limit)

    def run_evidence(self, limit):
        return self.experiments("gpu-measure", "evidence", limit)

    def run_tests(self, limit):
        (self.logs / "tests.xml").unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["--tb", "short", "-W", "ignore", "--durations", "15"]
        command += ["--junitxml", self.logs / "tests.xml", f"-n{self.options.workers}"]
        folders = ["tests/loops/test_gpu.py", "tests/ops/test_compact_active.py"]
        if self.options.device == "cuda":  # elsewhere they would all be interpreted
            folders.append("tests/kernels")
        # The other tests need datasets and seqeval to be collected at all.
        status = self.run("tests", command + folders, limit)
        return 0 if status == 5 and self.options.device == "cpu" else status  # none was chosen

    def run_sanitize(self, limit):
        def one(what):
            tool, file, chosen = what
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", 3, sys.executable]
            command += ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", chosen]
            status = self.run("sanitize", command, limit)
            how = {0: "clean", None: "CUT OFF"}.get(status, f"FAILED with status {status}")
            self.note("sanitize", f"{tool} {file} -k '{chosen}': {how}")
            return status

        return self.at_once(one, SANITIZED)

    def note(self, stage: str, text: str):
        """A line for the summary."""
        notes = self.out / "notes" / f"{stage}.txt"
        notes.parent.mkdir(exist_ok=True)
        with notes.open("a") as file:
            file.write(f"{text}\n")


def failures(junit: Path) -> str:
    """How many tests there were, and which failed why, a line for each test function."""
    suite = xml.parse(junit).getroot().find("testsuite")
    counts = (f"{suite.get(name)} {name}" for name in ("tests", "failures", "errors", "skipped"))
    lines, failed = [f"{', '.join(counts)}, {suite.get('time')} s"], defaultdict(list)
    for case in suite.iter("testcase"):
        for found in (*case.iterfind("failure"), *case.iterfind("error")):
            name, _, parameters = case.get("name").partition("[")
            why = re.sub(r"\s+", " ", found.get("message") or "")[:130]
            file = case.get("classname").split(".")[-1]
            failed[file, name].append((parameters.rstrip("]"), why))
    for (file, name), cases in failed.items():
        which = ", ".join(parameters for parameters, _ in cases[:4])[:80]
        lines.append(f"FAILED {len(cases)} x {file}::{name} [{which}]: {cases[0][1]}")
    return "\n".join(lines)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(LIMITS))
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-check")
    parser.add_argument("--budget", type=float, default=465, help="seconds in all")
    parser.add_argument("--workers", type=int, default=8, help="test processes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    options = parser.parse_args(arguments)
    if unknown := {x for joined in options.stages for x in joined.split("+")} - LIMITS.keys():
        parser.error(f"got stages {sorted(unknown)}; expected some of {list(LIMITS)}")
    options.out = options.out.resolve()
    with tempfile.TemporaryDirectory() as work:
        check = Check(options, Path(work))
        for joined in options.stages or list(LIMITS)[:-5]:
            check.stages(joined)
        print(f"==== summary after {options.budget - check.left():.0f} s\n{check.summary()}")
    return int(bool(check.failed))


if __name__ == "__main__":
    sys.exit(main())
