#!/usr/bin/env bash
# Two Ray nodes with token authentication and a real S3 server (SeaweedFS), as processes of this machine; no Docker.
#   cluster/local/up.sh && source runs/local/env         STATE=runs/local PORT=6379 DASHBOARD_PORT=8265 CPUS=2 (per node)
#   persona-pruner doctor --address auto --output s3://personas/run
#   cluster/local/down.sh
# Where Prometheus is installed it scrapes both nodes, with the alert rules of cluster/monitoring.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PORT=${PORT:-6379} DASHBOARD_PORT=${DASHBOARD_PORT:-8265} CPUS=${CPUS:-2}
S3_PORT=${S3_PORT:-$((PORT + 20))} PROMETHEUS_PORT=${PROMETHEUS_PORT:-$((PORT + 30))}
state=$(realpath -m "${STATE:-runs/local}")
[[ ! -e $state/pids ]] || { echo "$state: a cluster is up already; cluster/local/down.sh ends it" >&2; exit 2; }
for program in ray weed curl setsid; do
  command -v "$program" >/dev/null || { echo "$program is not in PATH: source .venv/bin/activate" >&2; exit 2; }
done

umask 077
mkdir -p "$state/s3"
# Two nodes of one host that share a directory lose the job's working directory. Sockets in it need short names.
ray_directory=$(mktemp -d /tmp/pp-XXXXXX)
random() { od -An -N16 -tx1 /dev/urandom | tr -d ' \n'; }
cat >"$state/env" <<END
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$(random)
export RAY_ADDRESS=127.0.0.1:$PORT RAY_API_SERVER_ADDRESS=http://127.0.0.1:$DASHBOARD_PORT
export AWS_ENDPOINT_URL=http://127.0.0.1:$S3_PORT AWS_DEFAULT_REGION=us-east-1
export AWS_ACCESS_KEY_ID=local AWS_SECRET_ACCESS_KEY=$(random)
END
source "$state/env"
echo "$ray_directory" >"$state/ray_directory"
trap '"$here/down.sh" || true' ERR

# Each process leads a group of its own, so that down.sh ends it with all that it has started.
start() {
  local name=$1
  shift
  setsid "$@" >"$state/$name.log" 2>&1 </dev/null &
  echo "$name $!" >>"$state/pids"
}

wait_for() {
  for ((i = 0; i < 600; i++)); do
    ! curl --silent --fail --output /dev/null "$2" || return 0
    kill -0 "$(sed -n "s/^$1 //p" "$state/pids")" 2>/dev/null || break
    sleep 0.5
  done
  echo "$1 does not answer at $2:" >&2
  tail -n 20 "$state/$1.log" >&2
  return 1
}

cat >"$state/s3/s3.json" <<END
{"identities": [{"name": "local", "actions": ["Admin"],
  "credentials": [{"accessKey": "$AWS_ACCESS_KEY_ID", "secretKey": "$AWS_SECRET_ACCESS_KEY"}]}]}
END
start s3 weed server -dir="$state/s3" -ip=127.0.0.1 -ip.bind=127.0.0.1 -s3 -s3.config="$state/s3/s3.json" \
  -s3.port="$S3_PORT" -s3.port.grpc=$((S3_PORT + 1)) -s3.port.iceberg=0 -s3.port.lance=0 \
  -master.port=$((S3_PORT + 2)) -master.port.grpc=$((S3_PORT + 3)) -volume.port=$((S3_PORT + 4)) \
  -volume.port.grpc=$((S3_PORT + 5)) -filer.port=$((S3_PORT + 6)) -filer.port.grpc=$((S3_PORT + 7)) \
  -master.volumeSizeLimitMB=64 -volume.max=1000
start head env -u RAY_ADDRESS ray start --head --block --port="$PORT" --dashboard-port="$DASHBOARD_PORT" \
  --node-ip-address=127.0.0.1 --num-cpus="$CPUS" --temp-dir="$ray_directory/head" \
  --ray-client-server-port=$((PORT + 1)) --dashboard-agent-listen-port=$((PORT + 2)) --metrics-export-port=$((PORT + 3))
wait_for s3 "$AWS_ENDPOINT_URL/healthz"
# A node takes jobs once its agent answers, some seconds after `ray status` does.
wait_for head "http://127.0.0.1:$((PORT + 2))/api/local_raylet_healthz"
start node env -u RAY_ADDRESS ray start --block --address="127.0.0.1:$PORT" --node-ip-address=127.0.0.1 \
  --num-cpus="$CPUS" --temp-dir="$ray_directory/node" --dashboard-agent-listen-port=$((PORT + 4)) \
  --metrics-export-port=$((PORT + 5))
wait_for node "http://127.0.0.1:$((PORT + 4))/api/local_raylet_healthz"
wait_for head "http://127.0.0.1:$DASHBOARD_PORT/api/gcs_healthz"
python -c 'import boto3; boto3.client("s3").create_bucket(Bucket="personas")'

if command -v prometheus >/dev/null; then
  sed "s#/tmp/ray/#$ray_directory/head/#; s#\[alerts.yaml\]#[$here/../monitoring/alerts.yaml]#" \
    "$here/../monitoring/prometheus.yaml" >"$state/prometheus.yaml"
  start prometheus prometheus --config.file="$state/prometheus.yaml" --storage.tsdb.path="$state/prometheus" \
    --web.listen-address="127.0.0.1:$PROMETHEUS_PORT"
  wait_for prometheus "http://127.0.0.1:$PROMETHEUS_PORT/-/ready"
  echo "prometheus: http://127.0.0.1:$PROMETHEUS_PORT"
fi
echo "two nodes, jobs at $RAY_API_SERVER_ADDRESS; bucket s3://personas; next: source $state/env"
