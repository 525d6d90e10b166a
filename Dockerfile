# The image installs with infra/setup.sh, as `make setup` does, so that the two cannot drift.
#
#   docker build --tag spiketrain --build-arg COMMIT=$(git rev-parse --short=12 HEAD) .
#   sudo install -d -o 10001 /my/data /my/runs
#   docker run --volume /my/data:/opt/spiketrain/data spiketrain write fashion --out data/fashion
#   docker run --gpus all --shm-size 8g --volume /my/data:/opt/spiketrain/data --volume /my/runs:/opt/spiketrain/runs \
#       spiketrain launch recipes/fashion/sltt.py --workers 1
#
# It holds no secret and needs none to be built: an MLflow address or a token comes at run time (--env, --env-file).
# LOCKED=1 takes the releases of requirements.lock; LOCKED=0 the newest that pyproject.toml admits.

# torch's wheels bring CUDA's libraries along, and NVIDIA's container toolkit the driver's: an image of CUDA would add a second copy.
ARG BASE=ubuntu:24.04

FROM ${BASE} AS builder
ARG LOCKED=1
WORKDIR /opt/spiketrain
# Only what decides what is installed: an edit of the code leaves this layer as it is.
COPY pyproject.toml requirements.lock LICENSE ./
COPY infra/setup.sh infra/
RUN LOCKED=${LOCKED} infra/setup.sh

FROM ${BASE}
WORKDIR /opt/spiketrain
# The same path as in the first stage, because scripts of a virtual environment name their interpreter in full.
COPY --from=builder /opt/spiketrain/.venv .venv
COPY infra/setup.sh infra/
RUN infra/setup.sh --runtime \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home spiketrain \
    && mkdir data runs \
    && chown spiketrain:spiketrain data runs
COPY pyproject.toml LICENSE ./
COPY pipeline pipeline
COPY recipes recipes

# Runs name the commit that they are of, and .git stays outside.
ARG COMMIT=unknown
# A number, so that Kubernetes' runAsNonRoot can tell.
USER 10001
# What the toolkit is to bring in: CUDA for torch; NVML and nvidia-smi for Ray, doctor and joules.
ENV PATH=/opt/spiketrain/.venv/bin:${PATH} \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    SPIKETRAIN_COMMIT=${COMMIT} \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true
ENTRYPOINT ["spiketrain"]
CMD ["--help"]
