"""Package metadata of megatron-slm."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "megatron_slm" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

# Plots, reports, token dynamics as tables.
ANALYSIS = ["matplotlib", "pyarrow"]
# Fast tokenizers, compressed and columnar inputs, near-duplicates.
DATA = ["gigatoken", "kitoken", "mistral-common", "pyarrow", "rensa", "zstandard"]
DATATROVE = ["datatrove>=0.10"]

setup(
    name="megatron-slm",
    version=VERSION,
    description="Selective Language Modeling (Rho-1) for Megatron",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12,<3.14",
    packages=find_packages(include=["megatron_slm", "megatron_slm.*"]),
    package_data={"megatron_slm.analysis.report": ["*.css", "*.html", "*.js"]},
    install_requires=[
        "megatron-core[training]>=0.19.2,<0.20",
        "torch>=2.11.0a0,<2.16",  # a0: NVIDIA's containers have builds of before the release
        "sentencepiece",
        "safetensors",
        "numpy",
        "msgspec",
        "tensorboard",
        "orjson",
        "pyyaml",
        "jinja2",
        "tqdm",
    ],
    extras_require={
        "data": DATA,
        "datatrove": DATATROVE,
        "analysis": ANALYSIS,
        "dev": [
            "datasets",
            "hypothesis",
            "lm_eval[hf]>=0.4.13,<0.5",
            "mypy",
            "playwright",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            *ANALYSIS,
            *DATA,
            *DATATROVE,
        ],
        "gguf": ["gguf>=0.17", "transformers"],  # dequantizes a GGUF file
        "evaluation": ["lm_eval[hf,math]>=0.4.13,<0.5"],
        "sft": ["datasets"],  # Megatron's SFT dataset reads with it
        # einops: for groups in two levels (--num-distributed-optimizer-instances).
        "cuda": ["einops", "transformer-engine[pytorch]"],
    },
)
