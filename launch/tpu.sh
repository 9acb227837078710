#!/usr/bin/env bash
# Training on a Cloud TPU VM, or on all hosts of a slice, through queued resources.
#
#   launch/tpu.sh supervise --name=mine --zone=us-west4-a --accelerator_type=v5litepod-16 \
#     --bucket=my-bucket --spot=true -- --gin_file=gin/recipes/mine.gin \
#     --gin.MODEL_DIR=bucket/runs/mine
#
# create       ask for the slice
# wait         until it is there
# install      this checkout on all workers, and the bucket at ~/embgemma/bucket
# run          start `embgemma train --multiprocess` with what comes after --
# logs         follow the first worker's
# status       of the slice and of the run
# stop         the run, after it has saved
# delete       the slice
# supervise    all of it, and again after a preemption; ends with the run
#
# --name=NAME               of the slice
# --zone=ZONE               where
# --project=PROJECT         default: gcloud's
# --accelerator_type=TYPE   such as v5litepod-16, v5p-8, v6e-8
# --runtime_version=VERSION default: the one for the type
# --spot=true               may be preempted, and costs less
# --bucket=BUCKET           for checkpoints and data, through gcsfuse; slices of several
#                           hosts need it, as all of them write a checkpoint
# --source=DIR              checkout to install (default: this one)
# --interval=SECONDS        between two looks (default: 30)
# --dry_run                 print the commands

# shellcheck disable=SC2153 # `flags` assigns them
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

flags NAME= ZONE= PROJECT= ACCELERATOR_TYPE= RUNTIME_VERSION= SPOT=false BUCKET= INTERVAL=30 \
  SOURCE="$(cd "$(dirname "$0")/.." && pwd)"
parse_command "$@"
need NAME ZONE
number INTERVAL
[[ $SPOT == true || $SPOT == false ]] || die "--spot=$SPOT: true or false"

WHERE=(--zone="$ZONE")
if [[ -n $PROJECT ]]; then WHERE+=(--project="$PROJECT"); fi

runtime_version() {
  case $ACCELERATOR_TYPE in
  v5litepod-*) echo v2-alpha-tpuv5-lite ;;
  v5p-*) echo v2-alpha-tpuv5 ;;
  v6e-*) echo v2-alpha-tpuv6e ;;
  v[234]-*) echo tpu-ubuntu2204-base ;;
  *) die "--accelerator_type=$ACCELERATOR_TYPE: give its --runtime_version, too" ;;
  esac
}

create() {
  need ACCELERATOR_TYPE
  local version=$RUNTIME_VERSION extra=()
  [[ -n $version ]] || version=$(runtime_version)
  if [[ $SPOT == true ]]; then extra=(--spot); fi
  run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" "${WHERE[@]}" \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$version" "${extra[@]}"
}

# Empty where there is no such slice; an error of gcloud's own ends all.
state() {
  local found
  found=$(gcloud compute tpus queued-resources list "${WHERE[@]}" \
    --filter="name~/$NAME\$" --format='value(state.state)')
  printf '%s' "$found"
}

until_active() {
  if [[ $DRY_RUN == true ]]; then
    printf '# until it is ACTIVE:\n'
    run gcloud compute tpus queued-resources list "${WHERE[@]}" \
      --filter="name~/$NAME\$" --format='value(state.state)'
    return
  fi
  local now
  while now=$(state) && [[ $now != ACTIVE ]]; do
    [[ $now != FAILED && $now != SUSPENDED && -n $now ]] || die "$NAME is ${now:-not there}"
    sleep "$INTERVAL"
  done
}

# on WORKERS COMMAND: over ssh.
on() {
  run gcloud compute tpus tpu-vm ssh "$NAME" "${WHERE[@]}" --worker="$1" --command="$2"
}

install() {
  local archive
  archive=$(mktemp --suffix=.tar.gz)
  # shellcheck disable=SC2064 # the file of now
  trap "rm -f '$archive'" RETURN
  git -C "$SOURCE" archive --format=tar.gz --output="$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$NAME:embgemma.tar.gz" "${WHERE[@]}" --worker=all
  # The images' own Python is older than 3.11.
  local script='set -e
mkdir -p embgemma/run && tar -xzf embgemma.tar.gz -C embgemma && cd embgemma
sudo apt-get -q update && sudo apt-get -q install -y python3.11-venv
python3.11 -m venv .venv
.venv/bin/pip install -q -c constraints.txt -e ".[tpu,gcs]"'
  if [[ -n $BUCKET ]]; then
    script+="
mkdir -p bucket && { mountpoint -q bucket || gcsfuse --implicit-dirs $(quoted "$BUCKET") bucket; }"
  fi
  on all "$script"
}

start() {
  need_arguments
  local train
  train=$(quoted .venv/bin/embgemma train --multiprocess "${ARGUMENTS[@]}")
  # A session of its own outlives the connection; `exit` says how it ended.
  local session="echo \$\$ > run/pid; $train; echo \$? > run/ended; mv run/ended run/exit"
  on all "cd embgemma && rm -f run/exit run/pid && { setsid nohup bash -c $(quoted "$session") > run/log 2>&1 < /dev/null & }"
}

# Of all workers: a number each that has ended, `running` or `none`.
outcomes() {
  # shellcheck disable=SC2016 # there, not here
  on all 'cd embgemma 2> /dev/null && { cat run/exit 2> /dev/null || { kill -0 "$(cat run/pid 2> /dev/null)" 2> /dev/null && echo running; }; } || echo none'
}

supervise() {
  need_arguments
  if [[ $DRY_RUN == true ]]; then
    create
    until_active
    install
    start
    printf '# every %s s, until all workers say 0; after a preemption from the start:\n' "$INTERVAL"
    outcomes
    return
  fi
  local now said
  while :; do
    now=$(state)
    case $now in
    '') create ;;
    FAILED | SUSPENDED) delete ;;
    ACTIVE)
      # Unreachable workers are of a slice that is about to go.
      said=$(outcomes | sort -u) || said=unreachable
      case $said in
      0) return ;;
      none)
        install
        start
        ;;
      running | *running* | unreachable) ;;
      *) die "the run ended with: ${said//$'\n'/, }; see \`$0 logs\`" ;;
      esac
      ;;
    esac
    sleep "$INTERVAL"
  done
}

stop() {
  # shellcheck disable=SC2016 # there, not here
  on all 'kill -TERM -- "-$(cat embgemma/run/pid)"'
}

delete() {
  run gcloud compute tpus queued-resources delete "$NAME" "${WHERE[@]}" --force --quiet
}

case $COMMAND in
create | install | supervise | delete) "$COMMAND" ;;
wait) until_active ;;
run) start ;;
logs) on 0 'tail -n 100 -F embgemma/run/log' ;;
status)
  run gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}"
  outcomes
  ;;
stop) stop ;;
*) die "no command $COMMAND; see --help" ;;
esac
