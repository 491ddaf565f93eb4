"""Builds tokenexit/_C, the compiled ops; pyproject.toml holds the rest.

TOKENEXIT_BUILD_EXT=0 skips them; =1 makes it an error if they cannot be built. Otherwise what
can be built is built, and the install succeeds.
"""

import os
import shutil
from glob import glob

from setuptools import find_packages, setup

MODE = os.environ.get("TOKENEXIT_BUILD_EXT", "auto")


def say(message):
    print(f"tokenexit: {message}", flush=True)


def skipped(reason):
    say(f"compiled ops were not built ({reason}); the pure-PyTorch path works, only slower")


def compiled_ops():
    """The arguments of setup() that build the extension; none where there is no way to."""
    if MODE == "0":
        skipped("TOKENEXIT_BUILD_EXT=0")
        return {}
    try:
        import torch
        from torch.utils import cpp_extension as build
    except ImportError as error:
        if MODE == "1":
            raise
        skipped(f"torch could not be imported: {error}")
        return {}

    # By the toolkit, not by a GPU: machines that build packages have none.
    toolkit = build.CUDA_HOME and shutil.which("nvcc", path=os.path.join(build.CUDA_HOME, "bin"))
    cuda = bool(toolkit and torch.version.cuda)
    if cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # else that of the GPU here
    flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # runs on any torch >= 2.10
    if "-O" not in os.environ.get("CFLAGS", ""):  # as `make asan` asks for less
        flags.append("-O3")
    extension = (build.CUDAExtension if cuda else build.CppExtension)(
        "tokenexit._C",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp") + cuda * glob("csrc/cuda/*.cu")),
        depends=glob("csrc/**/*.h", recursive=True) + glob("csrc/cuda/*.cuh"),
        extra_compile_args={
            "cxx": [*flags, "-g0", "-Wno-psabi", "-fvisibility=hidden"],
            "nvcc": [*flags, "-DUSE_CUDA"],
        },
        py_limited_api=True,
    )

    class BuildWhatCanBeBuilt(build.BuildExtension):
        def build_extensions(self):
            with_cuda = any(name.endswith(".cu") for name in extension.sources)
            say(f"building compiled ops for {'CPU and CUDA' if with_cuda else 'CPU'}")
            try:
                super().build_extensions()
            except Exception as error:
                if MODE == "1":
                    raise
                if with_cuda:
                    say(f"CUDA ops were not built ({error})")
                    extension.sources = [s for s in extension.sources if not s.endswith(".cu")]
                    extension.libraries = [s for s in extension.libraries if "cuda" not in s]
                    self.build_extensions()
                    return
                compiler = build.get_cxx_compiler()
                found = shutil.which(compiler.split()[0])
                skipped(error if found else f"no C++ compiler: {compiler} was not found")
                extension.optional = True  # nothing to copy to the source tree

    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildWhatCanBeBuilt},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


# kernels/ stands beside the package; see "The house" in docs for why its folder is not inside.
setup(
    packages=[*find_packages(include=["tokenexit*"]), "tokenexit.kernels"],
    package_dir={"tokenexit.kernels": "kernels"},
    **compiled_ops(),
)
