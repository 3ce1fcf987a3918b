"""Package metadata of megatron-slm."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "megatron_slm" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="megatron-slm",
    version=VERSION,
    description="Selective Language Modeling (Rho-1) for Megatron",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.12,<3.14",
    packages=find_packages(include=["megatron_slm", "megatron_slm.*"]),
    install_requires=[
        "megatron-core[training]>=0.19.2,<0.20",
        "torch",
        "sentencepiece",
        "safetensors",
        "numpy",
        "tensorboard",
    ],
    extras_require={
        "dev": ["hypothesis", "lm_eval[hf]>=0.4.13,<0.5", "mypy", "pytest", "ruff"],
        "evaluation": ["lm_eval[hf,math]>=0.4.13,<0.5"],
        "cuda": ["transformer-engine[pytorch]", "liger-kernel"],
    },
)
