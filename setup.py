"""Package definition. Version ranges are stated here; requirements.txt pins what the tests ran with."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "real_megatron/__init__.py").read_text()).group(1)


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


setup(
    name="real-megatron",
    version=VERSION,
    description="Regression-aware reinforcement learning (REAL) of LLM judges on Megatron-Core",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["real_megatron", "real_megatron.*"]),
    include_package_data=True,
    package_data={"real_megatron": ["**/*.txt", "**/*.jinja", "**/*.yaml", "**/*.cpp", "**/*.cu", "**/*.h", "**/*.so"]},
    install_requires=[
        "torch>=2.13,<2.15",
        "megatron-core==0.16.1",  # the output head and attention hook into its GPTModel
        "transformers>=5.12,<6",
        "tokenizers>=0.22,<0.24",
        "safetensors>=0.5",
        "datasets>=4,<6",
        "numpy>=2,<3",
        "scipy>=1.13,<2",
        "pydantic>=2.10,<3",
        "PyYAML>=6,<7",
        "typer>=0.15,<1",
        "rich>=13.8",
        "tqdm>=4.66,<5",
        "aiohttp>=3.10,<4",
        "psutil>=5.9",
        "tensorboard>=2.18,<3",
        "matplotlib>=3.9,<4",
    ],
    extras_require={
        "sglang": ["sglang>=0.5.21"],
        "vllm": ["vllm"],
        "wandb": ["wandb>=0.19"],
        "te": ["transformer-engine[pytorch]>=2.0"],
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff==0.17.6"],
    },
    cmdclass={"build_py": BuildWithKernels},
    distclass=MaybeBinaryDistribution,
    entry_points={"console_scripts": ["real-megatron = real_megatron.cli:main"]},
)
