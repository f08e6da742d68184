#!/bin/bash
# Trains on all hosts of a TPU slice. Set NAME, ZONE, TYPE and BUCKET first; run
# the last command again after an interruption.
set -euo pipefail

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="$1"
}

gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" \
  --accelerator-type="$TYPE" --version=tpu-ubuntu2204-base
on_all_hosts 'python3 -m venv .venv && .venv/bin/pip install "jaxsparse[train,tpu]"'
on_all_hosts ".venv/bin/jaxsparse train --config=ultramem:151m \
  --config.data.tfds=lm1b --workdir=gs://$BUCKET/ultramem_151m --distributed"
