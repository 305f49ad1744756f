#   docker build -t softmask .
#   docker run --gpus all --shm-size 8g -v softmask:/app/out softmask
# --gpus all (NVIDIA Container Toolkit on the host) is all a GPU needs: the pinned wheels bring CUDA. Without it the
# CPU is used. Loader workers pass batches through /dev/shm, whose default of 64 MB is too small for real data.
ARG BASE=python:3.12-slim
FROM ${BASE}

# A plain Debian base has no Python, or one without venv.
RUN python3 -c "import ensurepip, venv" || { \
        apt-get update \
        && apt-get install -y --no-install-recommends python3 python3-venv \
        && rm -rf /var/lib/apt/lists/*; }

# The packages come before the code: a change of code then leaves their layer, by far the largest, in the cache.
COPY requirements.txt /tmp/
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -r /tmp/requirements.txt
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

# The user owns /app/data (rendered scenes) and /app/out, so that a new volume mounted there is writable too.
RUN useradd --uid 1000 --create-home softmask \
    && mkdir -p /app/data /app/out \
    && chown -R softmask: /app
WORKDIR /app
COPY softmask.py data.py train.py eval.py config.yaml README.md LICENSE requirements.txt pyproject.toml ./
COPY tests tests
USER softmask
# The quick start, then its figures against those recorded in tests/quick_start.json. The first process of a container gets
# what `docker stop` sends: the shell hands it on and waits for the checkpoint, with which the next start goes on.
CMD ["sh", "-c", "trap 'kill -TERM $run; wait $run' TERM INT; python train.py & run=$!; wait $run && python eval.py check out/scenes/pretrain"]
