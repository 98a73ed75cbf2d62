# The container image that launch/tpu.sh and launch/gke.sh run. Build it in this folder, with or without Docker:
#   docker build --tag IMAGE . && docker push IMAGE
#   gcloud builds submit --tag IMAGE --project PROJECT
# The build argument EXTRA is an extra of pyproject.toml: tpu (the default), gpu for NVIDIA GPUs, or ray,gcs for nodes of
# a cluster that writes data.
FROM python:3.11-slim-bookworm
ARG EXTRA=tpu
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# gcsfuse mounts buckets on TPU VMs (launch/with_bucket.sh); on GKE the cluster mounts them. Its version is not
# pinned: the newest release is wanted.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl fuse3 \
    && curl --fail --silent --show-error --location --output /usr/share/keyrings/cloud.google.asc \
        https://packages.cloud.google.com/apt/doc/apt-key.gpg \
    && echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt gcsfuse-bookworm main" \
        >/etc/apt/sources.list.d/gcsfuse.list \
    && apt-get update \
    && apt-get install --yes --no-install-recommends gcsfuse \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /fastvlm_jax
# The pinned packages come first: they change rarely, so that a change of the code does not install them again.
COPY requirements.txt ./
RUN pip install --no-cache-dir --requirement requirements.txt
COPY . .
RUN pip install --no-cache-dir --constraint requirements.txt --editable ".[${EXTRA}]"

ENV PYTHONUNBUFFERED=1
CMD ["fastvlm", "--help"]
