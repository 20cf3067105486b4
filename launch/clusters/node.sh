#!/usr/bin/env bash
# Starts this node's processes of a launch over several nodes; no ssh between them is needed. On every node:
#
#     NODE_RANK=0 MASTER_ADDR=10.0.0.1 launch/clusters/node.sh launch/train.py --config ... data.path=...
#
# NODE_RANK    number of this node, 0 for the first
# MASTER_ADDR  address of node 0 that every node reaches
# MASTER_PORT  free port of node 0 (default 29500)
# HOSTFILE     nodes in rank order and their processes (default: the hostfile beside this script)
#
# SIGTERM or Ctrl-C on any one node saves a checkpoint and ends all nodes.
set -euo pipefail
: "${NODE_RANK:?is not set: the number of this node, 0 for the first}"
: "${MASTER_ADDR:?is not set: the address of node 0 that every node reaches}"
: "${1:?no program: launch/doctor.py or launch/train.py, then its arguments}"
here=$(dirname "$(readlink -f "$0")")

# A session of its own: Ctrl-C would reach every process at once, and again through the launcher, and a later
# second signal ends training without saving. The runner passes no signal on, so its launcher is told directly.
setsid deepspeed --hostfile "${HOSTFILE:-$here/hostfile}" --no_ssh --save_pid \
  --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$@" &
runner=$!
launcher="/tmp/$runner.deepspeed"
trap 'kill -TERM "$(cat "$launcher" 2>/dev/null || echo "$runner")"' TERM INT HUP
trap 'rm -f "$launcher"' EXIT

code=0
wait "$runner" || code=$?
while kill -0 "$runner" 2>/dev/null; do # a trapped signal ends `wait` early
  code=0
  wait "$runner" || code=$?
done
exit "$code"
