"""Package metadata. Tool settings live in pyproject.toml, known-good versions in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

# `kernels/` and `recipes/` stand at the top of the repository and are imported as parts of the package.
PACKAGE_DIRS = {"umedtrain": "umedtrain", "umedtrain.kernels": "kernels", "umedtrain.recipes": "recipes"}

EXTRAS = {
    "flash": ["flash-attn>=2.6"],
    "hf": ["tokenizers>=0.21"],
    "gguf": ["gguf>=0.17", "tokenizers>=0.21"],
    "data": ["pyarrow>=16", "huggingface_hub>=0.25"],
    "eval": ["scipy>=1.12"],
    "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus_client>=0.20"],
    "track": ["tensorboard>=2.16"],
    "report": ["matplotlib>=3.8"],
}
EXTRAS["demo"] = [*EXTRAS["hf"], *EXTRAS["eval"], "simple-icd-10-cm==1.5.0"]
EXTRAS["test"] = [
    *EXTRAS["demo"],
    *EXTRAS["gguf"],
    "pyarrow>=16",
    *EXTRAS["serve"],
    *EXTRAS["track"],
    "openai>=2",
    "lm-eval[api]>=0.4.9",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.6",
    "transformers>=5.0",
    "trl>=1.16",
    "fairscale==0.4.13",
    "jinja2>=3.1",
]
EXTRAS["dev"] = EXTRAS["test"]

setup(
    name="umedtrain",
    version="0.1.0",
    description="Post-training for Llama-3: supervised fine-tuning, reward models, preference learning, sampling",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    package_dir=PACKAGE_DIRS,
    packages=[
        *find_packages(include=["umedtrain", "umedtrain.*"]),
        "umedtrain.kernels",
        "umedtrain.kernels.cpu",
        "umedtrain.kernels.offline",
        "umedtrain.kernels.offline.cases",
        "umedtrain.recipes",
    ],
    package_data={
        "umedtrain.kernels": ["*.toml"],
        "umedtrain.kernels.cpu": ["*.cpp", "*.h"],
        "umedtrain.recipes": ["configs/*.toml", "configs/*/*.toml"],
    },
    install_requires=[
        "torch>=2.6",
        "triton>=3.2; platform_system == 'Linux'",
        "numpy>=1.26",
        "safetensors>=0.4",
        "tiktoken>=0.7",
        "sentencepiece>=0.2",
        "msgspec>=0.18",
        "tomli-w>=1.0",
        "tqdm>=4.66",
        "tyro>=0.9",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["umedtrain=umedtrain.cli:main"]},
)
