# The server's image. BASE_IMAGE is any Debian-based image with Python 3.11 or 3.12 and its venv module.
ARG BASE_IMAGE=python:3.12-slim-bookworm

# What the server needs, in a layer that changes with its versions and not with the code.
FROM ${BASE_IMAGE} AS dependencies
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY fsa_core/__init__.py fsa_core/
COPY service/__init__.py service/
RUN python3 -m venv /opt/fsa \
    && /opt/fsa/bin/pip install --no-cache-dir -c constraints.txt '.[server]' \
    && /opt/fsa/bin/pip uninstall --yes fsa-serve

FROM dependencies AS wheel
COPY fsa_core fsa_core
COPY service service
RUN /opt/fsa/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="FSA Serve" \
      org.opencontainers.image.description="Sparse attention as a service: Flash Sparse Attention kernels behind a gRPC API" \
      org.opencontainers.image.licenses="Apache-2.0"

# Triton compiles a C stub against Python's headers for every kernel: official images bring the headers,
# Debian's own Python has them in a package.
RUN headers="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
    && if [ -e "$headers/Python.h" ]; then set --; else set -- python3-dev; fi \
    && apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev "$@" \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --system --gid 10001 fsa \
    && useradd --system --uid 10001 --gid fsa --home-dir /nonexistent --shell /usr/sbin/nologin fsa \
    && install --directory --owner fsa --group fsa /var/cache/fsa

COPY --from=dependencies /opt/fsa /opt/fsa
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    /opt/fsa/bin/pip install --no-cache-dir --no-deps --no-index /wheel/*.whl
COPY deploy/healthcheck.py /opt/fsa/healthcheck.py

# The container's own network is the fence here, so the ports listen on every address of it.
# The user has no home: what `fsa tune` finds is kept in the volume.
# The NVIDIA_ variables ask the NVIDIA runtime for the driver; without a GPU they do nothing.
ENV PATH=/opt/fsa/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    FSA_HOST=0.0.0.0 \
    TRITON_CACHE_DIR=/var/cache/fsa/triton \
    XDG_CONFIG_HOME=/var/cache/fsa \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

USER 10001:10001
WORKDIR /var/cache/fsa
VOLUME /var/cache/fsa
EXPOSE 50051 9464
STOPSIGNAL SIGTERM
# The first start on a GPU compiles the kernels; later ones find them in the volume.
HEALTHCHECK --interval=10s --timeout=10s --start-period=180s --retries=3 \
    CMD ["python", "/opt/fsa/healthcheck.py"]
ENTRYPOINT ["fsa"]
CMD ["serve"]
