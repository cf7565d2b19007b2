# The server in a container. PyTorch for CPUs, or for CUDA:
#   docker build -t blip-fast .
#   docker build -t blip-fast:cuda --build-arg TORCH_BACKEND=cu130 .
# docs/serving.md and compose.yaml say how it is used.
FROM python:3.11-slim AS build
# What uv installs of PyTorch: cpu, cu130, … (uv help pip install, --torch-backend).
ARG TORCH_BACKEND=cpu
WORKDIR /source
RUN python -m venv /opt/blip-fast && pip install --no-cache-dir "uv>=0.13"
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY blip_fast blip_fast
COPY train train
COPY benchmarks benchmarks
RUN uv pip install --no-cache --python /opt/blip-fast/bin/python --torch-backend "$TORCH_BACKEND" ".[serve]"

FROM python:3.11-slim
# Triton compiles a small launcher in C when a kernel first runs on a GPU.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 blip && mkdir -p /models/hub && chown -R blip /models
COPY --from=build /opt/blip-fast /opt/blip-fast
ENV PATH=/opt/blip-fast/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/models/hub TRITON_CACHE_DIR=/models/triton
USER blip
VOLUME /models
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
# Within the container it listens to all; who reaches it is decided by what is published, and by the key.
ENTRYPOINT ["blip-fast", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--model", "Salesforce/blip-image-captioning-base"]
