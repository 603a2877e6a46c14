#!/usr/bin/env bash
# All stages as one Hugging Face Job. Store and runs are in a bucket: if a job runs out of time, submit it again to
# resume (after a failure, --attempts does so automatically).
#   BUCKET: owner/name of the bucket (create it with `hf buckets create`). SOURCE: what pip installs.
#   FLAVOR: a100-large by default, with GPUS GPUs. TIMEOUT: 24h by default. DRY_RUN=1 prints what would be submitted.
#   Other variables: README.md.
set -euo pipefail

BUCKET=${BUCKET:?set BUCKET to owner/name of a storage bucket}
SOURCE=${SOURCE:?set SOURCE to what pip installs: a wheel, or git+https://...}
REPO=${REPO:-}
RECIPE=${RECIPE:-loquacious-small}
RUN=${RUN:-$(basename "$RECIPE" .toml)}

OPTIONS=(--flavor "${FLAVOR:-a100-large}" --timeout "${TIMEOUT:-24h}" --attempts 3 --name "tinyaudio-$RUN")
OPTIONS+=(--volume "hf://buckets/$BUCKET:/work" --secrets HF_TOKEN)
OPTIONS+=(--env "RECIPE=$RECIPE" --env "RUN=$RUN" --env "REPO=$REPO" --env "SOURCE=$SOURCE" --env WORK=/work)
OPTIONS+=(--env "GPUS=${GPUS:-1}" --env "STAGES=${STAGES:-extract train eval publish}" --env "SHARD=${SHARD:-0/1}")
if [ "${DRY_RUN:-0}" = 1 ]; then OPTIONS+=(--dry-run); else OPTIONS+=(--detach); fi

exec hf jobs run "${OPTIONS[@]}" python:3.12 bash -c '
    pip install --quiet "$SOURCE" &&
    bash "$(python -c "import pipelines; print(pipelines.__path__[0])")/remote/run_stages.sh"'
