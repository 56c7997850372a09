# vcdeft on NVIDIA GPUs: training, inference, evaluation.
#
#   docker build -t vcdeft .
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/work" \
#     vcdeft train --tasks all --zero 2 --output runs/demo
#
# BASE: a system with Python 3.11 or newer, and the CUDA compiler of TORCH's CUDA version, with
# which DeepSpeed builds what a run needs of it.
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE}
ARG TORCH=torch==2.13.0

# hadolint ignore=DL3008
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      g++ python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

ENV PATH=/opt/vcdeft/bin:$PATH \
    PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3013
RUN python3 -m venv /opt/vcdeft \
 && pip install "${TORCH}"

COPY . /usr/local/src/vcdeft
RUN DS_BUILD_OPS=0 pip install "/usr/local/src/vcdeft[quantised]"

# For any user: a name, and folders for the hub's models and for what is compiled.
ENV LOGNAME=vcdeft \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    TORCH_EXTENSIONS_DIR=/cache/extensions \
    TRITON_CACHE_DIR=/cache/triton \
    MPLCONFIGDIR=/cache/matplotlib
RUN mkdir -m 1777 /cache /work
WORKDIR /work
USER 65534
ENTRYPOINT ["vcdeft"]
CMD ["--help"]
