# docker build -t flora-live .                           and: docker run -p 7860:7860 flora-live
# docker build -t flora-live --build-arg TORCH=cuda .    and: docker run --gpus all -p 7860:7860 flora-live
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm

RUN useradd --create-home --uid 1000 user
WORKDIR /home/user/app
COPY packages.txt ./
RUN apt-get update \
    && xargs -a packages.txt apt-get install -y --no-install-recommends \
    && rm -rf /var/lib/apt/lists/*

# TORCH: cpu, or cuda, which is what PyPI's build for Linux brings.
ARG TORCH=cpu
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
# hadolint ignore=DL3013
RUN python -m venv "$VIRTUAL_ENV" && pip install --no-cache-dir uv && case "$TORCH" in \
      cpu) uv pip install --no-cache --torch-backend=cpu torch==2.13.0 ;; \
      cuda) uv pip install --no-cache torch==2.13.0 ;; \
      *) echo "TORCH is cpu or cuda, not $TORCH" >&2; exit 1 ;; \
    esac

COPY requirements.txt ./
RUN uv pip install --no-cache -r requirements.txt

COPY --chown=1000:1000 . ./
RUN chown 1000:1000 .

USER 1000
# Two arenas: with one for each thread, glibc keeps memory that was given back in all of them.
ENV HOME=/home/user HF_HOME=/home/user/.cache/huggingface PYTHONUNBUFFERED=1 MALLOC_ARENA_MAX=2
EXPOSE 7860
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/', timeout=4)"]
CMD ["python", "app.py", "--host", "0.0.0.0", "--port", "7860"]
