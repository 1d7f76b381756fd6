#!/usr/bin/env bash
# A head and one more node on this machine, with token authentication; Ctrl-C ends both.
#   cluster/local/two-nodes.sh          PORT=6379 DASHBOARD_PORT=8265 CPUS=2 (per node)
# In another shell: export RAY_AUTH_MODE=token; persona-pruner submit MANIFEST --config C --output O
set -euo pipefail

PORT=${PORT:-6379} DASHBOARD_PORT=${DASHBOARD_PORT:-8265} CPUS=${CPUS:-2}
export RAY_AUTH_MODE=token
if [[ -z ${RAY_AUTH_TOKEN:-} && ! -s ~/.ray/auth_token ]]; then
  ray get-auth-token --generate >/dev/null
  chmod 600 ~/.ray/auth_token
fi

# Two nodes of one host that share a directory lose the job's working directory. Sockets in it need short names.
directory=$(mktemp -d /tmp/pp-XXXXXX)
nodes=()
leave() {
  trap - EXIT INT TERM
  if ((${#nodes[@]})); then
    kill "${nodes[@]}" 2>/dev/null || true
    wait "${nodes[@]}" 2>/dev/null || true
  fi
  rm -rf "$directory"
}
trap leave EXIT
trap 'exit 130' INT TERM

# A node takes jobs once its agent answers, some seconds after `ray status` does.
wait_for() {
  until curl --silent --fail --output /dev/null "http://127.0.0.1:$1"; do
    kill -0 "${nodes[-1]}" 2>/dev/null || { cat "$directory"/*.log >&2; exit 1; }
    sleep 0.5
  done
}

ray start --head --block --port="$PORT" --dashboard-port="$DASHBOARD_PORT" --node-ip-address=127.0.0.1 \
  --num-cpus="$CPUS" --temp-dir="$directory/head" --ray-client-server-port=$((PORT + 1)) \
  --dashboard-agent-listen-port=$((PORT + 2)) >"$directory/head.log" 2>&1 &
nodes+=($!)
wait_for "$((PORT + 2))/api/local_raylet_healthz"
wait_for "$DASHBOARD_PORT/api/gcs_healthz"
ray start --block --address="127.0.0.1:$PORT" --node-ip-address=127.0.0.1 --num-cpus="$CPUS" \
  --dashboard-agent-listen-port=$((PORT + 3)) --temp-dir="$directory/node" >"$directory/node.log" 2>&1 &
nodes+=($!)
wait_for "$((PORT + 3))/api/local_raylet_healthz"
echo "two nodes: 127.0.0.1:$PORT, jobs at http://127.0.0.1:$DASHBOARD_PORT"
wait -n || true
cat "$directory"/*.log >&2
exit 1
