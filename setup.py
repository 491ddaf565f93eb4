"""Builds tokenexit/_C and _C_cuda, the compiled ops; pyproject.toml holds the rest.

TOKENEXIT_BUILD_EXT=0 skips them; =1 makes it an error if they cannot be built, but for CUDA without
nvcc. Otherwise what can be built is built, and the install succeeds.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from glob import glob

from setuptools import find_packages, setup

CUDA = sorted(glob("csrc/cuda/*.cu"))
PASSED_OVER = () if os.environ.get("TOKENEXIT_BUILD_EXT") == "1" else Exception


def missing(what, why):
    message = f"tokenexit: {what} were not built ({why}); pure PyTorch does their work, only slower"
    print(message, flush=True)  # which pip keeps to itself, but not what goes to the terminal
    with contextlib.suppress(OSError), open("/dev/tty", "w") as terminal:
        print(f"\n{message}", file=terminal)


def toolkit():
    """The CUDA toolkit's folder or None. nvcc tells it, for the one on PATH may be a wrapper."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    packaged = [nvcc for folder in sys.path for nvcc in glob(f"{folder}/nvidia/cu*/bin/nvcc")]
    places = [f"{home}/bin/nvcc"] if home else ["nvcc", *packaged, "/usr/local/cuda/bin/nvcc"]
    for nvcc in filter(shutil.which, places):
        told = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True).stderr
        if found := re.search(rb"^#\$ TOP=(.+)", told, re.MULTILINE):
            return os.path.realpath(os.fsdecode(found[1].strip()))


def compiled_ops():
    """The arguments of setup() that build the extension; none where there is no way to."""
    try:
        if os.environ.get("TOKENEXIT_BUILD_EXT") == "0":
            raise ImportError("TOKENEXIT_BUILD_EXT=0")
        import torch

        home = toolkit() if torch.version.cuda else None  # no GPU is needed to build for one
        os.environ.update({"CUDA_HOME": home} if home else {})  # read as the next line imports
        from torch.utils import cpp_extension as build
    except PASSED_OVER as error:
        return missing("compiled ops", error) or {}

    if home and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # else that of the GPU here
    flags = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # runs on torch >= 2.10
    flags += [] if "-O" in os.environ.get("CFLAGS", "") else ["-O3"]  # `make asan` asks for less
    common = {"depends": glob("csrc/**/*.*h", recursive=True), "py_limited_api": True}
    args = {"cxx": [*flags, "-g0", "-Wno-psabi", "-fvisibility=hidden"]}
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp"))
    extensions = [build.CppExtension("tokenexit._C", sources, extra_compile_args=args, **common)]
    if home:  # in a library of its own, for a torch without CUDA could not load it
        common |= {"extra_compile_args": {"nvcc": [*flags, "-DUSE_CUDA"]}}
        extensions += [cuda := build.CUDAExtension("tokenexit._C_cuda", CUDA, **common)]
        cuda.libraries.remove("cudart")  # by its path, as pip's packages name it by version only
        cuda.extra_objects = glob(f"{home}/lib*/libcudart.so*")[:1]

    class BuildWhatCanBeBuilt(build.BuildExtension):
        def build_extensions(self):
            for extension in extensions:
                self.extensions = [extension]
                kind = "CUDA" if extension.name.endswith("cuda") else "CPU"
                print(f"tokenexit: building compiled ops for {kind}")
                try:
                    super().build_extensions()
                except PASSED_OVER as error:
                    cxx = build.get_cxx_compiler().split()[0]
                    why = error if shutil.which(cxx) else f"no C++ compiler: {cxx} is missing"
                    missing(f"compiled ops for {kind}", why)
                    extension.optional = True  # nothing to copy to the source tree
            self.extensions = extensions
            if not home and (torch.version.cuda or glob("/dev/nvidia[0-9]*")):
                why = "nvcc was not found" if torch.version.cuda else "torch is built without CUDA"
                missing("compiled ops for CUDA", why)

    return dict(ext_modules=extensions, cmdclass={"build_ext": BuildWhatCanBeBuilt})


# kernels/ stands beside the package; see CONTRIBUTING.md for why its folder is not inside.
packages = [*find_packages(include=["tokenexit*"]), "tokenexit.kernels"]
places, options = {"tokenexit.kernels": "kernels"}, {"bdist_wheel": {"py_limited_api": "cp310"}}
setup(packages=packages, package_dir=places, options=options, **compiled_ops())
