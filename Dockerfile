# An image that trains, on CPUs or on NVIDIA GPUs: make docker-image CUDA=13.0
#   CUDA     cpu, or the CUDA that torch is built for, as 13.0 or 12.6
#   TORCH    version of torch; default: the one in constraints.txt
#   PYTHON   version of Python
#   EXTRAS   of `pip install "toolkit[EXTRAS]"`
# The wheels of torch bring CUDA's libraries, so the base is the same; the driver is the host's.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-trixie

ARG CUDA=cpu
ARG TORCH=
ARG EXTRAS=all

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    NVIDIA_VISIBLE_DEVICES=all

# g++ is for compile_model, git for code that `toolkit launch --git` fetches. tini passes signals on
# and collects workers whose parents have ended.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/toolkit
COPY constraints.txt ./
RUN if [ -n "$TORCH" ]; then sed -i "s/^torch==.*/torch==$TORCH/" constraints.txt; fi \
    && build=$(echo "$CUDA" | sed 's/^[0-9]/cu&/; s/[.]//') \
    && pip install -c constraints.txt "$(grep '^torch==' constraints.txt)+$build" \
        --extra-index-url "https://download.pytorch.org/whl/$build"

# What toolkit needs comes before its source: a changed source installs nothing else again.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir toolkit && touch toolkit/__init__.py \
    && pip install -c constraints.txt ".[$EXTRAS]" \
    && pip uninstall --yes toolkit \
    && rm -rf build toolkit toolkit.egg-info

COPY toolkit toolkit
RUN pip install --no-deps . && rm -rf build toolkit toolkit.egg-info

# Any user may run the image (docker run --user), so anybody may write there.
RUN useradd --create-home --uid 1000 toolkit \
    && mkdir -p /work/data /work/runs \
    && chmod 1777 /home/toolkit /work /work/data /work/runs
ENV HOME=/home/toolkit USER=toolkit
USER 1000
WORKDIR /work
VOLUME ["/work/data", "/work/runs"]

# On the CPU: a run may have filled the GPUs. `docker run --gpus all IMAGE toolkit doctor` tries them.
HEALTHCHECK --interval=10m --timeout=2m --start-period=2m --retries=2 \
    CMD ACCELERATE_USE_CPU=true toolkit doctor

ENTRYPOINT ["tini", "--"]
CMD ["toolkit", "--help"]
