#!/bin/sh
# Fill wheels/ with what a GPU machine without network lacks: sh scripts/gpu_wheels.sh [3.12]
#
# The argument is that machine's Python version, 3.12 if none is given; it need not be this one's.
# Expected there: torch 2.11 or newer and what usually comes with it (jinja2, numpy, scipy, matplotlib,
# pillow, opencv, pandas, pyarrow, protobuf, regex, requests, sentencepiece, tensorboard, ninja).
# Copy the folder, about 30 MB, then run there:
#
#     python3 -m pip install --no-deps --no-index --upgrade wheels/*.whl
#     python3 -m pip install --no-deps --no-index --no-build-isolation -e .
#
# Versions are those of pyproject.toml. The folder is git-ignored. PYTHON: this machine's Python,
# with pip and, for DeepSpeed, which is built from source, setuptools and torch.
set -eu
version=${1:-3.12}
python=${PYTHON:-.venv/bin/python}
mkdir -p wheels

# huggingface-hub 2 needs httpx2, which is rarely there; 1.33 needs httpx.
# Compiled packages: the wheel for the other machine's Python.
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" \
    --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux_2_12_x86_64 \
    --platform manylinux1_x86_64 -d wheels \
    'diffusers>=0.42.1,<0.43' 'transformers>=5.23,<6' 'accelerate>=1.15,<2' \
    'peft>=0.21.2,<0.22' 'datasets>=5.2,<6' 'huggingface-hub==1.33.*' 'einops>=0.8.2' \
    'click>=8.2,<9' 'tomli-w>=1.1' 'tqdm>=4.66' 'psutil>=6' \
    'pydantic==2.14.4' 'pydantic-core==2.50.5' 'annotated-types' 'typing-inspection' \
    'typing-extensions' 'tokenizers>=0.22' 'safetensors>=0.5' 'hjson' 'dill<0.4.2' \
    'multiprocess<0.70.20' 'xxhash' 'msgpack' 'py-cpuinfo' \
    'hatchling>=1.27' 'editables' 'trove-classifiers' 'pathspec' 'pluggy' 'packaging'

# DeepSpeed is published as source. Without its compiled operations the wheel is pure Python.
DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation -w wheels \
    'deepspeed>=0.19.8,<0.20'

du -sh wheels
