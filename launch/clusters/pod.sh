#!/usr/bin/env bash
# One pod of kubernetes.yaml, or any node whose scheduler restarts what fails: launch/elastic.py (a torchrun), and
# exit code 75 where a stop on request came before the end of the run.
#
# NODES        how many there are
# NODE_RANK    number of this one, 0 for the first
# PROCESSES    of this node, one a GPU
# MASTER_ADDR  address of node 0 that every node reaches
# MASTER_PORT  free port of node 0 (default 29500)
set -euo pipefail
: "${NODES:?is not set: the number of nodes}"
: "${NODE_RANK:?is not set: the number of this node, 0 for the first}"
: "${PROCESSES:?is not set: the processes of this node}"
: "${MASTER_ADDR:?is not set: the address of node 0 that every node reaches}"
: "${1:?no program: launch/doctor.py or launch/train.py, then its arguments}"

here=$(dirname "$(readlink -f "$0")")

python3 "$here/../elastic.py" --nnodes="$NODES" --nproc_per_node="$PROCESSES" --node_rank="$NODE_RANK" \
  --master_addr="$MASTER_ADDR" --master_port="${MASTER_PORT:-29500}" "$@" &
runner=$!
trap 'kill -TERM "$runner"' TERM INT # the first process of a container gets the signal alone

code=0
wait "$runner" || code=$?
while kill -0 "$runner" 2>/dev/null; do # a trapped signal ends `wait` early
  code=0
  wait "$runner" || code=$?
done
[ "$code" = 0 ] || exit "$code"
[ "${1##*/}" != doctor.py ] || exit 0 # which ends with its checks
# Nodes that were not evicted themselves end well when another one is, and what ends well is not started again.
exec python3 "$@" --finished
