#!/usr/bin/env bash
# Training on GPUs of a Slurm cluster: one process a GPU, requeued until it is done.
#
#   launch/slurm.sh --name=mine --nodes=2 --gpus_per_node=8 --time=24:00:00 \
#     --environment=/shared/embgemma/.venv -- --gin_file=gin/recipes/mine.gin \
#     --gin.MODEL_DIR=/shared/runs/mine
#
# --name=NAME          of the job
# --nodes=N            default: 1
# --gpus_per_node=N    default: 8
# --cpus_per_gpu=N     default: 8
# --time=LIMIT         after which it is requeued, and goes on
# --partition=NAME, --account=NAME, --constraint=TEXT
#                      as of sbatch
# --environment=DIR    virtual environment that all nodes see
# --logs=DIR           default: logs
# --dry_run            print the batch script
#
# Two minutes before the limit, and when the job is preempted, training saves and ends;
# the job is requeued then, and resumes.

# shellcheck disable=SC2153 # `flags` assigns them
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

flags NAME= NODES=1 GPUS_PER_NODE=8 CPUS_PER_GPU=8 TIME= PARTITION= ACCOUNT= CONSTRAINT= \
  ENVIRONMENT= LOGS=logs
parse "$@"
need NAME TIME ENVIRONMENT
number NODES GPUS_PER_NODE CPUS_PER_GPU
need_arguments

optional() {
  local name
  for name; do
    [[ -z ${!name} ]] || printf '#SBATCH --%s=%s\n' "${name,,}" "${!name}"
  done
}

script() {
  cat <<BATCH
#!/usr/bin/env bash
#SBATCH --job-name=$NAME
#SBATCH --nodes=$NODES
#SBATCH --ntasks-per-node=$GPUS_PER_NODE
#SBATCH --gpus-per-node=$GPUS_PER_NODE
#SBATCH --cpus-per-task=$CPUS_PER_GPU
#SBATCH --time=$TIME
#SBATCH --output=$LOGS/$NAME-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
$(optional PARTITION ACCOUNT CONSTRAINT)
# JAX gives each process the GPU of its number on the node: all of them must be seen.
srun --kill-on-bad-exit=1 $(quoted "$ENVIRONMENT/bin/embgemma" train --multiprocess "${ARGUMENTS[@]}")
code=\$?
if ((code == 143)); then # it saved, and was told to end
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
BATCH
}

if [[ $DRY_RUN == true ]]; then
  script
else
  mkdir -p "$LOGS"
  script | sbatch
fi
