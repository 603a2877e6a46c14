#!/usr/bin/env bash
# Submit all stages to Slurm: an array of extraction jobs, then training, evaluation and publishing, each after the other.
# Run it on a login node, in a folder on a shared disk, with an environment active that contains tinyaudio.
#   ARRAY: extraction jobs (default 8), each with its own SHARD. PARTITION: passed to sbatch if set. GPUS: per job.
#   Other variables: README.md.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ARRAY=${ARRAY:-8}
export WORK=${WORK:-$PWD} RECIPE=${RECIPE:-demo} RUN=${RUN:-} REPO=${REPO:-} GPUS=${GPUS:-1} SCRIPT=$HERE/run_stages.sh
if [ -z "$RUN" ]; then RUN=$(basename "$RECIPE" .toml); fi
COMMON=(--parsable --export=ALL)
if [ -n "${PARTITION:-}" ]; then COMMON+=(--partition "$PARTITION"); fi

submit() { # stage, then further options of sbatch
    local stage=$1
    shift
    STAGES=$stage sbatch "${COMMON[@]}" --job-name "tinyaudio-$stage" "$@" "$HERE/slurm.sbatch"
}

previous= submitted=
follow() { # stage, then further options of sbatch: after the stage before it
    local options=(${previous:+--dependency "afterok:$previous"})
    previous=$(submit "$@" ${options[@]+"${options[@]}"})
    submitted+="$1 $previous, "
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
            # one more job makes what the array left unfinished, and seals the store
            previous=$(submit extract --dependency "afterany:$previous" --gres "gpu:$GPUS" --time 12:00:00)
            submitted+="seal $previous, "
            ;;
        train) follow train --gres "gpu:$GPUS" --time 24:00:00 ;;
        eval) follow eval --gres gpu:1 --time 6:00:00 ;;
        publish) follow publish --time 0:30:00 ;;
    esac
done
echo "${submitted%, }"
