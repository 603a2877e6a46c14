#!/usr/bin/env bash
# The whole line on one machine: extract, train, eval, publish, in order. Start it again and it goes on where it stopped.
# Variables: see README.md beside this file.
set -euo pipefail

RECIPE=${RECIPE:-demo}
WORK=${WORK:-.}
RUN=${RUN:-$(basename "$RECIPE" .toml)}
REPO=${REPO:-}
STAGES=${STAGES:-extract train eval publish}
GPUS=${GPUS:-1}
SHARD=${SHARD:-0/1}
DRY_RUN=${DRY_RUN:-0}

STORE=$WORK/data/$(basename "$RECIPE" .toml)
FOLDER=$WORK/runs/$RUN
CHILD=

# Slurm, spot machines and `docker stop` send TERM first: hand it on, so that training saves, and say so in the exit code.
on_term() { if [ -n "$CHILD" ]; then kill -TERM "$CHILD" 2>/dev/null || true; wait "$CHILD" || true; fi; exit 143; }
trap on_term TERM

say() {
    echo "+ $*" >&2
    if [ "$DRY_RUN" = 1 ]; then return; fi
    local status=0
    "$@" &
    CHILD=$!
    wait "$CHILD" || status=$?
    CHILD=
    return "$status"
}

# torchrun gives every GPU a process; with one GPU it would only be in the way. Without `--` it takes --run for its own
# --run-path, and refuses.
tinyaudio_on_gpus() {
    if [ "$GPUS" -gt 1 ]; then
        say torchrun --standalone --nproc-per-node "$GPUS" -m -- tinyaudio "$@"
    else
        say tinyaudio "$@"
    fi
}

stage_extract() { tinyaudio_on_gpus extract --recipe "$RECIPE" --store "$STORE" --shard "$SHARD"; }

stage_train() {
    local resume=()
    if [ -f "$FOLDER/run.json" ]; then resume=(--resume); fi
    tinyaudio_on_gpus train --recipe "$RECIPE" --store "$STORE" --run "$FOLDER" ${resume[@]+"${resume[@]}"}
}

# eval exits 1 if a clip has no answer, with its summary written all the same: the line goes on, and the card marks that
# number and keeps it out of the model-index.
evaluate() {
    local before status=0
    before=$(mktemp)
    say tinyaudio eval "$@" || status=$?
    if [ "$status" = 1 ] && [ -n "$(find "$FOLDER/eval" -name summary.json -newer "$before" 2>/dev/null)" ]; then
        echo "some clips have no answer; going on, see the report" >&2
        status=0
    fi
    rm -f "$before"
    return "$status"
}

stage_eval() {
    evaluate "$FOLDER"
    evaluate "$FOLDER" --provider ctc
}

stage_publish() {
    if [ -z "$REPO" ]; then
        echo "REPO is not set: nothing is published" >&2
        return
    fi
    say tinyaudio publish "$FOLDER" --repo "$REPO"
}

for stage in $STAGES; do
    case $stage in
        extract | train | eval | publish) "stage_$stage" ;;
        *) echo "no stage '$stage'; expected extract, train, eval or publish" >&2; exit 2 ;;
    esac
done
