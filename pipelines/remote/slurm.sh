#!/usr/bin/env bash
# Submit the whole line to Slurm: an array that extracts, then training, evaluation and publishing, each after the last.
# Run it on a login node, in a folder on a shared disk, with tinyaudio installed in the environment that is active there.
#   ARRAY: extraction jobs (default 8), each with its own SHARD. PARTITION: passed to sbatch if set. GPUS: for each job.
#   The rest: README.md beside this file.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ARRAY=${ARRAY:-8}
export WORK=${WORK:-$PWD} RECIPE=${RECIPE:-demo} RUN=${RUN:-} REPO=${REPO:-} GPUS=${GPUS:-1} LINE=$HERE/line.sh
if [ -z "$RUN" ]; then RUN=$(basename "$RECIPE" .toml); fi
COMMON=(--parsable --export=ALL)
if [ -n "${PARTITION:-}" ]; then COMMON+=(--partition "$PARTITION"); fi

submit() { # stage, then further options of sbatch
    local stage=$1
    shift
    STAGES=$stage sbatch "${COMMON[@]}" --job-name "tinyaudio-$stage" "$@" "$HERE/slurm.sbatch"
}

previous= said=
follow() { # stage, then further options of sbatch: after the stage before it
    local options=(${previous:+--dependency "afterok:$previous"})
    previous=$(submit "$@" ${options[@]+"${options[@]}"})
    said+="$1 $previous, "
}

STAGES=${STAGES:-extract train eval publish}
for stage in $STAGES; do
    case $stage in
        extract | train | eval | publish) ;;
        *) echo "no stage '$stage'; expected extract, train, eval or publish" >&2; exit 2 ;;
    esac
done

for stage in $STAGES; do
    case $stage in
        extract)
            follow extract --array "0-$((ARRAY - 1))" --gres "gpu:$GPUS" --time 12:00:00
            # one more pass repairs what an array job left undone, and seals the store
            previous=$(submit extract --dependency "afterany:$previous" --gres "gpu:$GPUS" --time 12:00:00)
            said+="seal $previous, "
            ;;
        train) follow train --gres "gpu:$GPUS" --time 24:00:00 ;;
        eval) follow eval --gres gpu:1 --time 6:00:00 ;;
        publish) follow publish --time 0:30:00 ;;
    esac
done
echo "${said%, }"
