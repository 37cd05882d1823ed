"""What pyproject.toml cannot say: the head's CUDA kernels are compiled where nvcc is found."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithKernels(build_py):
    """Also compiles the head's CUDA kernels, where nvcc is; without them, or should that fail, plain torch serves."""

    def run(self) -> None:
        super().run()
        if shutil.which("nvcc"):
            root = ROOT if self.editable_mode else Path(self.build_lib)
            output = root / "real_megatron/head/lib"
            output.mkdir(exist_ok=True)
            build = ROOT / "real_megatron/head/build.py"
            subprocess.run([sys.executable, build, "--optional", "--output", output, "cuda"], check=False)
            for lock in output.glob("*.lock"):  # of the build's own exclusion; not part of the package
                lock.unlink()


class MaybeBinaryDistribution(Distribution):
    """Its wheel is for this platform when it holds compiled kernels."""

    def has_ext_modules(self) -> bool:
        return shutil.which("nvcc") is not None


setup(cmdclass={"build_py": BuildWithKernels}, distclass=MaybeBinaryDistribution)
