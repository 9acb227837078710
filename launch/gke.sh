#!/usr/bin/env bash
# Training on GPUs of a GKE cluster: a Job with one pod a node, which go on when they are
# evicted.
#
#   launch/gke.sh apply --name=mine --image=us-docker.pkg.dev/me/embgemma:1 --nodes=2 \
#     --gpus_per_node=8 --accelerator=nvidia-h100-80gb --bucket=my-bucket \
#     -- --gin_file=gin/recipes/mine.gin --gin.MODEL_DIR=/bucket/runs/mine
#
# apply        start it
# logs         follow the first pod's
# status       of its pods
# delete       stop it, after it has saved
#
# --name=NAME               of the job
# --image=IMAGE             made of launch/Dockerfile
# --nodes=N                 default: 1
# --gpus_per_node=N         default: 8
# --accelerator=NAME        such as nvidia-l4, nvidia-h100-80gb
# --bucket=BUCKET           at /bucket, through the Cloud Storage FUSE driver
# --service_account=NAME    of Kubernetes, that may write to the bucket
# --namespace=NAME          default: default
# --dry_run                 print what would be applied or done

# shellcheck disable=SC2153 # `flags` assigns them
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "$0")/common.sh"

flags NAME= IMAGE= NODES=1 GPUS_PER_NODE=8 ACCELERATOR= BUCKET= SERVICE_ACCOUNT=default \
  NAMESPACE=default
parse_command "$@"
PORT=9911
need NAME
[[ $NAME =~ ^[a-z]([a-z0-9-]{0,51}[a-z0-9])?$ ]] ||
  die "--name=$NAME: lower-case letters, digits and -, as Kubernetes wants it"

# A JSON string, which is YAML's, too.
text() {
  local escaped=${1//\\/\\\\}
  printf '"%s"' "${escaped//\"/\\\"}"
}

arguments() {
  local argument
  for argument; do
    printf '            - %s\n' "$(text "$argument")"
  done
}

manifest() {
  need IMAGE ACCELERATOR
  number NODES GPUS_PER_NODE
  need_arguments
  [[ ${ARGUMENTS[*]} != *$'\n'* ]] || die "an argument of several lines: put it into a gin file"
  cat <<YAML
apiVersion: v1
kind: Service
metadata:
  name: $NAME
spec:
  clusterIP: None
  publishNotReadyAddresses: true  # pods find each other before they are ready
  selector:
    job-name: $NAME
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $NAME
spec:
  completionMode: Indexed
  completions: $NODES
  parallelism: $NODES
  backoffLimit: $((20 * NODES))
  podFailurePolicy:
    rules:
      - action: Ignore  # evictions are not failures
        onPodConditions:
          - type: DisruptionTarget
  template:
    metadata:
      annotations:
        gke-gcsfuse/volumes: "$([[ -n $BUCKET ]] && echo true || echo false)"
    spec:
      subdomain: $NAME
      serviceAccountName: $SERVICE_ACCOUNT
      restartPolicy: Never
      terminationGracePeriodSeconds: 120
      nodeSelector:
        cloud.google.com/gke-accelerator: $ACCELERATOR
      containers:
        - name: train
          image: $(text "$IMAGE")
          args:
$(arguments train "${ARGUMENTS[@]}" "--coordinator_address=$NAME-0.$NAME:$PORT" "--process_count=$NODES" "--process_index=\$(JOB_COMPLETION_INDEX)")
          resources:
            limits:
              nvidia.com/gpu: $GPUS_PER_NODE
          volumeMounts:
            - {name: shm, mountPath: /dev/shm}
YAML
  if [[ -n $BUCKET ]]; then
    printf '            - {name: bucket, mountPath: /bucket}\n'
  fi
  cat <<YAML
      volumes:
        - name: shm
          emptyDir: {medium: Memory}
YAML
  if [[ -n $BUCKET ]]; then
    cat <<YAML
        - name: bucket
          csi:
            driver: gcsfuse.csi.storage.gke.io
            volumeAttributes:
              bucketName: $BUCKET
              mountOptions: implicit-dirs
YAML
  fi
}

case $COMMAND in
apply)
  yaml=$(manifest)
  if [[ $DRY_RUN == true ]]; then
    printf '%s\n' "$yaml"
  else
    kubectl apply --namespace="$NAMESPACE" --filename=- <<<"$yaml"
  fi
  ;;
logs)
  run kubectl logs --namespace="$NAMESPACE" --follow --tail=100 \
    --selector="job-name=$NAME,batch.kubernetes.io/job-completion-index=0"
  ;;
status) run kubectl get pods --namespace="$NAMESPACE" --selector="job-name=$NAME" --output=wide ;;
delete) run kubectl delete --namespace="$NAMESPACE" "job/$NAME" "service/$NAME" ;;
*) die "no command $COMMAND; see --help" ;;
esac
