# The server on NVIDIA GPUs, with TensorRT and ONNX Runtime's CUDA provider. From the repository's root:
#   docker build -f deploy/cuda.Dockerfile -t ldm-deploy:cuda .
FROM ubuntu:24.04 AS build
# Extras of pyproject.toml; without TensorRT, whose wheels come from NVIDIA and take gigabytes,
# EXTRAS=cuda,serve,otel.
ARG EXTRAS=cuda,tensorrt,serve,otel
ARG PACKAGES=""
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3.12-venv && \
    rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY ldm_runtime ldm_runtime
COPY ldm_export ldm_export
COPY ldm_serve ldm_serve
# hadolint ignore=SC2086
RUN python3.12 -m venv /opt/ldm && \
    /opt/ldm/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" ${PACKAGES}

# CUDA 13 and cuDNN 9, which onnxruntime-gpu loads; the driver is the host's.
FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends python3.12 && \
    rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/ldm /opt/ldm
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin ldm
ENV PATH=/opt/ldm/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /home/ldm
EXPOSE 8188
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8188/livez', timeout=4)"]
# The bundle is mounted, read-only, and LDM_SERVE_KEYS has the keys; without any, the server says so and ends.
ENTRYPOINT ["ldm"]
CMD ["serve", "engines=/bundle", "--host", "0.0.0.0", "--port", "8188"]
