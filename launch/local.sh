#!/usr/bin/env bash
# Several processes of `embgemma train` on this machine, as several hosts would run it.
#
#   launch/local.sh --processes=2 -- --gin_file=gin/recipes/quickstart.gin --gin.MODEL_DIR=runs/two
#
# --processes=N       processes
# --port=PORT         of the first (default: 9911)
# --dry_run           print the commands
#
# What comes after -- is `embgemma train`'s. Ends with the first process that fails, and
# stops the others; Ctrl-C stops all, after they have saved.

set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

flags PROCESSES= PORT=9911
parse "$@"
need PROCESSES
number PROCESSES PORT
need_arguments

children=()
stop() {
  trap - INT TERM
  ((${#children[@]})) && kill -TERM "${children[@]}" 2>/dev/null
  wait
}
trap 'stop; exit 143' INT TERM
for ((index = 0; index < PROCESSES; index++)); do
  command=("${EMBGEMMA:-embgemma}" train "${ARGUMENTS[@]}"
    --coordinator_address="localhost:$PORT" --process_count="$PROCESSES"
    --process_index="$index")
  if [[ $DRY_RUN == true ]]; then
    run "${command[@]}"
  else
    "${command[@]}" &
    children+=($!)
  fi
done
for _ in "${children[@]}"; do
  code=0
  wait -n || code=$?
  if ((code)); then
    stop
    exit "$code"
  fi
done
