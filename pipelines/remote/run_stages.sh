#!/usr/bin/env bash
# All stages on one machine: extract, train, eval, publish, in order. Run it again to resume.
# Variables: README.md.
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

# Slurm, spot machines and `docker stop` send TERM first: pass it on, so that training saves, and exit with 143.
on_term() { if [ -n "$CHILD" ]; then kill -TERM "$CHILD" 2>/dev/null || true; wait "$CHILD" || true; fi; exit 143; }
trap on_term TERM

run() {
    echo "+ $*" >&2
    if [ "$DRY_RUN" = 1 ]; then return; fi
    local status=0
    "$@" &
    CHILD=$!
    wait "$CHILD" || status=$?
    CHILD=
    return "$status"
}

# torchrun starts one process per GPU; one GPU does not need it. Without `--` it would take --run for its own --run-path.
tinyaudio_on_gpus() {
    if [ "$GPUS" -gt 1 ]; then
        run torchrun --standalone --nproc-per-node "$GPUS" -m -- tinyaudio "$@"
    else
        run tinyaudio "$@"
    fi
}

stage_extract() { tinyaudio_on_gpus extract --recipe "$RECIPE" --store "$STORE" --shard "$SHARD"; }

stage_train() {
    local resume=()
    if [ -f "$FOLDER/run.json" ]; then resume=(--resume); fi
    tinyaudio_on_gpus train --recipe "$RECIPE" --store "$STORE" --run "$FOLDER" ${resume[@]+"${resume[@]}"}
}

# eval exits with 1 if a clip has no answer, but writes its summary. Then the next stage still runs; the model card marks
# the number and leaves it out of the model-index.
evaluate() {
    local before status=0
    before=$(mktemp)
    run tinyaudio eval "$@" || status=$?
    if [ "$status" = 1 ] && [ -n "$(find "$FOLDER/eval" -name summary.json -newer "$before" 2>/dev/null)" ]; then
        echo "some clips have no answer (see the report); continuing" >&2
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
    run tinyaudio publish "$FOLDER" --repo "$REPO"
}

for stage in $STAGES; do
    case $stage in
        extract | train | eval | publish) "stage_$stage" ;;
        *) echo "no stage '$stage'; expected extract, train, eval or publish" >&2; exit 2 ;;
    esac
done
