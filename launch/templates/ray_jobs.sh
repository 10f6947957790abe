#!/usr/bin/env bash
# Runs an offline stage as a Ray job. To use a running cluster, set RAY_ADDRESS to its job server, and the token variables that its
# owner gave you. Without RAY_ADDRESS, a cluster is started on this machine and stopped at the end.
#
#   ray_jobs.sh entities  SET/train
#   ray_jobs.sh attention SET/train CHECKPOINT
#
# WORKERS: processes at once, 2 by default. GPUS: of each process of `attention`; by default 1 on this machine if it has a card, and
# 0 on another cluster.
set -euo pipefail
stage=${1:?entities or attention}
base=${2:?a packed set, SET/SPLIT}
workers=${WORKERS:-2}
# Local sets need their full path: a job starts in another folder.
[[ $base == *://* ]] || base=$(realpath -e "$base")

case $stage in
  entities)
    job=(mmclip entities "$base" --workers "$workers")
    ;;
  attention)
    job=(mmclip attention "$base" --checkpoint "$(realpath -e "${3:?a checkpoint, or the folder of a run}")" --workers "$workers")
    if [[ -z ${GPUS:-} && -z ${RAY_ADDRESS:-} ]] && nvidia-smi --list-gpus 2>/dev/null | grep -q GPU; then GPUS=1; fi
    job+=(--gpus "${GPUS:-0}")
    [[ $base == *://* || ! -d $base/entities ]] || job+=(--entities "$base/entities")
    ;;
  *)
    echo "the stage is entities or attention, not $stage" >&2
    exit 2
    ;;
esac

if [[ -z ${RAY_ADDRESS:-} ]]; then
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(python3 -c 'import secrets; print(secrets.token_hex(32))')}
  # Run the head as a child and end it by its process id: `ray stop` would end every Ray cluster of this user.
  ray start --head --block --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --disable-usage-stats --num-cpus="$workers" \
    >/dev/null &
  head=$!
  trap 'kill "$head"; wait "$head" || true' EXIT
  export RAY_ADDRESS=http://127.0.0.1:8265
  until ray job list >/dev/null 2>&1; do
    kill -0 "$head" || { echo "the Ray cluster did not start; is one running already? Then set RAY_ADDRESS" >&2; exit 1; }
    sleep 1
  done
fi
ray job submit -- "${job[@]}"
