#!/usr/bin/env bash
# The two offline stages as Ray jobs. On a cluster that runs already, set RAY_ADDRESS to its job server and the token
# variables that its owner gave you; without RAY_ADDRESS a cluster is started on this machine and stopped at the end.
#
#   ray_jobs.sh entities  SET/train
#   ray_jobs.sh attention SET/train CHECKPOINT
set -euo pipefail
stage=${1:?entities or attention}
base=${2:?a packed set, SET/SPLIT}
workers=${WORKERS:-2}
# Sets on this machine are named by their full path: a job starts in a folder of its own.
[[ $base == *://* ]] || base=$(realpath "$base")

if [[ -z ${RAY_ADDRESS:-} ]]; then
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(python3 -c 'import secrets; print(secrets.token_hex(32))')}
  ray start --head --node-ip-address=127.0.0.1 --dashboard-host=127.0.0.1 --disable-usage-stats --num-cpus="$workers"
  trap 'ray stop' EXIT
  export RAY_ADDRESS=http://127.0.0.1:8265
fi

case $stage in
  entities)
    ray job submit -- mmclip entities "$base" --workers "$workers"
    ;;
  attention)
    checkpoint=$(realpath "${3:?a checkpoint, or the folder of a run}")
    entities=()
    [[ $base == *://* || ! -d $base/entities ]] || entities=(--entities "$base/entities")
    ray job submit -- mmclip attention "$base" --checkpoint "$checkpoint" --workers "$workers" "${entities[@]}"
    ;;
  *)
    echo "the stage is entities or attention, not $stage" >&2
    exit 2
    ;;
esac
