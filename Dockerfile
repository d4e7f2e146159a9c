# CPU:  docker build -t cfrl .
# CUDA: docker build -t cfrl --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 --build-arg TORCH= .
# Use:  docker run --rm -v "$PWD:/work" cfrl finetune --reward dielectric_bandgap
ARG BASE=ubuntu:24.04
FROM ${BASE}
ARG TORCH="--extra-index-url https://download.pytorch.org/whl/cpu"
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/cfrl PATH=/opt/cfrl/bin:$PATH
RUN python3 -m venv "$VIRTUAL_ENV"
COPY . /src
RUN pip install --no-cache-dir ${TORCH} /src
WORKDIR /work
ENTRYPOINT ["cfrl"]
