# The server of `tinyaudio serve`. By default for CUDA, which PyPI's torch contains; for a smaller CPU image pass PyTorch's
# CPU index (pytorch.org/get-started): docker build --build-arg TORCH_INDEX=URL .
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

WORKDIR /app
COPY constraints.txt ./
# torch first and alone, so that a change of the code does not download it again.
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+-i "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE ./
COPY tinyaudio tinyaudio
COPY cache cache
COPY pipelines pipelines
RUN pip install --constraint constraints.txt '.[serve]'

RUN useradd --create-home --uid 1000 tinyaudio
USER tinyaudio
WORKDIR /home/tinyaudio
# A volume takes its owner from the folder it is mounted on.
RUN mkdir -p .cache/huggingface

# The model: a hub id, or a folder mounted into the container. The key: required, since the server listens on every address.
ENV TINYAUDIO_MODEL=
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["tinyaudio", "serve", "--host", "0.0.0.0", "--port", "8000"]
