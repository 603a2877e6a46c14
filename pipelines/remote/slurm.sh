#!/usr/bin/env bash
# Submit the whole line to Slurm: an array that extracts, then training, evaluation and publishing, each after the last.
# Run it on a login node, in a folder on a shared disk, with tinyaudio installed in the environment that is active there.
#   ARRAY: extraction jobs (default 8). PARTITION: passed to sbatch if set. The rest: README.md beside this file.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ARRAY=${ARRAY:-8}
export WORK=${WORK:-$PWD} RECIPE=${RECIPE:-demo} RUN=${RUN:-} REPO=${REPO:-} LINE=$HERE/line.sh
if [ -z "$RUN" ]; then RUN=$(basename "$RECIPE" .toml); fi
COMMON=(--parsable --export=ALL)
if [ -n "${PARTITION:-}" ]; then COMMON+=(--partition "$PARTITION"); fi

submit() { # stage, then further options of sbatch
    local stage=$1
    shift
    STAGES=$stage sbatch "${COMMON[@]}" --job-name "tinyaudio-$stage" "$@" "$HERE/slurm.sbatch"
}

extract=$(submit extract --array "0-$((ARRAY - 1))" --gres gpu:1 --time 12:00:00)
# one more pass repairs what an array job left undone, and seals the store
seal=$(submit extract --dependency "afterany:$extract" --gres gpu:1 --time 12:00:00)
train=$(submit train --dependency "afterok:$seal" --gres gpu:1 --time 24:00:00)
eval=$(submit eval --dependency "afterok:$train" --gres gpu:1 --time 6:00:00)
publish=$(submit publish --dependency "afterok:$eval" --time 0:30:00)
echo "extract $extract, seal $seal, train $train, eval $eval, publish $publish"
