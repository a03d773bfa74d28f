# Two images: `triton`, NVIDIA's server with what the model `recommend` imports, and `onerec`, every other process.
FROM nvcr.io/nvidia/tritonserver:24.12-py3 AS triton

# onnxruntime-gpu where the server has a GPU.
ARG ONNXRUNTIME=onnxruntime
RUN pip install --no-cache-dir --break-system-packages 'numpy>=1.26,<2' 'msgspec>=0.19' 'orjson>=3.10' \
    rocksdict==0.3.29 "${ONNXRUNTIME}>=1.24"
USER 10001:10001


FROM python:3.11-slim AS onerec

RUN useradd --uid 10001 --create-home onerec \
    # An anonymous volume takes its owner from here; `stream` has one.
    && mkdir -p /data/state && chown -R onerec:onerec /data
WORKDIR /src
# Dependencies (6.8 GB) in a layer of their own: a change of the sources does not install them again.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > /tmp/requirements.txt && pip install --no-cache-dir -r /tmp/requirements.txt
COPY README.md LICENSE ./
COPY onerec onerec
COPY streaming streaming
COPY trainer trainer
COPY exporter exporter
COPY simulator simulator
COPY serving_config serving_config
RUN pip install --no-cache-dir --no-deps .

USER 10001:10001
WORKDIR /data
ENTRYPOINT ["onerec"]
