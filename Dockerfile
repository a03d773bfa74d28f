# The image of `onerec`: stream, trainer, publisher. Triton itself runs in NVIDIA's image, see docker-compose.yml.
FROM python:3.11-slim

RUN useradd --uid 10001 --create-home onerec \
    && mkdir /data && chown onerec:onerec /data
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY onerec onerec
COPY streaming streaming
COPY trainer trainer
COPY exporter exporter
COPY simulator simulator
COPY serving_config serving_config
RUN pip install --no-cache-dir .

USER 10001:10001
WORKDIR /data
ENTRYPOINT ["onerec"]
