"""What a user gets: the sdist, the wheel, an install without a compiler; and who imports whom."""

import ast
import importlib.util
import os
import pty
import shutil
import subprocess
import sys
import tarfile
import warnings
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
COMPILER = shutil.which(os.environ.get("CXX", "c++").split()[0])


def run(*command, cwd, ok=True, **env):
    """Its output, after a check of its exit status."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": "1", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree, so that building leaves nothing in ours."""
    source = tmp_path_factory.mktemp("source")
    built = ("build", "dist", "results", "__pycache__", "*.egg-info", "*.so", "*.pyd")
    ignored = shutil.ignore_patterns(".git*", ".venv", ".*_cache", ".hypothesis", *built)
    return shutil.copytree(ROOT, source, ignore=ignored, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def sdist(source):
    run(sys.executable, "setup.py", "-q", "sdist", cwd=source)
    return next((source / "dist").glob("*.tar.gz"))


@pytest.mark.slow
def test_sdist_has_what_its_tests_need(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    for part in ("tests", "benchmarks", "csrc", "kernels", "tokenexit", ".ci", "docs"):
        ours = {path.relative_to(ROOT) for path in (ROOT / part).rglob("*.*") if path.is_file()}
        ours = {p for p in ours if p.suffix not in (".pyc", ".so", ".jsonl", ".png")}
        assert [p for p in sorted(ours) if not (folder / p).exists()] == []
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    log = run(*pytest_, "--collect-only", cwd=folder)
    assert "error" not in log.splitlines()[-1]
    assert " passed" in run(*pytest_, "tests/test_policy.py", "tests/test_packing.py", cwd=folder)


def load_setup(monkeypatch, root=ROOT):
    """setup.py as a module, and what it gave to `setup`."""
    given = {}
    monkeypatch.setattr("setuptools.setup", lambda **kwargs: given.update(kwargs))
    monkeypatch.chdir(root)
    spec = importlib.util.spec_from_file_location("setup_of_tokenexit", root / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, given


def make_nvcc(folder, top):
    """An nvcc that tells the folder of its toolkit as the real one does."""
    folder.mkdir(parents=True)
    file = folder / "nvcc"
    file.write_text(f"#!{sys.executable}\nimport sys\nprint('#$ TOP={top}', file=sys.stderr)\n")
    file.chmod(0o755)


def test_the_toolkit_is_where_nvcc_says(monkeypatch, tmp_path):
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOKENEXIT_BUILD_EXT", "0")
    module, given = load_setup(monkeypatch)
    assert "ext_modules" not in given
    for name in ("wrapped", "packaged/nvidia/cu13", "asked"):
        make_nvcc(tmp_path / name / "bin", f"{tmp_path}/{name}/bin/..")
    make_nvcc(tmp_path / "path", f"{tmp_path}/wrapped/bin/..")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "packaged")])
    monkeypatch.setenv("PATH", "")
    assert module.toolkit() == str(tmp_path / "packaged/nvidia/cu13")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert module.toolkit() == str(tmp_path / "wrapped")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "asked"))
    assert module.toolkit() == str(tmp_path / "asked")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert module.toolkit() is None


def test_missing_cuda_ops_are_told(monkeypatch, capfd):
    """Where torch is built for CUDA. Nothing is compiled for this."""
    from setuptools import Distribution
    from torch.utils import cpp_extension

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", "nowhere")
    monkeypatch.setenv("TOKENEXIT_BUILD_EXT", "auto")
    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", lambda self: None)
    _, given = load_setup(monkeypatch)
    assert [extension.name for extension in given["ext_modules"]] == ["tokenexit._C"]
    given["cmdclass"]["build_ext"](Distribution()).build_extensions()
    out = capfd.readouterr().out
    assert (
        "tokenexit: compiled ops for CUDA were not built (nvcc was not found); pure PyTorch does"
        in out
    )


