# The server on a CPU. From the repository's root:
#   docker build -f deploy/cpu.Dockerfile -t ldm-deploy:cpu .
FROM python:3.13.9-slim-trixie AS build
# Extras of pyproject.toml; and packages of your own, such as ray[serve] for deploy/kuberay.yaml.
ARG EXTRAS=cpu,serve,otel
ARG PACKAGES=""
WORKDIR /source
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY ldm_runtime ldm_runtime
COPY ldm_export ldm_export
COPY ldm_serve ldm_serve
# hadolint ignore=SC2086
RUN python -m venv /opt/ldm && \
    /opt/ldm/bin/pip install --no-cache-dir --constraint constraints.txt ".[${EXTRAS}]" ${PACKAGES}

FROM python:3.13.9-slim-trixie
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