def test_ops_for_cuda_lie_in_a_library_of_their_own(monkeypatch, tmp_path):
    """Which a torch without CUDA does not look at, and without which the others load."""
    from tokenexit import ops

    broken = tmp_path / "_C_cuda.abi3.so"
    broken.write_text("no library")
    monkeypatch.setattr(ops, "find_spec", lambda name: SimpleNamespace(origin=str(broken)))
    monkeypatch.setattr(ops, "_ERROR", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops._load_cuda()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(RuntimeWarning, match="_C_cuda was built, but does not load"):
        ops._load_cuda()


def test_what_is_missing_is_told_on_the_terminal(source):
    """Past pip, which keeps what a build prints to itself."""
    child, terminal = pty.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        environment = {**os.environ, "TOKENEXIT_BUILD_EXT": "0"}
        os.chdir(source)
        os.execve(sys.executable, [sys.executable, "setup.py", "--version"], environment)
    told = b""
    try:
        while part := os.read(terminal, 1000):
            told += part
    except OSError:  # how a terminal ends
        pass
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0
    assert b"tokenexit: compiled ops were not built (TOKENEXIT_BUILD_EXT=0); pure PyTorch" in told


ONE_OP = """
import torch
import tokenexit.kernels
from tokenexit import ops
from tokenexit.ops.exit_decision import exit_decision

i = torch.tensor
u, left = exit_decision(
    i([[9.0, 0.0], [0.0, 0.0]]), i([0, 1]), i([1.0, 1.0]), i([0, 0]), i([0, 2]), i([0]), i([0.5]), 4
)
assert left.tolist() == [4, 0], left
assert u[0] < 0.01 and u[1] == 1, u
print("compiled" if ops.extension_available() else ops.extension_error())
print(tokenexit.kernels.__file__)
"""


def run_one_op(target, cwd):
    """The lines that it prints, with what is installed in target and what torch lies beside.

    -S and PYTHONPATH: a development install, a .pth file, must not stand in for what is missing.
    """
    path = f"{target}{os.pathsep}{Path(torch.__file__).parents[1]}"
    return run(sys.executable, "-S", "-c", ONE_OP, cwd=cwd, PYTHONPATH=path).splitlines()


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_wheel_from_sdist_runs_outside_the_source_tree(sdist, tmp_path):
    command = [*PIP, "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    log = run(*command, "-w", tmp_path, sdist, cwd=tmp_path, TOKENEXIT_BUILD_EXT="1")
    assert "tokenexit: building compiled ops for CPU" in log
    wheel = next(tmp_path.glob("*.whl"))
    assert "-cp310-abi3-" in wheel.name
    target = tmp_path / "site"
    run(*PIP, "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    assert not (target / "kernels").exists()
    kernels = str(target / "tokenexit" / "kernels" / "__init__.py")
    assert run_one_op(target, tmp_path) == ["compiled", kernels]


@pytest.mark.slow
def test_install_without_a_compiler_falls_back(sdist, tmp_path):
    target = tmp_path / "site"
    command = [*PIP, "install", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    missing = {"CXX": "no-c++", "CC": "no-cc", "TOKENEXIT_BUILD_EXT": "auto"}
    log = run(*command, "--target", target, sdist, cwd=tmp_path, **missing)
    message = "compiled ops for CPU were not built (no C++ compiler: no-c++ is missing); "
    assert f"tokenexit: {message}pure PyTorch does their work, only slower" in log
    assert (target / "tokenexit" / "py.typed").exists()
    assert run_one_op(target, tmp_path)[0].startswith("tokenexit._C was not built")


@pytest.mark.slow
def test_a_build_that_was_asked_for_must_succeed(source, tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "-b", tmp_path, "-t", tmp_path]
    log = run(*command, cwd=source, ok=False, CXX="no-c++", CC="no-cc", TOKENEXIT_BUILD_EXT="1")
    assert "no-c++: not found" in log


@pytest.mark.slow
def test_a_build_that_was_declined(source, tmp_path):
    command = [sys.executable, "setup.py", "build", "-b", tmp_path]
    log = run(*command, cwd=source, TOKENEXIT_BUILD_EXT="0")
    assert "tokenexit: compiled ops were not built (TOKENEXIT_BUILD_EXT=0)" in log
    assert (tmp_path / "lib/tokenexit/kernels/__init__.py").exists()
    assert not list(tmp_path.rglob("_C*"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cu")), ids=lambda p: p.name)
def test_cuda_source_compiles(source, tmp_path):
    from torch.utils.cpp_extension import include_paths

    object_ = tmp_path / "object.o"
    flags = ["-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in (80, 90)]
    includes = [f"-I{path}" for path in include_paths()]
    flags.append("--threads=2")
    run("nvcc", "-c", source, "-o", object_, *flags, *includes, "-Xcompiler=-fPIC", cwd=tmp_path)
    assert object_.stat().st_size > 0


def test_transformers_does_not_take_our_kernels_for_its_own():
    code = "import transformers, sys; from transformers import BertModel; print(*sys.modules)"
    modules = run(sys.executable, "-c", code, cwd=ROOT, PYTHONSAFEPATH="").split()
    assert "transformers" in modules
    assert "tokenexit" not in modules
    where = "import kernels; print(kernels.__file__)"  # the trap is there: ours is found
    assert run(sys.executable, "-c", where, cwd=ROOT, PYTHONSAFEPATH="").startswith(str(ROOT))


def test_kernels_package_is_a_docstring_only_and_is_mapped():
    import tokenexit.kernels

    assert tokenexit.kernels.__doc__
    body = ast.parse((ROOT / "kernels/__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0].value, ast.Constant)


# Each room imports from those below it only; those of the first two lines, from each other too.
ARROWS = [
    {"cli", "benchmarks"},  # and what is not named
    {"training", "calibrate", "evaluate", "flops", "promise", "temperature"},
    {"models"},
    {"loops"},
    {"prepacking"},
    {"layers"},
    {"costs"},
    {"int8", "schedule"},
    {"ops"},
    {"kernels", "_C", "reference"},
]
RANK = {room: rank for rank, rooms in enumerate(ARROWS) for room in rooms}
# What all rooms speak in. These import nothing of ours but each other.
SHARED = {"policy", "dial", "packing", "files", "conditions", "text"}
OUTSIDE = {"kernels": {"torch", "triton"}, "reference": {"torch"}}


def room_of(path):
    """The room that a file of ours belongs to; None for the package's own `__init__`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "tokenexit":
        return parts[0]
    return None if parts[1] == "__init__" else parts[1]


def imports_of(path):
    """Every module that the file imports anywhere, with its dots, names of ours in full."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    if package[0] == "kernels":
        package = ("tokenexit", *package)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "tokenexit":
                yield from (f"tokenexit.{alias.name}" for alias in node.names)
            else:
                yield module
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value


SOURCES = sorted(
    path
    for folder in ("tokenexit", "kernels", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    room = room_of(path)
    for module in imports_of(path):
        top, _, rest = module.partition(".")
        used = rest.partition(".")[0]
        assert top != "kernels", f"imports {module}; ours is tokenexit.kernels"
        assert top != "benchmarks" or room == "benchmarks", f"imports {module}"
        if top != "tokenexit":
            allowed = OUTSIDE.get(room, {top}) | sys.stdlib_module_names
            assert top in allowed, f"imports {module}; {room} may import {OUTSIDE[room]} only"
        elif room in SHARED:
            assert used in SHARED, f"imports {module}; {room} may import {SHARED} only"
        elif room not in (None, used) and used not in SHARED:
            ours, theirs = RANK.get(room, 0), RANK.get(used, 0)
            assert ours < theirs or ours == theirs < 2, f"imports {module}, against the arrows"


def test_no_circle_of_files():
    """No file of ours needs itself by way of others, imports within functions counted."""
    names = {}
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("tokenexit", *parts) if parts[0] == "kernels" else parts
        names[".".join(parts).removesuffix(".__init__")] = path
    needs = {name: {x for x in imports_of(path) if x in names} for name, path in names.items()}
    for name, path in names.items():  # `from package import file` needs the file
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in names:
                found = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
                needs[name] |= found
                if len(found) == len(node.names):  # and nothing of the package's own
                    needs[name] -= {node.module}
    graph = TopologicalSorter(needs)
    graph.prepare()  # raises CycleError, which tells the circle


PUBLIC = ["", ".policy", ".promise", ".reference", ".training.report", ".training.trainer"]


@pytest.mark.parametrize("module", PUBLIC)
def test_public_modules_name_what_is_theirs(module):
    """And tell of each."""
    found = importlib.import_module(f"tokenexit{module}")
    own = {
        name
        for name, value in vars(found).items()
        if getattr(value, "__module__", None) == found.__name__ and not name.startswith("_")
    }
    assert own <= {*found.__all__} and len(found.__all__) == len({*found.__all__})
    things = [getattr(found, name) for name in found.__all__]
    assert all(thing.__doc__ for thing in things if callable(thing))
